"The noise scale against gradients of plain losses, and a learner that is as it was; this file is also what two processes run"
from contextlib import nullcontext
from copy import deepcopy
import pytest
from fastai.text.data import LMDataLoader
from matplotlib import pyplot as plt
from scipy.stats import ttest_1samp
from common import *
from processes import *
from fastai_accum.noise import *
from test_companions import Mixed,Spoil
from test_distributed import Cut
from test_host import Quiet

W = torch.tensor([0.1,1,7], dtype=torch.float64)
CE,IGNORE = nn.CrossEntropyLoss(),nn.CrossEntropyLoss(ignore_index=1)
SUM = nn.CrossEntropyLoss(reduction='sum')

# ---- what is computed by hand: gradients of plain losses, without any callback

def grad(model, loss, x, y):
    "The gradient of `loss` on one batch"
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss(model(x), y), list(model.parameters()))])

def truth(model, loss, x, y):
    "Trace of the covariance of the samples' gradients, over the squared norm of their mean"
    g = torch.stack([grad(model, loss, x[i:i+1], y[i:i+1]) for i in range(len(x))])
    return float((g-g.mean(0)).pow(2).sum(1).mean()/g.mean(0).pow(2).sum())

def best(wins, model, loss, count, ratio=False):
    """Squared norm of the mean gradient and trace of the covariance, from the micro-batches of a window in each process, None if it has but one size: the best linear
    unbiased estimate (Gauss-Markov) from squared norms of what each process has after 1, 2, 4, ... micro-batches and of the whole, whose covariances, if all
    gradients are noise, are the squares of the share that two of these have in common. `ratio`: processes have an equal say, whatever they count"""
    wins = [[(*m, float(count(m[1]))) for m in w] for w in wins]
    sizes = torch.tensor([c for w in wins for *_,c in w], dtype=torch.float64)
    say,sq,i = [],[],0
    scale = [len(wins)*sum(c for *_,c in w) if ratio else float(sizes.sum()) for w in wins]
    def total(w): return sum(grad(model, loss, x, y)*c for x,y,c in w if c)
    for w,o in zip(wins, scale):
        for k in [2**j for j in range(9) if 2**j<len(w)]:
            if sum(c for *_,c in w[:k]):
                say.append(torch.zeros(len(sizes)).double()); say[-1][i:i+k] = 1/o
                sq.append((total(w[:k])/o).pow(2).sum())
        i += len(w)
    say.append(torch.cat([torch.full((len(w),), 1/o, dtype=torch.float64) for w,o in zip(wins, scale)]))
    sq.append(sum(total(w)/o for w,o in zip(wins, scale)).pow(2).sum())
    say,sq = torch.stack(say),torch.stack(sq)
    X = torch.stack([(say*sizes).sum(1)**2, (say**2*sizes).sum(1)], 1)
    if torch.linalg.matrix_rank(X/X.norm(dim=0), rtol=1e-6)<2: return None
    P = torch.linalg.pinv((say.sqrt()*sizes@say.sqrt().T)**2)
    return torch.linalg.solve(X.T@P@X, X.T@P@sq)

class Windows(Callback):
    "The micro-batches of each window"
    order = 40
    def before_fit(self): self.all,self.open = [],[]
    def before_backward(self): self.open.append((self.x, self.y))
    def before_step(self):
        self.all.append(self.open)
        self.open = []

class Cancels(Callback):
    "Cancel every third backward pass"
    order = 30
    def before_fit(self): self.n = 0
    def before_backward(self):
        self.n += 1
        if self.n%3==0: raise CancelBackwardException

class Cuts(Callback):
    "End the epoch before its seventh micro-batch"
    order = 30
    def before_train(self): self.n = 0
    def before_batch(self):
        self.n += 1
        if self.n==7: raise CancelTrainException

def measured(acc, n=61, bs=4, sizes=None, cbs=(), loss_func=CE, fit=lambda l: l.fit(2, 0.), **kwargs):
    "A learner after a fit at fixed weights, with `NoiseScale` and `Windows`"
    learn = learner(n, bs, acc, cbs=[NoiseScale(),Windows(),*cbs], loss_func=loss_func, **kwargs)
    if sizes: resize(learn, sizes)
    return run(learn, fit)

def rows(learn): return torch.cat(learn.noise_scale.rows)

def check(rows, windows, *args, **kwargs):
    "Each window's numbers make the best estimate; how many windows have one?"
    some = 0
    for (A,r,h,q,n),wins in zip(rows, windows):
        est = best(wins, *args, **kwargs)
        assert n==sum(len(y) for w in wins for _,y in w)
        if est is None: assert not h>q*q*(1+1e-6); continue
        some += 1
        assert rel(est, torch.stack([h*A-q*r,r-q*A])/(h-q*q)) <= 1e-10
    return some

