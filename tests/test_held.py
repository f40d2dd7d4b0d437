"Runs that would silently be another one: what other callbacks do at odd moments, and what batches, losses and loaders are made of"
import pytest,warnings
from fastai.callback.hook import ActivationStats
from fastai.callback.training import GradientAccumulation
from common import *
from fastai_accum.loop import Accumulator
from fastai_accum.noise import ratio_interval

N,BS,N_STEP = 58,4,4
def fit(l): l.fit(3, 0.05)

class At(Callback):
    "Call `f(learn)` once, at the `k`-th `event`, but not within what `f` sets off"
    order = 55
    def __init__(self, event, f, k=1): self.event,self.f,self.k,self.n,self.res = event,f,k,0,None
    def __call__(self, name):
        if name!=self.event or self.n>=self.k: return
        self.n += 1
        if self.n==self.k: self.res = self.f(self.learn)

WAYS = {'acc':(BS, partial(AccumulateStep, N_STEP)), 'micro':(BS*N_STEP, partial(MicroBatch, 3)), 'auto':(BS*N_STEP, partial(MicroBatch, 'auto'))}

def pair(way, cbs=list, n=N, fit=fit, **kwargs):
    "A large batch and `way`, each with callbacks of its own"
    bs,acc = WAYS[way]
    large,small = learner(n, BS*N_STEP, cbs=cbs(), **kwargs),learner(n, bs, acc(), cbs=cbs(), **kwargs)
    for l in (large,small): run(l, fit)
    return large,small

def same(large, small, tol=1e-12):
    assert rel(flat(large.model.parameters()), flat(small.model.parameters())) <= tol
    assert [rel(s['weights'], t['weights'])<=tol for s,t in zip(large.trace.steps, small.trace.steps)]==[True]*len(large.trace.steps)
    assert len(large.trace.steps)==len(small.trace.steps)

def sound(learn):
    "Nothing of ours is left on the learner"
    assert not {'all_batches','one_batch','_do_one_batch','_do_grad_opt','_call_one','_backward'} & set(vars(learn))
    assert type(learn.opt).__name__!='AccumulateOptimizer' and isinstance(learn.model, nn.Module)
    assert not any(p.grad is not None and p.grad.any() for p in learn.model.parameters())

# ---- scopes

def aside(f):
    "`f(learn)`, and then what it changed of the fit's progress as it was"
    def _f(learn):
        keep = {k:vars(learn)[k] for k in 'epoch n_epoch loss train_iter pct_train dl iter n_iter xb yb pred loss_grad training'.split() if k in vars(learn)}
        f(learn)
        vars(learn).update(keep)
        learn.model.train(learn.training)
    return _f

@pytest.mark.parametrize('f', (Self.validate(), Self.get_preds(), Self.get_preds(ds_idx=0)), ids=('validate','get_preds','get_preds of training'))
@pytest.mark.parametrize('event', ('before_epoch','before_train','after_train','before_validate','after_validate','after_epoch','after_batch','after_step'))
@pytest.mark.parametrize('way', WAYS)
def test_validation_by_a_callback(way, event, f):
    "At any event: it neither takes up nor loses what belongs to the fit"
    large,small = pair(way, lambda: [At(event, aside(f), k=2)])
    same(large, small)
    sound(small)

@pytest.mark.parametrize('f', (Self.validate(), Self.get_preds()), ids=('validate','get_preds'))
@pytest.mark.parametrize('event', ('before_epoch','before_validate','after_validate','after_epoch'))
def test_validation_between_the_parts_of_a_carried_window(event, f):
    "The window goes on as without it"
    def one(*cbs): return run(learner(N, BS, AccumulateStep(N_STEP, leftover='carry'), cbs=cbs), fit)
    plain,other = one(),one(At(event, f, k=3))
    same(plain, other)

@pytest.mark.parametrize('event', ('before_batch','after_pred','after_loss','after_backward','after_step','after_batch','before_epoch','after_epoch'))
def test_fit_within_a_fit(event):
    "A callback trains for an epoch in the midst of it: both fits are what they would be, and in a window that is open nothing is lost"
    def inner(l):
        keep = {k:vars(l)[k] for k in ('epoch','n_epoch','loss','train_iter','pct_train','dl','iter','n_iter','xb','yb','pred','loss_grad','training') if k in vars(l)}
        l.fit(1, 0.02, cbs=Inner())
        vars(l).update(keep)
        l.training = event not in ('before_epoch','after_epoch')
        l.model.train(l.training)
    class Inner(Callback): pass
    small = learner(N, BS, AccumulateStep(N_STEP), cbs=At(event, inner, k=2))
    run(small, fit)
    sound(small)
    assert len(small.trace.steps)==4*4

@pytest.mark.parametrize('way', WAYS)
def test_events_outside_of_a_fit(way):
    "fastai's own idiom of telling an event, or computing a batch, without a fit"
    bs,acc = WAYS[way]
    large,small = learner(64, 16),learner(64, 16, acc())
    for l in (large,small):
        seed()
        l.remove_cb(Trace)
        l.create_opt()
        l.opt.set_hypers(lr=0.1)
        l.training,l.iter = True,0
        l.train_iter = l.pct_train = l.epoch = l.n_iter = 1
        l.model.train()
        b = l.dls.one_batch()
        l._split(b)
        l('before_batch')
        l.one_batch(0, b)
    assert rel(flat(large.model.parameters()), flat(small.model.parameters()))<1e-12
    sound(small)

