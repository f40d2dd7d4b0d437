"What a loss of unknown type divides by is read from what it computes"
import pytest,warnings
from fastai.losses import DiceLoss,LabelSmoothingCrossEntropy,LabelSmoothingCrossEntropyFlat
from fastai.callback.tracker import TerminateOnNaNCallback
from fastai_accum.loop import Accumulator
from fastai_accum.window import Window,WarnMixed
from common import *

N,BS,N_STEP = 58,4,4
WAYS = {'acc':(BS, partial(AccumulateStep, N_STEP)), 'micro':(BS*N_STEP, partial(MicroBatch, 3)), 'sync':(BS*N_STEP, partial(MicroBatch, 3, sync_bn=True))}
W = torch.tensor([0.3,1.,3.])

def fit(l): l.fit(3, 0.05)

def bn_net(): return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

def pair(way, loss_func, data=None, large_loss=None, n=N, fit=fit, **kwargs):
    "A large batch and `way`"
    bs,acc = WAYS[way]
    if way=='sync': kwargs['model'] = bn_net
    large,small = learner(n, BS*N_STEP, loss_func=loss_func() if large_loss is None else large_loss, data=data, **kwargs),learner(n, bs, acc(), loss_func=loss_func(), data=data, **kwargs)
    for l in (large,small): run(l, fit)
    return large,small

def same(large, small, tol=1e-12):
    a,b = large.trace,small.trace
    assert len(a.steps)==len(b.steps)>0
    for s,t in zip(a.steps, b.steps): assert rel(s['weights'], t['weights']) <= tol
    assert rel([o['loss'] for o in a.batches], [o['loss'] for o in b.batches]) <= tol

def differ(p, t): return rel(flat(p.model.parameters()), flat(t.model.parameters()))

class Squeezed(nn.CrossEntropyLoss):
    "A subclass with a forward pass of its own"
    def forward(self, p, t):
        self.weight = self.weight.to(p)
        return super().forward(p, t[:,None].squeeze(-1))

def stale():
    "An option that was changed after fastai has copied it"
    loss = CrossEntropyLossFlat()
    loss.func.ignore_index = 0
    return loss

def ce(p, t, **kw): return F.cross_entropy(p, t, **kw)
def each(p, t): return F.cross_entropy(p, t, reduction='none')
def some(t): return (t>0).float()

SHOWN = dict(
    ignores=lambda p,t: ce(p, t, ignore_index=0), weights=lambda p,t: ce(p, t, weight=W.to(p)), both=lambda p,t: ce(p, t, weight=W.to(p), ignore_index=2), nll=lambda p,t: F.nll_loss(p.log_softmax(1), t, weight=W.to(p)),
    scaled=lambda p,t: 3-ce(p, t, ignore_index=0)*-0.5, selected=lambda p,t: ce(p[t>0], t[t>0]), sum_over_mask=lambda p,t: (each(p, t)*some(t)).sum()/some(t).sum(), sum_over_number=lambda p,t: (each(p, t)*some(t)).sum()/some(t).sum().item(),
    mean_over_mean=lambda p,t: (each(p, t)*some(t)).mean()/some(t).to(p).mean(), sum_of_shares=lambda p,t: (each(p, t)*some(t)/some(t).sum()).sum(), selected_mean=lambda p,t: each(p, t)[t>0].mean(),
    smooth=lambda p,t: ce(p, t, label_smoothing=0.2, ignore_index=0), deep=lambda p,t: torch.stack([ce(q, t, ignore_index=0) for q in (p, p.flip(1))]).mean(),
    sample_by_sample=lambda p,t: torch.stack([F.mse_loss(q[:k+1], torch.ones_like(q[:k+1])) for q,k in zip(p, t)]).mean(), sample_by_sample_sum=lambda p,t: sum(F.mse_loss(q[:k+1], torch.ones_like(q[:k+1])) for q,k in zip(p, t))/len(t),
    image=lambda p,t: F.cross_entropy(p[...,None,None], t[:,None,None], ignore_index=0), penalty=lambda p,t: ce(p, t, ignore_index=0) + 0.1, proportional=lambda p,t: ce(p, t) + F.mse_loss(p, torch.zeros_like(p)),
    at_least_1=lambda p,t: (each(p, t)*some(t)).sum()/some(t).sum().clamp(min=1), filled=lambda p,t: each(p, t).masked_fill(t<1, 0).sum()/(t>0).sum(), where=lambda p,t: torch.where(t>0, each(p, t), 0).sum()/(t>0).sum(),
    dot=lambda p,t: each(p, t)@some(t).to(p)/some(t).sum(), samples=lambda p,t: (each(p, t)*some(t)).sum()/len(t),
    without_nan=lambda p,t: torch.nan_to_num(ce(p, t, ignore_index=0)), huber=lambda p,t: F.huber_loss(p[t>0], torch.zeros_like(p[t>0])), counted=lambda p,t: (p.pow(2).sum(1)*some(t)).sum().div(some(t).sum()))
