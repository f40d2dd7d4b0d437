"On a GPU: real mixed precision, the memory of a micro-batch, and no waiting for the device within a window"
import gc,resource,threading
import pytest
from fastai.vision.all import models
from fastai_accum import batchnorm,scarce as scarce_
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

def one_class(): return torch.randn(64, 3, 64, 64),torch.arange(64)%10

def peak(bs, *cbs, model=stem, data=one_class, loss=nn.CrossEntropyLoss()):
    "Bytes in use at the peak of a second fit of 64 samples in batches of `bs`, and those of the gradients"
    gc.collect()
    before = torch.cuda.memory_allocated()
    seed()
    l = bare(batches(*data(), bs), model(), loss, *cbs)
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

# name: model, data, loss
LARGE = {'language model':dict(model=lambda: nn.Sequential(nn.Embedding(8000, 64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8000)), data=lambda: (x := torch.randint(8000, (64, 64)),x), loss=CrossEntropyLossFlat()),
         'U-Net':dict(model=lambda: models.unet.DynamicUnet(nn.Sequential(*list(models.resnet18().children())[:6]), 21, (64,64)), data=lambda: (torch.randn(64, 3, 64, 64),torch.randint(21, (64, 64, 64))), loss=CrossEntropyLossFlat(axis=1))}

@pytest.mark.parametrize('kind', LARGE)
def test_memory_of_large_outputs(kind):
    "So they do where outputs are large, and what a model returned for a micro-batch does not stay"
    kw = LARGE[kind]
    peak(8, **kw)
    (plain,grads),(small,_),(parts,_),(large,_) = peak(8, **kw),peak(8, AccumulateStep(8), **kw),peak(64, MicroBatch(8), **kw),peak(64, **kw)
    print(f'{kind}: plain bs=8 {plain}, AccumulateStep(8) {small}, MicroBatch(8) {parts}, plain bs=64 {large}, gradients {grads} bytes')
    assert max(small, parts) <= 1.03*plain + grads and max(small, parts) < large/2

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

class Own(nn.Module):
    "With what it divides by"
    def forward(self, p, t): return F.cross_entropy(p, t, ignore_index=1)
    def denominator(self, p, t): return (t!=1).sum()
class Centers(nn.Module):
    "With parameters"
    def __init__(self): super().__init__(); self.c = nn.Parameter(torch.zeros(3, 3, dtype=f64, device=DEV))
    def forward(self, p, t): return F.cross_entropy(p, t) + (p-self.c[t]).pow(2).mean()
def masked(p, t): return (F.cross_entropy(p, t, reduction='none')*(m := (t!=1).to(p.dtype))).sum()/m.sum().clamp(min=1)
def two_means(p, t): return F.cross_entropy(p, t, ignore_index=1)+0.1*p.pow(2).mean()
def one_hot(y): return F.one_hot(y, 3).to(f64)
def counted(learn): return (learn.y!=1).sum()+1
LOSSES = {'numbers': (nn.MSELoss, one_hot, 'auto'), 'samples': (nn.CrossEntropyLoss, noop, 'samples'), 'none': (nn.CrossEntropyLoss, noop, 'none'),
          'sum': (partial(nn.CrossEntropyLoss, reduction='sum'), noop, 'auto'),
          'ignore_index': (partial(nn.CrossEntropyLoss, ignore_index=1), noop, 'auto'),
          'ignore_index of fastai': (partial(CrossEntropyLossFlat, ignore_index=1), noop, 'auto'),
          'class weights': (lambda: nn.CrossEntropyLoss(torch.tensor([0.1,1,7], dtype=f64, device=DEV)), noop, 'auto'),
          'function': (nn.CrossEntropyLoss, noop, counted), 'denominator': (Own, noop, 'auto'), 'parameters': (Centers, noop, 'auto'), 'BCE': (nn.BCEWithLogitsLoss, one_hot, 'auto'),
          'label smoothing': (partial(nn.CrossEntropyLoss, label_smoothing=0.1), noop, 'auto'), 'a function': (lambda: F.cross_entropy, noop, 'auto'),
          'a function with a mask': (lambda: masked, noop, 'auto'), 'a function of two means': (lambda: two_means, noop, 'auto')}

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

