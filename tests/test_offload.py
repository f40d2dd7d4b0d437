"What autograd saves is kept in the host's memory, on a CPU that is taken for an accelerator: `MicroBatch(offload='cpu')`"
import types,weakref
import pytest
import test_oom as oom
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from fastai_accum import batchnorm,microbatch,offload
from fastai_accum.offload import Offload
from test_companions import Mixed,images
from test_oom import little_garbage
from common import *

N,BS = 21,8 # batches of 8, 8 and 5
f32,f64 = torch.float32,torch.float64
def fit(l): l.fit_one_cycle(2, 0.1)

class Elsewhere:
    "A tensor as it would be on an accelerator"
    device,is_cuda = types.SimpleNamespace(type='cuda'),True
    def __init__(self, t): self.t = t
    @property
    def __class__(self): return type(self.t)
    def __getattr__(self, k): return getattr(self.t, k)
class Host(Offload):
    "Offload what would be offloaded if the CPU were an accelerator, and log what is saved and what is copied"
    alive,logs = weakref.WeakSet(),[]
    def __init__(self): super().__init__(); self.log = [],[]; self.alive.add(self); self.logs.append(self.log)
    def stays(self, t): return super().stays(Elsewhere(t))
    @staticmethod
    def helps(device): return True
    def pack(self, t):
        n,res = len(self.seen),super().pack(t)
        for o in self.log[:1+(len(self.seen)>n)]: o.append(t.detach()) # held, so that no other has its address
        return res
@pytest.fixture
def hosts(monkeypatch):
    for m in (batchnorm,microbatch): monkeypatch.setattr(m, 'Offload', Host)
    Host.logs.clear()
    return Host

class Net(nn.Module):
    "With BatchNorm, dropout, a tensor that two operations save, and a view of a parameter"
    def __init__(self): super().__init__(); self.c,self.n,self.l = nn.Conv2d(3, 4, 3),nn.BatchNorm2d(4),nn.Linear(4, 3)
    def forward(self, x):
        x = F.dropout(self.n(self.c(x)), 0.2, self.training).sigmoid()
        x = x*x.tanh()
        return F.linear(x.mean((2,3)), self.l.weight.view(3, 4), self.l.bias)
class Recomputed(Net):
    def forward(self, x): return checkpoint(super().forward, x, use_reentrant=False)

class Kept(Callback):
    "How many micro-batches have something on the host when one has been differentiated"
    def __init__(self): self.n = set()
    def after_backward(self): self.n.add(len(Host.alive))

def one(acc, dtype=f64, cbs=(), model=Net, **kwargs): return learner(N, BS, acc, dtype=dtype, data=images(N), model=model, cbs=[*cbs, Kept()], **kwargs)

# arguments, callbacks and the like; micro-batches in two epochs
MODES = {'plain': (dict(), dict(), 16), 'stats': (dict(sync_bn='stats'), dict(), 16), 'whole': (dict(bs=99), dict(), 6),
         'sync_loss': (dict(sync_loss=True), dict(), 16+6), 'sync_loss, stats': (dict(sync_loss=True, sync_bn='stats'), dict(), 16+6),
         'auto': (dict(bs='auto'), dict(), 6), 'bf16': (dict(), dict(cbs=lambda: [Mixed('bf16')], dtype=f32), 16),
         'checkpoint': (dict(), dict(model=Recomputed), 16)}
@pytest.mark.parametrize('mode', MODES)
def test_plain(mode, hosts):
    "The same run to the bit; each tensor is copied once for all who need it, parameters not at all, and no micro-batch's stays for long"
    args,kw,n = MODES[mode]
    def go(offload):
        return run(one(MicroBatch(**{'bs':3, **args}, offload=offload), **{k:v() if k=='cbs' else v for k,v in kw.items()}), fit)
    off = go(None)
    assert not hosts.logs
    on = go('cpu')
    for s,t in zip(off.trace.steps, on.trace.steps): assert torch.equal(s['weights'], t['weights'])
    for a,b in zip(off.model.buffers(), on.model.buffers()): assert torch.equal(a, b)
    assert len(hosts.logs)==n and not len(hosts.alive) and on.kept.n=={1}
    ptrs = {p.untyped_storage().data_ptr() for p in on.model.parameters()}
    for packed,copied in hosts.logs:
        at = [(t.data_ptr(), t._version, t.shape, t.dtype) for t in copied]
        assert len(at)==len(set(at)) and not ptrs & {t.untyped_storage().data_ptr() for t in copied}
    assert sum(len(copied)>1 for _,copied in hosts.logs)==n and (mode=='checkpoint' or any(len(copied)<len(packed) for packed,copied in hosts.logs))