LOSSES = {k:(lambda f=f: f) for k,f in SHOWN.items()} | dict(subclass=lambda: Squeezed(weight=W, ignore_index=2), stale=stale, partial=lambda: partial(SHOWN['ignores']),
    compiled=lambda: torch.compile(nn.CrossEntropyLoss(ignore_index=0), backend='eager'))

@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('way', WAYS)
def test_denominators_are_read(way, name):
    if name=='stale': kw = dict(dtype=torch.float32, tol=1e-5) # fastai's loss makes float32 of float64
    else: kw = dict(tol=1e-12)
    tol = kw.pop('tol')
    with warnings.catch_warnings():
        warnings.filterwarnings('error', '.*no one number', UserWarning)
        same(*pair(way, LOSSES[name], **kw), tol)

@pytest.mark.parametrize('name', ('ignores','sum_over_mask','selected_mean','subclass'))
def test_counting_samples_would_be_another_run(name):
    large,_ = pair('acc', LOSSES[name])
    small = run(learner(N, BS, AccumulateStep(N_STEP, normalize='samples'), loss_func=LOSSES[name]()), fit)
    assert not differ(large, small) < 1e-4 # it may be nan

def total(p, t): return each(p, t).sum()
def mean(p, t): return each(p, t).mean()

def test_a_sum_stays_a_sum_or_becomes_the_mean():
    same(*pair('micro', lambda: lambda p,t: 0.1*total(p, t)))
    large,small = pair('acc', lambda: total, large_loss=mean)
    same(large, small)

@pytest.mark.parametrize('name', [k for k in LOSSES if k!='compiled'])
def test_in_validation(name):
    "Validation in parts of uneven size records the loss of the whole"
    kw = dict(loss_func=LOSSES[name](), dtype=torch.float32)
    large,small = learner(N, 16, **kw),learner(N, 16, MicroBatch(3, valid=True), **kw)
    for l in (large,small): run(l, fit)
    assert_same_run(large, small, 1e-5)
    for l in (large,small): l.validate(ds_idx=0)
    assert torch.is_grad_enabled() and not small.pred.requires_grad and not small.loss.requires_grad
    assert rel(small.get_preds(with_loss=False)[0], large.get_preds()[0]) <= 1e-5

def test_validation_that_fails_leaves_gradients_as_they_were():
    def loss(p, t): raise KeyError('loss')
    learn = learner(N, 16, MicroBatch(3, valid=True), loss_func=loss)
    with torch.no_grad():
        with pytest.raises(KeyError): learn.validate()
        assert not torch.is_grad_enabled()

# ---- models that compute their loss themselves

class WithLoss(nn.Module):
    "As those of transformers do it: the model is given its targets, and returns its loss beside its logits"
    def __init__(self): super().__init__(); self.net = net()
    def forward(self, x):
        logits,labels = self.net(x[:,:-1]),x[:,-1].long()
        return dict(loss=F.cross_entropy(logits, labels, ignore_index=0), logits=logits)

def with_labels(n=N):
    x,y = problem(n+16)
    return torch.cat([x, y[:,None].double()], 1),y

@pytest.mark.parametrize('way', ('acc','micro'))
def test_loss_inside_the_model(way):
    same(*pair(way, lambda: lambda out,t: out['loss'], data=with_labels(), model=WithLoss))

class TakeLoss(Callback):
    "Callbacks that put the model's loss in place of a dummy"
    order = -50
    def after_pred(self): self.took,self.learn.pred = self.pred['loss'],self.pred['logits']
    def after_loss(self): self.learn.loss_grad,self.learn.loss = self.took,self.took.clone()