def ones(y): return len(y)
UNEVEN = [5,1,7,2,6,3,4,4,9,1,8]
CASES = dict(
    uneven=dict(acc=AccumulateStep(5), sizes=UNEVEN),
    n_samples=dict(acc=AccumulateStep(n_samples=15), sizes=UNEVEN),
    parts=dict(acc=MicroBatch(5), bs=22),
    weights=dict(acc=AccumulateStep(6), loss_func=nn.CrossEntropyLoss(W), count=lambda y: W[y].sum()),
    ignored=dict(acc=AccumulateStep(6), bs=2, loss_func=IGNORE, count=lambda y: (y!=1).sum()),
    ignored_in_parts=dict(acc=MicroBatch(2), bs=11, loss_func=IGNORE, count=lambda y: (y!=1).sum()),
    cancelled=dict(acc=AccumulateStep(5), cbs=[Cancels()]),
    cut=dict(acc=AccumulateStep(4), cbs=[Cuts()]),
    sums=dict(acc=AccumulateStep(4), loss_func=SUM),
    not_normalized=dict(acc=AccumulateStep(4, normalize='none'), sizes=UNEVEN, loss_func=SUM),
    sums_in_parts=dict(acc=MicroBatch(5), bs=22, loss_func=SUM),
    scaled=dict(acc=AccumulateStep(4), cbs=[Mixed(full=True, init_scale=2.**10, growth_interval=3),GradientClip(1e-3)]),
)

@pytest.mark.parametrize('name', CASES)
def test_window(name):
    "What is kept of a window makes the best estimate from its norms after 1, 2, 4, ... micro-batches and of the whole, computed without accumulation"
    kw = deepcopy(CASES[name])
    count = kw.pop('count', ones)
    learn = measured(**kw)
    loss = CE if learn.loss_func.reduction=='sum' else learn.loss_func
    assert len(rows(learn))==len(learn.windows.all)==len(learn.noise_scale.values)
    assert check(rows(learn), [[w] for w in learn.windows.all], learn.model, loss, count)>=4

# ---- the estimate

def every(n, sizes, acc, model=None, loss=CE, **kwargs):
    "The noise scale of `n` samples, from every possible window, with repetition, of micro-batches of `sizes`; and what it is by hand"
    x,y = problem(n)
    ids = torch.cartesian_prod(*[torch.arange(n)]*sum(sizes))
    cut = [sum(sizes)] if isinstance(acc, MicroBatch) else sizes
    batches = [(x[i],y[i]) for w in ids for i in w.split(cut)]
    seed()
    learn = Learner(DataLoaders(Batches(batches), Batches()), net().double(), loss_func=loss, opt_func=SGD, default_cbs=False, cbs=[TrainEvalCallback(),acc,NoiseScale(beta=1)], **kwargs)
    learn.fit(1, 0.)
    return learn.noise_scale.values[-1],truth(learn.model, loss, x, y)

class Batches(list): "A loader of given batches"

@pytest.mark.parametrize('n,sizes,acc', ((4,[2,1],AccumulateStep(2)), (3,[1,1,2],AccumulateStep(3)), (4,[1,2],MicroBatch(2))), ids=('two','three','parts'))
def test_every_window(n, sizes, acc):
    "Over all windows that there are, mean squared norms are their expectations, so the estimate is the noise scale"
    v,by_hand = every(n, sizes, acc)
    assert rel(by_hand, v) <= 1e-10

def linear(n, d=10, bs=4, noise=1., seed=0, start=None, acc=None, **kwargs):
    """A learner for `n` targets that a linear model predicts from `d` normal features, but for normal `noise`, and its noise scale at today's weights: where these
    differ from the best by v, the gradient's mean is 2v, and its second moment 4*(v@v*(d+2) + noise**2*d)"""
    g = torch.Generator().manual_seed(seed)
    def rand(*size): return torch.randn(*size, generator=g, dtype=torch.float64)
    x,best,v = rand(n, d),rand(d),rand(d) if start is None else start
    y = x@best + noise*rand(n)
    model = nn.Linear(d, 1, bias=False).double()
    with torch.no_grad(): model.weight.copy_(best+v)
    learn = Learner(DataLoaders(Batches(zip(x.split(bs), y[:,None].split(bs))), Batches()), model, loss_func=nn.MSELoss(), opt_func=SGD, default_cbs=False, cbs=[TrainEvalCallback(),*L(acc)], **kwargs)
    return learn,float(d+1 + d*noise**2/(v@v)) if (v@v)>0 else math.inf

