"On a GPU: real mixed precision, the memory of a micro-batch, and no waiting for the device within a window"
import gc
import pytest
from fastai.vision.all import models
from common import *

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')]
DEV = 'cuda' if torch.cuda.is_available() else 'cpu' # all helpers run on a CPU too
f32,f64 = torch.float32,torch.float64
N_STEP = 4
SGD_MOM = partial(SGD, mom=0.9)

# ---- mixed precision

class Scaled(Callback):
    "What `MixedPrecision`, which comes later, is about to forget"
    order = 5
    def after_fit(self):
        if hasattr(self.learn, 'mixed_precision'): self.scales,self.scaler_state = list(self.mixed_precision.scales),self.scaler.state_dict()

def wide(): return nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 10))
def precise(bs, acc=None, to=noop):
    "A run of two epochs of five windows, the last of them short, in the precision that `to` gives; the learner and its first weights"
    l = learner(73, bs, acc, dtype=f32, data=problem(73+16, 64, 10), model=wide, cbs=Scaled())
    l.model.to(DEV) # batches follow
    to(l)
    start = flat(l.model.parameters())
    run(l, lambda l: l.fit_one_cycle(2, 0.05))
    assert {p.device.type for p in l.model.parameters()}=={DEV}
    return l,start

@pytest.mark.parametrize('mode', ('fp16','bf16'))
def test_autocast(mode):
    "Weights are as near to full precision as the large batch's, after every step, and nothing else differs"
    to = Learner.to_fp16 if mode=='fp16' else Learner.to_bf16
    full,large,small = (precise(*args)[0] for args in ((16,), (16,None,to), (4,AccumulateStep(N_STEP),to)))
    a,b = large.trace.steps,small.trace.steps
    assert len(a)==len(b)==len(small.recorder.losses)==10 and len(small.scaled.scales)==10 # none was skipped
    assert large.scaled.scales==small.scaled.scales and large.scaled.scaler_state==small.scaled.scaler_state
    assert large.recorder.lrs==small.recorder.lrs and large.recorder.iters==small.recorder.iters and str(large.recorder.hps)==str(small.recorder.hps)
    for f,s,t in zip(full.trace.steps, a, b):
        theirs,ours = rel(f['weights'], s['weights']),rel(f['weights'], t['weights'])
        assert 0 < theirs and ours <= 2*theirs

def test_overflow():
    "A scale too high falls, each time in place of a window's step, to about the large batch's: what must not overflow is a sum over fewer samples"
    to = partial(Learner.to_fp16, init_scale=2.**22)
    large,small = precise(16, None, to),precise(4, AccumulateStep(N_STEP), to)
    for l,start in (large,small):
        ws = [start] + [s['weights'] for s in l.trace.steps]
        skipped = sum(torch.equal(v, w) for v,w in zip(ws, ws[1:]))
        assert len(l.trace.steps)==len(l.recorder.losses)==10
        assert skipped==10-len(l.scaled.scales)==22-math.log2(l.scaled.scaler_state['scale'])>0
        assert ws[-1].isfinite().all() and not torch.equal(ws[0], ws[-1])
    assert 0.5 <= small[0].scaled.scaler_state['scale']/large[0].scaled.scaler_state['scale'] <= 2*N_STEP

# ---- batches that are on the device already, with nothing around the training loop that reads from it

class Batches(list): "A loader for `Learner`"
def batches(x, y, bs): return Batches(zip(x.to(DEV).split(bs), y.to(DEV).split(bs)))
def bare(dl, model, loss_func, *cbs):
    "A learner without `Recorder` and `ProgressCallback`, and without validation"
    return Learner(DataLoaders(dl, Batches()), model.to(DEV), loss_func=loss_func, opt_func=SGD_MOM, default_cbs=False, cbs=[TrainEvalCallback(), *cbs])

# ---- memory

def stem(): # the part of a ResNet that has few parameters and large activations
    return nn.Sequential(*list(models.resnet18().children())[:6], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))

def peak(bs, *cbs):
    "Bytes in use at the peak of a second fit of 64 pictures in batches of `bs`, and those of the gradients"
    gc.collect()
    before = torch.cuda.memory_allocated()
    seed()
    l = bare(batches(torch.randn(64, 3, 64, 64), torch.arange(64)%10, bs), stem(), nn.CrossEntropyLoss(), *cbs)
    l.fit(1, 1e-3)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    l.fit(1, 1e-3)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()-before, sum(p.grad.nbytes for p in l.model.parameters())