@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('k', (1,2,4,5))
def test_batch_cancelled_ahead_of_everybody(way, k):
    "By a callback that hears of it first"
    class First(At): order = -200
    def cancel(l): raise CancelBatchException
    bs,acc = WAYS[way]
    small = run(learner(64, bs, acc(), cbs=First('before_batch', cancel, k)), lambda l: l.fit(1, 0.05))
    assert len(small.trace.steps)==4 if way=='acc' else 3
    sound(small)

@pytest.mark.parametrize('event', ('before_fit','before_epoch','before_train','before_batch','after_pred','after_step','after_batch','after_epoch'))
def test_added_in_a_fit(event):
    "From the next epoch on at the latest it accumulates; taken out again, training is plain"
    small = run(learner(64, BS, cbs=At(event, lambda l: l.add_cb(AccumulateStep(N_STEP)), k=1)), fit)
    assert len(small.trace.steps) in (12,24)
    sound(small)
    small.detach_accum()
    n = len(small.trace.steps)
    small.fit(1, 0.1)
    assert len(small.trace.steps)==n+16
    sound(small)

@pytest.mark.parametrize('event', ('before_batch','after_pred','after_loss','before_backward','after_backward','before_step','after_step','after_batch','after_train','before_validate','after_epoch'))
@pytest.mark.parametrize('way', ('acc','micro'))
def test_removed_in_a_fit(way, event):
    "Between windows it goes; within one that is refused, and the learner is sound"
    bs,acc = WAYS[way]
    learn = learner(64, bs, acc(), cbs=At(event, lambda l: l.remove_cbs([cb for cb in l.cbs if isinstance(cb, (AccumulateStep,MicroBatch))]), k=2))
    try: run(learn, fit)
    except ValueError as e: assert 'can\'t be taken out while micro-batches of one step are under way' in str(e)
    sound(learn)
    before = flat(learn.model.parameters())
    learn.fit(1, 0.1)
    assert rel(before, flat(learn.model.parameters()))>1e-6
    sound(learn)

@pytest.mark.parametrize('event', ('before_batch','after_pred','before_backward','after_step','after_batch','before_epoch','before_validate'))
@pytest.mark.parametrize('way', ('acc','micro'))
def test_copies(way, event):
    "A copy that is taken in the midst of a fit trains as one that was taken before"
    bs,acc = WAYS[way]
    def copied(l):
        graph = [v for v in vars(l).values() if isinstance(v, Tensor) and v.grad_fn is not None]
        return deepcopy(l, {id(v):v.detach() for v in graph})
    at = At(event, copied, k=3)
    learn = run(learner(64, bs, acc(), cbs=at), fit)
    other = at.res
    assert not {'all_batches','one_batch','_do_one_batch','_do_grad_opt'} & set(vars(other)) and type(other.opt).__name__ in ('Optimizer','AccumulateOptimizer')
    other.remove_cb(At)
    other.trace.steps = []
    seed()
    other.fit(1, 0.05)
    assert len(other.trace.steps)==4
    sound(other)

def test_fit_that_dies_between_epochs():
    "Nothing of ours stays on the learner, whatever event it dies at"
    for event in ('before_fit','before_epoch','before_train','after_train','before_validate','after_epoch','after_fit'):
        for bs,acc in WAYS.values():
            def boom(l): raise KeyboardInterrupt
            learn = learner(64, bs, acc(), cbs=At(event, boom))
            with pytest.raises(KeyboardInterrupt): run(learn, fit)
            sound(learn)

def test_a_method_that_was_put_on_the_learner():
    "It would stand before ours: said before the fit"
    learn = learner(64, BS, AccumulateStep(N_STEP))
    learn.all_batches = lambda: None
    with pytest.raises(ValueError, match='`learn.all_batches` is .* whose place AccumulateStep has to take'): learn.fit(1)

def test_learner_of_another_class():
    "A learner that gets another class, and a host that finds that out as the fit begins"
    class Mine(Learner): pass
    large,small = learner(N, 16),learner(N, BS, AccumulateStep(N_STEP))
    small.__class__ = Mine
    for l in (large,small): run(l, fit)
    same(large, small)
    small.detach_accum()
    assert type(small) is Mine

# ---- schedules

@pytest.mark.parametrize('acc', (partial(AccumulateStep, N_STEP), partial(AccumulateStep, n_samples=16)), ids=('n_step','n_samples'))
@pytest.mark.parametrize('n', (64,70,73,79))
def test_dropped_micro_batches_move_nothing(n, acc):
    "Hyper-parameters after a fit, and the fit after it, are those of a loader that drops its last batch"
    if n==79 and acc.args: n = 76 # as four micro-batches are a window of `n_step=4`, also with 15 samples
    large,small = learner(n, 16, drop_last=True),learner(n, BS, acc(leftover='drop'))
    for l in (large,small): run(l, lambda l: l.fit_one_cycle(2, 0.02))
    assert_same_run(large, small, 1e-12, batches=False)
    assert [dict(h) for h in large.opt.hypers]==[dict(h) for h in small.opt.hypers]
    for l in (large,small): run(l, lambda l: l.fit(1))
    same(large, small)