def find(learn, tol=0.5, **kwargs):
    "`bs_find` at today's weights, without a warning about its width"
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='.*wider than')
        return learn.bs_find(**{**dict(lr=0, tol=tol, show_plot=False, pace=False), **kwargs})

def test_coverage():
    "The noise scale that is known in closed form lies in the interval for at least 90 % of 50 seeds"
    inside,finite = 0,0
    for s in range(50):
        learn,true = linear(400, seed=s, acc=AccumulateStep(4))
        r = find(learn, n_it=20)
        inside += r.interval[0]<=true<=r.interval[1]
        finite += r.interval[1]<math.inf
        assert r.interval[0]<=r.noise_scale<=r.interval[1] and r.n_step==max(1, round(r.batch_size/4))
    assert inside>=45, inside
    assert finite>=40, finite # the intervals do say something

def test_interval():
    "At the ends of the interval a t-test of `y - end*x` is just significant; each step's is that of the samples so far, and weights are those asked for"
    rng = np.random.default_rng(0)
    x,z = rng.standard_normal((2,40))
    x,y = 2+x,5+z+x
    r,lo,hi = ratio_interval(x, y)
    assert rel(y.mean()/x.mean(), r[-1]) <= 1e-12
    for end in (lo[-1],hi[-1]): assert rel(0.05, ttest_1samp(y-end*x, 0).pvalue) <= 1e-9
    for end in [o[-1] for o in ratio_interval(x, y, level=0.5)[1:]]: assert rel(0.5, ttest_1samp(y-end*x, 0).pvalue) <= 1e-9
    for k in (1,2,5,17): assert rel(np.nan_to_num([o[k-1] for o in (r,lo,hi)], posinf=-1), np.nan_to_num([o[-1] for o in ratio_interval(x[:k], y[:k])], posinf=-1)) <= 1e-9
    gaps = np.insert(x, [0,3,3,40], [np.nan,np.nan,np.inf,np.nan]),np.insert(y, [0,3,3,40], [1,np.nan,2,3])
    assert rel([o[-1] for o in (r,lo,hi)], [o[-1] for o in ratio_interval(*gaps)]) <= 1e-9
    w = 0.9**np.arange(40)[::-1]
    assert rel(np.average(y, weights=w)/np.average(x, weights=w), ratio_interval(x, y, 0.9)[0][-1]) <= 1e-12
    steps = np.r_[np.zeros(30), np.ones(10)]>0 # with weights that are all alike or 0, it is the interval of those that count
    assert rel([o[-1] for o in ratio_interval(x[30:], y[30:])][1:], [o[-1] for o in ratio_interval(np.where(steps, x, np.nan), y, 1-1e-12)][1:]) <= 1e-6

def test_interval_without_end():
    "No upper end where the denominator may be 0, no lower one where the numerator may; the estimate is never negative"
    rng = np.random.default_rng(0)
    x,y = rng.standard_normal((2,40))
    def last(x, y): return [o[-1] for o in ratio_interval(x, y)]
    r,lo,hi = last(x-x.mean()+0.1, y-y.mean()+9)
    assert 0<lo<r<hi==math.inf and rel(0.05, ttest_1samp(y-y.mean()+9-lo*(x-x.mean()+0.1), 0).pvalue) <= 1e-9
    r,lo,hi = last(x-x.mean()-0.1, y-y.mean()+9)
    assert 0<lo<r==hi==math.inf
    assert last(x-9, y+9)[1]<math.inf==last(x-9, y+9)[0]
    r,lo,hi = last(x-x.mean()+9, y-y.mean()-0.1)
    assert 0==r==lo<hi<1
    assert last(x-x.mean()+0.1, y-y.mean()+0.1)[1:]==[0,math.inf]
    assert last(x[:1], y[:1]+9)[1:]==[0,math.inf] and np.isnan(last(x[:1]*np.nan, y[:1])[0])

def test_no_noise():
    "If all samples are equal, one of them is as good as many"
    x,y = problem(1)
    learn = learner(64, 4, data=(x.repeat(80,1), y.repeat(80)))
    r = learn.bs_find(show_plot=False)
    assert r.noise_scale<1e-10 and r.interval[1]<1e-9 and (r.batch_size,r.n_step)==(1,1)

def test_all_noise():
    "Where the mean gradient is 0 the interval has no upper end"
    learn,_ = linear(1280, start=torch.zeros(10, dtype=torch.float64))
    with pytest.warns(UserWarning, match="can't be told from noise"): r = learn.bs_find(lr=0, n_it=40, show_plot=False)
    assert r.interval[1]==math.inf and r.interval[0]>11
    assert find(learn, n_it=40, max_n_step=7)[2:4]==(28,7)