BESIDE = {'NoiseScale': (4, lambda: [AccumulateStep(N_STEP), NoiseScale()]), 'stats': (4, lambda: [AccumulateStep(N_STEP, sync_bn='stats')]), 'stats of MicroBatch': (16, lambda: [MicroBatch(4, sync_bn='stats')]),
          'GradientClip': (4, lambda: [AccumulateStep(N_STEP), GradientClip(0.1)]), 'samples': (4, lambda: [AccumulateStep(n_samples=16)])}

@pytest.mark.parametrize('to', (noop,Learner.to_fp16), ids=('fp32','fp16'))
@pytest.mark.parametrize('kind', BESIDE)
def test_no_sync_beside(kind, to, lax_after):
    "Nor beside other callbacks, with BatchNorm"
    (bs,cbs),(x,y) = BESIDE[kind],problem(71)
    l = bare(batches(x.float(), y, bs), nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), nn.CrossEntropyLoss(ignore_index=1), Strict(), *cbs(), lax := Lax())
    to(l)
    l.fit(2, 0.05)
    assert lax.n==10

def test_sync_is_seen(lax_after):
    "The tests above do see the host wait, in a window too"
    t = torch.ones(1, device=DEV)
    torch.cuda.set_sync_debug_mode('error')
    with pytest.raises(RuntimeError, match='synchroniz'): t.item()
    torch.cuda.set_sync_debug_mode('default')
    wait = AccumulateStep(N_STEP, normalize=lambda learn: learn.y.sum().item()+1)
    with pytest.raises(RuntimeError, match='synchroniz'): trained(4, 'samples', Strict(), wait, Lax())

# ---- `MicroBatch`: what it is for, memory

@contextmanager
def room(n):
    "Only `n` bytes of the device's memory for this process"
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction(min(1., n/torch.cuda.get_device_properties(0).total_memory))
    try: yield
    finally: torch.cuda.set_per_process_memory_fraction(1.)

def pictures(mb=None, n=512, bs=256, sz=96, arch=models.resnet50, benchmark=False):
    "A learner after an epoch in batches of `bs` pictures, and the weights that it had before"
    seed()
    l = bare(batches(torch.randn(n, 3, sz, sz), torch.arange(n)%10, bs), arch(num_classes=10), nn.CrossEntropyLoss(), *L(mb))
    start = flat(l.model.parameters())
    with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark, deterministic=not benchmark, allow_tf32=False): l.fit(1, 0.01)
    return l,start

def same_pictures(fixed, auto):
    "Weights, buffers, optimizer state and what training changed, of two results of `pictures`"
    (a,s),(b,t) = fixed,auto
    assert torch.equal(s, t)
    for f in (lambda l: l.model.parameters(), lambda l: l.model.buffers(), lambda l: tensors(l.opt.state_dict()['state'])): assert rel(flat(f(a)), flat(f(b)))<=1e-5
    assert rel(flat(a.model.parameters())-s, flat(b.model.parameters())-t)<=1e-3

SIZES = [math.ceil(256/k) for k in (2,3,4,6,8,12,16,24,32)]
def test_as_much_as_fits():
    "ResNet-50 in batches of 256 pictures, in 2 GB: what does not fit at once is trained in micro-batches, as if their size had been known"
    cap = 2*10**9
    with room(cap):
        with pytest.raises(torch.OutOfMemoryError): pictures()
    with room(cap):
        auto = pictures(MicroBatch('auto'))
        used,bs = torch.cuda.max_memory_reserved(),auto[0].micro_batch.bs
    print(f'micro-batches of {bs}, {used} bytes at the peak')
    assert bs in SIZES and used<=cap
    with room(cap): same_pictures(pictures(MicroBatch(bs)), auto)

