"""Whole fits on device 'meta', where a tensor has no values: to the package it is an accelerator, and whoever reads a value there (`.item()`, `bool`,
`.cpu()`, a mask as an index) gets an error. On a GPU the host would wait for the device at that place. A copy from the host's memory waits there too, but
is no error on 'meta', so `NoCopies` looks for those that our modules make.

What is left out, as it reads values: fastai's `AvgMetric` and other metrics; the copy to the host that fastai's `Recorder` makes of each loss (`Recorder_`
here leaves the loss where it is); the look of PyTorch's `GradScaler` at overflows, once a step (`Scaler` here makes each step); `MicroBatch(sync_bn=True,
offload='cpu')`, whose purpose is to copy; a model that returns something that is not by samples, and that changes buffers within exact BatchNorm, where
one look a batch is made; validation, which has no step; `MicroBatch(sync_loss=True)`, which compares outputs in the first batch of a fit. `WarnMixed.look`
reads one value at the end of an epoch, and is counted. Autocast is for named devices, and 'meta' is none of them. That waiting is not needed is shown
here, and that nothing waits is shown on a GPU, in `tests/test_cuda.py`."""
import sys
import fastai_accum,pytest
from contextlib import nullcontext
from fastai.callback.fp16 import MixedPrecision
from torch.overrides import TorchFunctionMode
from common import *
from fastai_accum import loop
from fastai_accum.loop import Accumulator
from fastai_accum.window import WarnMixed,Window

ours = str(Path(fastai_accum.__file__).parent)

# ---- what finds a wait

class NoCopies(TorchFunctionMode):
    "An error for a copy from the host's memory to 'meta', made by a module of ours"
    def __torch_function__(self, func, types, args=(), kwargs=None):
        res,kwargs = func(*args, **(kwargs or {})),kwargs or {}
        name = getattr(func, '__name__', '')
        src = args[name in ('new_tensor','copy_') :][:1] if name in ('tensor','as_tensor','new_tensor','copy_','to') else ()
        if src and isinstance(res, Tensor) and res.is_meta and not getattr(src[0], 'is_meta', False) and not kwargs.get('non_blocking'):
            if self._caller().startswith(ours): raise RuntimeError(f'{name} copies from the host to the device')
        return res

    @staticmethod
    def _caller():
        f,others = sys._getframe(2),(str(Path(torch.__file__).parent),sys.modules['fastai.torch_core'].__file__)
        while f and f.f_code.co_filename.startswith(others): f = f.f_back
        return f.f_code.co_filename if f else ''

@pytest.fixture(autouse=True)
def looks(monkeypatch):
    "What `WarnMixed` would read at the end of an epoch"
    seen = []
    def look(self, loss_func):
        if self.later is not None: seen.append(self.later)
        self.later = None
    monkeypatch.setattr(WarnMixed, 'look', look)
    return seen

@pytest.mark.parametrize('read', (Tensor.item, bool, float, Tensor.cpu, Tensor.tolist, Tensor.nonzero, Tensor.unique,
    lambda t: torch.ones(3, device='meta')[t>0], lambda t: torch.equal(t, t)))
def test_reads_are_errors(read):
    with pytest.raises((RuntimeError,NotImplementedError)): read(torch.ones(3 if read not in (Tensor.item,bool,float) else (), device='meta'))

@pytest.mark.parametrize('copy', (lambda t: torch.tensor(1., device='meta'), lambda t: torch.as_tensor([1.], device='meta'), lambda t: t.new_tensor(1.),
    lambda t: t.copy_(torch.ones(3)), lambda t: torch.ones(3).to(t),
                                  lambda t: torch.ones(3).to('meta')))
def test_copies_are_errors(copy, monkeypatch):
    monkeypatch.setattr(NoCopies, '_caller', staticmethod(lambda: ours))
    t = torch.ones(3, device='meta')
    with NoCopies(), pytest.raises(RuntimeError, match='copies from the host'): copy(t)
    with NoCopies(): t.new_full((), 1.), t.to(torch.float64), torch.as_tensor(t), t.copy_(t), t+1.

# ---- fits

class Batches(list): "A loader for `Learner`"
class Loaders(DataLoaders):
    device = torch.device('meta')