def test_negative_estimate():
    "Windows whose gradient is exactly 0 make the squared norm of the mean come out negative: as for 0, the noise scale is inf, and as large a batch as possible is suggested"
    x = torch.eye(4, dtype=torch.float64).repeat(2,1)
    model = nn.Linear(4, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    learn = Learner(DataLoaders(Batches([(o,s*torch.ones(4,1,dtype=torch.float64)) for o in x.split(4) for s in (1,-1)]), Batches()), model, loss_func=nn.MSELoss(),
                    opt_func=SGD, default_cbs=False, cbs=[TrainEvalCallback(),AccumulateStep(2),NoiseScale()])
    learn.fit(3, 0.)
    assert (learn.noise_scale.values==math.inf).all() and (learn.noise_scale.intervals[:,1]==math.inf).all()
    r = find(learn)
    assert (r.noise_scale,r.interval[1],r.batch_size,r.n_step)==(math.inf,math.inf,16,4)

# ---- a run

def plain_values(acc, bs, **kwargs): return measured(acc, n=64, bs=bs, fit=lambda l: l.fit(3, 0.05), **kwargs).noise_scale

def test_callbacks_agree():
    "Micro-batches of a loader, and parts of a batch, while training; and a loss that counts each sample twice"
    a,b,c = plain_values(AccumulateStep(4), 4),plain_values(MicroBatch(4), 16),plain_values(AccumulateStep(4), 4, loss_func=nn.CrossEntropyLoss(0*W+2))
    assert len(a.values)==12 and rel(a.values, b.values) <= 1e-10 and rel(a.values, c.values) <= 1e-10
    assert rel(np.nan_to_num(a.intervals, posinf=-1), np.nan_to_num(b.intervals, posinf=-1)) <= 1e-8

@pytest.mark.parametrize('acc,bs', ((AccumulateStep(4),4), (MicroBatch(4),16)), ids=('AccumulateStep','MicroBatch'))
def test_run_is_the_same(acc, bs):
    "Whoever looks on changes nothing"
    a,b = (run(learner(61, bs, deepcopy(acc), dtype=torch.float32, cbs=cbs), lambda l: l.fit_one_cycle(2, 0.05)) for cbs in ([],[NoiseScale()]))
    assert_same_run(a, b, 0)

def test_skipped_step():
    "A step that `GradScaler` skips is left out"
    noise = plain_values(AccumulateStep(4), 4, cbs=[Mixed(full=True, init_scale=2.**10, growth_interval=3),Spoil(float('inf'), epochs=(1,))])
    bad = (~rows(noise.learn).isfinite()).any(1)
    i = int(bad.nonzero())
    assert len(noise.values)==12 and np.isfinite(noise.values[1:]).all() and rel(noise.values[i-1], noise.values[i]) <= 1e-10

@pytest.mark.parametrize('acc,bs', ((AccumulateStep(4),4), (MicroBatch(4),16)), ids=('AccumulateStep','MicroBatch'))
def test_no_waits(acc, bs):
    "The host waits for the device as often as without the callback"
    def waits(*cbs):
        learn = learner(61, bs, deepcopy(acc), cbs=[Quiet(),*cbs])
        learn.remove_cb(Trace)
        run(learn, lambda l: l.fit(2, 0.01))
        return learn.quiet.mode.n
    assert waits(NoiseScale())==waits()
    class Looks(NoiseScale):
        def before_step(self): super().before_step(); float(self.rows[-1][0,0])
    assert waits(Looks())!=waits()

def test_column():
    "A metric shows the estimate as of the end of each epoch"
    noise = NoiseScale(beta=0.9)
    learn = run(learner(64, 4, AccumulateStep(4), cbs=noise, dtype=torch.float32, metrics=[accuracy,noise.metric]), lambda l: l.fit(3, 0.05))
    assert learn.recorder.metric_names[4]=='noise_scale'
    assert rel([v[3] for v in learn.recorder.values], noise.values[[3,7,11]]) <= 1e-9
    assert len(noise.values)==len(learn.recorder.losses)

@pytest.mark.parametrize('acc,bs,cbs', ((AccumulateStep(4),4,[]), (AccumulateStep(4),4,[GradientClip(0.01)]), (AccumulateStep(4),4,[Mixed(full=True)]), (MicroBatch(5),16,[]), (AccumulateStep(1),16,[])), ids=str)
@pytest.mark.parametrize('loss', (CE,nn.CrossEntropyLoss(W),IGNORE), ids=('plain','weights','ignored'))
def test_norms(acc, bs, cbs, loss):
    "They are those of the large batch, before its gradients are clipped"
    class Norms(Callback):
        order = 9
        def before_fit(self): self.all = []
        def before_step(self): self.all.append(flat(p.grad for p in self.model.parameters()).norm())
    def fit(l): l.fit(2, 0.05)
    large,small = learner(61, 16, cbs=[Norms(),*(cb for cb in deepcopy(cbs) if not isinstance(cb, Mixed))], loss_func=loss),measured(deepcopy(acc), bs=bs, cbs=deepcopy(cbs), loss_func=loss, fit=fit)
    run(large, fit)
    assert len(small.noise_scale.norms)==8 and rel(large.norms.all, small.noise_scale.norms)<1e-12
    line, = small.noise_scale.plot_norms().get_lines()
    assert rel(line.get_ydata(), large.norms.all)<1e-12
    plt.close('all')

def test_norms_of_nothing():
    "There are none before the first fit's first step; of sums that are not normalized, it is that of the mean over samples"
    noise = NoiseScale()
    assert len(noise.norms)==0
    a,b = (measured(AccumulateStep(4, normalize=n), loss_func=l) for n,l in (('auto',CE),('none',SUM)))
    assert rel(a.noise_scale.norms, b.noise_scale.norms)<1e-12
    with pytest.raises(ValueError, match="`ax`='x': pass an axis"): a.noise_scale.plot_norms('x')

def test_windows_of_one():
    "They tell nothing"
    learn = measured(AccumulateStep(1))
    assert np.isnan(learn.noise_scale.values).all() and len(learn.noise_scale.values)==32
    assert np.isnan(measured(MicroBatch(16), bs=16).noise_scale.values).all()

def test_forgets():
    "A fit begins anew, and what an interrupted one left is of no account"
    def fit(l):
        with pytest.raises(KeyboardInterrupt): l.fit(1, 0.05, cbs=Ends('before_batch', KeyboardInterrupt, 6))
        l.load_model_state()
        l.fit(2, 0.)
    def mk():
        learn = learner(64, 4, AccumulateStep(4), cbs=NoiseScale())
        start = deepcopy(learn.model.state_dict())
        learn.load_model_state = lambda: (learn.model.load_state_dict(start), seed(), learn.dls.train.rng.seed(1))
        return learn
    a = run(mk(), lambda l: (l.load_model_state(), l.fit(2, 0.)))
    assert len(a.noise_scale.values)==8 and (a.noise_scale.values==run(mk(), fit).noise_scale.values).all()

# ---- `bs_find`

class Ends(Callback):
    "Raise `exc` at the `at`-th `event`"
    order = 45
    def __init__(self, event, exc=None, at=None): store_attr(); self.n_event,self.log = 0,[]
    def __call__(self, event_name):
        if event_name==self.event:
            self.n_event += 1
            self.log.append(event_name)
            if self.n_event==self.at: raise self.exc('as told')
        return super().__call__(event_name)

class Stateful(nn.Module):
    "Remembers batches in ways that a model can"
    def __init__(self): super().__init__(); self.register_buffer('n', torch.zeros(1)); self.hidden,self.count = [torch.zeros(1)],0
    def reset(self): self.hidden = [torch.zeros(1)]
    def forward(self, x):
        self.hidden,self.count = [x.detach().mean(0)],self.count+1
        self.n += 1
        return x

class Counting(nn.CrossEntropyLoss):
    "Remembers how often it was computed"
    def __init__(self): super().__init__(); self.register_buffer('n', torch.zeros(1))
    def forward(self, *args): self.n += 1; return super().forward(*args)

def norm_net():
    m = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3), nn.Dropout(0.3), Stateful())
    m[0].bias.requires_grad_(False)
    return m