def test_large_batch(hosts):
    "It is the run of the large batch"
    def mk(acc): return learner(N, BS, acc, data=images(N), model=lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)))
    large,small = (run(mk(acc), fit) for acc in (None,MicroBatch(1, offload='cpu')))
    assert len(hosts.logs)==2*N
    assert_same_run(large, small, 1e-12)

@pytest.mark.parametrize('kw', (dict(), dict(offload=None), dict(offload='auto'), dict(sync_bn='stats'), dict(sync_loss=True)))
def test_not_by_default(kw, hosts):
    run(one(MicroBatch(3, **kw)), fit)
    assert not hosts.logs

def test_not_in_validation(hosts):
    l = run(one(MicroBatch(3, valid=True, offload='cpu')), fit)
    n = len(hosts.logs)
    l.validate()
    assert len(hosts.logs)==n==16

def test_does_not_fit(monkeypatch, hosts):
    "Of the host's memory a micro-batch has to fit, not the batch"
    def of(bs):
        hosts.logs.clear()
        run(one(MicroBatch(bs, offload='cpu')), lambda l: l.fit(1))
        return max(sum(1<<(t.nbytes-1).bit_length() for t in copied) for _,copied in hosts.logs)
    large,small = of(8),of(2)
    monkeypatch.setattr(offload, 'host_memory', lambda: small)
    assert of(2)==small<large
    with pytest.raises(RuntimeError, match="`offload`='cpu'.*fewer samples, or `offload`=None"): of(8)

def test_cpu():
    "Where the host's memory is all there is, nothing is copied"
    off,on = (run(one(MicroBatch(3, offload=o)), fit) for o in (None,'cpu'))
    assert_same_run(off, on, 0.)
    x = torch.ones(3, requires_grad=True)
    with Offload()(): y = x.exp()
    assert y.grad_fn._saved_result.data_ptr()==y.data_ptr()

# ---- copies in a stream of their own: here each is made as late as possible, and finds nothing where nobody has held the memory until then

class Event:
    def __init__(self, stream): self.stream,self.n = stream,stream.n_begun
class Stream:
    "Copies that wait until somebody waits for them"
    def __init__(self, device=None): self.todo,self.n_begun,self.n_done = [],0,0
    def wait_stream(self, o): pass # what is computed is there at once
    def record_event(self): return Event(self)
    def begin(self, f): self.todo.append(f); self.n_begun += 1
    def until(self, n):
        while self.n_done<n: self.todo.pop(0)(); self.n_done += 1
class Now(Stream):
    "The stream that computes"
    def wait_event(self, e): e.stream.until(e.n)
    def wait_stream(self, o): o.until(o.n_begun)
class Late(torch.overrides.TorchFunctionMode):
    "`copy_` in stream `o`"
    def __init__(self, o): super().__init__(); self.o = o
    def __torch_function__(self, f, types, args=(), kwargs=None):
        if f is not torch.Tensor.copy_: return f(*args, **(kwargs or {}))
        host,v,at = args[0].detach(),args[1].detach().clone(),StorageWeakRef(args[1].untyped_storage())
        self.o.begin(lambda: host.fill_(math.nan if v.is_floating_point() else 0) if at.expired() else host.copy_(v)) # others may have the memory
        return args[0]
LIB = types.SimpleNamespace(Stream=Stream, stream=Late, current_stream=lambda device, now=Now(): now)

class Streams(Host):
    "Offload by streams, and note how many copies were under way at once"
    most = 0
    def copies(self, device):
        if device not in self.streams: self.streams[device] = offload.Copies(device, lib=LIB)
        return self.streams[device]
    def pack(self, t):
        res = Offload.pack(self, t)
        for o in self.streams.values(): Streams.most = max(Streams.most, len(o.under_way))
        return res

@pytest.mark.parametrize('kw', (dict(), dict(sync_bn=True), dict(sync_loss=True), dict(bs='auto')), ids=str)
def test_streams(kw, monkeypatch):
    "The same run to the bit, with at most two copies under way"
    for m in (batchnorm,microbatch): monkeypatch.setattr(m, 'Offload', Streams)
    Streams.most = 0
    off,on = (run(one(MicroBatch(**{'bs':3, **kw}, offload=o)), fit) for o in (None,'cpu'))
    assert Streams.most==2
    for s,t in zip(off.trace.steps, on.trace.steps): assert torch.equal(s['weights'], t['weights'])