class Recorder_(Recorder):
    "With losses that stay on the device"
    name = 'recorder'
    class Smooth(AvgSmoothLoss):
        def reset(self): self.count,self.val = 0,torch.zeros((), device='meta')
        def accumulate(self, learn):
            self.count += 1
            self.val = torch.lerp(learn.loss.mean().detach(), self.val, self.beta)
    def __init__(self):
        super().__init__()
        self.smooth_loss = self.Smooth()

class Scaler(torch.amp.GradScaler):
    "That makes its step without a look at overflows"
    def _maybe_opt_step(self, opt, state, *args, **kwargs): return opt.step(*args, **kwargs)
    def get_scale(self): return self._scale

class Scaled(MixedPrecision):
    "Without autocast"
    name = 'mixed_precision'
    def before_fit(self): self.autocast,self.learn.scaler,self.scales = torch.autocast('cpu', enabled=False),Scaler('cpu', init_scale=1024.),L()

def bn_net(): return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3))
def one_hot(y): return F.one_hot(y, 3).float()

def meta_fit(hosts, loss, targets=noop, bs=4, cbs=(), model=None, fit=lambda l: l.fit(2, 1e-3), n=11):
    "A learner after two epochs of 11 samples, of which the last batch and the last window are short"
    x,y = problem(n)
    x,y = x.float(),targets(y)
    dls = Loaders(Batches(zip(x.to('meta').split(bs), y.to('meta').split(bs))), Batches(), device=None)
    model = model or (bn_net if any(cb.sync_bn for cb in hosts) else net)
    learn = Learner(dls, model().to('meta'), loss_func=loss, opt_func=partial(SGD, mom=0.9), default_cbs=False, cbs=[TrainEvalCallback(), *hosts, *cbs])
    learn.logger = noop
    with NoCopies(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        fit(learn)
    return learn

class Own(nn.Module):
    "With what it divides by"
    reduction = 'mean'
    def forward(self, p, t): return F.cross_entropy(p, t, ignore_index=1)
    def denominator(self, p, t): return (t!=1).sum()
class Centers(nn.Module):
    "With parameters"
    def __init__(self): super().__init__(); self.c = nn.Parameter(torch.zeros(3, 3, device='meta'))
    def forward(self, p, t): return F.cross_entropy(p, t) + (p-self.c[t]).pow(2).mean()
def masked(p, t): return (F.cross_entropy(p, t, reduction='none')*(m := (t!=1).to(p.dtype))).sum()/m.sum().clamp(min=1)
def filled(p, t): return F.cross_entropy(p, t, reduction='none').masked_fill(t==1, 0).sum()/(t!=1).sum()
def counted(learn): return (learn.y!=1).sum()+1
WEIGHTS = torch.ones(3, device='meta')
# loss, targets, `normalize`
LOSSES = {'cross-entropy':(nn.CrossEntropyLoss(), noop, 'auto'), 'mean squares':(nn.MSELoss(), one_hot, 'auto'),
    'samples':(nn.CrossEntropyLoss(), noop, 'samples'), 'none':(nn.CrossEntropyLoss(), noop, 'none'),
    'function normalize':(nn.CrossEntropyLoss(), noop, counted), 'sum':(nn.CrossEntropyLoss(reduction='sum'), noop, 'auto'),
    'ignore_index':(nn.CrossEntropyLoss(ignore_index=1), noop, 'auto'),
    'class weights':(nn.CrossEntropyLoss(WEIGHTS), noop, 'auto'), 'fastai':(CrossEntropyLossFlat(ignore_index=1), noop, 'auto'),
    'label smoothing':(nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=1), noop, 'auto'),
    "label smoothing of fastai's":(LabelSmoothingCrossEntropyFlat(), noop, 'auto'), 'focal':(FocalLossFlat(), noop, 'auto'),
    'BCE':(nn.BCEWithLogitsLoss(), one_hot, 'auto'), 'BCE, weights':(nn.BCEWithLogitsLoss(pos_weight=WEIGHTS), one_hot, 'auto'),
    "BCE of fastai's":(BCEWithLogitsLossFlat(), one_hot, 'auto'), 'denominator':(Own(), noop, 'auto'), 'parameters':(Centers(), noop, 'auto'),
    'function':(lambda p,t: F.cross_entropy(p, t), noop, 'auto'), 'function, ignore_index':(lambda p,t: F.cross_entropy(p, t, ignore_index=1), noop, 'auto'),
    'function, class weights':(lambda p,t: F.cross_entropy(p, t, WEIGHTS), noop, 'auto'),
    'function, sum':(lambda p,t: F.mse_loss(p, t, reduction='sum'), one_hot, 'auto'),
    'function, sum over samples':(lambda p,t: F.mse_loss(p, t, reduction='sum')/len(p), one_hot, 'auto'),
    'function, mask':(masked, noop, 'auto'), 'function, filled':(filled, noop, 'auto'),
    'function, mean of a mean':(lambda p,t: (p-t).pow(2).mean(1).mean(), one_hot, 'auto'),
    'function, two means':(lambda p,t: F.cross_entropy(p, t, ignore_index=1)+0.1*p.pow(2).mean(), noop, 'auto'),
    'function, samples':(lambda p,t: sum(F.cross_entropy(a[None], b[None]) for a,b in zip(p, t))/len(p), noop, 'auto')}