@pytest.mark.parametrize('way', ('acc','micro'))
def test_loss_inside_the_model_by_a_callback(way):
    bs,acc = WAYS[way]
    kw = dict(loss_func=lambda p,t: p.sum()*0, data=with_labels(), model=WithLoss)
    large,small = learner(N, BS*N_STEP, cbs=TakeLoss(), **kw),learner(N, bs, acc(), cbs=TakeLoss(), **kw)
    for l in (large,small): run(l, fit)
    same(large, small)

# ---- micro-batches in which nothing counts

def rare(n=N):
    "In most micro-batches of 4, no target counts"
    x,y = problem(n+16)
    return x,(torch.arange(len(y))%16<3)*(1+y%2)

def constant(p, t): return F.cross_entropy(p[t>0], t[t>0]) if (t>0).any() else p.new_zeros(())

@pytest.mark.parametrize('loss', (constant,*(SHOWN[k] for k in ('ignores','sum_over_mask','selected_mean','at_least_1','where','filled','samples')),partial(F.cross_entropy, ignore_index=0)))
@pytest.mark.parametrize('way', ('acc','micro'))
def test_micro_batches_without_targets(way, loss): same(*pair(way, lambda: loss, data=rare(), shuffle=False))

def hinge(p, t): return p[t>0].relu().sum()/len(t) if (t>0).any() else p.new_zeros(())
def hinge_of_elements(p, t): return (p.relu()*(t>0)[:,None]).mean() if (t>0).any() else p.new_zeros(())

class FusedHinge(torch.autograd.Function):
    "As fused kernels have it, so that nothing shows what it divides by"
    @staticmethod
    def forward(ctx, p, t):
        ctx.save_for_backward(((p>0)*(t>0)[:,None]).to(p)/len(t))
        return hinge(p, t)
    @staticmethod
    def backward(ctx, g): return g*ctx.saved_tensors[0],None

def fused(p, t): return FusedHinge.apply(p, t) if (t>0).any() else p.new_zeros(())

@pytest.mark.parametrize('loss', (hinge,hinge_of_elements,fused))
@pytest.mark.parametrize('way', ('acc','micro'))
def test_constants_count_where_samples_do(way, loss):
    "A micro-batch without positives has no gradient, and yet its samples are among those that the large batch divides by"
    same(*pair(way, lambda: loss, data=rare(), shuffle=False))

def test_nothing_but_constants_is_an_error_as_without_the_callback():
    for acc in (None,AccumulateStep(N_STEP)):
        with pytest.raises(RuntimeError, match='does not require grad'): learner(N, BS, acc, loss_func=lambda p,t: p.new_zeros(())).fit(1)

@pytest.mark.parametrize('way', ('acc','micro'))
def test_the_recorded_loss_is_a_number(way):
    "`TerminateOnNaNCallback` goes on where the large batch does"
    bs,acc = WAYS[way]
    kw = dict(dtype=torch.float32, loss_func=SHOWN['ignores'], data=rare(), shuffle=False)
    large,small = learner(N, BS*N_STEP, cbs=TerminateOnNaNCallback(), **kw),learner(N, bs, acc(), cbs=TerminateOnNaNCallback(), **kw)
    for l in (large,small): run(l, fit)
    assert len(large.recorder.losses)==12 and not np.isnan(large.recorder.losses).any()
    assert_same_run(large, small, 1e-5)

# ---- losses that no one number weighs

class Both(nn.Module):
    def __init__(self, a, b): super().__init__(); self.a,self.b = a,b
    def forward(self, p, t): return self.a(p, t) + self.b(p, t)

MIXED = dict(mse=lambda p,t: ce(p, t, ignore_index=0)+F.mse_loss(p, torch.zeros_like(p)), dice=Both(nn.CrossEntropyLoss(ignore_index=0), DiceLoss(reduction='mean')), weights=Both(nn.CrossEntropyLoss(weight=W.double()), DiceLoss(reduction='mean')),
    own=lambda p,t: ce(p, t, ignore_index=0) + p.pow(2).mean(1).sqrt().prod(), sums=lambda p,t: ce(p, t)+each(p, t).sum(), sqrt=lambda p,t: ce(p, t, weight=W.to(p))+p.pow(2).mean().sqrt())