LEARNERS = dict(
    fresh=dict(opt_func=Adam),
    trained=dict(opt_func=Adam, fit=1, loss_func=Counting()),
    torch_optimizer=dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW), fit=1),
    accumulating=dict(acc=AccumulateStep(2), fit=1, cbs=[NoiseScale()]),
    parts=dict(acc=MicroBatch('auto'), fit=1),
    mixed=dict(cbs=[MixUp(),Mixed('bf16')], fit=1, loss_func=CrossEntropyLossFlat()),
    hooked=dict(acc=AccumulateStep(3, sync_bn='stats'), cbs=[ActivationStats(with_hist=False)]),
)
def made(name, event):
    kw = deepcopy(LEARNERS[name])
    fit,cbs = kw.pop('fit', 0),kw.pop('cbs', [])
    learn = learner(64, 8, kw.pop('acc', None), dtype=torch.float32, model=norm_net, metrics=accuracy, cbs=[*cbs,Ends(event)], **kw)
    learn.dls.train.drop_last = True
    seed(3)
    if fit: learn.fit(fit, 0.01)
    return learn

def snapshot(learn):
    "All that can be seen of a learner"
    dl,averages = learn.dls.train,[learn.recorder.smooth_loss,*learn.metrics]
    return dict(averages=str([vars(o) for o in averages]), loss=flat(loss.buffers()).tolist() if isinstance(loss := learn.loss_func, nn.Module) else None, weights=flat(learn.model.parameters()).tolist(), buffers=flat(learn.model.buffers()).tolist(), grads=[None if p.grad is None else p.grad.tolist() for p in learn.model.parameters()],
        modules=[(sorted(vars(m)),m.training,len(m._forward_hooks),str(getattr(m, 'hidden', None)),getattr(m, 'count', None)) for m in learn.model.modules()],
        opt=None if learn.opt is None else (id(learn.opt),flat(tensors(learn.opt.state_dict()['state'])).tolist(),str(list(learn.opt.hypers))),
        rng=str((random.getstate(),np.random.get_state(),torch.get_rng_state().tolist(),dl.rng.getstate(),id(dl.rng))),
        learn={k:id(v) for k,v in vars(learn).items()}, cbs=[(id(cb),{k:(id(v),str(v)) for k,v in vars(cb).items()}) for cb in learn.cbs],
        modes=(torch.is_grad_enabled(),torch.is_autocast_enabled('cpu')))