def test_as_much_as_fits_in_benchmark_mode():
    "So it is where cuDNN tries which of its ways is the fastest, some of which want much memory"
    with room(2*10**9):
        l,start = pictures(MicroBatch('auto'), benchmark=True)
        used = torch.cuda.max_memory_reserved()
    assert l.micro_batch.bs in SIZES and used<=2*10**9
    assert flat(l.model.parameters()).isfinite().all() and not torch.equal(start, flat(l.model.parameters()))

def test_memory_of_micro_batches():
    "A batch of 64 in micro-batches of eight takes the memory of a batch of eight; and 'auto', where all fits, no more than a plain `Learner`"
    peak(8) # the libraries take their workspaces
    (plain,grads),(small,_),(auto,_),(large,_) = peak(8),peak(64, MicroBatch(8)),peak(8, MicroBatch('auto')),peak(64)
    print(f"plain bs=8 {plain}, MicroBatch(8) {small}, MicroBatch('auto') with bs=8 {auto}, plain bs=64 {large}, gradients {grads} bytes")
    assert plain > 4*grads
    assert small <= 1.01*plain and auto <= 1.01*plain and small < large/2

class Scarce(nn.Module):
    "No memory for more than `k` samples, in forward or in `backward`"
    def __init__(self, k, backward=False): super().__init__(); self.k,self.backward,self.seen = k,backward,[]
    def ask(self, n):
        if n>self.k: torch.empty(2**58, device=DEV)
    def forward(self, x):
        self.seen.append((len(x),torch.is_autocast_enabled(DEV),x.dtype))
        if self.training and self.backward: x.register_hook(lambda g: self.ask(len(g)))
        elif self.training: self.ask(len(x))
        return x

def drawn(): return torch.cuda.get_rng_state() if DEV=='cuda' else torch.get_rng_state()
def scarce(k, backward, dtype=f64): return nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.BatchNorm1d(64), Scarce(k, backward), nn.Linear(64, 3)).to(dtype)

@pytest.mark.parametrize('backward', (False,True), ids=('forward','backward'))
def test_random_numbers(backward):
    "What the failed attempt drew on the device is drawn again"
    def one(mb, k):
        seed()
        l = bare(batches(*problem(71), 16), scarce(k, backward), nn.CrossEntropyLoss(), mb)
        l.fit(2, 0.05)
        return l,drawn()
    (fixed,a),(auto,b) = one(MicroBatch(4), 99),one(MicroBatch('auto'), 5)
    assert auto.micro_batch.bs==4 and torch.equal(a, b)
    for f in (lambda l: l.model.parameters(), lambda l: l.model.buffers(), lambda l: tensors(l.opt.state_dict()['state'])): assert rel(flat(f(fixed)), flat(f(auto)))<=1e-12

# ---- `MicroBatch` and mixed precision

PRECISIONS = {'fp16':(Learner.to_fp16,torch.float16), 'bf16':(Learner.to_bf16,torch.bfloat16)}

@pytest.mark.parametrize('mode', PRECISIONS)
def test_autocast_of_micro_batches(mode):
    "Every micro-batch is computed in low precision, and weights are as near to full precision as those of the whole batch, after every step"
    to,dtype = PRECISIONS[mode]
    seen = []
    def logged(l):
        to(l)
        l.model[1].register_forward_pre_hook(lambda m,i: seen.append((len(i[0]),torch.is_autocast_enabled(DEV),i[0].dtype)))
    full,large,small = (precise(*args)[0] for args in ((16,), (16,None,to), (16,MicroBatch(4),logged)))
    assert [n for n,*_ in seen]==([4]*16+[3]*3+[16])*2 and {tuple(o) for _,*o in seen}=={(True,dtype)}
    assert len(small.recorder.losses)==len(small.scaled.scales)==10 and not torch.is_autocast_enabled(DEV)
    assert large.scaled.scales==small.scaled.scales and large.scaled.scaler_state==small.scaled.scaler_state
    assert large.recorder.lrs==small.recorder.lrs and large.recorder.iters==small.recorder.iters and str(large.recorder.hps)==str(small.recorder.hps)
    for f,s,t in zip(full.trace.steps, large.trace.steps, small.trace.steps):
        theirs,ours = rel(f['weights'], s['weights']),rel(f['weights'], t['weights'])
        assert 0 < theirs and ours <= 2*theirs