@pytest.mark.parametrize('n', (78,80))
def test_dropped_samples_of_a_torch_loader(n):
    "PyTorch's loader, with a last micro-batch that may not fill its window"
    def made(bs, acc=None):
        learn = learner(n, bs, acc)
        learn.dls.loaders[0] = torch.utils.data.DataLoader(learn.dls.train.dataset, batch_size=bs, drop_last=acc is None)
        return learn
    large,small = made(16),made(BS, AccumulateStep(n_samples=16, leftover='drop'))
    for l in (large,small): run(l, lambda l: l.fit_one_cycle(2, 0.02))
    assert_same_run(large, small, 1e-12, batches=False)

def test_loader_longer_than_its_len():
    "A window that is closed too early, as the loader's end was expected, is told"
    class Long(DataLoader):
        def __len__(self): return 6
    learn = learner(64, BS, AccumulateStep(N_STEP))
    learn.dls.loaders[0] = Long(learn.dls.train.dataset, bs=BS)
    with pytest.warns(UserWarning, match='gave more than the 6 micro-batches of its `len`'): run(learn, lambda l: l.fit(1, 0.01))

# ---- gradients

class Free(nn.Sequential):
    "A net with a parameter that the optimizer does not have"
    def __init__(self):
        super().__init__(*net())
        self.scale = nn.Parameter(torch.ones(()))
    def forward(self, x): return super().forward(x)*self.scale

@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('loss', (nn.CrossEntropyLoss(), nn.MultiMarginLoss()), ids=('known','unknown'))
def test_parameters_outside_of_the_optimizer(way, loss):
    "Nobody zeroes their gradients, which only add up: windows that are uneven do not scale what others left"
    bs,acc = WAYS[way]
    def mk(bs, acc=None):
        l = learner(N, bs, acc, model=Free, loss_func=loss, cbs=GradientClip(0.01))
        l.splitter = lambda m: [params(m[0]), params(m[2])]
        return l
    large,small = mk(16),mk(bs, acc())
    for l in (large,small): run(l, fit)
    same(large, small)
    assert rel(large.model.scale.grad, small.model.scale.grad)<1e-12

class Scaled:
    "A plain class of a loss with a parameter"
    def __init__(self): self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    def __call__(self, pred, targ): return F.cross_entropy(pred*self.scale, targ)

@pytest.mark.parametrize('way', WAYS)
def test_loss_with_an_optimizer_of_its_own(way):
    "Its parameters get the window's final scale, too"
    class OwnSteps(Callback):
        def before_fit(self): self.sgd = torch.optim.SGD([self.loss_func.scale], lr=0.1)
        def after_step(self): self.sgd.step(); self.sgd.zero_grad()
    bs,acc = WAYS[way]
    large,small = (learner(N, b, a, loss_func=Scaled(), cbs=OwnSteps()) for b,a in ((16,None),(bs,acc())))
    for l in (large,small): run(l, fit)
    same(large, small)
    assert rel(large.loss_func.scale, small.loss_func.scale)<1e-12

class Counted(nn.Module):
    "A loss with a parameter, and targets that may all be ignored"
    def __init__(self, kind=noop):
        super().__init__()
        self.kind,self.scale = kind,nn.Parameter(torch.ones((), dtype=torch.float64))
    def denominator(self, pred, targ): return self.kind((targ>=0).sum())
    def forward(self, pred, targ):
        mask = targ>=0
        return (F.cross_entropy(pred*self.scale, targ.clamp(min=0), reduction='none')*mask).sum()/mask.sum()

@pytest.mark.parametrize('kind', (noop,int), ids=('tensor','number'))
@pytest.mark.parametrize('way', ('acc','micro'))
def test_loss_with_parameters_where_nothing_counts(way, kind):
    "A micro-batch that divides by 0 leaves no nan in the loss's parameters"
    x,y = problem(N+16)
    y[:4],y[20:24] = -1,-1
    bs,acc = WAYS[way]
    def mk(bs, acc=None):
        l = learner(N, bs, acc, data=(x,y), loss_func=Counted(kind), shuffle=False)
        l.splitter = lambda m: [params(m), [l.loss_func.scale]]
        return l
    large,small = mk(16),mk(bs, MicroBatch(4) if way=='micro' else acc())
    for l in (large,small): run(l, fit)
    assert small.loss_func.scale.isfinite()
    same(large, small)

def test_memory_runs_out_beside_a_plain_loss_with_a_parameter():
    "The attempt leaves nothing in its gradient"
    class Limit(nn.Module):
        def __init__(self): super().__init__(); self.n = 0
        def forward(self, x):
            if len(x)>8: raise torch.OutOfMemoryError('out of memory')
            return x
    class Late(Callback):
        "Memory runs out in the second micro-batch of the first attempt with 8"
        order,n = 98,0
        def after_loss(self):
            self.n += 1
            if self.n==2: raise torch.OutOfMemoryError('out of memory')
    def model(): return nn.Sequential(Limit(), *net())
    def mk(acc=None, *cbs):
        l = learner(N, 16, acc, model=net if acc is None else model, loss_func=Scaled(), cbs=cbs)
        l.splitter = lambda m: [params(m), [l.loss_func.scale]]
        return l
    large,small = mk(),mk(MicroBatch('auto'), Late())
    for l in (large,small): run(l, fit)
    same(large, small)

class Zeroes(Callback):
    "Zero gradients after a backward pass"
    def after_backward(self): self.opt.zero_grad()

def test_calls_of_the_optimizer_in_a_window_are_told():
    with pytest.warns(UserWarning, match=r'`opt.zero_grad\(\)` was called within a window of AccumulateStep and did nothing'):
        run(learner(64, BS, AccumulateStep(N_STEP), cbs=Zeroes()), fit)

# ---- samples

