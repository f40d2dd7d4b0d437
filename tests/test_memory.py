"What `MicroBatch` keeps in memory: one micro-batch, and the outputs of the whole batch only if somebody may read them, once"
import fastai,gc,json,inspect,itertools,re
import pytest
from fastai_accum.hosts import reads_pred
from fastai_accum.lockstep import UndoNotes
from fastai.vision.models.unet import DynamicUnet
from torch.profiler import ProfilerActivity,profile
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from common import *

class Memory(TorchDispatchMode):
    "Tensors that are alive, in bytes; more than `limit` are out of memory"
    def __init__(self, limit=math.inf): super().__init__(); self.limit,self.alive,self.peak = limit,{},0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        res = func(*args, **(kwargs or {}))
        stores = [t.untyped_storage() for t in tree_leaves(res) if isinstance(t, Tensor)]
        if not (new := {s._cdata:(StorageWeakRef(s),s.nbytes()) for s in stores if s._cdata not in self.alive or self.alive[s._cdata][0].expired()}): return res
        self.alive = {k:(r,n) for k,(r,n) in self.alive.items() if not r.expired()} | new
        if (used := sum(n for _,n in self.alive.values()))>self.limit:
            raise torch.OutOfMemoryError(f'CUDA out of memory. {used} bytes (made up)')
        self.peak = max(used, self.peak)
        return res

class Ready(list): "Batches that are there already"

V,S,H,N = 1500,16,16,32
def logits(): return nn.Sequential(nn.Embedding(V, H), nn.Linear(H, H), nn.ReLU(), nn.Linear(H, V))
OUTPUT = N*S*V*4 # bytes that the model returns for a batch

def lm(*cbs, bs=N, metrics=None, valid=False):
    "A learner whose outputs are larger than all else, as a language model's are"
    torch.manual_seed(0)
    x,y = torch.randint(V, (2,N,S))
    batches = Ready(zip(x.split(bs), y.split(bs)))
    l = Learner(DataLoaders(batches, batches if valid else Ready(), device='cpu'), logits(), loss_func=CrossEntropyLossFlat(), opt_func=SGD, default_cbs=False,
                metrics=metrics, cbs=[TrainEvalCallback(), *cbs])
    l.logger = noop
    return l

def used(l, f, limit=math.inf):
    "The most bytes at a time that operations have returned and somebody holds"
    gc.collect()
    with Memory(limit) as m: f(l)
    return m.peak

def peak(l, f=Self.fit(1, 0.1)):
    "The most bytes at a time that PyTorch's allocator has given out"
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof: f(l)
    with tempfile.TemporaryDirectory() as d:
        prof.export_chrome_trace(f'{d}/trace.json')
        events = [o for o in json.loads((Path(d)/'trace.json').read_text())['traceEvents'] if o.get('name')=='[memory]']
    return max(itertools.accumulate(o['args']['Bytes'] for o in sorted(events, key=lambda o: o['ts'])))

@pytest.fixture(scope='module')
def plain(): return peak(lm(bs=4))

NOBODY = {'nobody':(lambda: [], None), 'validation metrics':(lambda: [Recorder()], accuracy), 'schedule and clipping':(lambda: [Recorder(), ParamScheduler({'lr':SchedLin(1,2)}), GradientClip()], None),
          'within the passes':(lambda: [Callback(after_loss=lambda self: self.pred.sum())], None), 'an epoch':(lambda: [Callback(after_epoch=lambda self: self.loss)], None)}
@pytest.mark.parametrize('who', NOBODY)
def test_peak(plain, who):
    "Where nobody reads the outputs after the passes, the peak is that of a plain run with batches as small as the micro-batches"
    cbs,metrics = NOBODY[who]
    assert peak(lm(MicroBatch(4), *cbs(), metrics=metrics)) <= 1.1*plain

SOMEBODY = {'training metrics':(lambda: [Recorder(train_metrics=True)], accuracy, None), 'a callback':(lambda: [Callback(after_batch=lambda self: None)], None, None), 'preds=True':(lambda: [], None, True)}
@pytest.mark.parametrize('who', SOMEBODY)
def test_peak_with_outputs(plain, who):
    "Where somebody may read them, they are there once beside that"
    cbs,metrics,preds = SOMEBODY[who]
    assert 0.95*OUTPUT <= peak(lm(MicroBatch(4, preds=preds), *cbs(), metrics=metrics))-plain <= 1.05*OUTPUT