def leaves_unchanged(find, name, event, exc, at):
    "`find` of a learner, which `exc` may end at the `at`th `event`: nothing that can be seen has changed, and training goes on as if it had not been"
    event = event or 'after_fit'
    learn,other = made(name, event),made(name, event)
    if exc: learn.ends.at,learn.ends.exc = learn.ends.n_event+at,exc
    before = snapshot(learn)
    with pytest.raises(exc) if exc else nullcontext(): find(learn)
    after = snapshot(learn)
    for k in before: assert str(before[k])==str(after[k]), k
    learn.ends.at = None
    for l in (learn,other):
        seed(5)
        l.fit(1, 0.01)
    assert_same_run(other, learn, 0)
    assert (flat(learn.model.buffers())==flat(other.model.buffers())).all()

@pytest.mark.parametrize('name,event,exc,at', (('fresh',None,None,0), ('torch_optimizer',None,None,0), ('accumulating',None,None,0), ('parts',None,None,0), ('mixed',None,None,0),
    ('trained','before_batch',KeyboardInterrupt,3), ('accumulating','after_step',RuntimeError,2), ('parts','before_backward',RuntimeError,6), ('mixed','after_pred',KeyboardInterrupt,5),
    ('hooked','before_step',KeyboardInterrupt,2)))
def test_unchanged(name, event, exc, at):
    leaves_unchanged(partial(find, n_it=10, lr=0.1), name, event, exc, at)

def test_order_of_texts():
    "A loader of a language model shuffles its texts in place; the next fit reads them as it would have"
    texts = [torch.randint(20, (n,)) for n in (9,14,6,11,8,13)]
    def learn():
        seed()
        dls = DataLoaders(*[LMDataLoader(texts, bs=2, seq_len=4, shuffle=s) for s in (True,False)])
        return Learner(dls, nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 20)), loss_func=CrossEntropyLossFlat(), cbs=AccumulateStep(2))
    a,b = learn(),learn()
    with a.no_bar(): a.bs_find(n_it=10, show_plot=False)
    def read(learn):
        seed()
        return [x.tolist() for x,_ in learn.dls.train]
    assert read(a)==read(b)

def spied(learn, f):
    "What `f(learn)` gave in each step of `bs_find`, and what that returned"
    seen = []
    learn.add_cb(Callback(after_step=lambda cb: seen.append(f(cb.learn))))
    r = find(learn, n_it=3)
    return seen,r

@pytest.mark.parametrize('acc,bs,per_step', ((AccumulateStep(n_samples=9),4,3), (MicroBatch(4),16,4), (None,4,8), (AccumulateStep(n_samples=3, normalize='samples'),4,8), (MicroBatch('auto'),16,8), (MicroBatch('auto'),4,2)), ids=str)
def test_measures_with(acc, bs, per_step):
    "The learner's own callback if it makes parts, else one of its kind that does: as many as an epoch has up to 8, or parts of two samples or more"
    learn = learner(64, bs, acc)
    def look(l):
        cb, = [cb for cb in l.cbs if isinstance(cb, (AccumulateStep,MicroBatch))]
        assert cb.normalize==(acc.normalize if acc else 'auto')
        return type(cb),cb.win.count,cb is acc
    seen,_ = spied(learn, look)
    assert seen==[(MicroBatch if isinstance(acc, MicroBatch) else AccumulateStep,per_step,per_step in (3,4) and acc is not None)]*3