def boxes(b): return torch.stack([x for x,_ in b]),torch.cat([y for _,y in b])
@pytest.mark.parametrize('unit', ('n_step','n_samples'))
def test_targets_that_are_not_by_samples(unit):
    "Boxes of all images: samples are counted in the inputs"
    g = torch.Generator().manual_seed(3)
    ks = torch.randint(1, 6, (N+16,), generator=g)
    items = [(torch.randn(6, generator=g, dtype=torch.float64), torch.cat([torch.full((int(k),1), float(i)), torch.randn(int(k), 3, generator=g)], 1).double()) for i,k in enumerate(ks)]
    def loss(pred, targ):
        "The mean over images of a sum over each one's boxes"
        ids = targ[:,0].unique(sorted=False)
        first = {float(i):k for k,i in enumerate(dict.fromkeys(targ[:,0].tolist()))}
        rows = torch.tensor([first[i] for i in targ[:,0].tolist()])
        return (pred[rows]-targ[:,1:]).pow(2).sum()/len(pred)
    def mk(bs, acc=None):
        l = learner(N, bs, acc, loss_func=loss)
        l.dls.loaders[:] = [DataLoader(o, bs=bs, shuffle=s, create_batch=boxes) for o,s in ((items[:N], True), (items[N:], False))]
        l.dls.n_inp = 1
        return l
    large,small = mk(16),mk(BS, AccumulateStep(N_STEP) if unit=='n_step' else AccumulateStep(n_samples=16))
    for l in (large,small): run(l, fit)
    same(large, small)
    with pytest.raises(ValueError, match=r'`yb\[0\]` is a Tensor of shape .* in a batch of 16 samples'): run(mk(16, MicroBatch(4)), fit)

@pytest.mark.parametrize('way', WAYS)
def test_loss_of_one_element(way):
    "A loss of shape (1,) is recorded as the large batch's"
    large,small = pair(way, loss_func=lambda p,t: F.cross_entropy(p, t).view(1), cbs=list)
    same(large, small)
    assert rel([b['loss'] for b in large.trace.batches], [b['loss'] for b in small.trace.batches])<1e-12

@pytest.mark.parametrize('bs', ('auto',3))
def test_inference_mode(bs):
    "Predictions under `torch.inference_mode`, as `load_learner(...).predict` may be called"
    large,small = learner(64, 16),learner(64, 16, MicroBatch(bs, valid=True))
    for l in (large,small): run(l, lambda l: l.fit(1, 0.1))
    with torch.inference_mode(): a,b = (l.get_preds()[0] for l in (large,small))
    assert rel(a, b)<1e-12

# ---- arguments

@pytest.mark.parametrize('make,match', (
    (lambda: MicroBatch(8, sync_bn=1), '`sync_bn`=1'), (lambda: MicroBatch(8, valid='x'), "`valid`='x'"), (lambda: MicroBatch(8, offload=True), '`offload`=True'),
    (lambda: AccumulateStep(4, normalize=np.array(['auto'])), '`normalize`=array'), (lambda: AccumulateStep(4, sync_bn=1), '`sync_bn`=1'),
    (lambda: AccumulateStep(4, leftover=np.array(['step','drop'])), '`leftover`=array')))
def test_arguments(make, match):
    with pytest.raises(ValueError, match=match): make()

@pytest.mark.parametrize('split,match', (
    (lambda xb,yb,bs: None, 'returned None: return a list of'), (lambda xb,yb,bs: 3, 'returned 3'), (lambda xb,yb,bs: [xb,yb,bs], 'return a list of'),
    (lambda xb,yb,bs: [(tuple(x[i:i+8] for x in xb),tuple(y[i:i+8] for y in yb)) for i in (0,8)], r'parts of \[8, 8\] samples where `bs`=4 were asked for'),
    (lambda xb,yb,bs: [(tuple(x[:4] for x in xb),tuple(y[:4] for y in yb))]*3, r'parts of \[4, 4, 4\] samples for a batch of 16')))
def test_splits(split, match):
    learn = learner(64, 16, MicroBatch(4, split=split))
    with pytest.raises(ValueError, match=match): run(learn, fit)
    sound(learn)

@pytest.mark.parametrize('way', WAYS)
def test_nothing_to_train(way):
    bs,acc = WAYS[way]
    learn = learner(64, bs, acc())
    learn.create_opt()
    for p in learn.model.parameters(): p.requires_grad_(False)
    with pytest.raises(ValueError, match='no parameter of `learn.model` has `requires_grad`'): run(learn, fit)

def test_hooks_for_each_batch_beside_windows_of_one():
    "Where each micro-batch is a step, nothing can go wrong"
    run(learner(64, 16, AccumulateStep(1), cbs=ActivationStats(every=2)), fit)
    with pytest.raises(ValueError, match='take `every=None`'): run(learner(64, BS, AccumulateStep(N_STEP), cbs=ActivationStats(every=2)), fit)

# ---- outputs that are not samples first

class Returns(nn.Module):
    "A net that returns `f(x, logits, self)`"
    def __init__(self, f, bn=False):
        super().__init__()
        self.net,self.f = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8) if bn else nn.Tanh(), nn.Linear(8, 3)),f
        self.protos,self.few = nn.Parameter(torch.randn(10, 8)),nn.Parameter(torch.randn(4, 3)) # few are as many as samples in a micro-batch
        self.token = nn.Parameter(torch.randn(1, 2, 3))
        self.register_buffer('code', torch.ones(10, 3))
    def forward(self, x): return self.f(x, self.net(x), self)

