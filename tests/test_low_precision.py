"Parameters in bfloat16 and float16: their gradients are added up in float32; this file is also what two processes run"
import gc
from copy import deepcopy
import pytest
from sklearn.datasets import load_digits
from common import *
from processes import *
from fastai_accum.loop import Accumulator
from fastai_accum.noise import NoiseScale
from fastai_accum.window import *

bf16,f16,f32,f64 = torch.bfloat16,torch.float16,torch.float32,torch.float64
LOW,BS,N = (bf16,f16),128,(1,4,16,64,128)
CE = nn.CrossEntropyLoss()
digits = [torch.tensor(o) for o in load_digits(return_X_y=True)]

def convs():
    return nn.Sequential(nn.Unflatten(1, (1,8,8)), nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.Tanh(),
                         nn.Flatten(), nn.Linear(256, 10))

def batch(dtype, s=0, n=BS, model=convs):
    "A model in `dtype` and `n` digits, of which each seed has others"
    seed(s)
    i = torch.randperm(len(digits[0]))[:n]
    return model().to(dtype),(digits[0][i]/16).to(dtype),digits[1][i]

def grads(model): return [None if p.grad is None else p.grad.detach().to_dense().clone() for p in model.parameters()]

def together(gs): return flat([torch.zeros(1) if g is None else g for g in gs])

class Grads(Callback):
    "The gradients of every step"
    order,run_valid = 90,False
    def before_fit(self): self.steps = []
    def before_step(self): self.steps.append(grads(self.model))

def learner(model, x, y, bs, acc=None, cbs=None, loss_func=CE, **kwargs):
    "A learner of the batches of `bs` samples of `x` and `y` in their order; without fastai's `Recorder`, whose losses are in float32"
    learn = Learner(DataLoaders(*[DataLoader(list(zip(x, y)), bs=bs)]*2), model, loss_func, opt_func=SGD, lr=0.1, default_cbs=False,
                    cbs=L(TrainEvalCallback)+L(acc)+L(cbs)+Grads(), **kwargs)
    learn.logger = noop
    return learn

def fitted(model, x, y, bs, acc=None, cbs=None, n_epoch=1, **kwargs):
    learn = learner(deepcopy(model), x, y, bs, acc, cbs, **kwargs)
    learn.fit(n_epoch)
    return learn

def loop_grads(model, x, y, n, loss_func=CE, **kwargs):
    "The gradients of the steps that a loop makes of all of `x` and `y`, each of `n` micro-batches"
    steps = []
    acc = Accumulator(model, torch.optim.SGD(model.parameters(), 0.), loss_func, n, before_step=lambda: steps.append(grads(model)))
    with acc:
        for xb,yb in zip(x.chunk(n), y.chunk(n)): acc.backward(model(xb), yb)
    return steps

def errors(dtype, s, ns, model=convs):
    "For each number of micro-batches, the loop's gradient, and how far that is from float64 compared with the large batch's; all of the same rounded weights"
    model,x,y = batch(dtype, s, model=model)
    truth = deepcopy(model).double()
    CE(truth(x.double()), y).backward()
    truth,(large,) = together(grads(truth)),loop_grads(model, x, y, 1)
    res = {n:loop_grads(model, x, y, n)[0] for n in ns}
    return {n:(g, rel(truth, together(g))/rel(truth, together(large))) for n,g in res.items()}

def sums(): return [o for o in gc.get_objects() if type(o) is Float32Sums]
def no_trace(model):
    "No parameter has a hook, and nobody holds a sum"
    ps = set(model.parameters())
    return not any(p._backward_hooks for p in ps) and not any(ps.intersection([*o.sums, *o.params]) for o in sums())

# ---- how exact it is

@pytest.fixture(scope='module')
def in_loop(): return {dtype:errors(dtype, 0, N) for dtype in LOW}

@pytest.mark.parametrize('dtype', LOW, ids=str)
def test_error(dtype, in_loop):
    "However many micro-batches there are, the gradient is as near to that in float64 as the large batch's"
    assert all(r<=1.1 for _,r in in_loop[dtype].values()), [r for _,r in in_loop[dtype].values()]

@pytest.mark.parametrize('dtype', LOW, ids=str)
def test_error_without(dtype, monkeypatch):
    "It would not be, added up in their own format"
    monkeypatch.setattr('fastai_accum.loop.low_precision', lambda params: [])
    assert errors(dtype, 0, [64])[64][1]>2

