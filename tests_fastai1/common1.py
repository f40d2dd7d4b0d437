"A small problem, learners of fastai 1 for it, and what a run shows of itself at every step"
import random
import numpy as np,torch
from functools import partial
from torch import nn
from torch.utils.data import DataLoader,TensorDataset
import fastai
from fastai.basic_data import DataBunch
from fastai.basic_train import Learner,LearnerCallback
from fastai.callback import Callback,OptimWrapper
from fastai.train import * # `lr_find`, `fit_one_cycle`, `to_fp16` for `Learner`
from fastai_accum import AccumulateStep,MicroBatch

assert fastai.__version__=='1.0.61'
torch.set_num_threads(1)
BS,N_STEP = 4,4
SGD,CE = partial(torch.optim.SGD, momentum=0.9),nn.CrossEntropyLoss
acc4 = partial(AccumulateStep, n_step=N_STEP)

def seed(s=7): torch.manual_seed(s); random.seed(s); np.random.seed(s)

def problem(n):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=g, dtype=torch.float64)
    return x, (x@torch.randn(6, 3, generator=g, dtype=torch.float64)).argmax(1)

def flat(ts):
    ts = [torch.as_tensor(t).detach().double().flatten() for t in ts]
    return torch.cat(ts) if ts else torch.zeros(0)
def weights(learn): return flat(learn.model.parameters())
def rel(a, b): return float((a-b).norm()/(a.norm() or 1))

class Steps(Callback):
    "What every step of the optimizer was made with, and the weights and the optimizer's state after it"
    _order = 200
    def __init__(self, learn): self.learn,self.log = learn,[]
    def on_batch_begin(self, train, **kwargs):
        opt = getattr(self.learn.opt, 'wrapped', None) or self.learn.opt
        if not train or hasattr(opt.opt, 'plain_step'): return
        opt.opt.plain_step,opt.opt.step = opt.opt.step,lambda *args: self.step(opt)
    def step(self, opt):
        opt.opt.plain_step()
        state = opt.opt.state_dict()['state']
        self.log.append((weights(self.learn), opt.lr, opt.mom, opt.wd, flat(t for s in state.values() for t in s.values() if t is not None)))

def net(): return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()

def learner(n, bs, acc=None, loss=None, opt=SGD, path=None, data=None, fns=(), model=net, shuffle=True, drop_last=False, **kwargs):
    "Of `n` samples and 16 for validation; `acc` is the last of its `callback_fns`"
    x,y = data or problem(n+16)
    seed()
    model = model()
    train,valid = TensorDataset(x[:n], y[:n]),TensorDataset(x[n:], y[n:])
    db = DataBunch(DataLoader(train, bs, shuffle=shuffle, drop_last=drop_last), DataLoader(valid, 16), device=torch.device('cpu'), path=path or '.')
    if isinstance(model, nn.Sequential) and len(model)==3: kwargs.setdefault('layer_groups', [model[:2], model[2:]])
    learn = Learner(db, model, loss_func=loss or CE(), opt_func=opt, silent=True, callback_fns=[*fns, *([acc] if acc else [])], **kwargs)
    learn.steps = Steps(learn)
    learn.callbacks.append(learn.steps)
    return learn

def clean(learn): return type(learn.opt) is OptimWrapper and all(p.grad is None or not p.grad.any() for p in learn.model.parameters())
def run(learn, fit, s=3):
    seed(s)
    fit(learn)
    assert clean(learn) and type(learn.data.train_dl).__name__=='DeviceDataLoader' and len(learn.data.train_dl)==len(learn.data.train_dl.dl)
    return learn
def run_both(fit, *learners): return [run(l, fit) for l in learners]

def assert_same(large, small, tol=1e-12):
    "Weights, optimizer state and rates at every step"
    a,b = large.steps.log,small.steps.log
    assert len(a)==len(b)>0, f'{len(b)} steps where {len(a)} are to be'
    for i,(s,t) in enumerate(zip(a, b)):
        assert rel(s[0], t[0])<=tol, f'weights after step {i}: {rel(s[0], t[0])}'
        assert rel(s[4], t[4])<=tol, f'state of the optimizer after step {i}: {rel(s[4], t[4])}'
        assert s[1:4]==t[1:4], f'rates at step {i}: {s[1:4]}, {t[1:4]}'

def assert_same_records(large, small, tol=1e-5):
    "What the recorder has"
    a,b = large.recorder,small.recorder
    assert a.lrs==b.lrs and a.moms==b.moms and a.nb_batches==b.nb_batches and a.names==b.names and len(a.losses)==len(b.losses)>0
    for k in ('losses','val_losses','metrics'):
        xs,ys = (np.array([[float('nan' if x is None else x) for x in np.ravel(v)] for v in getattr(o, k)]) for o in (a,b))
        assert np.allclose(xs, ys, rtol=tol, atol=0, equal_nan=True), f'{k}: {xs}, {ys}'

def assert_same_run(large, small, tol=1e-12, losses=1e-5):
    assert_same(large, small, tol)
    assert_same_records(large, small, losses)