class Sees(Callback):
    "Keep what is there to be seen at the end of each batch"
    order = 60
    def before_fit(self): self.saw = []
    def after_batch(self): self.saw.append(self.pred)

def times(p, t=7): return torch.stack([p*k for k in range(1, t+1)])
OUTPUTS = dict( # what a model returns, and its logits in that
    time_first=(lambda x,p,m: times(p), lambda o: o[0]),
    time_first_in_dict=(lambda x,p,m: dict(o=p, h=times(p[...,:2], 2)), lambda o: o['o']), # the hidden state of two layers
    last=(lambda x,p,m: (p, p.T, p.T[None]), lambda o: o[0]),
    prototypes=(lambda x,p,m: (p, m.protos), lambda o: o[0]+o[1].mean()),
    as_many_prototypes_as_samples=(lambda x,p,m: (p, m.few), lambda o: o[0]+o[1].mean()),
    computed_prototypes=(lambda x,p,m: (p, F.normalize(m.protos)), lambda o: o[0]+o[1].mean()),
    buffer=(lambda x,p,m: [p, m.code, None, 'text', True], lambda o: o[0]),
    expanded=(lambda x,p,m: (p, m.token.expand(len(x), -1, -1)), lambda o: o[0]+o[1].mean()),
    rows=(lambda x,p,m: (p, torch.stack([p,p*2], 1).flatten(0, 1)), lambda o: o[0]), # two for each sample
    boxes=(lambda x,p,m: (p, p[p[:,0]>p[:,1]].detach()), lambda o: o[0]))

def assert_alike(a, b):
    assert isinstance(b, Tensor) if isinstance(a, Tensor) else type(a) is type(b)
    if isinstance(a, Tensor): assert rel(a, b)<1e-12
    elif isinstance(a, (list,tuple)):
        assert len(a)==len(b)
        for p,q in zip(a, b): assert_alike(p, q)
    elif isinstance(a, dict): assert_alike(list(a.values()), list(b.values()))
    else: assert a==b

@pytest.mark.parametrize('o', OUTPUTS)
@pytest.mark.parametrize('bs,sync_bn', ((6,False),(4,False),(6,True)), ids=('uneven parts','even parts','exact BatchNorm'))
def test_outputs_of_other_forms(o, bs, sync_bn):
    "What callbacks, metrics and predictions see is what the model returns for the whole batch"
    f,logits = OUTPUTS[o]
    large,small = (learner(N, 16, acc, model=partial(Returns, f, sync_bn), loss_func=lambda o,t: F.cross_entropy(logits(o), t), cbs=Sees())
                   for acc in (None, MicroBatch(bs, sync_bn=sync_bn, valid=True)))
    for l in (large,small): run(l, fit)
    same(large, small)
    assert_alike(large.sees.saw, small.sees.saw)
    def gathered(l): return l.get_preds(act=noop, reorder=False)[0]
    try: p = gathered(large)
    except (TypeError,AttributeError): return # fastai can't
    assert_alike(p, gathered(small))

def packed(p):
    lens = (p[:,0].argsort().argsort()%3).add(1).sort(descending=True)[0]
    return nn.utils.rnn.pack_padded_sequence(times(p, 3), lens.cpu())

UNJOINED = dict(
    mean=lambda x,p,m: p.mean(), number=lambda x,p,m: float(p.mean()), packed=lambda x,p,m: packed(p), similarity=lambda x,p,m: p@p.T,
    longest=lambda x,p,m: times(p, len(x)-3), lists=lambda x,p,m: [p]*(len(x)-4), sometimes=lambda x,p,m: p if len(x)<6 else None,
    keys=lambda x,p,m: {len(x):p}, moving=lambda x,p,m: m.code.add_(p.detach().mean()).clone(), moments=lambda x,p,m: p.mean(0))

@pytest.mark.parametrize('o', UNJOINED)
def test_outputs_that_cannot_be_joined(o):
    "They are no tensor that is taken for the whole batch's: a list in training, and refused where predictions are gathered"
    f = UNJOINED[o]
    small = learner(N, 16, MicroBatch(6, valid=True), model=partial(Returns, lambda x,p,m: (p, f(x, p, m))), loss_func=lambda o,t: F.cross_entropy(o[0], t), cbs=Sees())
    run(small, fit)
    whole = [s[1] for s in small.sees.saw if len(s[0])==16]
    assert all(isinstance(s, list) and len(s)==3 for s in whole)
    with pytest.raises(ValueError, match=r"`learn.pred\[1\]`, a .* in micro-batches of \[5, 5, 6\] samples, can't be joined: .*`MicroBatch\(..., valid=False\)`"): small.get_preds()
    sound(small)

class TimeFirst(nn.Module):
    "A recurrent net whose inputs are `(time, samples, channels)`"
    def __init__(self): super().__init__(); self.rnn,self.out = nn.RNN(2, 8),nn.Linear(8, 3)
    def forward(self, x): return self.out(self.rnn(x)[0][-1])

class Margin(nn.Module):
    "A mean over samples that is not known"
    def forward(self, pred, targ): return F.multi_margin_loss(pred, targ)

def steps_first(b): return torch.stack([x.view(3, 2) for x,_ in b], 1),torch.stack([y for _,y in b])