# callbacks, samples in a batch of the loader; eight are split in parts of 2, 3 and 3, as all tensors of one shape seem to be one on 'meta', where no memory is
HOSTS = {'AccumulateStep':(lambda n: [AccumulateStep(2, normalize=n)], 4), 'drop':(lambda n: [AccumulateStep(2, normalize=n, leftover='drop')], 4),
    'carry':(lambda n: [AccumulateStep(2, normalize=n, leftover='carry')], 4),
    'n_samples, stats':(lambda n: [AccumulateStep(n_samples=8, normalize=n, sync_bn='stats')], 4), 'MicroBatch':(lambda n: [MicroBatch(3, normalize=n)], 8),
    "'auto'":(lambda n: [MicroBatch('auto', normalize=n)], 8),
    'stats':(lambda n: [MicroBatch(3, normalize=n, sync_bn='stats')], 8), 'exact':(lambda n: [MicroBatch(3, normalize=n, sync_bn=True, offload=None)], 8)}

FEW = 'cross-entropy','mean squares','ignore_index','sum','function, mask' # for variants of a host

@pytest.mark.parametrize('kind,host', [(k,h) for h in HOSTS for k in (LOSSES if h in ('AccumulateStep','MicroBatch') else FEW)])
def test_losses(kind, host, looks):
    "Nothing is read, for any loss, from the first batch of a fit to its last step"
    loss,targets,normalize = LOSSES[kind]
    make,bs = HOSTS[host]
    meta_fit(make(normalize), loss, targets, bs)
    assert len(looks)<=2 # one an epoch

class Tight(nn.Module):
    "No memory for more than four samples"
    def forward(self, x):
        if len(x)>4: raise torch.OutOfMemoryError('made up')
        return x
def tight(): return nn.Sequential(*bn_net(), Tight())

@pytest.mark.parametrize('sync_bn', (False,'stats',True))
def test_too_large(sync_bn):
    "Nor when memory is not enough, and an attempt is undone"
    learn = meta_fit([MicroBatch('auto', sync_bn=sync_bn, offload=None)], nn.CrossEntropyLoss(), bs=8, model=tight)
    assert learn.micro_batch.bs==4

# ---- beside other callbacks

ONE_CYCLE = lambda l: l.fit_one_cycle(2, 1e-3)
# callbacks, loss, how it is fitted
BESIDE = {'MixUp':(lambda: [MixUp()], nn.CrossEntropyLoss(), None), 'MixUp that stacks':(lambda: [MixUp()], CrossEntropyLossFlat(), None),
    'MixUp, class weights':(lambda: [MixUp()], CrossEntropyLossFlat(weight=WEIGHTS), None),
    'Recorder':(lambda: [Recorder_(), GradientClip(0.1)], nn.CrossEntropyLoss(), ONE_CYCLE),
    'ParamScheduler':(lambda: [ParamScheduler({'lr':SchedLin(1e-3, 1e-4)})], nn.CrossEntropyLoss(), None),
    'GradScaler':(lambda: [Scaled()], nn.CrossEntropyLoss(ignore_index=1), None),
    'GradScaler, GradientClip':(lambda: [Scaled(), GradientClip(0.1)], nn.CrossEntropyLoss(), ONE_CYCLE),
    'NoiseScale':(lambda: [NoiseScale()], nn.CrossEntropyLoss(ignore_index=1), None),
    'NoiseScale, GradScaler':(lambda: [NoiseScale(), Scaled()], nn.CrossEntropyLoss(), None),
    'all':(lambda: [Recorder_(), MixUp(), Scaled(), GradientClip(0.1)], CrossEntropyLossFlat(), ONE_CYCLE)}