def test_learning_rate():
    "None is the learner's own, 0 leaves the weights where they are"
    def look(l): return l.opt.hypers[-1]['lr'],flat(l.model.parameters())
    for lr,rate in ((None,0.03),(0,0),(0.1,0.1),(slice(0.1,0.2),0.2)):
        learn = learner(64, 4, AccumulateStep(4))
        learn.lr = 0.03
        start,seen = flat(learn.model.parameters()),[]
        learn.add_cb(Callback(after_step=lambda cb: seen.append(look(cb.learn))))
        find(learn, n_it=5, lr=lr)
        assert {s[0] for s in seen}=={rate}
        assert all((s[1]==start).all()==(lr==0) for s in seen)

def test_when_it_stops():
    "When the interval is narrow enough, after 20 steps at the earliest, or after `n_it` steps with a warning"
    def steps(**kwargs):
        learn,seen = linear(1280, acc=AccumulateStep(4))[0],[]
        learn.add_cb(Callback(after_step=lambda cb: seen.append(1)))
        r = learn.bs_find(lr=0, show_plot=False, pace=False, **kwargs)
        return len(seen),r
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        n,r = steps(tol=math.inf)
        assert n==20
        k,r = steps(tol=2.)
        assert 20<k<80 and r.interval[1]-r.interval[0]<=2*r.noise_scale
    with pytest.warns(UserWarning, match='wider than `tol`=0'):
        n,s = steps(tol=0, n_it=k-1)
        assert n==k-1 and s.interval[1]-s.interval[0]>2*s.noise_scale
    with pytest.warns(UserWarning, match='after 100 steps'): assert steps(tol=0)[0]==100 # more than an epoch has

def test_suggestion():
    "The noise scale is the batch to take, in samples and in micro-batches of the loader that is there"
    learn,true = linear(2560, acc=AccumulateStep(8))
    r = find(learn, n_it=80)
    assert r.interval[0]<true<r.interval[1] and r.batch_size==round(r.noise_scale) and r.n_step==round(r.batch_size/4)>1
    assert find(learn, n_it=80, max_n_step=2)[2:4]==(8,2)
    whole = [tuple(map(torch.cat, zip(*learn.dls.train[i:i+16]))) for i in range(0, 640, 16)]
    learn.dls.loaders[0] = Batches(whole)
    learn.remove_cb(AccumulateStep)
    assert find(learn, n_it=40).n_step==1 # 64 are more than that already

def test_loggers_keep_still(tmp_path):
    "Files of a run are not those of `bs_find`"
    learn = learner(64, 4, AccumulateStep(4), dtype=torch.float32, path=tmp_path, cbs=[CSVLogger(),SaveModelCallback(),ShowGraphCallback()])
    learn.remove_cb(ShowGraphCallback)
    learn.fit(2, 0.05)
    files = {f:(f.read_bytes(),f.stat().st_mtime_ns) for f in tmp_path.rglob('*') if f.is_file()}
    find(learn, lr=0.1, n_it=20)
    assert files=={f:(f.read_bytes(),f.stat().st_mtime_ns) for f in tmp_path.rglob('*') if f.is_file()} and len(files)==2

def test_plots():
    "Of a run, and of `bs_find` if asked"
    learn = measured(AccumulateStep(4), fit=lambda l: l.fit(2, 0.05))
    fig,ax = plt.subplots()
    assert learn.noise_scale.plot(ax) is ax
    line, = ax.get_lines()
    assert rel(line.get_ydata(), learn.noise_scale.values) <= 0 and ax.get_yscale()=='log' and len(ax.collections)==1
    n = len(plt.get_fignums())
    find(learn, n_it=2)
    assert len(plt.get_fignums())==n
    find(learn, n_it=2, show_plot=True)
    assert len(plt.get_fignums())==n+1
    plt.close('all')

def test_errors():
    "They say what to do"
    for kw,text in (({'n_it':0},'`n_it`=0'), ({'max_n_step':0.5},'`max_n_step`=0.5'), ({'tol':-1},'`tol`=-1'), ({'tol':math.nan},'`tol`=nan')):
        with pytest.raises(ValueError, match=text): learner(64, 4).bs_find(**kw)
    for beta in (0,1.1,-1,math.nan):
        with pytest.raises(ValueError, match='`beta`='): NoiseScale(beta)
    with pytest.raises(ValueError, match='put it beside `AccumulateStep` or `MicroBatch`'): learner(64, 4, NoiseScale()).fit(1)
    with pytest.raises(ValueError, match="sync_bn=True.*Take `sync_bn='stats'`"): learner(64, 8, MicroBatch(4, sync_bn=True), model=norm_net, cbs=NoiseScale()).fit(1)
    learner(64, 8, MicroBatch(4, sync_bn=True), cbs=NoiseScale()).fit(1) # without a BatchNorm it is no matter
    learn = learner(64, 8, MicroBatch('auto', sync_bn=True), model=norm_net)
    with pytest.raises(ValueError, match=r"`bs_find` compares.*MicroBatch\(sync_bn=True\).*`learn.to_microbatch\(8, sync_bn='stats'\).bs_find\(\)`"): find(learn)
    assert find(learn.to_microbatch(4, sync_bn='stats'), n_it=5).noise_scale>0