@pytest.mark.parametrize('acc', (partial(AccumulateStep, N_STEP), partial(AccumulateStep, n_samples=16)), ids=('n_step','n_samples'))
def test_inputs_that_are_time_first(acc):
    "Samples are counted by what inputs and targets share, and `MicroBatch` says what it can't split"
    def mk(bs, acc=None):
        l = learner(N, bs, acc, model=TimeFirst, loss_func=Margin(), shuffle=False)
        for i,d in enumerate(l.dls.loaders): l.dls.loaders[i] = DataLoader(d.dataset, bs=bs, create_batch=steps_first)
        return l
    large,small = mk(16),mk(BS, acc())
    for l in (large,small): run(l, fit)
    same(large, small)
    with pytest.raises(ValueError, match=r'`xb\[0\]` is a Tensor of shape \(3, 16, 2\) in a batch of 16 samples'): run(mk(16, MicroBatch(4)), fit)

# ---- hosts that meet in the midst of a fit

@pytest.mark.parametrize('event', ('before_epoch','before_batch','after_pred','after_backward','before_step','after_batch','before_validate','after_epoch'))
@pytest.mark.parametrize('way', WAYS)
def test_a_second_host_in_a_fit(way, event):
    "It is refused where it is added, as it would be before a fit; the run goes on as without it"
    bs,acc = WAYS[way]
    class Adds(At):
        def __call__(self, name):
            try: super().__call__(name)
            except ValueError as e: self.res = str(e)
    for other in (lambda: AccumulateStep(2), lambda: MicroBatch(2)):
        adds = Adds(event, lambda l: l.add_cb(other()), k=2)
        plain,small = (run(learner(N, bs, acc(), cbs=cbs), fit) for cbs in ((), adds))
        assert 'one of them is enough' in adds.res
        same(plain, small)
        sound(small)

@pytest.mark.parametrize('event', ('before_batch','after_backward','after_step','after_batch'))
@pytest.mark.parametrize('way', WAYS)
def test_a_fit_within_a_batch(way, event):
    "Of one batch, by a callback, and with the weights put back: the batch around it is what it would be"
    class Inner(Callback): pass
    def inner(l):
        keep,weights = {k:v for k,v in vars(l).items() if k in 'epoch n_epoch loss train_iter pct_train dl iter n_iter xb yb pred loss_grad training'.split()},deepcopy(l.model.state_dict())
        opt,l.opt = l.opt,None
        l.fit(1, 0.02, cbs=Inner())
        l.opt = opt
        l.model.load_state_dict(weights)
        l.model.train()
        vars(l).update(keep)
    bs,acc = WAYS[way]
    at = At(event, inner, k=2)
    plain,small = (learner(N, bs, acc(), cbs=cbs, shuffle=False) for cbs in ((), at))
    for l in (plain,small): run(l, lambda l: l.fit(1, 0.05))
    n = len(small.trace.steps)-len(plain.trace.steps)
    assert n==4
    assert rel(flat(plain.model.parameters()), flat(small.model.parameters()))<1e-12
    sound(small)

def test_bs_find_within_a_window():
    "It leaves all as it was, also the window that is open"
    for way,event in itertools.product(WAYS, ('before_batch','after_batch','after_step')):
        bs,acc = WAYS[way]
        at = At(event, lambda l: l.bs_find(n_it=3, show_plot=False, pace=False), k=2)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            plain,small = (run(learner(N, bs, acc(), cbs=cbs), fit) for cbs in ((), at))
        same(plain, small)
        sound(small)

# ---- arguments and batches of other functions

X = torch.randn(4, 6, dtype=torch.float64)
@pytest.mark.parametrize('call,match', (
    (lambda l: l.bs_find(tol='x'), "`tol`='x': pass a number that is not negative"), (lambda l: l.bs_find(tol=None), '`tol`=None'), (lambda l: l.bs_find(tol=True), '`tol`=True'),
    (lambda l: l.bs_find(tol=math.nan), '`tol`=nan'), (lambda l: l.bs_find(n_it='x'), "`n_it`='x'"), (lambda l: l.bs_find(max_n_step=1.5), '`max_n_step`=1.5'),
    (lambda l: l.bs_find(lr='x'), "`lr`='x': pass a learning rate"), (lambda l: l.bs_find(lr=-1.), '`lr`=-1.0'), (lambda l: l.bs_find(lr=math.nan), '`lr`=nan'),
    (lambda l: NoiseScale(beta='x'), "`beta`='x': pass a number above 0 and up to 1"), (lambda l: NoiseScale(beta=None), '`beta`=None'), (lambda l: NoiseScale(beta=True), '`beta`=True'),
    (lambda l: NoiseScale(beta=torch.tensor(0.5)), '`beta`=tensor'), (lambda l: NoiseScale().plot(ax='x'), "`ax`='x': pass an axis"),
    (lambda l: ratio_interval(np.ones(3), np.ones(3), beta='x'), "`beta`='x'"), (lambda l: ratio_interval(np.ones(3), np.ones(3), level=95), '`level`=95'),
    (lambda l: l.check_accumulation('x'), "`n_step`='x'"), (lambda l: l.check_accumulation(cb='x'), "`cb`='x'"), (lambda l: l.check_accumulation(dl=3), '`dl`=3: pass a loader'),
    (lambda l: l.check_accumulation(dl='x'), "`dl`='x'"), (lambda l: l.check_accumulation(dl={}), '`dl`={}'), (lambda l: l.check_accumulation(dl=[]), '`dl` gave no batch'),
    (lambda l: l.check_accumulation(device='x'), "`device`='x' can't be computed on"), (lambda l: l.check_accumulation(device='meta'), "`device`='meta' can't be computed on"),
    (lambda l: l.check_accumulation(device='cpu:x'), "`device`='cpu:x'"), (lambda l: l.check_accumulation(device=1.5), '`device`=1.5'),
    (lambda l: l.check_accumulation(dl=[(X,)]*4), 'the batches of `dl` have no targets')))