@pytest.mark.parametrize('dtype', LOW, ids=str)
@pytest.mark.parametrize('mk', (AccumulateStep,lambda n: MicroBatch(BS//n)), ids=('AccumulateStep','MicroBatch'))
def test_same_in_each_host(mk, dtype, in_loop):
    model,x,y = batch(dtype)
    for n in (1,16,128):
        acc = mk(n)
        learn = fitted(model, x, y, BS//n if isinstance(acc, AccumulateStep) else BS, acc)
        assert torch.equal(together(learn.grads.steps[0]), together(in_loop[dtype][n][0])), n
    assert no_trace(learn.model)

@pytest.mark.parametrize('dtype', LOW, ids=str)
def test_one_loss(dtype):
    "With `sync_loss=True` each micro-batch has a backward pass of its own, too"
    model,x,y = batch(dtype)
    truth = deepcopy(model).double()
    CE(truth(x.double()), y).backward()
    large,small = fitted(model, x, y, BS),fitted(model, x, y, BS, MicroBatch(2, sync_loss=True))
    off = [rel(together(grads(truth)), together(l.grads.steps[0])) for l in (large,small)]
    assert off[1]<=1.1*off[0], off
    assert no_trace(small.model)

# ---- what there is while a window is open

class Look(Callback):
    "How many hooks and sums there are after each backward pass"
    order,run_valid = 60,False
    def before_fit(self): self.seen = []
    def after_backward(self): self.seen.append((sum(len(p._backward_hooks or ()) for p in self.model.parameters()), sum(len(o.sums) for o in sums())))

@pytest.mark.parametrize('host', (AccumulateStep,MicroBatch))
@pytest.mark.parametrize('dtype,n,seen', ((f32,4,[(0,0)]*4), (f64,4,[(0,0)]*4), (bf16,1,[(0,0)]), (bf16,3,[(0,0),(6,6),(6,6)])), ids=str)
def test_costs(dtype, n, seen, host):
    "No hook and no sum for other parameters, nor for a window of one micro-batch; otherwise one for each parameter until the window is closed"
    model,x,y = batch(dtype, n=12)
    learn = fitted(model, x, y, 12//n if host is AccumulateStep else 12, host(n if host is AccumulateStep else 12//n), Look())
    assert learn.look.seen==seen
    assert no_trace(learn.model)

class Odd(nn.Module):
    "Sparse and dense gradients, one frozen parameter, one in float32, and one that not every micro-batch uses"
    def __init__(self):
        super().__init__()
        self.emb,self.lin,self.frozen,self.out = nn.Embedding(17, 8, sparse=True),nn.Linear(64, 8),nn.Linear(8, 8).requires_grad_(False),nn.Linear(8, 10)
        self.some = nn.Parameter(torch.ones(8))
    def forward(self, x):
        h = self.emb((x[:,:16]*16).long()).mean(1) + self.frozen(self.lin(x).tanh())
        if (some := x[:,2]>0.9).any(): h = torch.where(some[:,None], h*self.some, h)
        return self.out(h.to(self.out.weight.dtype))

class Weighted(nn.Module):
    "A loss with a parameter"
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(10, dtype=bf16))
    def forward(self, pred, targ): return F.cross_entropy(pred*self.w, targ)

class Thaw(Callback):
    "Freeze `lin` and thaw `frozen` from the second epoch on"
    order,run_valid = 55,False
    def before_epoch(self):
        if self.epoch==1: self.model.lin.requires_grad_(False).zero_grad(), self.model.frozen.requires_grad_(True)

def odd_splitter(m): return [[*m.emb.parameters(), *m.frozen.parameters()],[*m.lin.parameters(), m.some],[*m.out.parameters()]]

class Zero(Callback):
    "After each step nothing has a gradient, sparse ones neither, which fastai's `zero_grad` keeps; keep those of the loss before"
    order,run_valid = 91,False
    def before_fit(self): self.steps = []
    def before_step(self): self.steps.append(self.learn.loss_func.w.grad.clone())
    def after_step(self):
        self.model.zero_grad()
        self.learn.loss_func.zero_grad()

@pytest.mark.parametrize('clip', (None,0.05))
@pytest.mark.parametrize('acc', (AccumulateStep(8),AccumulateStep(8, leftover='carry'),MicroBatch(6)), ids=str)
def test_odd_parameters(acc, clip):
    "Frozen and thawed, sparse, in groups, in float32, of the loss, not always used; clipped: each step has a gradient where the large batch's has one, exact to the format's precision"
    model,(_,x,y) = Odd().to(bf16),batch(bf16, n=96)
    model.out.float()
    def steps(bs, acc=None, dtype=None):
        learn = learner(deepcopy(model).to(dtype), x.to(dtype), y, bs, acc, [Thaw(),Zero()] + ([GradientClip(clip)] if clip else []), Weighted().to(dtype), splitter=odd_splitter)
        learn.fit(2, 0.) # at the same weights all the time
        assert no_trace(learn.model)
        return [[*s,w] for s,w in zip(learn.grads.steps, learn.zero.steps)]
    truth,large,small = steps(48, dtype=f64),steps(48),steps(6 if isinstance(acc, AccumulateStep) else 48, acc)
    assert len(large)==len(small)==4
    for t,a,b in zip(truth, large, small):
        assert [g is None for g in a]==[g is None for g in b]
        for u,h in zip(t, b): assert u is None or rel(u, h)<=torch.finfo(bf16).eps, (u.shape, rel(u, h))

# ---- what interrupts a window

class At(Callback):
    "Call `f` at `event` of micro-batch `i`"
    order,run_valid = 50,False
    def __init__(self, event, i, f): self.event,self.i,self.f,self.seen = event,i,f,0
    def __call__(self, event_name):
        if event_name=='after_pred': self.seen += self.training
        if event_name==self.event and self.seen==self.i+1 and self.training: self.f(self.learn)

def raises(exc):
    def f(learn): raise exc()
    return f

@pytest.mark.parametrize('exc', (KeyError,KeyboardInterrupt,CancelFitException,CancelEpochException,CancelBatchException,CancelBackwardException))
@pytest.mark.parametrize('event', ('after_pred','before_backward','after_backward'))
@pytest.mark.parametrize('mk', (lambda: AccumulateStep(4),lambda: MicroBatch(4)), ids=('AccumulateStep','MicroBatch'))
def test_interrupted(mk, event, exc):
    "Whatever ends a window, no hook and no sum stays"
    if exc is CancelBackwardException and event!='before_backward': pytest.skip('for the backward pass only')
    model,x,y = batch(bf16, n=32)
    acc = mk()
    learn = learner(model, x, y, 4 if isinstance(acc, AccumulateStep) else 16, acc, At(event, 2, raises(exc)))
    try: learn.fit(1)
    except (KeyError,KeyboardInterrupt): pass
    assert no_trace(model)
    if exc in (KeyError,KeyboardInterrupt): assert not together(grads(model)).any()

@pytest.mark.parametrize('i', (0,2,3))
@pytest.mark.parametrize('mk', (lambda: AccumulateStep(4),lambda: MicroBatch(4)), ids=('AccumulateStep','MicroBatch'))
def test_cancelled_micro_batch(mk, i):
    "The step is that of the other micro-batches"
    model,x,y = batch(bf16, n=16)
    acc = mk()
    small = fitted(model, x, y, 4 if isinstance(acc, AccumulateStep) else 16, acc, At('before_backward', i, raises(CancelBackwardException)))
    rest = [j for j in range(16) if j//4!=i]
    large = fitted(model, x[rest], y[rest], 12)
    assert rel(together(large.grads.steps[0]), together(small.grads.steps[0]))<=0.01

@pytest.mark.parametrize('event', ('after_pred','before_backward','after_backward'))
@pytest.mark.parametrize('mk', (lambda: AccumulateStep(4),lambda: MicroBatch(4)), ids=('AccumulateStep','MicroBatch'))
def test_fit_within_a_window(mk, event):
    "Another fit, at no learning rate, in the midst of a window leaves it as it is"
    model,x,y = batch(bf16, n=16)
    def run(f):
        acc = mk()
        learn = learner(deepcopy(model), x, y, 4 if isinstance(acc, AccumulateStep) else 16, acc, At(event, 2, f))
        learn.fit(1)
        assert no_trace(learn.model)
        return together(learn.grads.steps[-1])
    def fit(learn):
        (at,) = [cb for cb in learn.cbs if isinstance(cb, At)]
        kept = learn.xb,learn.yb,learn.pred,learn.loss,learn.loss_grad
        with learn.removed_cbs([at]): learn.fit(1, 0.)
        learn.model.train()
        learn.xb,learn.yb,learn.pred,learn.loss,learn.loss_grad = kept
        learn.training = True
    assert rel(run(noop), run(fit))<=1e-2

def test_taken_out_in_mid_fit():
    model,x,y = batch(bf16, n=32)
    learn = learner(model, x, y, 4, AccumulateStep(4), At('after_batch', 3, lambda learn: learn.detach_accum()))
    learn.fit(1)
    assert len(learn.grads.steps)==1+4 and no_trace(model)

# ---- beside other callbacks

class OnCPU(NonNativeMixedPrecision):
    "`NonNativeMixedPrecision` that does not insist on a GPU"
    def before_fit(self):
        self.dls.device = torch.device('cuda')
        super().before_fit()
        self.dls.device = torch.device('cpu')

def test_NonNativeMixedPrecision():
    "The model's gradients, in float16 and scaled, are the large batch's when the callback takes them for its own copies in float32; the scale moves as the large batch's"
    model,x,y = batch(f32, n=64)
    def run(bs, acc=None): return fitted(model, x, y, bs, acc, [ModelToHalf(),OnCPU(max_loss_scale=2.**20, scale_wait=2)], n_epoch=4)
    large = run(32)
    for small in (run(2, AccumulateStep(16)),run(32, MicroBatch(2))):
        assert small.on_cpu.loss_scale==large.on_cpu.loss_scale and len(small.grads.steps)==len(large.grads.steps)>=4
        assert rel(together(large.grads.steps[-1]), together(small.grads.steps[-1]))<=0.003
        assert no_trace(small.model)

def test_noise_scale():
    "It sees the sums, not what `.grad` is between micro-batches"
    model,x,y = batch(bf16, n=128)
    def run(dtype): return fitted(deepcopy(model).to(dtype), x.to(dtype), y, 8, AccumulateStep(8), NoiseScale()).noise_scale
    a,b = [torch.cat(run(o).rows).double().T for o in (f32,bf16)]
    for name,u,v in zip(('G2_B','r','h','q','n'), a, b): assert rel(u, v)<=0.03, (name, u, v)

# ---- in two processes

class Half(nn.Module):
    "A net with a part that only samples use whose pixel 2 is 1"
    def __init__(self): super().__init__(); self.net,self.some = convs(),nn.Linear(64, 10)
    def forward(self, x):
        some = x[:,2]==1
        return self.net(x) + (some[:,None]*self.some(x) if some.any() else 0)

def in_each(dtype):
    "A model and the global batch; the first of 16 micro-batches of each process uses all of the model, the others do not"
    model,x,y = batch(dtype, model=Half)
    x[:,2] = torch.arange(len(x))%(len(x)//2)<4
    return model,x,y

def samples(n): return MicroBatch(64//n, normalize='samples') # its last backward pass communicates
CASES = dict(accumulate=(AccumulateStep,False,False), unused=(AccumulateStep,True,False), microbatch=(lambda n: MicroBatch(64//n),True,False), samples=(samples,True,False),
             loop=(None,False,False), view=(None,True,True)) # the host; are there parameters that some micro-batches do not use; are gradients views of what is communicated

def work(c):
    "The gradients of a step as they were reduced: of one batch, and of 16 micro-batches"
    host,unused,view = c
    def steps(n):
        model,x,y = in_each(bf16)
        if not unused: model = model.net
        ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused, gradient_as_bucket_view=view)
        x,y = [o.chunk(2)[torch.distributed.get_rank()] for o in (x,y)]
        if host is None: return loop_grads(ddp, x, y, n)[0]
        learn = learner(ddp, x, y, 64//n if isinstance(host(n), AccumulateStep) else 64, host(n))
        learn.fit(1, 0.)
        assert no_trace(model)
        return learn.grads.steps[0]
    return steps(1),steps(16)

@pytest.fixture(scope='module')
def two(tmp_path_factory): return in_two(__file__, tmp_path_factory.mktemp('two'), CASES)

@pytest.mark.parametrize('name', CASES)
def test_two_processes(name, two):
    "Sums are rounded once and then reduced, as the gradients of a large batch are"
    (large,small),(_,other) = two(name)
    model,x,y = in_each(bf16)
    model = (model if CASES[name][1] else model.net).double()
    CE(model(x.double()), y).backward()
    truth = together(grads(model))
    assert torch.equal(together(small), together(other)) # they were reduced
    assert rel(truth, together(small))<=1.1*rel(truth, together(large)), (rel(truth, together(small)), rel(truth, together(large)))

if __name__=='__main__': work_on(CASES, work)