def test_memory():
    "Windows of eight times eight samples take the memory of eight samples, not that of 64"
    peak(8) # the libraries take their workspaces
    (plain,grads),(small,_),(large,_) = peak(8),peak(8, AccumulateStep(8)),peak(64)
    print(f'plain bs=8 {plain}, AccumulateStep(8) {small}, plain bs=64 {large}, gradients {grads} bytes')
    assert plain > 4*grads # so there is something to save
    assert small <= 1.01*plain + grads and small < large/2

# ---- waiting for the device

class Strict(Callback):
    "Waiting for the device is an error from here on"
    order,run_valid = -101,False
    def before_batch(self): torch.cuda.set_sync_debug_mode('error')
class Lax(Callback):
    "`AccumulateStep` is done with the window; what the optimizer does is its own affair"
    order,run_valid,n = -99,False,0
    def before_step(self):
        torch.cuda.set_sync_debug_mode('default')
        self.n += 1

@pytest.fixture
def lax_after():
    yield
    torch.cuda.set_sync_debug_mode('default')

def one_hot(y): return F.one_hot(y, 3).to(f64)
def counted(learn): return (learn.y!=1).sum()+1
LOSSES = {'numbers': (nn.MSELoss, one_hot, 'auto'), 'samples': (nn.CrossEntropyLoss, noop, 'samples'), 'none': (nn.CrossEntropyLoss, noop, 'none'),
          'sum': (partial(nn.CrossEntropyLoss, reduction='sum'), noop, 'auto'),
          'ignore_index': (partial(nn.CrossEntropyLoss, ignore_index=1), noop, 'auto'),
          'ignore_index of fastai': (partial(CrossEntropyLossFlat, ignore_index=1), noop, 'auto'),
          'class weights': (lambda: nn.CrossEntropyLoss(torch.tensor([0.1,1,7], dtype=f64, device=DEV)), noop, 'auto'),
          'function': (nn.CrossEntropyLoss, noop, counted)}

def trained(bs, kind, *cbs, n=71):
    "A learner after two epochs of `n` samples in order, in float64"
    loss,f,_ = LOSSES[kind]
    x,y = problem(n)
    seed()
    l = bare(batches(x, f(y), bs), net().to(f64), loss(), *cbs)
    l.fit(2, 1e-3 if kind in ('sum','none') else 0.05)
    return l

@pytest.mark.parametrize('leftover', ('step','drop','carry'))
@pytest.mark.parametrize('kind', LOSSES)
def test_no_sync(kind, leftover, lax_after):
    "From the first micro-batch of a window until its gradients have the large batch's scale, the host waits for nothing"
    small = trained(4, kind, Strict(), AccumulateStep(N_STEP, normalize=LOSSES[kind][2], leftover=leftover), Lax())
    # 71 samples make 18 micro-batches an epoch: four windows and a half
    assert small.lax.n==dict(step=10, drop=8, carry=9)[leftover]

@pytest.mark.parametrize('kind', ('numbers','samples','ignore_index','ignore_index of fastai','class weights'))
def test_same_run(kind):
    "With counts that stay on the device, weights and optimizer state are the large batch's"
    tol = 1e-5 if 'fastai' in kind else 1e-12 # fastai's losses make float32 of what they are given
    large,small = trained(16, kind),trained(4, kind, AccumulateStep(N_STEP, normalize=LOSSES[kind][2]))
    for get in (lambda l: l.model.parameters(), lambda l: tensors(l.opt.state_dict()['state'])): assert rel(flat(get(large)), flat(get(small))) <= tol

def test_sync_is_seen(lax_after):
    "The tests above do see the host wait, in a window too"
    t = torch.ones(1, device=DEV)
    torch.cuda.set_sync_debug_mode('error')
    with pytest.raises(RuntimeError, match='synchroniz'): t.item()
    torch.cuda.set_sync_debug_mode('default')
    wait = AccumulateStep(N_STEP, normalize=lambda learn: learn.y.sum().item()+1)
    with pytest.raises(RuntimeError, match='synchroniz'): trained(4, 'samples', Strict(), wait, Lax())