def test_peak_in_validation():
    "In validation in parts, too: one micro-batch without metrics, and the outputs once beside it with them"
    for cbs,metrics,outputs in ((list,None,0), (lambda: [Recorder()],accuracy,OUTPUT)):
        small,parts = (peak(lm(*mb, *cbs(), bs=bs, metrics=metrics, valid=True), Self.validate()) for mb,bs in (((),4), ((MicroBatch(4, valid=True),),N)))
        assert 0.95*outputs - 0.1*small <= parts-small <= 0.1*small + 1.05*outputs

def test_lockstep_lets_go():
    "With exact BatchNorm, outputs are computed first; each is free as soon as its loss is there"
    l = lm(MicroBatch(4, sync_bn=True))
    l.model = nn.Sequential(nn.Embedding(V, H), nn.Flatten(0, 1), nn.BatchNorm1d(H), nn.Linear(H, V), nn.Unflatten(0, (-1,S)))
    outs,alive = [],[]
    def look(self):
        outs.append(StorageWeakRef(self.pred.untyped_storage()))
        alive.append(sum(not r.expired() for r in outs))
    l.add_cb(Callback(after_loss=look))
    l.fit(1, 0.1)
    assert alive==[1]*8

# ---- who reads

def test_outputs_of_the_batch():
    "Whoever reads after the passes sees all samples, in one tensor that joining has not copied"
    seen = []
    for preds in (None,True):
        l = lm(MicroBatch(12, preds=preds), Callback(after_batch=lambda self: seen.append((self.pred, self.y))))
        l.fit(1, 0.)
        with torch.no_grad(): assert rel(l.model(l.dls.train[0][0]), seen[-1][0])<1e-5
        assert len(seen[-1][0])==len(seen[-1][1])==N and not seen[-1][0].requires_grad

def show(learn): return learn.pred
class Late(Callback):
    def after_epoch(self): show(self.learn) # which does not name it
class Named(Callback):
    def after_epoch(self): self.kept = getattr(self.learn, 'pred')
class Unknown(Callback):
    def after_step(self): show(self.learn)
class Mixin:
    def after_batch(self): show(self.learn)
class Mixed(Mixin, Callback): run_valid = False

@pytest.mark.parametrize('preds,cb', ((None,Late), (False,Late), (False,Unknown), (False,Mixed)))
def test_never_a_part_for_the_whole(preds, cb):
    "Outputs that were not kept can't be read: an error that says what to do, and doing it cures; nothing of it is left when the callback goes"
    l = lm(MicroBatch(4, preds=preds), cb())
    with pytest.raises(RuntimeError, match=r"(?s)`learn.pred` is read after the micro-batches.*`MicroBatch\(..., preds=True\)`.*`after_pred`"): l.fit(1, 0.1)
    l.remove_cb(MicroBatch)
    assert l.pred is None
    l.to_microbatch(4, preds=True).fit(1, 0.1)

@pytest.mark.parametrize('preds,cb', ((None,Named), (False,Named), (None,Unknown), (None,Mixed), (True,Late)))
def test_kept_for_those_who_may_read(preds, cb): lm(MicroBatch(4, preds=preds), cb()).fit(1, 0.1)

def test_readers_in_fastai():
    "Whatever in fastai reads `pred` outside of the passes is known to do so; those that never do are known, too"
    learn = SimpleNamespace(metrics=[], training=True)
    reads,quiet = set(),set()
    import fastai.callback.all,fastai.callback.data,fastai.vision.gan
    for mod in [m for n,m in sys.modules.items() if n.startswith('fastai.')]:
        for cls in vars(mod).values():
            if not (isinstance(cls, type) and issubclass(cls, Callback) and cls.__module__==mod.__name__): continue
            src = re.split(r'\n    (?=def |@)', inspect.getsource(cls))
            says = any(re.search(r"(self|learn)\.pred\b|'pred'", o) for o in src[1:] if not o.startswith(('def after_pred','def after_loss')))
            cb = cls.__new__(cls)
            assert reads_pred(cb, learn)==says or any(issubclass(cls, o) for o in cls.__mro__[1:] if o in reads), cls
            (reads if says else quiet).add(cls)
    assert {o.__name__ for o in reads} >= {'GatherPredsCallback','CollectDataCallback','GANTrainer'} and len(quiet)>25