@pytest.mark.parametrize('backward', (False,True), ids=('forward','backward'))
@pytest.mark.parametrize('mode', PRECISIONS)
def test_autocast_after_a_failure(mode, backward):
    "Autocast is entered again, or still, in the attempts that follow, and the run is that of the size found"
    to,dtype = PRECISIONS[mode]
    def one(mb, k):
        seed()
        x,y = problem(71)
        l = bare(batches(x.float(), y, 16), scarce(k, backward, f32), nn.CrossEntropyLoss(), mb)
        to(l).fit(2, 0.05)
        return l
    fixed,auto = one(MicroBatch(4), 99),one(MicroBatch('auto'), 5)
    assert [n for n,*_ in auto.model[3].seen[:9]]==[16,8,5,5,6,4,4,4,4] and {tuple(o) for _,*o in auto.model[3].seen}=={(True,dtype)}
    assert auto.model[3].seen[5:]==fixed.model[3].seen and not torch.is_autocast_enabled(DEV)
    for f in (lambda l: l.model.parameters(), lambda l: l.model.buffers()): assert rel(flat(f(fixed)), flat(f(auto)))<=1e-5

# ---- `MicroBatch` and waiting for the device

@pytest.mark.parametrize('bs', (4,'auto'))
@pytest.mark.parametrize('kind', LOSSES)
def test_no_sync_in_a_batch(kind, bs, lax_after):
    "From the start of a batch until its gradients are complete, the host waits for nothing"
    small = trained(16, kind, Strict(), MicroBatch(bs, normalize=LOSSES[kind][2]), Lax())
    assert small.lax.n==10 and small.micro_batch.bs==(16 if bs=='auto' else 4) # 71 samples make five batches an epoch

@pytest.mark.parametrize('kind', ('numbers','samples','ignore_index','ignore_index of fastai','class weights'))
def test_same_run_of_micro_batches(kind):
    "With counts that stay on the device, weights and optimizer state are those of the whole batch"
    tol = 1e-5 if 'fastai' in kind else 1e-12
    large,small = trained(16, kind),trained(16, kind, MicroBatch(4, normalize=LOSSES[kind][2]))
    for get in (lambda l: l.model.parameters(), lambda l: tensors(l.opt.state_dict()['state'])): assert rel(flat(get(large)), flat(get(small))) <= tol

def test_sync_in_a_batch_is_seen(lax_after):
    "The test above does see the host wait"
    with pytest.raises(RuntimeError, match='synchroniz'): trained(16, 'samples', Strict(), MicroBatch(4, normalize=lambda learn: learn.y.sum().item()+1), Lax())

# ---- exact BatchNorm

def exact(bs=4, **kwargs): return MicroBatch(bs, sync_bn=True, **kwargs)
def conv(i, o): return nn.Conv2d(i, o, 3, padding=1, bias=False)
class Residual(nn.Module):
    "With a BatchNorm of each kind in `norms`"
    def __init__(self, *norms):
        super().__init__()
        self.stem,self.a,self.b,self.head = conv(3, 8),conv(8, 8),conv(8, 8),nn.Linear(8, 10)
        self.n1,self.n2,self.n3 = (f(8) for f in ((norms or (nn.BatchNorm2d,))*3)[:3])
    def forward(self, x):
        x = F.relu_(self.n1(self.stem(x)))
        y = self.n3(self.b(F.relu_(self.n2(self.a(x)))))
        y += x
        return self.head(F.relu_(y).mean((2,3)))