def test_arguments_of_tools(call, match):
    "Each error names the argument and its value, and leaves the learner as it was"
    learn = learner(64, BS)
    before = flat(learn.model.parameters()).clone()
    with pytest.raises(ValueError, match=match): call(learn)
    assert torch.equal(before, flat(learn.model.parameters())) and learn.opt is None and len(learn.cbs)==2
    run(learn, fit)

@pytest.mark.parametrize('call', (Self.bs_find(show_plot=False, pace=False), Self.check_accumulation()), ids=('bs_find','check_accumulation'))
def test_tools_with_nothing_to_learn(call):
    "A frozen model, one without parameters, batches without targets"
    for model in (net, nn.Identity):
        learn = learner(64, BS, model=model)
        for p in learn.model.parameters(): p.requires_grad_(False)
        with pytest.raises(ValueError, match='no parameter of `learn.model` has `requires_grad`'): call(learn)
    learn = learner(64, BS)
    learn.dls.loaders[0] = [(X,)]*4
    with pytest.raises(ValueError, match='have no targets'): call(learn)

def test_check_of_a_model_without_data():
    learn = learner(64, BS)
    learn.model.to('meta')
    with pytest.raises(ValueError, match="`learn.model` is on the 'meta' device"): learn.check_accumulation()

def in_all(make, match, kind=Exception, check=sound):
    "The same error as without the callback, in all ways"
    for acc in (None, *(acc for _,acc in WAYS.values()), partial(MicroBatch, 3, sync_bn=True)):
        learn = make(acc and acc())
        with pytest.raises(kind, match=match): run(learn, fit)
        check(learn)

def test_models_and_batches_without_data():
    "On the `meta` device: what the plain learner says"
    def mk(acc):
        l = learner(64, 16, acc)
        l.model.to('meta')
        return l
    in_all(mk, 'meta', check=noop)
    def mk(acc):
        l = learner(64, 16, acc)
        l.dls.loaders[0] = [(torch.zeros(16, 6, dtype=torch.float64, device='meta'),torch.zeros(16, device='meta').long())]*4
        return l
    in_all(mk, 'meta')

def test_denominators_without_data():
    def nothing(l): return torch.tensor(3., device='meta')
    for bs,acc in ((BS, AccumulateStep(N_STEP, normalize=nothing)), (16, MicroBatch(4, normalize=nothing))):
        with pytest.raises(ValueError, match=r"the denominator of a micro-batch is tensor\(.*on the 'meta' device, which has no values: return a number"): run(learner(64, bs, acc), fit)

def test_losses_that_are_no_number():
    "PyTorch's own error, as without the callback"
    def norm(): return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    in_all(lambda acc: learner(64, 16, acc, model=norm, loss_func=partial(F.cross_entropy, reduction='none')), 'grad can be implicitly created only for scalar outputs', RuntimeError)

@pytest.mark.parametrize('way', WAYS)
def test_batches_without_targets(way):
    "Nothing is trained, as without the callback"
    bs,acc = WAYS[way]
    def mk(acc=None):
        l = learner(64, bs, acc)
        l.dls.loaders[0] = [(X,)]*5
        return run(l, fit)
    large,small = mk(),mk(acc())
    assert rel(flat(large.model.parameters()), flat(small.model.parameters()))==0 and not small.trace.steps
    sound(small)

def test_batch_that_is_one_tensor():
    learn = learner(64, 16, MicroBatch(2))
    learn.dls.loaders[0] = [torch.randn(16, 6, dtype=torch.float64)]*4
    with pytest.raises(ValueError, match=r'the dataloader returned a Tensor, where a tuple of inputs and targets is expected: let it return `\(x, y\)`'): run(learn, fit)
    sound(learn)

# ---- gradients that are written by hand

class Writes(Callback):
    "Add to the gradients at `event`"
    run_valid = False
    def __init__(self, event, cancel=False): self.cancel = cancel; setattr(self, event, self.write)
    def write(self):
        for p in self.model.parameters(): p.grad = 0.1*p.detach() if p.grad is None else p.grad.add_(p.detach(), alpha=0.1)
        if self.cancel: raise CancelBackwardException

class Clears(Callback):
    def after_loss(self):
        if self.training: self.model.zero_grad()

class InModel(nn.Sequential):
    def forward(self, x):
        if self.training: Writes.write(Self_(self))
        return super().forward(x)

class Self_: # what `Writes.write` looks at
    cancel = False
    def __init__(self, model): self.model = model

class Replaces(Callback):
    def before_backward(self): self.learn.loss_grad = self.loss_func(self.pred, self.y)**2

class Backward(Learner):
    def _backward(self): Writes.write(Self_(self.model))

HOSTS = {**WAYS, 'sync':(BS*N_STEP, partial(MicroBatch, 3, sync_bn=True)), 'stats':(BS, partial(AccumulateStep, N_STEP, sync_bn='stats'))}
del HOSTS['auto']
def bn_net(): return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
def touched(way, cbs=(), model=None, **kwargs):
    "What is said of gradients that are written"
    bs,acc = HOSTS[way]
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        run(learner(N, bs, acc(), cbs=cbs, model=model or bn_net, **kwargs), Self.fit(1, 0.05))
    return [str(w.message) for w in ws if '`.grad` was changed' in str(w.message)]