BESIDE_HOSTS = 'AccumulateStep','MicroBatch',"'auto'",'stats','exact' # the last refuses `NoiseScale`

@pytest.mark.parametrize('kind,host', [(k,h) for k in BESIDE for h in BESIDE_HOSTS if h!='exact' or 'NoiseScale' not in k])
def test_callbacks(kind, host):
    "Nothing of ours is read beside them"
    (cbs,loss,fit),(make,bs) = BESIDE[kind],HOSTS[host]
    targets = one_hot if kind=='MixUp' else noop # it mixes targets where the loss has no classes
    learn = meta_fit(make('auto'), loss, targets, bs, cbs(), **({'fit':fit} if fit else {}))
    if hasattr(learn, 'recorder'): assert len(learn.recorder.losses)==4 # steps of two epochs

def test_growing_windows():
    "Windows whose size is a function of training progress"
    meta_fit([AccumulateStep(SchedLin(1, 2), normalize='auto')], nn.CrossEntropyLoss(ignore_index=1), cbs=[Recorder_()], fit=ONE_CYCLE)

class Text(nn.Module):
    "A language model"
    def __init__(self): super().__init__(); self.emb,self.rnn,self.head = nn.Embedding(9, 8),nn.LSTM(8, 8, batch_first=True),nn.Linear(8, 9)
    def forward(self, x): return self.head(self.rnn(self.emb(x.long().clamp(0, 8)))[0])

@pytest.mark.parametrize('host', ('AccumulateStep','MicroBatch',"'auto'"))
def test_text(host):
    "Targets of several a sample, some of them padding"
    make,bs = HOSTS[host]
    meta_fit(make('auto'), CrossEntropyLossFlat(ignore_index=1), lambda y: y[:,None].repeat(1, 6), bs, model=Text)

# ---- a loop without fastai

@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    "PyTorch does not know whether autocast is entered for 'meta'"
    monkeypatch.setattr(loop, 'without_autocast', lambda device_type: nullcontext())

@pytest.mark.parametrize('windows,scaled', ((dict(n_step=2),False), (dict(n_step=2),True), (dict(n_samples=8),False), ({},False)))
@pytest.mark.parametrize('kind', (*FEW,'class weights','denominator','parameters','function, two means'))
def test_loop(kind, windows, scaled):
    "`Accumulator` in two epochs"
    loss,targets,_ = LOSSES[kind]
    x,y = problem(11)
    x,y,model = x.float().to('meta'),targets(y).to('meta'),net().to('meta')
    opt = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    acc = Accumulator(model, opt, loss, **windows, scaler=Scaler('cpu') if scaled else None,
        before_step=lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.1))
    with NoCopies():
        for _ in range(2):
            with acc:
                for a,b in zip(x.split(4), y.split(4)): acc.backward(model(a), b)
    assert len(acc.losses)==(4 if windows else 2) # three micro-batches an epoch

# ---- controls

@pytest.mark.parametrize('host', HOSTS)
@pytest.mark.parametrize('wait', (lambda t: t.item(), lambda t: t.cpu(), lambda t: t>0 and 1))
def test_planted(wait, host, monkeypatch):
    "A wait of ours in a window is found, in every host"
    make,bs = HOSTS[host]
    add = Window.add
    monkeypatch.setattr(Window, 'add', lambda self,loss,*args: (wait(loss), add(self, loss, *args)))
    with pytest.raises((RuntimeError,NotImplementedError), match='meta tensor'): meta_fit(make('auto'), nn.CrossEntropyLoss(), bs=bs)

@pytest.mark.parametrize('host', ('AccumulateStep','MicroBatch'))
def test_planted_by_user(host):
    "So is one of a function that is passed"
    make,bs = HOSTS[host]
    with pytest.raises((RuntimeError,NotImplementedError), match='meta tensor'): meta_fit(make(lambda learn: learn.y.sum().item()+1), nn.CrossEntropyLoss(),
        bs=bs)

def test_planted_in_loop(monkeypatch):
    add = Window.add
    monkeypatch.setattr(Window, 'add', lambda self,loss,*args: (loss.item(), add(self, loss, *args)))
    with pytest.raises(RuntimeError, match='meta tensor'): test_loop('cross-entropy', dict(n_step=2), False)