def flat_norms(): return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 10))
def line_norms(): return nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 10))
def cube_norms(): return nn.Sequential(nn.Unflatten(1, (1,3)), nn.Conv3d(1, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 10))
def bn(**kwargs): return partial(Residual, partial(nn.BatchNorm2d, **kwargs))
NORMS = {'residual':Residual, '1d':flat_norms, '1d with length':line_norms, '3d':cube_norms, 'momentum None':bn(momentum=None), 'not tracked':bn(track_running_stats=False), 'not affine':bn(affine=False)}

class LikeInput(Callback):
    "The model is in the memory format of its inputs, which is `fmt`"
    def __init__(self, fmt): self.fmt = fmt
    def before_fit(self): self.model.to(memory_format=self.fmt)
    def before_batch(self): self.learn.xb = (self.x.contiguous(memory_format=self.fmt),)

def normed(mb=None, model=Residual, dtype=f64, cbs=(), n=45, bs=16, sz=8, to=noop):
    "A learner after two epochs of pictures in batches of 16, 16 and 13, in full precision"
    seed()
    l = bare(batches(torch.randn(n, 3, sz, sz, dtype=dtype), torch.arange(n)%10, bs), model().to(dtype), nn.CrossEntropyLoss(), *L(mb), *cbs)
    to(l)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False): l.fit(2, 0.05)
    return l

def same_norms(large, small, tol):
    for f in (lambda l: l.model.parameters(), lambda l: tensors(l.opt.state_dict()['state'])): assert rel(flat(f(large)), flat(f(small)))<=tol
    for a,b in zip(large.model.buffers(), small.model.buffers()): assert rel(a.cpu(), b.cpu())<=tol

@pytest.mark.parametrize('dtype,tol', ((f64,1e-12),(f32,1e-5)), ids=str)
@pytest.mark.parametrize('bs', (4,1))
@pytest.mark.parametrize('o', NORMS)
def test_exact_norms(o, bs, dtype, tol):
    "On this device's own kernels, weights, optimizer state and buffers are those of the whole batch, in parts of four samples and of one"
    same_norms(*(normed(mb, NORMS[o], dtype) for mb in (None,exact(bs))), tol)

@pytest.mark.parametrize('dtype,tol', ((f64,1e-12),(f32,1e-5)), ids=str)
def test_exact_norms_channels_last(dtype, tol):
    "In a memory format that stays what it was"
    seen = set()
    def see(l): l.model.n2.register_forward_hook(lambda m,i,o: seen.add((len(o), *(t.is_contiguous(memory_format=torch.channels_last) for t in (i[0],o)))))
    large,small = (normed(mb, dtype=dtype, cbs=[LikeInput(torch.channels_last)], to=see) for mb in (None,exact()))
    same_norms(large, small, tol)
    assert seen=={(n,True,True) for n in (16,13,4,3)}

def norm_errors(f, dtype, trials=20):
    "Relative errors of outputs, gradients and running statistics of `f(xs, mean, var, w, b)` in `dtype`, against the same inputs in float64 and `F.batch_norm` of all of them"
    def once(f, xs, dys, ps, dt, pt):
        xs,(mean,var,w,b) = [x.to(dt).requires_grad_() for x in xs],(p.to(pt) for p in ps)
        ins = [*xs,w.requires_grad_(),b.requires_grad_()]
        y = f(xs, mean, var, w, b)
        gs = torch.autograd.grad(y, ins, torch.cat(dys).to(dt))
        return [y.detach(), torch.cat(gs[:-2]), *gs[-2:], mean, var]
    errs = []
    for i in range(trials):
        torch.manual_seed(i)
        xs,dys = ([(torch.randn(n, 6, 7, 7)*2+m).to(dtype).to(DEV) for n in (5,1,2)] for m in (1,0))
        ps = [torch.randn(6).to(DEV), torch.rand(6).to(DEV)+0.5, *(torch.randn(6).to(DEV) for _ in range(2))]
        errs.append([rel(p.cpu(), q.cpu().double()) for p,q in zip(once(whole_norm, xs, dys, ps, f64, f64), once(f, xs, dys, ps, dtype, torch.promote_types(dtype, f32)))])
    return tensor(errs).pow(2).mean(0).sqrt().tolist()