def test_pred_beside_the_host():
    "`learn.pred` is an attribute as before: missing before the first batch, there to be set, copied and taken along"
    l = lm(MicroBatch(4))
    assert not hasattr(l, 'pred')
    l.pred = 3
    assert l.pred==3 and vars(l)['pred']==3 and not lm().__dict__.get('pred')
    l.fit(1, 0.1)
    assert l.pred is None
    l.fit(1, 0.1)

# ---- memory runs out while outputs are joined

class Rows(Module):
    "Two rows for each sample"
    def forward(self, x): return torch.stack([x,x], 1).flatten(0, 1)

class Whole(Callback):
    "Sees outputs of all samples, or nothing"
    def after_batch(self): self.n = len(self.pred) if isinstance(self.pred, Tensor) else type(self.pred)

def rows(m): return nn.Sequential(m, Rows())
def joins(bs, form, found=N):
    "A learner that has come down to `found` samples if it is 'auto'"
    l = lm(MicroBatch(bs, valid=True), Whole(), valid=True)
    l.micro_batch.sizes.update({(True,0):found, (False,0):found})
    if form is rows: l.model,l.loss_func = rows(l.model),lambda p,y: F.cross_entropy(p.flatten(0, 1), y.repeat_interleave(2, 0).flatten())
    return l

def test_joining_takes_a_smaller_size():
    "Outputs that do not fit beside a micro-batch are a reason for a smaller one"
    large,fits = (used(joins(bs, noop), Self.fit(1, 0.1)) for bs in (8,6))
    auto = joins('auto', noop, 8)
    used(auto, Self.fit(1, 0.1), limit=(large+fits)/2)
    assert auto.micro_batch.bs==6 and auto.whole.n==N

@pytest.mark.parametrize('train', (True,False), ids=('training','validation'))
@pytest.mark.parametrize('form', (noop,rows), ids=('by samples','by rows'))
def test_joining_lacks_memory(form, train):
    "Outputs that never fit are the error that this is, which says what they are kept for, in training and validation"
    l = joins('auto', form, 2)
    with pytest.raises(torch.OutOfMemoryError, match="(?s)made up.*with 1 of a batch's 32 samples. Take smaller.*. The outputs of all 32 are kept for Whole"):
        used(l, Self.fit(1, 0.1) if train else Self.validate(), limit=(3 if form is rows else 1)*OUTPUT) # rows fit once, but not while they are joined
    assert not hasattr(l.whole, 'n')

# ---- what a failed attempt leaves behind

class Narrow(Module):
    "Has memory for `k` samples"
    def __init__(self, k): self.k = k
    def forward(self, x):
        if len(x)>self.k: raise torch.OutOfMemoryError('CUDA out of memory (made up)')
        return x

def encoder(): return nn.Sequential(*[nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.GroupNorm(2, o), nn.ReLU()) for i,o in ((3,8),(8,16),(16,16))])
class Keeps(nn.Module):
    "Keeps an activation and counts its calls"
    def __init__(self): super().__init__(); self.conv,self.kept,self.calls,self.all = nn.Conv2d(3, 8, 3, 2, 1),None,0,[]
    def forward(self, x):
        self.kept,self.calls = self.conv(x),self.calls+1
        self.all.append(self.kept)
        return self.kept
class Notes(Callback):
    "A forward hook that writes to its callback, in several ways"
    order = 10
    def before_fit(self):
        self.outs,self.last,self.pair,self.n,self.by = [],None,(),0,{}
        self.handle = self.model[0].register_forward_hook(self.note)
    def note(self, m, args, out):
        self.outs.append(out)
        self.last,self.pair,self.n,self.by['out'] = out,(out,None),self.n+1,out
    def after_fit(self): self.handle.remove()

HOLDERS = {'nobody':lambda: nn.Sequential(encoder(), nn.Conv2d(16, 2, 1)), 'DynamicUnet':lambda: DynamicUnet(encoder(), 2, (16,16), norm_type=None),
           'a module':Keeps, 'a callback':encoder}
