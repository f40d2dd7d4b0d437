"Whatever ends or disturbs a fit: no gradient is lost or left behind, and the learner is as it was"
import pytest
from hypothesis import given,settings,strategies as st
from common import *

N,BS,N_STEP = 73,4,4 # 19 micro-batches, the last of one sample: windows of 16, 16, 16, 16 and 9
EVENTS = 'before_batch after_pred after_loss before_backward after_backward before_step after_step after_batch'.split()
class Boom(Exception): pass

class Bomb(Callback):
    "Raise `exc` at the `k`-th call of `event` in training, from behind (or, with a low `order`, before) all other callbacks"
    def __init__(self, event, k, exc, order=99): self.event,self.k,self.exc,self.order,self.n = event,k,exc,order,0
    def __call__(self, name):
        if name!=self.event or not self.training: return
        self.n += 1
        if self.n==self.k+1: raise self.exc('boom')

def fresh(acc=True, **kwargs): return learner(N, BS if acc else BS*N_STEP, AccumulateStep(N_STEP) if acc is True else acc or None, **kwargs)

def assert_plain(learn, n_cbs):
    "Nothing of ours is left on `learn`"
    assert type(learn.opt) is Optimizer
    assert 'all_batches' not in vars(learn) and len(learn.cbs)==n_cbs
    assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())

def assert_goes_on(learn):
    "Another fit is that of a large batch that starts from the same weights and optimizer state"
    large = fresh(False)
    large.model.load_state_dict(deepcopy(learn.model.state_dict()))
    large.create_opt(); large.opt.load_state_dict(deepcopy(learn.opt.state_dict()))
    learn.trace.steps,learn.trace.batches = [],[]
    for l in (large,learn):
        l.dls.train.rng,l.dls.train.shuffle = random.Random(3),True
        run(l, lambda l: l.fit_one_cycle(2, 0.05))
    assert_same_run(large, learn, 1e-12)

@given(event=st.sampled_from(EVENTS), k=st.integers(0, 18), exc=st.sampled_from((Boom,KeyboardInterrupt)), order=st.sampled_from((-200,99)),
       leftover=st.sampled_from(('step','drop','carry')))
@settings(max_examples=60)
def test_error_anywhere(event, k, exc, order, leftover):
    "An error or an interrupt at any event of any micro-batch"
    learn = fresh(AccumulateStep(N_STEP, leftover=leftover))
    n = len(learn.cbs)
    bomb = Bomb(event, k, exc, order)
    if event in ('before_step','after_step','after_batch'): bomb.k = k%4 # heard once a window
    with pytest.raises(exc): run(learn, lambda l: l.fit(2, 0.1, cbs=bomb))
    assert_plain(learn, n)
    if leftover=='step': assert_goes_on(learn)

def boom_at(k, f, exc):
    "`f`, raising `exc` when it is called for the `k`-th time"
    n = 0
    def _f(*args, **kwargs):
        nonlocal n
        n += 1
        if n==k: raise exc('boom')
        return f(*args, **kwargs)
    return _f

def test_interrupt_between_micro_batches():
    "An interrupt while no callback is at work: all is as it was"
    class Interrupted(AccumulateStep):
        name = 'accumulate_step'
        def _begin(self, learn, bs):
            if self.win and self.win.count==2: raise KeyboardInterrupt
            return super()._begin(learn, bs)
    learn = fresh(Interrupted(N_STEP))
    with pytest.raises(KeyboardInterrupt): run(learn, lambda l: l.fit(1, 0.1))
    assert_plain(learn, 3)

@pytest.mark.parametrize('where', ('loader','model','loss','backward','optimizer','metric'))
@pytest.mark.parametrize('exc', (Boom,KeyboardInterrupt))
def test_error_outside_callbacks(where, exc, monkeypatch):
    "An error where no callback is at work, in the middle of a window or (optimizer) at its step"
    learn = fresh(**(dict(dtype=torch.float32, metrics=accuracy) if where=='metric' else {}))
    learn.create_opt()
    n = len(learn.cbs)
    with monkeypatch.context() as m:
        def plant(o, attr): m.setattr(o, attr, boom_at(6, getattr(o, attr), exc))
        if   where=='loader':    plant(learn.dls.train, 'do_batch')
        elif where=='model':     plant(learn.model, 'forward')
        elif where=='loss':      plant(learn, 'loss_func')
        elif where=='backward':  hook = learn.model[0].weight.register_hook(boom_at(6, noop, exc))
        elif where=='optimizer': m.setattr(learn.opt, 'cbs', learn.opt.cbs + boom_at(6, lambda *args, **kwargs: None, exc))
        else:
            learn.recorder.train_metrics = True
            plant(learn.metrics[0], 'accumulate')
        with pytest.raises(exc): run(learn, lambda l: l.fit(2, 0.1))
    if where=='backward': hook.remove()
    assert_plain(learn, n)
    if where!='metric': assert_goes_on(learn)