def whole_norm(xs, mean, var, w, b): return F.batch_norm(torch.cat(xs), mean, var, w, b, True)
def joint_norm(xs, *args): return torch.cat(batchnorm.joint_batch_norm(xs, *args))

@pytest.mark.parametrize('dtype', (f64,f32,torch.float16,torch.bfloat16), ids=str)
def test_norms_precision(dtype):
    "Nothing is farther from float64 than where all of it is normalized at once, but for a rounding of its own, and the chance in how 20 of these fall"
    theirs,ours = norm_errors(whole_norm, dtype),norm_errors(joint_norm, dtype)
    for a,b in zip(theirs, ours): assert b<=(1e-12 if dtype==f64 else math.hypot(1.25*a, torch.finfo(f32).eps))

@pytest.mark.parametrize('tracked', (True,False), ids=('tracked','not tracked'))
@pytest.mark.parametrize('dtype,param_dtype,tol', ((f64,f64,1e-12), (f32,f32,1e-5), (torch.float16,f32,1e-3), (torch.bfloat16,f32,1e-2), (torch.float16,torch.float16,1e-3), (torch.bfloat16,torch.bfloat16,1e-2)), ids=str)
def test_norms_of_many_values(dtype, param_dtype, tol, tracked):
    "More values a channel than float16 can count, with autocast and in a model that is in low precision itself"
    torch.manual_seed(0)
    xs,dys = ([(torch.randn(16, 4, 32, 32, device=DEV)*2+m).to(dtype) for _ in range(5)] for m in (1,0))
    def once(f, dt, pt):
        running = [g(4, dtype=pt, device=DEV) for g in (torch.zeros,torch.ones)] if tracked else [None,None]
        ins = [*(x.to(dt).requires_grad_() for x in xs), *((torch.arange(4.)/4+0.5).to(dtype=pt, device=DEV).requires_grad_() for _ in range(2))]
        y = f(ins[:5], *running, *ins[5:])
        gs = torch.autograd.grad(y, ins, torch.cat(dys).to(dt))
        return [y.detach(), torch.cat(gs[:5]), *gs[5:], *(o for o in running if o is not None)]
    for a,b in zip(once(whole_norm, f64, f64), once(joint_norm, dtype, param_dtype)): assert rel(a.cpu(), b.cpu().double())<=tol

@pytest.mark.parametrize('offload', ('cpu',None))
def test_threads_stay(offload):
    "A fit of many batches has as many threads as micro-batches, and the host's memory does not grow"
    ids,sizes = set(),[]
    def note(*_):
        ids.add(threading.get_native_id())
        sizes.append(int(Path('/proc/self/statm').read_text().split()[1])*resource.getpagesize())
    l = bare(batches(torch.randn(16, 3, 16, 16), torch.arange(16)%10, 16)*100, Residual(), nn.CrossEntropyLoss(), exact(offload=offload))
    l.model.stem.register_forward_hook(note)
    l.fit(1, 0.01)
    assert len(sizes)==400 and len(ids)==4 and threading.get_native_id() not in ids
    assert sizes[-1]-sizes[100] < 20*2**20