@pytest.mark.parametrize('who', HOLDERS)
def test_hooks_let_go(who, monkeypatch):
    "No activation of a failed attempt is alive when the next one begins, and nothing that was noted of it stays"
    from fastai_accum import microbatch
    made,alive,inputs = [],[],{*()}
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            res = func(*args, **(kwargs or {}))
            made.extend(StorageWeakRef(t.untyped_storage()) for t in tree_leaves(res) if isinstance(t, Tensor) and t.ndim==4 and len(t)>4 and t.data_ptr() not in inputs)
            return res
    class Undo(microbatch.Undo):
        def __call__(self):
            super().__call__()
            alive.append((len(made), sum(not r.expired() for r in made)))
            made.clear()
    monkeypatch.setattr(microbatch, 'Undo', Undo)
    seed()
    body = HOLDERS[who]()
    net = nn.Sequential(body, Narrow(4))
    x = torch.randn(16, 3, 16, 16)
    y = torch.randint(2, (16,*body(x[:2]).shape[2:]))
    if who=='a module': body.calls,body.kept = 0,None; body.all.clear()
    l = Learner(DataLoaders(Ready([(x,y)]*2), Ready(), device='cpu'), net, loss_func=CrossEntropyLossFlat(axis=1), opt_func=SGD, default_cbs=False,
                cbs=[TrainEvalCallback(), MicroBatch('auto')] + ([Notes()] if who=='a callback' else []))
    inputs.update(x[i].data_ptr() for i in range(16))
    with Watch(): l.fit(1, 1e-3)
    assert l.micro_batch.bs==4 and len(alive)==3 and all(n>0 and k==0 for n,k in alive)
    if who=='a module': assert body.calls==len(body.all)==8
    if who=='a callback': assert l.notes.n==len(l.notes.outs)==8

def test_auto_comes_down_no_further_than_it_must():
    "A hook that holds the graph of a failed attempt takes no memory from the next one"
    net = lambda k: nn.Sequential(encoder(), nn.Conv2d(16, 16, 1), Narrow(k), nn.Conv2d(16, 2, 1))
    x,y = torch.randn(8, 3, 32, 32),torch.randint(2, (8,4,4))
    def learn(bs, net):
        net.hook = hook_output(net[1], detach=False)
        l = Learner(DataLoaders(Ready([(x,y)]), Ready(), device='cpu'), net, loss_func=CrossEntropyLossFlat(axis=1), opt_func=SGD, default_cbs=False, cbs=[TrainEvalCallback(), MicroBatch(bs)])
        return l
    whole,fits = used(learn(8, net(8)), lambda l: l.model(x)),used(learn(4, net(8)), Self.fit(1, 1e-3))
    auto = learn('auto', net(4))
    used(auto, Self.fit(1, 1e-3), limit=1.05*max(whole, fits))
    assert auto.micro_batch.bs==4

def test_undo_keeps_no_graph_alive():
    "What has a graph is not held for the sake of putting it back; what has none is put back"
    m = nn.Linear(2, 2)
    m.seen,m.avg,m.n = [],torch.zeros(2),0
    def hook(mod, args, out): m.seen.append(out); m.last,m.avg,m.n = out,m.avg*0.5+out.detach().mean(0),m.n+1
    m.register_forward_hook(hook)
    m(torch.ones(1, 2))
    undo,avg,ref = UndoNotes(m),m.avg,StorageWeakRef(m.last.untyped_storage())
    m.seen.clear()
    m(torch.ones(1, 2))
    assert ref.expired()
    undo()
    assert m.avg is avg and m.n==1 and m.last is None and m.seen==[None]

def test_parameters_stay_parameters():
    "A callback's list of parameters is not detached when memory runs out; what hangs on the failed graph is"
    l = lm(MicroBatch('auto'))
    l.model.append(Narrow(16))
    class Holds(Callback):
        def before_fit(self): self.ps,self.p = list(self.model.parameters()),self.model[1].weight
        def after_loss(self): self.loss_of = self.learn.loss_grad
    l.add_cb(Holds())
    l.fit(1, 0.1)
    assert all(p is q for p,q in zip(l.holds.ps, l.model.parameters())) and l.holds.p is l.model[1].weight