@pytest.mark.parametrize('way', HOSTS)
def test_gradients_by_hand(way):
    "What is written between backward passes is not the large batch's, and is warned of once; in `before_step` it is"
    for cb in (Writes('after_backward'),Writes('before_backward'),Writes('before_backward', cancel=True),Clears()):
        if way!='sync' or not isinstance(cb, Clears): assert len(touched(way, [cb]))==1, cb # there, no gradient is there to be cleared
    assert len(touched(way, model=lambda: InModel(*net())))==1
    assert touched(way)==touched(way, [Writes('before_step')])==[]

class CancelLast(Callback):
    run_valid = False
    def before_backward(self):
        host = self.micro_batch
        if host.win.last: raise CancelBackwardException

def test_deferred_backward_is_no_hand(): assert touched('sync', [CancelLast()])==[]

@pytest.mark.parametrize('way', WAYS)
def test_written_before_the_step(way): same(*pair(way, lambda: [Writes('before_step')]))

def test_one_micro_batch_by_hand():
    "A window of one is the batch, whatever writes to its gradients"
    for way in ('acc','micro'):
        bs,acc = {'acc':(BS, partial(AccumulateStep, 1)), 'micro':(BS, partial(MicroBatch, BS))}[way]
        ls = [run(learner(N, BS, c, cbs=Writes('after_backward')), fit) for c in (None,acc())]
        same(*ls)

@pytest.mark.parametrize('way', HOSTS)
def test_backward_without_the_loss(way):
    "A backward pass that does not differentiate what was weighed is refused, and leaves the learner as it was"
    bs,acc = HOSTS[way]
    learn = learner(N, bs, acc(), cbs=Replaces())
    if way!='sync':
        with pytest.raises(ValueError, match='does not differentiate `learn.loss_grad`'): learn.fit(1)
        sound(learn)
    learn = learner(N, bs, model=bn_net)
    learn.__class__ = Backward
    learn.add_cb(acc())
    with pytest.raises(ValueError, match='does not differentiate `learn.loss_grad`'): learn.fit(1)
    sound(learn)

def test_gradients_by_hand_in_a_loop():
    for write in (False,True):
        m = net()
        acc = Accumulator(m, torch.optim.SGD(m.parameters(), lr=0.1), nn.CrossEntropyLoss(), n_step=2)
        with warnings.catch_warnings(record=True) as ws:
            warnings.simplefilter('always')
            for _ in range(4):
                acc.backward(m(torch.randn(4, 6)), torch.tensor([0,1,2,0]))
                if write and m[0].weight.grad is not None: m[0].weight.grad += 1
        assert [('`.grad` was changed' in str(w.message)) for w in ws]==[True]*write

# ---- callbacks that come in the middle of a fit

def comes(acc, *cbs, bs=BS, event='before_epoch', k=2, **kwargs):
    "A learner to which `acc` is added as the second epoch begins"
    return learner(64, bs, cbs=[At(event, lambda l: l.add_cb(acc), k), *cbs], **kwargs)

@pytest.mark.parametrize('acc,event', ((AccumulateStep(4),'before_epoch'), (MicroBatch(2),'before_epoch'), (MicroBatch(2),'before_batch')))
def test_comes_beside_what_it_cannot_work_with(acc, event):
    learn = comes(copy(acc), GradientAccumulation(BS*N_STEP), event=event)
    with pytest.raises(ValueError, match=f'GradientAccumulation beside {type(acc).__name__}'): run(learn, fit)
    if event=='before_epoch': sound(learn) # else there is a gradient of GradientAccumulation's

@pytest.mark.parametrize('acc,name,v', ((AccumulateStep(4),'normalize','none'), (AccumulateStep(4),'n_step',2), (MicroBatch(2),'normalize','none'), (MicroBatch(2),'bs',1)))
def test_comes_and_is_changed(acc, name, v):
    "Not within a batch"
    learn = comes(acc, At('after_loss', lambda l: setattr(acc, name, v), 18))
    with pytest.raises(ValueError, match=f'`{name}`=.* is set in a fit that goes by what it was'): run(learn, fit)

@pytest.mark.parametrize('acc,why', ((AccumulateStep(4, leftover='carry'),"`leftover`='carry' carries gradients from one epoch to the next"), (AccumulateStep('noise'),"`n_step`='noise' goes by all steps"), (MicroBatch('fast'),"`bs`='fast' times micro-batches")))
def test_comes_too_late(acc, why):
    learn = comes(acc)
    with pytest.raises(ValueError, match=why): run(learn, fit)
    sound(learn)

@pytest.mark.parametrize('acc,bs', ((AccumulateStep(N_STEP),BS), (MicroBatch(BS),BS*N_STEP)))
def test_comes_and_stays(acc, bs):
    "It makes the large batch's steps; an error in the epoch in which it came leaves nothing"
    def boom(l): raise KeyError
    learn = comes(copy(acc), bs=bs, k=1, shuffle=False)
    large = run(learner(64, BS*N_STEP, shuffle=False), fit)
    same(large, run(learn, fit))
    assert not learn.cbs[-1].fitting
    again = comes(copy(acc), At('after_backward', boom, 3), bs=bs, k=1, shuffle=False)
    with pytest.raises(KeyError): run(again, fit)
    sound(again)
    assert not again.cbs[-1].fitting
