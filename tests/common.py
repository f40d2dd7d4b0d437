"A small problem, learners for it, and what a run shows of itself at every step"
import random
import numpy as np
from fastai.basics import *
from fastai.callback.all import *
from fastai_accum import *

torch.set_num_threads(1)

def problem(n, n_in=6, n_out=3, seed=0):
    "`n` samples of a three-class problem that a small net can learn, in float64"
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, n_in, generator=g, dtype=torch.float64)
    return x, (x@torch.randn(n_in, n_out, generator=g, dtype=torch.float64)).argmax(1)

def loaders(x, y, bs, n_valid=16, shuffle=True, **kwargs):
    "The last `n_valid` samples are for validation"
    n = len(x)-n_valid
    return DataLoaders(DataLoader(list(zip(x[:n], y[:n])), bs=bs, shuffle=shuffle, **kwargs), DataLoader(list(zip(x[n:], y[n:])), bs=n_valid))

class Sized(DataLoader):
    "Batches of the sizes in `sizes`, one list an epoch (the last list serves for all that follow)"
    sizes,epoch = [],-1
    def __len__(self): return len(self.sizes[max(0, min(self.epoch, len(self.sizes)-1))])
    def create_batches(self, samps):
        self.epoch += 1
        samps = iter(list(samps))
        for k in self.sizes[min(self.epoch, len(self.sizes)-1)]: yield self.do_batch([self.do_item(next(samps)) for _ in range(k)])

def resize(learn, sizes):
    "Let the training loader of `learn` give batches of `sizes`"
    seed()
    learn.dls.loaders[0] = Sized(learn.dls.train.dataset, bs=learn.dls.train.bs, shuffle=True)
    learn.dls.train.sizes = sizes if is_listy(sizes[0]) else [sizes]
    return learn

def net(n_in=6, n_out=3): return nn.Sequential(nn.Linear(n_in, 8), nn.Tanh(), nn.Linear(8, n_out))
def two_groups(m): return [params(m[0]), params(m[2])]

class Trace(Callback):
    "What every step saw and left behind"
    order = 100
    def before_fit(self):
        if not hasattr(self, 'steps'): self.steps,self.batches = [],[]
    def after_step(self):
        self.steps.append(dict(weights=flat(self.model.parameters()), state=flat(tensors(self.opt.state_dict()['state'])), hypers=[dict(h) for h in self.opt.hypers]))
    def after_batch(self):
        if not self.training: return
        self.batches.append(dict(loss=float(self.loss.detach()), pct=self.pct_train, train_iter=self.train_iter, iter=self.iter, n_iter=self.n_iter, epoch=self.epoch))

def flat(ts):
    ts = [torch.as_tensor(t).detach().double().flatten() for t in ts]
    return torch.cat(ts) if ts else torch.zeros(0)
def tensors(o):
    "All numbers in nested `o`, in order"
    if isinstance(o, dict): return [t for k in sorted(o, key=str) for t in tensors(o[k])]
    if isinstance(o, (list,tuple,L)): return [t for v in o for t in tensors(v)]
    return [o] if isinstance(o, (int,float,torch.Tensor)) and not isinstance(o, bool) else []

def seed(s=7):
    torch.manual_seed(s); random.seed(s); np.random.seed(s)

def learner(n, bs, acc=None, dtype=torch.float64, opt_func=partial(SGD, mom=0.9), loss_func=None, data=None, model=None, cbs=None, path=None, metrics=None, **kwargs):
    "A learner for `n` training samples; with `Recorder` in float32 only, as that knows no float64"
    x,y = data or problem(n+16)
    seed()
    model = (model or net)().to(dtype)
    rec = dtype==torch.float32
    learn = Learner(loaders(x.to(dtype), y, bs, **kwargs), model, loss_func=ifnone(loss_func, nn.CrossEntropyLoss()), opt_func=opt_func,
                    default_cbs=rec, cbs=L(None if rec else TrainEvalCallback) + L(acc) + L(cbs) + Trace(), splitter=two_groups if isinstance(model, nn.Sequential) else trainable_params, path=path, metrics=metrics)
    if rec: learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def run(learn, fit):
    "`fit(learn)` from a fixed random state"
    seed()
    fit(learn)
    return learn

def rel(a, b):
    "Relative difference of `b` from `a`"
    a,b = torch.as_tensor(a, dtype=torch.float64),torch.as_tensor(b, dtype=torch.float64)
    assert a.shape==b.shape, f'{a.shape} is not {b.shape}'
    return float((a-b).norm()/a.norm().clamp(min=1e-30)) if a.numel() else 0.

def assert_same_run(large, small, tol, batches=True):
    "Weights, optimizer state, schedule, counters and losses of two traced learners agree at every step"
    a,b = large.trace,small.trace
    assert len(a.steps)==len(b.steps), f'{len(a.steps)} steps against {len(b.steps)}'
    assert len(a.steps)>0
    for i,(s,t) in enumerate(zip(a.steps, b.steps)):
        assert rel(s['weights'], t['weights']) <= tol, f"weights after step {i}: {rel(s['weights'], t['weights'])}"
        assert rel(s['state'], t['state']) <= tol, f"optimizer state after step {i}: {rel(s['state'], t['state'])}"
        assert str(s['hypers'])==str(t['hypers']), f'schedule at step {i}'
    if not batches: return
    assert len(a.batches)==len(b.batches)
    for s,t in zip(a.batches, b.batches):
        s,t = dict(s),dict(t)
        assert rel(s.pop('loss'), t.pop('loss')) <= tol
        assert s==t
    if hasattr(large, 'recorder'): assert_same_records(large.recorder, small.recorder, tol)

def assert_same_records(a, b, tol):
    assert a.lrs==b.lrs and a.iters==b.iters and a.metric_names==b.metric_names
    assert str(getattr(a, 'hps', None))==str(getattr(b, 'hps', None))
    assert rel(a.losses, b.losses) <= tol
    assert len(a.values)==len(b.values)
    for v,w in zip(a.values, b.values): assert rel(list(v), list(w)) <= tol

__all__ = [k for k in globals() if not k.startswith(('_','test'))] # fastai's `test_eq` and others are no tests