def without(n, i, bs=BS):
    "`i`-th micro-batch left out of `n` samples in order"
    x,y = problem(n+16)
    keep = [j for j in range(n+16) if not i*bs <= j < (i+1)*bs]
    return x[keep],y[keep]

@pytest.mark.parametrize('event,exc', [(e, CancelBatchException) for e in EVENTS[:4]] + [('before_backward', CancelBackwardException)])
@pytest.mark.parametrize('i', (0,1,3,5,18))
def test_cancelled_micro_batch(event, exc, i):
    "A micro-batch that another callback cancels counts nothing; first, in the middle or last of its window, all others do"
    small = learner(N, BS, AccumulateStep(N_STEP), shuffle=False)
    run(small, lambda l: l.fit(1, 0.1, cbs=Bomb(event, i, exc)))
    sizes = [16]*4+[9]
    sizes[i//4] -= 1 if i==18 else BS
    large = resize(learner(N-(1 if i==18 else BS), BS, data=without(N, i) if i<18 else [t[[j for j in range(N+16) if j!=N-1]] for t in problem(N+16)]), sizes)
    large.dls.train.shuffle = False
    run(large, lambda l: l.fit(1, 0.1))
    assert_same_run(large, small, 1e-12, batches=False)
    assert len(small.trace.batches)==5 # one a window, as ever
    assert_plain(small, 3)

@pytest.mark.parametrize('exc', (CancelTrainException,CancelEpochException,CancelFitException))
@pytest.mark.parametrize('event', EVENTS[:4])
@pytest.mark.parametrize('i', (1,4,6,16))
def test_training_cut_short(exc, event, i):
    "What was seen of a window is stepped, before validation"
    small = learner(N, BS, AccumulateStep(N_STEP), shuffle=False)
    run(small, lambda l: l.fit(1, 0.1, cbs=Bomb(event, i, exc)))
    large = resize(learner(N, BS, shuffle=False), [16]*(i//4)+([4*(i%4)] if i%4 else []))
    large.dls.train.shuffle = False
    run(large, lambda l: l.fit(1, 0.1))
    assert_same_run(large, small, 1e-12, batches=False)
    assert_plain(small, 3)
    assert_goes_on(small)

@pytest.mark.parametrize('exc', (CancelStepException,CancelBatchException))
@pytest.mark.parametrize('event,k', (('before_step',1),('before_step',4)))
def test_cancelled_step(exc, event, k):
    "A step that another callback cancels is cancelled as the large batch's would be"
    large,small = fresh(False),fresh()
    for l in (large,small): run(l, lambda l: l.fit(2, 0.1, cbs=Bomb(event, k, exc)))
    if exc is CancelStepException or k!=4: assert_same_run(large, small, 1e-12)

@pytest.mark.parametrize('exc', (CancelTrainException,CancelEpochException,CancelFitException))
@pytest.mark.parametrize('event', ('before_step','after_step','after_batch'))
@pytest.mark.parametrize('k', (0,4))
def test_cut_short_between_windows(exc, event, k):
    "Raised where only whole windows are heard of"
    small = fresh()
    run(small, lambda l: l.fit(2, 0.1, cbs=Bomb(event, k, exc)))
    assert_plain(small, 3)
    assert_goes_on(small)

def test_error_in_another_callbacks_before_train():
    "Between epochs there is nothing to break"
    for event in ('before_fit','before_epoch','before_train','after_train','before_validate','after_epoch'):
        class Late(Callback):
            order = 99
            def boom(self): raise Boom('boom')
        setattr(Late, event, Late.boom)
        learn = fresh()
        with pytest.raises(Boom): run(learn, lambda l: l.fit(1, 0.1, cbs=Late()))
        learn.trace.batches,learn.trace.steps = [],[]
        assert type(learn.opt) is Optimizer
        assert_goes_on(learn)
        learn.detach_accum()
        run(learn, lambda l: l.fit(1, 0.1))
        assert len(learn.trace.steps)==2*5+19 and 'all_batches' not in vars(learn)

def test_loader_ends_early():
    "It says 10 micro-batches and gives 6"
    class Short(Sized):
        def __len__(self): return 10
    small = resize(learner(N, BS, AccumulateStep(N_STEP)), [4]*6)
    small.dls.train.__class__ = Short
    large = resize(learner(N, BS), [16,8])
    for l in (large,small): run(l, lambda l: l.fit(2, 0.1))
    assert_same_run(large, small, 1e-12, batches=False)
    assert_plain(small, 3)

def test_loader_goes_on():
    "It says 6 micro-batches and gives 10: a step where it was to end, windows from there on"
    class Long(Sized):
        def __len__(self): return 6
    small = resize(learner(N, BS, AccumulateStep(N_STEP)), [4]*10)
    small.dls.train.__class__ = Long
    large = resize(learner(N, BS), [16,8,16])
    for l in (large,small): run(l, lambda l: l.fit(2, 0.1))
    assert_same_run(large, small, 1e-12, batches=False)

def test_loader_without_len():
    "fastai itself cannot train without `len`; its error comes through, and the learner is none the worse"
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): return iter(zip(*problem(20)))
    learn = fresh()
    dl,learn.dls.loaders[0] = learn.dls.train,DataLoader(Stream(), bs=4)
    with pytest.raises(TypeError): learn.fit(1)
    learn.dls.loaders[0] = dl
    assert_plain(learn, 3)
    assert_goes_on(learn)

def test_empty_loader():
    for leftover in ('step','drop','carry'):
        learn = resize(learner(N, BS, AccumulateStep(N_STEP, leftover=leftover)), [[]])
        run(learn, lambda l: l.fit(2, 0.1))
        assert learn.trace.steps==[]
        assert_plain(learn, 3)

def test_parameters_without_gradient():
    "Unused and frozen parameters stay out of it"
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.net,self.unused = net(),nn.Linear(3,3)
            self.net[0].weight.requires_grad_(False)
        def forward(self, x): return self.net(x)
    large,small = learner(N, 16, model=Odd),learner(N, BS, AccumulateStep(N_STEP), model=Odd)
    for l in (large,small): run(l, lambda l: l.fit(2, 0.1))
    assert_same_run(large, small, 1e-12)
    assert small.model.unused.weight.grad is None and small.model.net[0].weight.grad is None

@pytest.mark.parametrize('bs', (16,5))
def test_sparse_gradients(bs):
    "`nn.Embedding(sparse=True)`, with and without a window that needs rescaling"
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb,self.lin = nn.Embedding(11, 4, sparse=True),nn.Linear(4, 3)
        def forward(self, x): return self.lin(self.emb(x).mean(1))
    g = torch.Generator().manual_seed(0)
    x,y = torch.randint(11, (N+16,5), generator=g),torch.randint(3, (N+16,), generator=g)
    def one(bs, acc=None):
        learn = learner(N, bs, acc, model=Words, data=problem(N+16), opt_func=partial(OptimWrapper, opt=torch.optim.SGD))
        ds = list(zip(x,y))
        learn.dls.loaders[0] = DataLoader(ds[:N], bs=bs)
        learn.dls.loaders[1] = DataLoader(ds[N:], bs=16)
        run(learn, lambda l: l.fit(2, 0.1))
        return learn
    small = one(bs, AccumulateStep(N_STEP))
    assert small.model.emb.weight.grad is None or small.model.emb.weight.grad.is_sparse
    assert_same_run(one(bs*N_STEP), small, 1e-12)

def test_nan_loss():
    "A NaN is what the large batch would make of it, and `TerminateOnNaNCallback` ends the fit after the same step"
    x,y = problem(N+16)
    x[37] = float('nan')
    large,small = (learner(N, bs, acc, data=(x,y), shuffle=False) for bs,acc in ((16,None), (4,AccumulateStep(4))))
    for l in (large,small): run(l, lambda l: l.fit(2, 0.1, cbs=TerminateOnNaNCallback()))
    assert len(small.trace.steps)==len(large.trace.steps)==3
    for a,b in zip(large.trace.steps, small.trace.steps): assert torch.allclose(a['weights'], b['weights'], rtol=1e-12, atol=0, equal_nan=True)
    assert_plain(small, 3)

def test_optimizer_made_anew_mid_fit():
    "Another callback replaces `learn.opt` between windows and inside one"
    class Anew(Callback):
        order = 99
        def before_batch(self):
            if self.training and self.pct_train>0.3 and not getattr(self, 'did', False): self.did = True; self.learn.create_opt()
    large,small = fresh(False),fresh()
    for l in (large,small): run(l, lambda l: l.fit(2, 1e-3, cbs=Anew()))
    assert_same_run(large, small, 1e-12)
    assert_plain(small, 3)

def test_detach_and_one_fit_only():
    "`to_accum` stays, `fit(cbs=...)` does not, `detach_accum` ends it"
    learn = fresh(None)
    learn.dls.loaders[0] = fresh().dls.train
    counts = []
    def fit(**kw): learn.trace.steps,learn.trace.batches = [],[]; run(learn, lambda l: l.fit(1, 0.1, **kw)); counts.append(len(learn.trace.steps))
    fit(); fit(cbs=AccumulateStep(4)); fit()
    assert learn.to_accum(n_step=2) is learn; fit()
    learn.to_accum(n_step=10); fit()
    assert learn.detach_accum() is learn; fit()
    assert counts==[19,5,19,10,2,19]
    assert len(learn.cbs)==2

def test_error_while_a_window_is_carried():
    "A fit dies in validation, with a window carried over: the next fit does not find its gradients"
    class Late(Callback):
        def after_validate(self): raise Boom('boom')
    died,other = (fresh(AccumulateStep(N_STEP, leftover='carry')) for _ in range(2))
    with pytest.raises(Boom): run(died, lambda l: l.fit(2, 0.1, cbs=Late()))
    assert type(died.opt) is Optimizer and not any(p.grad.any() for p in died.model.parameters())
    other.model.load_state_dict(deepcopy(died.model.state_dict()))
    other.create_opt(); other.opt.load_state_dict(deepcopy(died.opt.state_dict()))
    died.trace.steps,died.trace.batches = [],[]
    for l in (other,died):
        l.dls.train.rng = random.Random(3)
        run(l, lambda l: l.fit(2, 0.1))
    assert_same_run(other, died, 1e-12)

def test_the_first_cancel_counts():
    "A fit that is cancelled in a window ends, whatever another callback makes of its leftover"
    class Fit(Callback):
        def after_loss(self):
            if self.training and self.accumulate_step.win.seen==2: raise CancelFitException
    class Train(Callback):
        order = 99
        def after_batch(self):
            if self.training: raise CancelTrainException
    learn = fresh()
    run(learn, lambda l: l.fit(3, 0.1, cbs=[Fit(),Train()]))
    assert learn.epoch==0 and len(learn.trace.steps)==1
    assert_plain(learn, 3)

def test_others_cannot_step_or_zero():
    "A callback that steps and zeroes of its own accord, in every micro-batch, does so only when a window is complete"
    class Eager(Callback):
        order = 99
        def after_backward(self):
            if self.accumulate_step.win.last: return # a window that is still open
            self.opt.step(); self.opt.zero_grad()
            self.opt.set_hypers(wd=0.)
    large,small = fresh(False),fresh()
    run(large, lambda l: l.fit(2, 0.1)); run(small, lambda l: l.fit(2, 0.1, cbs=Eager()))
    assert_same_run(large, small, 1e-12)

def test_detached_after_an_error_before_training():
    "A fit dies before its first batch and the callback is taken out: the next fit is plain"
    class Late(Callback):
        order = 99
        def before_train(self): raise Boom('boom')
    learn = fresh()
    with pytest.raises(Boom): run(learn, lambda l: l.fit(1, 0.1, cbs=Late()))
    learn.detach_accum()
    run(learn, lambda l: l.fit(1, 0.1))
    assert len(learn.trace.steps)==19