@pytest.mark.parametrize('name', MIXED)
@pytest.mark.parametrize('way', ('acc','micro'))
def test_mixed_denominators_are_warned_of_once(way, name):
    bs,acc = WAYS[way]
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        run(learner(N, bs, acc(), loss_func=MIXED[name]), fit)
    assert sum('no one number weighs its micro-batches' in str(w.message) for w in ws)==1

def ignoring(n=N):
    x,y = problem(n+16)
    return x,torch.where(torch.arange(len(y))%5==0, -100, y)

@pytest.mark.parametrize('loss', (LabelSmoothingCrossEntropy,LabelSmoothingCrossEntropyFlat))
@pytest.mark.parametrize('way', ('acc','micro'))
def test_label_smoothing_with_ignored_targets(way, loss):
    kw = dict(dtype=torch.float32, loss_func=loss())
    bs,acc = WAYS[way]
    with pytest.warns(UserWarning, match='no one number weighs'): run(learner(N, bs, acc(), data=ignoring(), **kw), fit)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        same(*pair(way, loss, dtype=torch.float32), 1e-5)

def test_mixed_denominators_of_a_loop():
    "No warning where a window is one micro-batch"
    x,y = problem(32)
    for n_step,n_warn in ((1,0),(4,1)):
        m = net().double()
        acc = Accumulator(m, torch.optim.SGD(m.parameters(), lr=0.1), MIXED['mse'], n_step=n_step)
        with warnings.catch_warnings(record=True) as ws:
            warnings.simplefilter('always')
            for i in range(0, 32, 4): acc.backward(m(x[i:i+4]), y[i:i+4])
        assert len(ws)==n_warn

def test_numbers_on_an_accelerator_are_looked_at_later():
    win,watch = Window(2),WarnMixed()
    for cs in ([torch.tensor(3.),8],[torch.tensor(2.),8]): win._compare(cs)
    watch.see(win, 'loss')
    with pytest.warns(UserWarning, match='no one number weighs'): watch.look('loss')
    win = Window(2)
    for cs in ([torch.tensor(3.),6],[torch.tensor(2.),4]): win._compare(cs)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        watch = WarnMixed()
        watch.see(win, 'loss')
        watch.look('loss')

# ---- what looks like something else

class Mul(torch.autograd.Function):
    "A function that is called as one of PyTorch's"
    @staticmethod
    def forward(ctx, x): return x*3
    @staticmethod
    def backward(ctx, g): return g*3

class Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): ctx.n = len(x); return x.mean()
    @staticmethod
    def backward(ctx, g): return g.expand(ctx.n)/ctx.n

def doubled(p, t):
    l = ce(p, t)
    for _ in range(60): l = l*0.5 + l*0.5
    return l

def pair_of(p, t): return torch.stack([ce(p, t), ce(p*2, t)])
def column(p, i): return F.mse_loss(p[:,i%3], torch.ones(len(p)).to(p))
def in_layers(p, t): return sum(ce(q, t) for q in torch.stack([p*k for k in range(1, 6)]))/5
def skips(p, t): return sum((q[:u+1].pow(2).mean() for q,u in zip(p, t) if u>0), p.sum()*0)/len(t)
def or_zero(p, t): return ce(p, t) + 0*p.sum()
ALIKE = dict(mul=lambda p,t: Mul.apply(ce(p, t)), mean=lambda p,t: Mean.apply(each(p, t)), many=lambda p,t: sum(ce(p, t)/1500 for _ in range(1500)), doubled=doubled,
    weighted_list=lambda p,t: (pair_of(p, t)*W[:2].to(p)).sum(), shifted_list=lambda p,t: (pair_of(p, t)*W[:2].to(p)+W[1:].to(p)).sum(), mean_of_list=lambda p,t: (pair_of(p, t)*W[:2].to(p)).mean(), dot_of_list=lambda p,t: pair_of(p, t)@W[:2].to(p),
    mean_of_number=lambda p,t: ce(p, t).mean(), sum_of_number=lambda p,t: ce(p, t, ignore_index=0).sum(), mean_of_columns=lambda p,t: p.pow(2).mean(0).mean(), transposed=lambda p,t: p.pow(2).t().mean(1).sum(),
    four_tasks=lambda p,t: sum(column(p, i) for i in range(4)), three_tasks=lambda p,t: sum(column(p, i) for i in range(3))/3, two_tasks=lambda p,t: sum(column(p, i) for i in range(2)), layers=in_layers, skips=skips, zero=or_zero,
    chunks=lambda p,t: sum(ce(q, u, reduction='sum') for q,u in zip(p.chunk(2), t.chunk(2)))/len(t), each_masked=lambda p,t: sum(q.pow(2).sum()/(1+(q.detach()>0).sum()) for q in p)/len(t))