# ---- `'auto'` where one sample is too much

class Tight(oom.Memory):
    "Not enough for two samples at once, and for one only if its activations are on the host"
    def lacks(self, i, n): return n>self.k or not Host.alive and self.k<oom.MAX
def tight(mb, where='forward', k=1, valid=0, norm=oom.Running):
    "A learner that has memory for `valid` samples in validation"
    mem = Tight(k)
    room = Callback(before_train=lambda self: setattr(mem, 'k', k), before_validate=lambda self: setattr(mem, 'k', valid))
    return oom.make(mb, mem, where, norm=norm, sizes=[5,3,5], cbs=[room])
def fit_once(l): l.fit(1, 0.05)

@pytest.mark.parametrize('where', ('forward','loss','backward','after_backward'))
@pytest.mark.parametrize('kw', (dict(), dict(sync_bn='stats'), dict(sync_loss=True)), ids=str)
def test_one_sample_is_too_much(where, kw, hosts, capsys):
    "It is the run of somebody who had foreseen it, bit for bit"
    if 'sync_loss' in kw and where!='backward': return # the loss is of all samples
    auto = run(tight(MicroBatch('auto', valid=False, **kw), where, valid=oom.MAX), fit_once)
    assert capsys.readouterr().out.splitlines()[-1]=="MicroBatch: one sample does not fit in memory in training, going on with `offload`='cpu'"
    assert auto.micro_batch.bs==1 and auto.micro_batch.sizes.away
    fixed = run(oom.make(MicroBatch(1, offload='cpu', **kw), None, where, norm=oom.Running, sizes=[5,3,5]), fit_once)
    oom.same(fixed, auto)
    oom.clean(auto)

@pytest.mark.parametrize('kw,k,tried', ((dict(offload=None),1,False), (dict(offload='cpu'),0,False), (dict(sync_bn=True),0,False), (dict(),0,True)), ids=str)
def test_nothing_left_to_try(kw, k, tried, hosts):
    "The error that it was, with advice; offloading is tried once, and not against an express `offload`"
    l = tight(MicroBatch('auto', valid=False, **kw), k=k, norm=oom.bn if 'sync_bn' in kw else oom.Running)
    with pytest.raises(torch.OutOfMemoryError, match="with 1 of a batch's 5 samples. Take smaller inputs"): run(l, fit_once)
    assert not l.exact.seen and bool(l.micro_batch.sizes.away)==tried
    if 'sync_bn' not in kw: assert l.model[1][3].mem.asked==[5,2,1,1,1][:5 if tried else 4]
    oom.clean(l)

@pytest.mark.parametrize('kw,named', ((dict(),True), (dict(offload=None),False), (dict(offload='cpu'),False)), ids=str)
def test_advice_for_a_number(kw, named, hosts):
    "With a number, memory of the host is named as a cure, unless there is a word about it already"
    with pytest.raises(torch.OutOfMemoryError, match="with 1 of a batch's 5 samples. Take smaller inputs") as e: run(tight(MicroBatch(1, valid=False, **kw), k=0), fit_once)
    assert ("`offload`='cpu'" in str(e.value))==named

def test_one_sample_elsewhere(hosts, monkeypatch, capsys):
    "In validation there is nothing to offload; nor on a CPU"
    l = tight(MicroBatch('auto'), k=1)
    with pytest.raises(torch.OutOfMemoryError, match="with 1 of a batch's 16 samples"): run(l, fit_once)
    assert 'in validation, going on with 1\n' in capsys.readouterr().out and len(l.exact.seen)==3
    l = oom.make(MicroBatch('auto'), oom.Memory(0))
    with pytest.raises(torch.OutOfMemoryError, match="with 1 of a batch's 16 samples"): l.validate()
    monkeypatch.undo()
    l = tight(MicroBatch('auto', valid=False))
    with pytest.raises(torch.OutOfMemoryError, match="with 1 of a batch's 5 samples"): run(l, fit_once)

def test_larger_samples_only(hosts):
    "Shorter texts stay whole, and on the device"
    class Long(oom.Memory):
        def lacks(self, i, n): return n>64 and not Host.alive
    away = []
    seen = Callback(after_batch=lambda self: away.append((len(hosts.logs), self.micro_batch.bs)))
    oom.texts([(4,8),(4,128),(4,8),(4,128)], MicroBatch('auto'), Long(), 'tensor', seen)
    assert away==[(0,4), (4,1), (4,4), (8,1)]