@pytest.mark.parametrize('mode', PRECISIONS)
def test_autocast_of_exact_norms(mode):
    "As near to full precision as the whole batch; BatchNorms have inputs in low precision"
    to,dtype = PRECISIONS[mode]
    seen = set()
    def logged(l): to(l); l.model.n2.register_forward_pre_hook(lambda m,i: seen.add((torch.is_autocast_enabled(DEV),i[0].dtype)))
    full,large,small = (normed(mb, dtype=f32, to=f) for mb,f in ((None,noop),(None,to),(exact(),logged)))
    assert seen=={(True,dtype)}
    for f in (lambda l: l.model.parameters(), lambda l: l.model.buffers()):
        theirs,ours = (rel(flat(f(full)), flat(f(l))) for l in (large,small))
        assert 0 < theirs and ours <= 2*theirs

def test_offload():
    "Activations that were on the host make the same gradients, and are not on the device meanwhile"
    on,off = (normed(exact(offload=o)) for o in ('cpu',None))
    same_norms(off, on, 1e-12)
    peak(8)
    (on,_),(off,_),(large,_),(small,_) = peak(64, exact(8)),peak(64, exact(8, offload=None)),peak(64),peak(64, MicroBatch(8))
    print(f'exact BatchNorm of 8x8: {on} with offload, {off} without; plain bs=64 {large}, MicroBatch(8) {small} bytes')
    assert small < on < off

def test_offload_of_micro_batches():
    "Nor are those of a plain micro-batch"
    on,off = (normed(MicroBatch(8, offload=o)) for o in ('cpu',None))
    same_norms(off, on, 1e-12)
    (on,_),(off,_) = (peak(64, MicroBatch(8, offload=o)) for o in ('cpu',None))
    print(f'MicroBatch(8): {on} with offload, {off} without')
    assert on < off

def test_figures():
    "What `MicroBatch('auto')` asks the device, and the memory that `margin` leaves free"
    device = scarce_.figures(torch.device('cuda'))
    start = device.mark()
    torch.randn(2**20, device=DEV).sum()
    end = device.mark()
    torch.cuda.synchronize()
    assert end.query() and start.elapsed_time(end)>=0 and device.retries()>=0 and 0<device.free()<1 and 0<device.kept()<1
    was = device.limit()
    with scarce_.leaving_free(device, 0.5):
        assert 0<device.limit()<=0.5
        with pytest.raises(torch.OutOfMemoryError): torch.empty(int(0.6*torch.cuda.mem_get_info()[1]), dtype=torch.uint8, device=DEV)
    assert device.limit()==was

def test_no_sync_of_exact_norms(lax_after):
    "With activations on the device, the host waits for nothing from the start of a batch until its gradients are complete"
    small = normed(exact(offload=None), cbs=[Strict(),Lax()])
    assert small.lax.n==6

@pytest.mark.parametrize('backward', (False,True), ids=('forward','backward'))
def test_size_of_exact_norms(backward):
    "'auto' comes down to what fits, and is from there on what it is with that size from the start"
    def one(mb, k):
        seed()
        l = bare(batches(*problem(71), 16), scarce(k, backward), nn.CrossEntropyLoss(), mb)
        l.fit(2, 0.05)
        return l,drawn()
    (fixed,a),(auto,b) = one(exact(), 99),one(MicroBatch('auto', sync_bn=True), 5)
    assert auto.micro_batch.bs==4 and torch.equal(a, b)
    same_norms(fixed, auto, 1e-12)

def test_streams():
    "Micro-batches are computed on the stream and the device that are current"
    seen,stream = set(),torch.cuda.Stream()
    model = Residual().to(DEV)
    model.n2.register_forward_hook(lambda *_: seen.add((torch.cuda.current_stream(),torch.cuda.current_device())))
    x = torch.randn(8, 3, 8, 8, device=DEV)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), batchnorm.jointly(model, [(o,) for o in x.split(3)], 'cpu') as forward:
        sum(o.sum() for o in forward()).backward()
        assert seen=={(stream,torch.cuda.current_device())}
    stream.synchronize()
    assert all(p.grad.isfinite().all() for p in model.parameters())