OF_ONE = dict(samples=SHOWN['samples'], mean_of_each=lambda p,t: (p.pow(2)*(p.detach()>0)).sum(1).div((p.detach()>0).sum(1).clamp(min=1)).sum()/len(t), stacked=lambda p,t: torch.stack([q[:k+1].pow(2).mean() for q,k in zip(p, t)]).sum()/len(t),
    at_least_1=SHOWN['at_least_1'], at_least_1_int=lambda p,t: F.cross_entropy(p, t, reduction='none', ignore_index=0).sum()/(t>0).sum().clamp(min=1), reciprocal=lambda p,t: (each(p, t)*some(t).to(p)).sum()*some(t).to(p).sum().clamp(min=1).reciprocal(),
    halved=lambda p,t: SHOWN['at_least_1'](p, t)/2, of_halves=lambda p,t: F.cross_entropy(p, t, reduction='none', ignore_index=0).div(2).sum()/(t>0).sum().clamp(min=1))

@pytest.mark.parametrize('name', ALIKE)
@pytest.mark.parametrize('way', ('acc','micro'))
def test_what_looks_alike(way, name):
    with warnings.catch_warnings():
        warnings.filterwarnings('error', '.*no one number', UserWarning)
        same(*pair(way, lambda: ALIKE[name], fit=lambda l: l.fit(1, 0.05)))

@pytest.mark.parametrize('name', OF_ONE)
def test_micro_batches_of_one_sample(name):
    large,small = (run(learner(N, 16, acc, loss_func=OF_ONE[name]), fit) for acc in (None,MicroBatch(1)))
    same(large, small)

# ---- losses with parameters

class Learned(nn.Module):
    "Two tasks with learned weights, as of Kendall et al. 2018"
    def __init__(self): super().__init__(); self.s = nn.Parameter(torch.tensor([0.3,-0.2], dtype=torch.float64))
    def forward(self, p, t): return (-self.s[0]).exp()*ce(p, t, ignore_index=0) + self.s[0] + (each(p.flip(1), t)*some(t)).sum()/some(t).sum()/(2*self.s[1].exp()) + self.s[1]/2

@pytest.mark.parametrize('way', ('acc','micro'))
def test_learned_weights(way):
    "Of what divides by the same; the terms without a prediction do not count"
    res = []
    for bs,acc in ((BS*N_STEP,None),(WAYS[way][0],WAYS[way][1]())):
        loss = Learned()
        def opt(groups, **kwargs): return OptimWrapper(opt=torch.optim.SGD([*L(groups).concat(),*loss.parameters()], lr=0.1))
        learn = learner(N, bs, acc, loss_func=loss, opt_func=opt)
        run(learn, lambda l: l.fit(3, 0.1))
        res.append((flat(learn.model.parameters()), flat(loss.parameters())))
    assert (res[0][1]-flat(Learned().parameters())).abs().min() > 1e-3
    for a,b in zip(*res): assert rel(a, b) <= 1e-12

# ---- a loop

@pytest.mark.parametrize('name', ('ignores','sum_over_mask','mean_over_mean','selected','subclass','deep'))
def test_in_a_loop(name):
    x,y = problem(64)
    res = []
    for bs,n_step in ((16,1),(4,4)):
        seed()
        m = net().double()
        acc = Accumulator(m, torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), LOSSES[name](), n_step=n_step)
        for _ in range(3):
            for i in range(0, 64, bs): acc.backward(m(x[i:i+bs]), y[i:i+bs])
        res.append((flat(m.parameters()), torch.stack(acc.losses)))
    for a,b in zip(*res): assert rel(a, b) <= 1e-12