@pytest.mark.parametrize('acc,n', ((MicroBatch('auto'),1), (MicroBatch(8),1), (AccumulateStep(1),1), (MicroBatch(4),0), (AccumulateStep(2),0)), ids=str)
def test_nothing_to_compare_is_told(acc, n):
    "Once in a fit"
    learn = learner(64, 8, acc, cbs=NoiseScale())
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        learn.fit(2)
    assert sum('each step so far is of one micro-batch' in str(w.message) for w in ws)==n==np.isnan(learn.noise_scale.values).all()
    for learn in (learner(64, 64), learner(64, 64, AccumulateStep(4)), learner(64, 1, MicroBatch(1))):
        with pytest.raises(ValueError, match='Take another batch size'): learn.bs_find()
    with pytest.raises(ValueError, match='no two finite gradients'): learner(64, 4, Spoil(math.nan, epochs=range(9))).bs_find(n_it=2)
    with pytest.raises(ValueError, match='one of them is enough'): learner(64, 4, GradientAccumulation(16)).bs_find()

# ---- two processes

DIST = dict(
    uneven=dict(n=71, cut=38),
    weights=dict(n=71, cut=38, loss=nn.CrossEntropyLoss(W)),
    not_normalized=dict(n=71, cut=38, loss=SUM, acc=AccumulateStep(4, normalize='none')),
    parts=dict(n=71, cut=38, acc=MicroBatch(2), bs=8),
    even_parts=dict(n=64, acc=MicroBatch(2), bs=8),
    parts_with_sums=dict(n=71, cut=38, acc=MicroBatch(3), bs=8, loss=SUM),
    first_missing=dict(n=64, acc=AccumulateStep(2), skip=True),
)

class Skip(Callback):
    "Leave out all but the last micro-batch of a window in one of the processes"
    order,run_valid = 20,False
    def after_loss(self):
        if rank_distrib()==1 and not self.accumulate_step.win.last: raise CancelBatchException

def work(n, cut=None, loss=CE, acc=AccumulateStep(4), bs=4, skip=False):
    learn = learner(n, bs, acc, cbs=[NoiseScale(),Windows(),*([Skip()] if skip else [])], loss_func=loss)
    if cut: learn.dls.loaders[0] = Cut(learn.dls.train, device='cpu'); learn.dls.train.cut = cut
    steps = []
    def state(): return str((flat(learn.model.parameters()),learn.dls.loaders,learn.cbs,get_random_states()))
    with learn.distrib_ctx(cpu=True):
        run(learn, lambda l: l.fit(2, 0.))
        learn.add_cb(Callback(after_step=lambda cb: steps.append(1)))
        before,found = state(),find(learn, n_it=6, lr=0.1)
        same = before==state() and len(steps)==6
    return dict(rows=rows(learn), values=learn.noise_scale.values, windows=learn.windows.all, model=learn.model.state_dict(), found=found, same=same)

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "What each of two processes saw of one case"
    return in_two(__file__, tmp_path_factory.mktemp('two'), DIST)

@pytest.mark.parametrize('name', DIST)
def test_processes(name, two):
    "What is kept of a window makes the best estimate from the norms that each process has on the way, and the global gradient's; `bs_find` takes as many steps as told and leaves learners as they were"
    ranks,kw = two(name),DIST[name]
    loss = kw.get('loss', CE)
    count = (lambda y: W[y].sum()) if loss.weight is not None else ones
    model = net().double()
    model.load_state_dict(ranks[0]['model'])
    assert len(ranks[0]['windows'])==len(ranks[1]['windows'])==len(ranks[0]['rows'])
    assert torch.equal(ranks[0]['rows'], ranks[1]['rows']) and all(r['same'] for r in ranks) and ranks[0]['found']==ranks[1]['found']
    found = ranks[0]['found']
    assert found.n_step==max(1, round(found.batch_size/kw.get('bs', 4)/WORLD))
    windows = list(zip(*(r['windows'] for r in ranks)))
    assert check(ranks[0]['rows'], windows, model, CE if loss is SUM else loss, count, ratio=name=='parts')>=4 # in parts: DDP's mean of the processes' means

if __name__=='__main__': work_on(DIST, lambda kw: work(**kw))
