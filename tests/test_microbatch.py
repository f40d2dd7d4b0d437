"`MicroBatch`: a batch that is computed in parts makes the step that it makes as a whole"
import collections,functools
import pytest
from hypothesis import assume,example,given,settings,strategies as st
from torch.amp import autocast
from fastai.callback.training import GradientAccumulation
from fastai.vision.all import CategoryBlock,DataBlock,F1Score,Flip,ImageBlock,PILImage,RandomSplitter,TensorImage,TensorMask,TensorPoint,accuracy,error_rate
from common import *
from test_faults import Boom,boom_at
from test_losses import EXACT,FLAT,W,W32,X,Combined,CountsOnHost,MaskedMSE,Net
from test_parity import FITS,OPTS,SIZES,TOL

BS,N = 16,73 # batches of 16, 16, 16, 16 and 9
f32,f64 = torch.float32,torch.float64
CE = nn.CrossEntropyLoss
MICRO_EVENTS = 'after_pred after_loss before_backward after_backward'.split()
EVENTS = ['before_batch', *MICRO_EVENTS, *'before_step after_step after_batch'.split()]
MICRO = {'divides':dict(bs=4), 'does not divide':dict(bs=6, valid=True), 'single samples':dict(bs=1), 'larger than the batch':dict(bs=40, valid=True),
         'auto':dict()}
def fit(l): l.fit(2, 0.05)
def mb(*args, **kwargs): return partial(MicroBatch, *args, **kwargs)
def no_grads(learn): return all(p.grad is None or not p.grad.any() for p in learn.model.parameters())

class Passes(Callback):
    "Samples of each forward pass, and whether they were for training"
    order = 99
    def before_fit(self): self.ns = {True:[], False:[]}
    def after_pred(self): self.ns[self.learn.training].append(len(self.learn.pred))

def assert_clean(learn):
    "Nothing of ours is left on `learn`"
    assert not {'all_batches','_do_one_batch','_do_grad_opt'} & set(vars(learn))

def same(large, small, tol=1e-12, **kwargs):
    assert_same_run(large, small, tol, **kwargs)
    assert_clean(small)
    assert rel(flat(large.model.buffers()), flat(small.model.buffers()))<=tol

def pair(micro=MicroBatch, fit=fit, n=N, mk=None, **kwargs):
    "The run of the plain learner and that of one with `micro()`, each with its own `cbs()`"
    cbs = kwargs.pop('cbs', list)
    res = [(mk or learner)(n, BS, acc, cbs=cbs(), **kwargs) for acc in (None,micro())]
    for l in res: run(l, fit)
    return res

# ---- the same run

@functools.lru_cache(None)
def plain(n, dtype, opt, fit='', lr=0.):
    "A plain run, made once for all that are compared to it"
    return run(learner(n, BS, dtype=dtype, opt_func=OPTS[opt], cbs=Passes()), FITS[fit] if fit else lambda l: l.fit(2, lr))

def assert_parity(micro, n, dtype, opt, fit='', lr=0.):
    small = learner(n, BS, MicroBatch(**MICRO[micro]), dtype=dtype, opt_func=OPTS[opt], cbs=Passes())
    run(small, FITS[fit] if fit else lambda l: l.fit(2, lr))
    bs,ns = MICRO[micro].get('bs', BS),small.passes.ns[True]
    assert ns==plain(n, dtype, opt, fit, lr).passes.ns[True] if bs>=BS else max(ns)<=bs
    same(plain(n, dtype, opt, fit, lr), small, 0. if bs>=BS else TOL[dtype]) # what needs no splitting is not touched: equal to the bit

@pytest.mark.parametrize('dtype,opt', ((f64,'sgd'), (f64,'adam'), (f32,'adamw')), ids=str)
@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('micro', MICRO)
def test_sizes(micro, size, opt, dtype):
    "Micro-batches that divide the batch and that do not, with uneven last batches"
    assert_parity(micro, SIZES[size], dtype, opt, lr=0.05 if opt=='sgd' else 0.01)

@pytest.mark.parametrize('micro,opt,dtype', (*(('does not divide',o,f64) for o in OPTS), ('does not divide','adam',f32), ('auto','adamw',f32)), ids=str)
@pytest.mark.parametrize('fit', FITS)
def test_fits(micro, fit, opt, dtype):
    "Every way to train"
    assert_parity(micro, SIZES['both'], dtype, opt, fit)

@pytest.mark.parametrize('bs', (1, 4, 6, 40, 'auto'))
@pytest.mark.parametrize('valid', (True,False,None))
def test_records(bs, valid):
    "Losses and metrics of both parts of an epoch, and how many samples a forward pass had in each"
    def mk(*args, **kwargs):
        l = learner(*args, **kwargs, dtype=f32, metrics=[accuracy, error_rate, F1Score(average='macro'), AvgMetric(F.cross_entropy)])
        l.recorder.train_metrics = True
        return l
    large,small = pair(mb(bs, valid=valid), lambda l: l.fit_one_cycle(2, 0.05), mk=mk, cbs=lambda: [Passes()])
    same(large, small, 0. if bs in (40,'auto') else 1e-5)
    assert len(large.recorder.metric_names)==2+2*5 and len(small.recorder.values[-1])==10
    epoch = {1:[1]*73, 4:[4]*16+[3]*3, 6:[5,5,6]*4+[4,5]}.get(bs, [16]*4+[9])
    assert small.passes.ns=={True:epoch*2, False:2*({1:[1]*16, 4:[4]*4, 6:[5,5,6]}.get(bs, [16]) if valid else [16])}

@pytest.mark.parametrize('micro,opt,end_lr', (('divides','sgd',3), ('does not divide','adam',0.3), ('does not divide','adamw',0.3), ('auto','adam',0.3)))
def test_lr_find(opt, end_lr, micro, tmp_path):
    "Points, curve and suggestions, and the fit that follows"
    def find(l): l.found = l.lr_find(num_it=30, end_lr=end_lr, show_plot=False, suggest_funcs=(valley,slide,minimum,steep))
    large,small = pair(mb(**MICRO[micro]), find, n=203, dtype=f32, opt_func=OPTS[opt], path=tmp_path)
    assert large.found==small.found and len(small.recorder.losses)==30
    same(large, small, 1e-5)
    for l in (large,small):
        l.trace.steps,l.trace.batches = [],[]
        run(l, fit)
    same(large, small, 1e-5)

def test_one_fit_only():
    "`fit(cbs=...)` is for that fit, `to_microbatch` for all that follow, until `detach_microbatch`"
    large,small = learner(N, BS),learner(N, BS, cbs=Passes())
    seen = []
    def one(f=noop, **kwargs):
        f(small)
        for l,kw in ((large,{}), (small,kwargs)): run(l, lambda l: l.fit(1, 0.05, **kw))
        seen.append(len(small.passes.ns[True]))
    one(); one(cbs=MicroBatch(4)); one()
    one(lambda l: l.to_microbatch(8)); one(); one(lambda l: l.to_microbatch(bs=1, valid=True)); one(lambda l: l.detach_microbatch()); one(cbs=[MicroBatch(5)])
    assert seen==[5, 19, 5, 10, 10, 73, 5, 18]
    same(large, small)
    assert len(small.cbs)==3 and not hasattr(small, 'micro_batch')

# ---- losses

N_LOSS = 52 # batches of 13, which `MicroBatch(3)` splits in 2, 3, 2, 3 and 3
def loss_pair(loss, y, shape=(3,), post=noop, *_, **kwargs):
    res = [learner(N_LOSS, 13, acc, data=(X,y), model=partial(Net, shape, post), loss_func=loss, cbs=Counts(), **kwargs)
           for acc in (None, MicroBatch(3, valid=True))]
    for l in res: run(l, lambda l: l.fit_one_cycle(2, 0.02))
    return res

class Counts(Callback):
    "Of how many forward passes in training were the targets all ignored?"
    def before_fit(self): self.empty = 0
    def after_pred(self):
        if self.learn.training and isinstance(self.y, Tensor): self.empty += bool((self.y==-100).all() or self.y.isnan().all())

@pytest.mark.parametrize('case', EXACT)
def test_losses(case):
    large,small = loss_pair(*EXACT[case])
    assert not large.counts.empty and (small.counts.empty>2 or 'ignored' not in case)
    same(large, small)

@pytest.mark.parametrize('case', FLAT)
def test_fastai_losses(case): same(*loss_pair(*FLAT[case]), 1e-6) # these compute in float32, whatever they are given

def as_sum(loss):
    loss = deepcopy(loss)
    if isinstance(loss, partial) or not hasattr(loss, 'reduction'): return partial(loss, reduction='sum')
    loss.reduction = 'sum'
    return loss

SUMS = {**{k:v for k,v in EXACT.items() if k!='unknown function'}, **{k:v for k,v in FLAT.items() if 'Label' not in k}}
@pytest.mark.parametrize('case', SUMS)
def test_sums(case):
    "A loss that sums stays a sum, also where `AccumulateStep` would make it a mean"
    loss,*rest = SUMS[case]
    same(*loss_pair(as_sum(loss), *rest), 1e-6 if case in FLAT else 1e-12)

def test_a_sum_of_its_own():
    "One that sums and does not say so shows it; where `normalize` takes it for a mean, the run is another"
    def loss(pred, targ): return F.mse_loss(pred, targ, reduction='sum')
    y = EXACT['mse'][1]
    large,none,auto,mean = (run(learner(N_LOSS, 13, acc, data=(X,y), loss_func=loss), fit)
                            for acc in (None, MicroBatch(3, normalize='none'), MicroBatch(3), MicroBatch(3, normalize='samples')))
    same(large, none)
    same(large, auto)
    assert not rel(large.trace.steps[0]['weights'], mean.trace.steps[0]['weights'])<1e-3

@pytest.mark.parametrize('loss', (CE(), F.cross_entropy, lambda p,t: F.cross_entropy(p, t)), ids=('module','function','unknown'))
@pytest.mark.parametrize('normalize', ('auto', 'samples', lambda l: len(l.y), lambda l: l.y.shape[0]/2, lambda l: torch.tensor(float(len(l.y))),
                                       lambda l: torch.tensor([len(l.y)])), ids=lambda v: 'function' if callable(v) else str(v))
def test_normalize(normalize, loss):
    "Of means over samples, whatever says how many these are"
    same(*pair(mb(5, normalize=normalize), loss_func=loss))

def hidden(pred, targ):
    "Nothing tells what this divides by"
    mask = targ!=1
    return F.cross_entropy(pred, targ, reduction='none')[mask].sum()/mask.sum()
class OwnCount:
    "As `hidden`, but it tells"
    def __call__(self, pred, targ): return hidden(pred, targ)
    def denominator(self, pred, targ): return (targ!=1).sum()

@pytest.mark.parametrize('count', (lambda l: (l.y!=1).sum(), lambda l: int((l.y!=1).sum()), lambda l: (l.y!=1).float().sum()[None]),
                         ids=('tensor','number','tensor of one'))
def test_normalize_function(count):
    "A function says what counts, and so does what the loss computes; by samples the run is another"
    same(*pair(mb(8, normalize=count), loss_func=hidden))
    same(*pair(mb(8), loss_func=hidden))
    large,small = pair(mb(8, normalize='samples'), loss_func=hidden)
    assert not rel(large.trace.steps[-1]['weights'], small.trace.steps[-1]['weights'])<1e-3

@pytest.mark.parametrize('v', (0, -1, float('nan'), float('inf'), None, 'many', True, torch.tensor(0), torch.tensor([1,2])), ids=str)
@pytest.mark.parametrize('at', ((0,0), (0,2), (2,1)), ids=str)
def test_normalize_function_returns_no_denominator(v, at):
    "Said in the micro-batch where it happens; nothing of its batch is kept"
    calls = collections.Counter()
    def count(l):
        i = l.iter,calls[l.iter]
        calls[l.iter] += 1
        return v if i==at else len(l.y)
    small = learner(N, BS, MicroBatch(5, normalize=count))
    with pytest.raises(ValueError, match='`normalize` returned .*: return one positive finite number'): run(small, fit)
    assert len(small.trace.steps)==at[0] and no_grads(small)
    assert_clean(small)

def test_samples_on_request():
    "`normalize='samples'` does not look at the targets, and is off where they are ignored: which is why 'auto' looks"
    large,samples = pair(mb(5, normalize='samples'), loss_func=CE(ignore_index=0))
    assert not rel(large.trace.steps[-1]['weights'], samples.trace.steps[-1]['weights'])<1e-3
    same(*pair(mb(5), loss_func=CE(ignore_index=0)))

class CountsHidden(MaskedMSE):
    "Its denominator as a tensor of one element"
    def denominator(self, pred, targ): return (~targ.isnan()).sum()[None].float()

@pytest.mark.parametrize('opt', ('sgd','adam'))
@pytest.mark.parametrize('loss', (CE(), CE(weight=W, label_smoothing=0.1), MaskedMSE(), CountsOnHost(), CountsHidden()), ids=str)
@pytest.mark.parametrize('lo,hi', ((0,4), (9,26), (0,52)))
def test_all_ignored(loss, opt, lo, hi):
    "A micro-batch, a batch or all batches in which no target counts: the weights are plain training's, the loss is 0 where that one's is NaN"
    classes = isinstance(loss, CE)
    y = X[:,:3].argmax(1) if classes else X[:,:3].clone()
    y[lo:hi] = -100 if classes else float('nan')
    large,small = loss_pair(loss, y, shuffle=False, opt_func=OPTS[opt])
    same(large, small, batches=False)
    nans = 0
    for a,b in zip(large.trace.batches, small.trace.batches):
        if not math.isnan(a['loss']): assert rel(a['loss'], b['loss'])<=1e-12
        else: nans += 1; assert b['loss']==0
    assert nans==2*sum(lo<=i and i+13<=hi for i in range(0, 52, 13))
    assert small.counts.empty>=2

@pytest.mark.parametrize('bad', (-4, float('nan'), None, torch.ones(3)), ids=str)
def test_bad_declared_denominator(bad):
    class Bad(nn.MSELoss):
        def denominator(self, pred, targ): return bad
    small = learner(N, BS, MicroBatch(5), data=(problem(N+16)[0], torch.zeros(N+16, 3, dtype=f64)), loss_func=Bad())
    with pytest.raises(ValueError, match='`denominator` of Bad.* returned'): run(small, fit)
    assert_clean(small)
    assert no_grads(small)

def test_no_mean_that_could_be_split():
    "Said once, by name, before training; of one that sums and means to, there is nothing to say"
    labels = EXACT['multi-margin, weights'][1]
    with pytest.warns(UserWarning, match='LabelSmoothingCrossEntropy.*class weights'):
        loss_pair(LabelSmoothingCrossEntropyFlat(weight=W32), labels)
    masks = FLAT['DiceLoss'][1]
    with pytest.warns(UserWarning, match='Combined.*has a part that sums'): loss_pair(Combined('sum'), masks, (3,4,4))
    same(*loss_pair(Combined('mean'), masks, (3,4,4)), 1e-6)

@pytest.mark.parametrize('event', ('before_fit','before_epoch','before_train','before_batch'))
@pytest.mark.parametrize('loss', (CE(reduction='sum'), CE(ignore_index=1), nn.MultiMarginLoss()), ids=('sum','ignore_index','multi-margin'))
def test_loss_set_by_another_callback(event, loss):
    "The loss that is in place when a batch is computed is the one that is weighed"
    class Other(Callback):
        def __call__(self, name):
            if name==event: self.learn.loss_func = loss
    same(*pair(mb(5), cbs=lambda: [Other()]))

@pytest.mark.parametrize('loss', (CE(), CE(weight=W), CE(reduction='sum')), ids=('mean','weights','sum'))
@pytest.mark.parametrize('in_place', (False,True))
def test_targets_set_by_another_callback(in_place, loss):
    "Targets that are made of predictions are counted as they are when the loss sees them"
    class Sure(Callback):
        def after_pred(self):
            if not self.learn.training: return
            mask = self.learn.pred.max(1)[0]<0.3
            if in_place: self.y[mask] = -100
            else: self.learn.yb = (self.y.masked_fill(mask, -100),)
    same(*pair(mb(5), cbs=lambda: [Sure()], loss_func=loss))

def test_loss_changed_by_another_callback():
    "What is added to a loss is weighed with it, what takes its place is recorded"
    class Penalty(Callback):
        def after_loss(self):
            self.learn.loss_grad = self.learn.loss_grad + 0.1*self.learn.pred.pow(2).mean()
            self.learn.loss = self.learn.loss_grad.clone()
    same(*pair(mb(5), cbs=lambda: [Penalty()], dtype=f32), 1e-5)

# ---- any sizes

def shifted(pred, targ): return F.multi_margin_loss(pred, targ)+1
LOSSES = (CE(), CE(reduction='sum'), CE(ignore_index=1), CE(weight=W, ignore_index=0), F.cross_entropy, shifted,
          partial(F.cross_entropy, label_smoothing=0.2, reduction='sum'))

OPT_FUNCS = partial(SGD, mom=0.9),Adam,partial(OptimWrapper, opt=torch.optim.AdamW, eps=1e-5)

@given(n=st.integers(1, 60), bs=st.integers(1, 20), k=st.one_of(st.just('auto'), st.integers(1, 22)), epochs=st.integers(1, 2), drop_last=st.booleans(),
       loss=st.sampled_from(LOSSES), opt=st.sampled_from(OPT_FUNCS), valid=st.booleans())
@example(n=1, bs=1, k=1, epochs=1, drop_last=True, loss=LOSSES[0], opt=Adam, valid=True)
@settings(max_examples=25)
def test_any_sizes(n, bs, k, epochs, drop_last, loss, opt, valid):
    "Whatever the sizes: the same run, and no pass of more samples than were asked for"
    large,small = (learner(n, bs, acc, opt_func=opt, loss_func=loss, drop_last=drop_last, cbs=Passes()) for acc in (None, MicroBatch(k, valid=valid)))
    for l in (large,small): run(l, lambda l: l.fit_one_cycle(epochs, 0.02))
    if not large.trace.batches: assert not small.trace.batches and not small.passes.ns[True]
    else: same_or_both_nan(large, small, 0. if k=='auto' or k>=bs else 1e-12)
    for train in (True,False):
        ns = small.passes.ns[train]
        assert sum(ns)==sum(large.passes.ns[train])
        if k!='auto' and (train or valid): assert max(ns, default=0)<=k

def same_or_both_nan(large, small, tol):
    "As `same`; batches in which nothing counts are NaN in the one and 0 (or, if not split, NaN) in the other"
    for a,b in zip(large.trace.batches, small.trace.batches):
        if math.isnan(a['loss']) and (b['loss']==0 or math.isnan(b['loss'])): a['loss'] = b['loss'] = 0.
    same(large, small, tol)

@given(sizes=st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=5), min_size=1, max_size=2), k=st.integers(1, 12), loss=st.sampled_from(LOSSES))
@settings(max_examples=40)
def test_any_batches(sizes, k, loss):
    "Batches of any sizes, other ones in each epoch"
    large,small = (resize(learner(max(map(sum, sizes)), 4, acc, loss_func=loss), sizes) for acc in (None, MicroBatch(k)))
    for l in (large,small): run(l, lambda l: l.fit(2, 0.05))
    same_or_both_nan(large, small, 1e-12)

# ---- splitting

Pair = collections.namedtuple('Pair', 'a b')

class To(Callback):
    "Make batches of another form"
    def __init__(self, fx=None, fy=None): self.fx,self.fy = fx,fy
    def before_batch(self):
        if self.fx: self.learn.xb = self.fx(*self.learn.xb)
        if self.fy: self.learn.yb = self.fy(*self.learn.yb)

class Reads(nn.Module):
    "A small net on what `get` finds in the inputs"
    def __init__(self, get=noop, post=noop): super().__init__(); self.get,self.post,self.net = get,post,net()
    def forward(self, *xb): return self.post(self.net(self.get(*xb)))

class Spy(Callback):
    "What `learn` holds at `events`"
    order = 98
    def __init__(self, *events): self.events,self.saw = events,[]
    def __call__(self, name):
        if name not in self.events: return
        l = self.learn
        # a loss is not of a type of targets' after it was split, which makes it faster
        losses = [None if o is None else o.detach().as_subclass(Tensor).clone() for o in (l.loss, getattr(l, 'loss_grad', None))]
        self.saw.append((name, l.training, *(deepcopy(detached(getattr(l, k, None))) for k in ('xb','yb','pred')), *losses))

def detached(o):
    if isinstance(o, Tensor): return o.detach()
    if isinstance(o, collections.abc.MutableMapping):
        res = copy(o)
        for k in o: res[k] = detached(o[k])
        return res
    if isinstance(o, (list,tuple,L)): return type(o)(*map(detached, o)) if hasattr(o, '_fields') else type(o)([detached(v) for v in o])
    return o

def form(o):
    "All that can be said of `o` without its values and its number of samples"
    if isinstance(o, Tensor): return type(o), o.dtype, tuple(o.shape[1:]), {k:v for k,v in vars(o).items()}
    if isinstance(o, np.ndarray): return type(o), o.dtype, o.shape[1:]
    if isinstance(o, collections.abc.MutableMapping): return type(o), [(k, form(v)) for k,v in o.items()]
    if isinstance(o, (list,tuple,L)): return type(o), [form(v) for v in (o if any(isinstance(v, (Tensor,np.ndarray,list,tuple,L)) for v in o) else o[:1])]
    return type(o)

def assert_same_values(a, b, tol=1e-12):
    assert type(a) is type(b)
    if isinstance(a, (Tensor,np.ndarray)) and a.dtype!=object:
        assert rel(torch.as_tensor(a), torch.as_tensor(b))<=tol
        if isinstance(a, Tensor): assert a.dtype==b.dtype and str(vars(a))==str(vars(b))
    elif isinstance(a, collections.abc.MutableMapping):
        assert list(a)==list(b)
        for k in a: assert_same_values(a[k], b[k], tol)
    elif isinstance(a, (list,tuple,L,np.ndarray)):
        assert len(a)==len(b)
        for v,w in zip(a, b): assert_same_values(v, w, tol)
    else: assert a==b

def typed(x, cls, **meta):
    "`x` as one of fastai's tensor types, with metadata"
    res = x.as_subclass(cls)
    for k,v in meta.items(): setattr(res, k, v)
    return res
def points(x): return typed(x.view(len(x), 3, 2), TensorPoint, img_size=(3,5), note='kept')

def entry(*ks):
    "A function that follows `ks` into nested arguments"
    def get(*o):
        for k in ks: o = getattr(o, k) if hasattr(o, '_fields') and isinstance(k, str) else o[k]
        return o
    return get

STRUCTURES = { # inputs, targets, where the model finds its own, and the loss
    'two inputs':       (lambda x: (x, x*2), None, entry(1), F.cross_entropy),
    'lists of inputs':  (lambda x: [x], lambda y: [y], noop, F.cross_entropy),
    'L':                (lambda x: L([x, [x,x]]), lambda y: L([y]), entry(1,0), F.cross_entropy),
    'L in a tuple':     (lambda x: (L([x,x]),), None, entry(0,1), F.cross_entropy),
    'list':             (lambda x: ([x, x],), None, entry(0,1), F.cross_entropy),
    'tuple of tuples':  (lambda x: ((x, (x, [x])),), None, entry(0,1,1,0), F.cross_entropy),
    'dict':             (lambda x: ({'a':x, 'b':{'c':x}},), lambda y: ({'t':y},), entry(0,'b','c'), lambda p,t: F.cross_entropy(p, t['t'])),
    'dict of dicts':    (None, lambda y: ({'t':{'u':y}},), noop, lambda p,t: F.cross_entropy(p, t['t']['u'])),
    'OrderedDict':      (lambda x: (collections.OrderedDict(z=x, a=x),), None, entry(0,'a'), F.cross_entropy),
    'defaultdict':      (lambda x: (collections.defaultdict(list, a=x),), None, entry(0,'a'), F.cross_entropy),
    'UserDict':         (lambda x: (collections.UserDict(a=x),), lambda y: (collections.UserDict(t=y),), entry(0,'a'), lambda p,t: F.cross_entropy(p, t['t'])),
    'namedtuple':       (lambda x: (Pair(x, [x, {'k':x}]),), None, entry(0,'b',1,'k'), F.cross_entropy),
    'None first':       (lambda x: (None, x), None, entry(1), F.cross_entropy),
    'None within':      (lambda x: ({'mask':None, 'x':(x, None)},), lambda y: (None, {'w':None, 't':y}), entry(0,'x',0),
                         lambda p,n,t: F.cross_entropy(p, t['t'])),
    'a dict a sample':  (lambda x: ([{'x':v} for v in x],), lambda y: ([{'t':v, 'boxes':torch.zeros(7, 4)} for v in y],),
                         lambda o: torch.stack([v['x'] for v in o]), lambda p,t: F.cross_entropy(p, torch.stack([o['t'] for o in t]))),
    'strings':          (lambda x: (x, [str(i) for i in range(len(x))], ('a',)*len(x)), lambda y: ([str(int(v)) for v in y],),
                         lambda x,a,b: x[:len(a)][:len(b)], lambda p,t: F.cross_entropy(p, tensor([int(v) for v in t]))),
    'arrays':           (lambda x: (x.numpy(), np.array(['a']*len(x), dtype=object)), None, lambda x,a: torch.as_tensor(x)[:len(a)], F.cross_entropy),
    'for all samples':  (lambda x: ({'x':x, 'scale':2}, 'text', np.float64(2)), None, lambda d,s,f: d['x']*d['scale']*f*len(s), F.cross_entropy),
    'nothing in it':    (lambda x: (x, (), {}), None, lambda x,a,b: x, F.cross_entropy),
    'tuple of targets': (None, lambda y: ((y, y),), noop, lambda p,t: F.cross_entropy(p, t[1])),
    'list of targets':  (None, lambda y: ([y, y],), noop, lambda p,t: F.cross_entropy(p, t[1])),
    'named targets':    (None, lambda y: (Pair(None, y),), noop, lambda p,t: F.cross_entropy(p, t.b)),
    'L of targets':     (None, lambda y: (L([y, y]),), noop, lambda p,t: F.cross_entropy(p, t[1])),
    'TensorImage':      (lambda x: (typed(x.view(-1, 1, 2, 3), TensorImage),), lambda y: (typed(y, TensorCategory, vocab=['a']),),
                         lambda x: x.flatten(1).as_subclass(Tensor), CrossEntropyLossFlat()),
    'TensorPoint':      (lambda x: (points(x),), None, lambda x: x.flatten(1).as_subclass(Tensor), F.cross_entropy),
    'TensorMask':       (None, lambda y: (typed(y, TensorMask, codes=['a','b']), points(torch.zeros(len(y), 6))), noop,
                         lambda p,t,_: F.cross_entropy(p, t.as_subclass(Tensor)))}

@pytest.mark.parametrize('bs', (1, 5))
@pytest.mark.parametrize('o', STRUCTURES)
def test_structures(o, bs):
    "Everything is split into what it was: types, keys, metadata; and after the batch it is whole again"
    fx,fy,get,loss = STRUCTURES[o]
    large,small = pair(mb(bs, valid=True), lambda l: l.fit(1, 0.05), n=41, model=partial(Reads, get), loss_func=loss,
                       cbs=lambda: [To(fx, fy), Spy('after_pred','before_step','after_batch'), Passes()])
    same(large, small, 1e-6 if isinstance(loss, CrossEntropyLossFlat) else 1e-12)
    for train,ns in ((True, (16,16,9)), (False, (16,))): assert len(small.passes.ns[train])==sum(-(-n//bs) for n in ns), 'not split'
    whole = [s for s in large.spy.saw if s[0]=='after_pred']
    for s in small.spy.saw:
        if s[0]=='after_pred': assert all(form(v)==form(w) for v,w in zip(s[2:4], whole[0][2:4]))
    events = [[s for s in l.spy.saw if s[0]!='after_pred'] for l in (large,small)]
    assert_same_values(*events, 1e-6 if isinstance(loss, CrossEntropyLossFlat) else 1e-12)

def test_inputs_alone():
    "Prediction of a batch without targets is split by its inputs, whatever these are made of"
    for fx,get in ((lambda x: ([x, x],), entry(0,1)), (lambda x: ((x, x, x),), entry(0,2)), (lambda x: (collections.UserDict(a=x),), entry(0,'a')),
                   (lambda x: (None, x), entry(1)), (lambda x: ([{'x':v} for v in x],), lambda o: torch.stack([v['x'] for v in o]))):
        large,small = (learner(41, BS, acc, model=partial(Reads, get), cbs=[To(fx, lambda y: ()), Passes()]) for acc in (None, MicroBatch(5, valid=True)))
        assert_same_values(*(l.get_preds(act=noop)[0] for l in (large,small)))
        assert small.passes.ns[False]==[4,4,4,4]

BAD = {"xb[1]":                 (lambda x: (x, tensor(1.)), None, r'Tensor of shape \(\)'),
       "xb[1][0]":              (lambda x: (x, [1.5]), None, 'float'),
       "xb[0][1]['k'][0]":      (lambda x: ((x, {'k':[x[:3]]}),), None, r'Tensor of shape \(3, 6\)'),
       "xb[0].b":               (lambda x: (Pair(x, x[0]),), None, r'Tensor of shape \(6,\)'),
       "yb[0]['boxes']":        (None, lambda y: ({'t':y, 'boxes':torch.zeros(7, 4)},), r'Tensor of shape \(7, 4\)'),
       "yb[1]":                 (None, lambda y: (y, torch.cat([y,y])), r'Tensor of shape \(32,\)'),
       "xb[0][0]":              (lambda x: ([v for v in x],), None, r'Tensor of shape \(6,\)'),
       "xb[1]  ":               (lambda x: (x, {1,2}), None, 'set of length 2'),
       "yb[1] ":                (None, lambda y: (y, object()), 'object')}

@pytest.mark.parametrize('name', BAD)
def test_what_cant_be_split(name):
    "Said by its place and what it is, before anything is computed; a batch that needs no splitting may hold it"
    fx,fy,what = BAD[name]
    name = name.strip().replace('.b', '[1]')
    def get(*xb):
        o = xb[0]
        return get(*o.values()) if isinstance(o, dict) else torch.stack(o) if isinstance(o, list) else get(*o) if isinstance(o, tuple) else o
    def loss(pred, *yb): return F.cross_entropy(pred, yb[0]['t'] if isinstance(yb[0], dict) else yb[0])
    def mk(acc): return learner(N, BS, acc, model=partial(Reads, get), loss_func=loss, cbs=[To(fx, fy), Passes()])
    small = mk(MicroBatch(4))
    before = flat(small.model.parameters())
    with pytest.raises(ValueError, match=f'^`{re.escape(name)}` is a {what} in a batch of 16 samples.*`MicroBatch\\(split=...\\)`'): run(small, fit)
    assert torch.equal(before, flat(small.model.parameters())) and small.passes.ns=={True:[], False:[]} and not small.trace.batches and no_grads(small)
    assert_clean(small)
    with pytest.raises(ValueError, match='`MicroBatch'): mk(MicroBatch(4, valid=True)).validate()
    large,small = mk(None),mk(MicroBatch(16, valid=True))
    for l in (large,small): run(l, fit)
    same(large, small, 0.)

def nodes(n):
    "Samples of 1 to 4 rows each, and how many"
    x,y = problem(4*(n+16))
    ns = [1+i*7%4 for i in range(n+16)]
    return [(x[4*i:4*i+k], y[4*i]) for i,k in enumerate(ns)]

def graph_batch(b): return torch.cat([x for x,_ in b]),tensor([len(x) for x,_ in b]),torch.stack([y for _,y in b])
class Pools(nn.Module):
    "A row each, their mean a sample"
    def __init__(self): super().__init__(); self.net = net()
    def forward(self, x, ns): return torch.stack([o.mean(0) for o in self.net(x).split(ns.tolist())])

def split_graphs(xb, yb, bs):
    xs = xb[0].split(xb[1].tolist())
    return [((torch.cat(xs[i:i+bs]), xb[1][i:i+bs]), (yb[0][i:i+bs],)) for i in range(0, len(xs), bs)]

def graphs(acc=None, n=57, **kwargs):
    learn = learner(n, BS, acc, model=Pools, **kwargs)
    ds = nodes(n)
    learn.dls.loaders[:] = [DataLoader(o, bs=BS, shuffle=s, create_batch=graph_batch) for o,s in ((ds[:n], True), (ds[n:], False))]
    learn.dls.n_inp = 2
    return learn

@pytest.mark.parametrize('split', (split_graphs, lambda *args: iter(split_graphs(*args)), lambda *args: [[list(b) for b in o] for o in split_graphs(*args)],
                                   lambda xb,yb,bs: [*split_graphs(xb, yb, bs)][::-1]), ids=('list','iterator','lists','reversed'))
def test_split(split):
    "A function splits what only it understands; in validation too, if that is split"
    large,small = (graphs(acc, cbs=Passes()) for acc in (None, MicroBatch(5, split=split, valid=True)))
    for l in (large,small): run(l, fit)
    same(large, small)
    assert sorted(small.passes.ns[True])==sorted(2*([5,5,5,1]*3+[5,4])) and sorted(small.passes.ns[False])==sorted(2*[5,5,5,1])

def test_split_of_uneven_means():
    "Targets that are ignored are counted in what `split` returns"
    loss = CE(ignore_index=1)
    large,small = (graphs(acc, loss_func=loss) for acc in (None, MicroBatch(3, split=split_graphs)))
    for l in (large,small): run(l, fit)
    same(large, small)

@pytest.mark.parametrize('split', (lambda *args: split_graphs(*args)[1:], lambda *args: split_graphs(*args)*2, lambda *args: []),
                         ids=('lost','twice','nothing'))
def test_split_that_loses_samples(split):
    small = graphs(MicroBatch(5, split=split))
    before = flat(small.model.parameters())
    with pytest.raises(ValueError, match='`split` returned parts of .* samples for a batch of 16: each sample is to be in one of them'): run(small, fit)
    assert torch.equal(before, flat(small.model.parameters())) and no_grads(small)
    assert_clean(small)

def test_split_that_fails():
    "Its own error comes through"
    def split(xb, yb, bs): raise Boom('boom')
    small = graphs(MicroBatch(5, split=split))
    with pytest.raises(Boom): run(small, fit)
    assert_clean(small)
    large = graphs()
    for l in (large, small.to_microbatch(5, split=split_graphs)):
        l.dls.train.rng = random.Random(3)
        run(l, fit)
    assert_same_run(large, small, 1e-12)

PREDS = { # what a model returns, and its logits in that
    'tuple':             (lambda p: (p, p*2), entry(0,0)),
    'list':              (lambda p: [p, [p*2]], entry(0,0)),
    'dict':              (lambda p: {'o':p, 'more':(p, p[:,0])}, entry(0,'o')),
    'OrderedDict':       (lambda p: collections.OrderedDict(z=p, o=p), entry(0,'o')),
    'UserDict':          (lambda p: collections.UserDict(o=p), entry(0,'o')),
    'namedtuple':        (lambda p: Pair(p, {'k':p}), entry(0,'a')),
    'TensorImage':       (lambda p: (p, typed(p, TensorImage, note='kept')), entry(0,0)),
    'a tensor a sample': (lambda p: list(p), lambda p: torch.stack(p)),
    'a dict a sample':   (lambda p: [{'s':v, 'l':[i for i in range(int(v.argmax())+1)]} for v in p], lambda p: torch.stack([o['s'] for o in p]))}

@pytest.mark.parametrize('o', PREDS)
def test_predictions_are_joined(o):
    "In `before_step` and `after_batch`, `learn.pred` is what the model would have returned for the whole batch"
    post,get = PREDS[o]
    def loss(pred, targ): return F.cross_entropy(get(pred), targ)
    for bs in (1, 5, 16):
        large,small = pair(mb(bs, valid=True), lambda l: l.fit(1, 0.05), n=41, model=partial(Reads, post=post), loss_func=loss,
                           cbs=lambda: [Spy('before_step','after_batch')])
        same(large, small)
        assert_same_values(large.spy.saw, small.spy.saw)

def test_what_has_no_samples_beside():
    "Scalars and numbers beside a prediction become lists, one entry a micro-batch; text and `None`, and all of one that needed no splitting, stay"
    def post(p): return p, p.sum(), 1.5, None, {'s':'text', 'm':p.mean()}
    def loss(pred, targ): return F.cross_entropy(pred[0], targ)
    large,small,whole = (learner(41, BS, acc, model=partial(Reads, post=post), loss_func=loss, cbs=Spy('after_batch'))
                         for acc in (None, MicroBatch(5, valid=True), MicroBatch(valid=True)))
    for l in (large,small,whole): run(l, lambda l: l.fit(1, 0.05))
    same(large, small); same(large, whole, 0.)
    assert_same_values(large.spy.saw, whole.spy.saw, 0.)
    for a,b in zip(large.spy.saw, small.spy.saw):
        (p,s,_,_,d),(q,t,*rest,e) = a[4],b[4]
        k = -(-len(p)//5)
        assert_same_values(p, q)
        assert len(t)==k and rel(s, sum(t))<=1e-12 and rest==[[1.5]*k, None] and e['s']=='text'
        assert len(e['m'])==k and rel(d['m'], sum(m*n for m,n in zip(e['m'], np.diff([len(q)*i//k for i in range(k+1)])))/len(q))<=1e-12

def test_state_in_events():
    "Whole batches are seen around the passes, micro-batches within, each with its own loss"
    large,small = pair(mb(5, valid=True), lambda l: l.fit(1, 0.05), n=41, cbs=lambda: [Spy(*EVENTS)])
    def at(l, *names): return [s for s in l.spy.saw if s[0] in names]
    for names in (('before_batch',), ('before_step','after_step','after_batch')):
        a,b = (at(l, *names) for l in (large,small))
        if names==('before_batch',): a,b = ([s[:4] for s in o] for o in (a,b)) # of the batch before, the rest is
        assert_same_values(a, b)
    for train in (True,False):
        wholes = [s for s in at(large, 'after_loss') if s[1]==train]
        parts = [s for s in at(small, 'after_loss') if s[1]==train]
        for _,_,(x,),(y,),pred,*_ in wholes:
            k = -(-len(x)//5)
            mine,parts = parts[:k],parts[k:]
            for o,whole in zip(zip(*((s[2][0], s[3][0], s[4]) for s in mine)), (x,y,pred)): assert_same_values(torch.cat(o), whole)
            for s in mine: assert 4<=len(s[2][0])<=5 and rel(F.cross_entropy(s[4], *s[3]), s[5])<=1e-12
        assert not parts

def by_index(order):
    "A function that splits by the places of samples"
    def split(xb, yb, bs): return [(tuple(x[i] for x in xb),tuple(y[i] for y in yb)) for i in order(len(xb[0])).split(bs)]
    return split

def backwards(xb, yb, bs): return [(tuple(x[i:i+bs] for x in xb),tuple(y[i:i+bs] for y in yb)) for i in reversed(range(0, len(xb[0]), bs))]

@pytest.mark.parametrize('split', (by_index(lambda n: torch.arange(n).flip(0)), backwards), ids=('copies','slices'))
@pytest.mark.parametrize('kwargs', (dict(), dict(sync_loss=True)), ids=('plain','sync_loss'))
def test_split_in_another_order(split, kwargs):
    "Weights are those of the batch; predictions and partners of `MixUp` would be those of other samples"
    micro = mb(5, split=split, valid=True, **kwargs)
    same(*pair(micro, n=41))
    learn = learner(41, 16, micro(), dtype=f32, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    for f in (learn.get_preds, learn.validate, lambda: learn.fit(1, 0.1, cbs=MixUp())):
        with pytest.raises(ValueError, match='in another order'): f()
    same(*pair(mb(5, split=by_index(torch.arange), valid=True, preds=True, **kwargs), n=41))

def test_training_without_targets():
    "As in plain training, there is no loss, no gradient and no step"
    large,small = pair(mb(5), n=41, cbs=lambda: [To(None, lambda y: ()), Spy('after_batch'), Passes()])
    assert not large.trace.steps and not small.trace.steps and torch.equal(flat(large.model.parameters()), flat(small.model.parameters()))
    assert_same_values(*([s[4] for s in l.spy.saw] for l in (large,small)))
    assert small.passes.ns[True]==[4]*8+[4,5]+[4]*8+[4,5]
    assert_clean(small)

def test_events():
    "Each event of a batch once, those within its passes once a micro-batch, in the plain order"
    class Log(Callback):
        order = 98
        def __init__(self): self.log = []
        def __call__(self, name): self.log.append((name, self.learn.training))
    for valid in (False,True):
        large,small = pair(mb(5, valid=valid), cbs=lambda: [Log()], n=41)
        batch = [[o for o in l.log.log if o[0] not in MICRO_EVENTS] for l in (large,small)]
        assert batch[0]==batch[1]
        for e in MICRO_EVENTS:
            for train in (True,False):
                k,n = (l.log.log.count((e,train)) for l in (small,large))
                assert n==(6 if train else 2 if e in MICRO_EVENTS[:2] else 0)
                assert k==(20 if train else n*(4 if valid else 1)), (e, train)
        i = small.log.log.index(('before_batch',True))
        assert [o[0] for o in small.log.log[i:i+20]]==['before_batch', *MICRO_EVENTS*4, 'before_step','after_step','after_batch']

def test_listeners_that_are_made_on_the_spot():
    "`Callback(after_pred=...)`, one whose events are set on it, and one that hears of all: each hears what it asks for"
    class All(Callback):
        def __call__(self, name): heard.append(name) if name in MICRO_EVENTS and self.learn.training else None
    heard = []
    def hears(name): return lambda self: heard.append(name) if self.learn.training else None
    def later():
        res = Callback()
        res.after_loss = lambda: heard.append('after_loss') if res.learn.training else None
        return res
    large,small = pair(mb(5), n=41, cbs=lambda: [Callback(**{e:hears(e) for e in MICRO_EVENTS}), later(), All()])
    counts = collections.Counter(heard)
    assert counts=={e:(6+20)*(3 if e=='after_loss' else 2) for e in MICRO_EVENTS}
    same(large, small)

def test_whole_batch_keeps_its_counters():
    "`iter`, `train_iter`, `pct_train` in the passes are the batch's"
    class Log(Callback):
        order = 98
        def __init__(self): self.log = []
        def after_backward(self):
            self.log.append((*(getattr(self.learn, k) for k in ('iter','n_iter','train_iter','pct_train')), *(h['lr'] for h in self.opt.hypers)))
    large,small = pair(mb(5), lambda l: l.fit_one_cycle(2, 0.05), cbs=lambda: [Log()])
    assert list(dict.fromkeys(small.log.log))==large.log.log and len(small.log.log)==2*(4*4+2)

# ---- faults

EXCS = (Boom,KeyboardInterrupt,CancelBackwardException,CancelStepException,CancelBatchException,CancelTrainException,CancelValidException,
        CancelEpochException,CancelFitException)

class Bomb(Callback):
    "Raise `exc` at the `i`-th call of `event` for batch `b` of the first epoch, from behind (or, with a low `order`, before) all other callbacks"
    def __init__(self, event, exc, b=0, i=0, order=99): self.event,self.exc,self.b,self.i,self.order = event,exc,b,i,order
    def __call__(self, name):
        if name!=self.event or not self.learn.training or self.learn.epoch or self.learn.iter!=self.b: return
        self.i -= 1
        if self.i==-1: raise self.exc('boom')

def outcome(learn, f=fit):
    "What a fit raises, if it does"
    try: run(learn, f)
    except BaseException as e: return type(e)

def again(*learns, **kwargs):
    "Another fit, in which the loader does not depend on how far the last one came"
    for l in learns:
        l.dls.train.rng = random.Random(3)
        run(l, lambda l: l.fit(1, 0.05, **kwargs))

@given(event=st.sampled_from(EVENTS), exc=st.sampled_from(EXCS), b=st.integers(0, 2), i=st.integers(0, 3), order=st.sampled_from((-200,99)),
       bs=st.sampled_from((5,'auto')), mom=st.sampled_from((0.,0.9)))
@settings(max_examples=100)
def test_raised_anywhere(event, exc, b, i, order, bs, mom):
    "An error, an interrupt or a cancellation, wherever in a batch: the rest of the fit and the next one are the plain learner's with the same in that batch"
    k = 1 if bs=='auto' else 2 if b==2 else 4
    assume(i<(k if event in MICRO_EVENTS else 1) and not (k>1 and event=='before_backward' and exc is CancelBackwardException))
    large,small = (learner(41, BS, acc, opt_func=partial(SGD, mom=mom)) for acc in (None, MicroBatch(bs)))
    # what a batch that did not come to its end has of a gradient is dropped, and so is that of a fit that dies, where fastai leaves both to the next step
    bombs = (large, 'after_loss' if event=='after_backward' else event, 0),(small, event, i)
    ends = [outcome(l, lambda l: l.fit(2, 0.05, cbs=Bomb(e, exc, b, j, order))) for l,e,j in bombs]
    assert ends[0]==ends[1]
    assert_clean(small)
    if ends[1]:
        assert no_grads(small)
        large.model.zero_grad()
    assert len(large.trace.batches)==len(small.trace.batches)
    again(large, small)
    same(large, small, batches=False)

@pytest.mark.parametrize('exc', (Boom,KeyboardInterrupt,CancelBatchException,CancelFitException))
@pytest.mark.parametrize('event', MICRO_EVENTS)
@pytest.mark.parametrize('i', (0,2))
def test_half_a_gradient(event, exc, i):
    "Of a batch that ends within its micro-batches there is no gradient, neither after the fit nor in the next step"
    small = learner(41, BS, MicroBatch(5))
    grads = []
    def look(self): grads.append(no_grads(self.learn))
    outcome(small, lambda l: l.fit(1, 0.05, cbs=[Bomb(event, exc, 1, i), Callback(after_cancel_batch=look, after_cancel_fit=look)]))
    assert no_grads(small) and all(grads) and len(grads)==(exc in (CancelBatchException,CancelFitException))
    assert_clean(small)

def without(lo, hi):
    x,y = problem(N+16)
    keep = [i for i in range(N+16) if not lo<=i<hi]
    return x[keep],y[keep]

@pytest.mark.parametrize('loss', (CE(), CE(reduction='sum'), CE(ignore_index=1), nn.MultiMarginLoss()), ids=('mean','sum','ignore_index','multi-margin'))
@pytest.mark.parametrize('b,i', ((0,0), (1,2), (3,3), (4,0), (4,1)))
def test_one_backward_pass_is_cancelled(b, i, loss):
    "What its micro-batch has counts nothing, all others do"
    small = learner(N, BS, MicroBatch(5), shuffle=False, loss_func=loss)
    run(small, lambda l: l.fit(1, 0.05, cbs=Bomb('before_backward', CancelBackwardException, b, i)))
    ns = [4]*4 if b<4 else [4,5]
    lo = b*16+sum(ns[:i])
    large = resize(learner(N-ns[i], BS, data=without(lo, lo+ns[i]), loss_func=loss), [16-ns[i]*(j==b) for j in range(4)]+[9-ns[i]*(b==4)])
    large.dls.train.shuffle = False
    run(large, lambda l: l.fit(1, 0.05))
    same(large, small)

@pytest.mark.parametrize('loss', (CE(), CE(reduction='sum'), nn.MultiMarginLoss()), ids=('mean','sum','multi-margin'))
@pytest.mark.parametrize('own', (False,True))
@pytest.mark.parametrize('bs', (5,'auto'))
def test_all_backward_passes_are_cancelled(bs, own, loss):
    "By a callback that does without, or sees to it itself: as in plain training, and so is the loss"
    class No(Callback):
        order = 98
        def before_backward(self):
            if self.learn.iter!=1: return
            if own: self.learn.loss_grad.backward()
            raise CancelBackwardException
    same(*pair(mb(bs), n=41, cbs=lambda: [No()], loss_func=loss))

@pytest.mark.parametrize('loss', (CE(), CE(ignore_index=1), CE(reduction='sum'), nn.MultiMarginLoss(), OwnCount()),
                         ids=('mean','ignore_index','sum','multi-margin','declared'))
def test_gradients_of_earlier_batches(loss):
    "A callback that cancels every other step, so that gradients add up: what is there from before is not touched"
    class Other(Callback):
        order = 98
        def before_step(self):
            if self.learn.iter%2==0: raise CancelBatchException
    same(*pair(mb(5), cbs=lambda: [Other()], loss_func=loss))

@pytest.mark.parametrize('event', ('after_pred','after_loss'))
def test_cancelled_batches_can_be_measured(event):
    "What `after_batch` sees of a batch that was cancelled fits together, so metrics can make something of it"
    class Skip(Callback):
        order = 98
        def __call__(self, name):
            if name==event and self.learn.training and self.learn.iter==1: raise CancelBatchException
    def mk(*args, **kwargs):
        l = learner(*args, **kwargs, metrics=accuracy, dtype=f32)
        l.recorder.train_metrics = True
        return l
    same(*pair(mb(5), mk=mk, cbs=lambda: [Skip()]), 1e-5, batches=False)

@pytest.mark.parametrize('where', ('loader','model','loss','backward','optimizer','metric'))
@pytest.mark.parametrize('exc', (Boom,KeyboardInterrupt))
@pytest.mark.parametrize('valid', (True,False))
def test_error_outside_callbacks(where, exc, valid, monkeypatch):
    "An error where no callback is at work, in the second batch"
    kw = dict(dtype=f32, metrics=accuracy) if where=='metric' else {}
    large,small = (learner(41, BS, acc, **kw) for acc in (None, MicroBatch(5, valid=valid)))
    for l,k in ((large,2), (small,7)):
        l.create_opt()
        with monkeypatch.context() as m:
            def plant(o, attr, k=k): m.setattr(o, attr, boom_at(k, getattr(o, attr), exc))
            if   where=='loader':    plant(l.dls.train, 'do_batch', 2)
            elif where=='model':     plant(l.model, 'forward')
            elif where=='loss':      plant(l, 'loss_func')
            elif where=='backward':  hook = l.model[0].weight.register_hook(boom_at(k, noop, exc))
            elif where=='optimizer': m.setattr(l.opt, 'cbs', l.opt.cbs + boom_at(6, lambda *args, **kwargs: None, exc))
            else:
                l.recorder.train_metrics = True
                plant(l.metrics[0], 'accumulate', 2)
            assert outcome(l) is exc
        if where=='backward': hook.remove()
    assert_clean(small)
    assert no_grads(small)
    large.model.zero_grad()
    if where=='metric': large.recorder.train_metrics = small.recorder.train_metrics = False
    again(large, small)
    same(large, small, 1e-5 if where=='metric' else 1e-12, batches=where!='metric')

class Late(Callback):
    "Raise at `event`, in which no batch is at work"
    order = 99
    def __init__(self, event, exc=Boom): self.event,self.exc = event,exc
    def __call__(self, name):
        if name==self.event: raise self.exc('boom')

LATE = 'before_fit before_epoch before_train after_train before_validate after_validate after_epoch after_fit'.split()
NEXT = { # how the next fit is to be computed, and how many passes and steps it then has
    'the same':     (MicroBatch(5), {}, noop, 10, 3),
    'another':      (MicroBatch(5), {}, lambda l: l.to_microbatch(8), 6, 3),
    'none':         (MicroBatch(5), {}, lambda l: l.detach_microbatch(), 3, 3),
    'of that fit':  (None, dict(cbs=MicroBatch(8)), noop, 6, 3),
    'after accumulation':  (AccumulateStep(1), {}, lambda l: l.detach_accum().to_microbatch(5), 10, 3),
    'accumulation': (MicroBatch(5), {}, lambda l: l.detach_microbatch().to_accum(2), 3, 2)}
@pytest.mark.parametrize('event', LATE)
@pytest.mark.parametrize('kind', NEXT)
def test_error_between_batches(event, kind):
    "A fit ends in another callback's event: what is asked of the next one is done, and it is the plain learner's"
    acc,kwargs,f,n_pass,n_step = NEXT[kind]
    large,small = learner(41, BS),learner(41, BS, copy(acc), cbs=Passes())
    for l,kw in ((large,{}), (small,kwargs)):
        cbs = [Late(event), *([copy(kw['cbs'])] if kw else [])]
        assert outcome(l, lambda l: l.fit(1, 0.05, cbs=cbs)) is Boom
        l.trace.steps,l.trace.batches = [],[]
    f(small)
    again(large)
    again(small, **{k:copy(v) for k,v in kwargs.items()})
    if n_step==3: same(large, small, batches=event!='before_fit')
    assert len(small.passes.ns[True])==n_pass and len(small.trace.steps)==n_step
    assert_clean(small)

def test_error_in_validation():
    "`validate` and `get_preds` that die leave nothing to the fit that follows, nor to the next prediction"
    for event in ('before_validate','after_pred','after_loss','after_batch','after_validate','after_epoch','after_fit'):
        large,small = (learner(41, BS, acc) for acc in (None, MicroBatch(5, valid=True)))
        for f in (lambda l: l.validate(cbs=Late(event)), lambda l: l.get_preds(cbs=Late(event))):
            assert outcome(large, f) is outcome(small, f) is Boom
        small.add_cb(Passes())
        again(large, small)
        same(large, small)
        assert small.passes.ns=={True:[4]*8+[4,5], False:[4]*4}
        assert_same_values(large.get_preds()[0], small.get_preds()[0])

@pytest.mark.parametrize('event', [*LATE[:3], *(e for e in EVENTS if e not in MICRO_EVENTS), *LATE[3:-1]])
@pytest.mark.parametrize('valid', (True,False))
def test_removed_in_a_fit(event, valid):
    "Another callback takes it out: from the next batch on at the latest, training is plain"
    class Out(Callback):
        order = 98
        def __call__(self, name):
            if name==event and (event not in EVENTS or self.learn.iter==1): self.learn.remove_cb(MicroBatch)
    large,small = pair(mb(5, valid=valid), n=73, cbs=lambda: [Out(), Passes()])
    same(large, small)
    if event in EVENTS: assert small.passes.ns[True][-8:]==[16]*2+[9]+[16]*4+[9] and small.passes.ns[True][:4]==[4]*4
    elif event in LATE[:3]: assert small.passes.ns[True]==large.passes.ns[True]
    else: assert small.passes.ns[True][-5:]==large.passes.ns[True][-5:] and len(small.passes.ns[True])==18+5
    assert small.passes.ns[False][-1]==16

@pytest.mark.parametrize('event', EVENTS)
def test_others_come_and_go(event):
    "A callback that takes itself and one more out and puts another in, in a micro-batch or around it: all hear what they would of a plain run"
    class Comes(Callback):
        order,n = 98,0
        def after_batch(self): self.n += 1
    class Goes(Comes):
        def __call__(self, name):
            super().__call__(name)
            if name==event and self.learn.training and self.learn.iter==1:
                self.learn.add_cb(comes)
                self.learn.remove_cbs([self,goes])
    class GoesToo(Comes): order = 97
    heard = []
    for acc in (None, MicroBatch(5)):
        comes,goes,cb = Comes(),GoesToo(),Goes()
        small = run(learner(41, BS, acc, cbs=[cb,goes]), fit)
        heard.append((cb.n, goes.n, comes.n, [str(o) for o in small.cbs if not isinstance(o, MicroBatch)], [o.learn is small for o in small.cbs].count(False)))
        if acc is None: large = small
    assert heard[0]==heard[1] and heard[0][2]>3
    same(large, small)

@pytest.mark.parametrize('loss', (CE(), CE(reduction='sum')), ids=('mean','sum'))
@pytest.mark.parametrize('event', ('before_epoch','before_train','before_batch','after_backward','after_batch','before_validate','after_epoch'))
def test_put_in_in_a_fit(event, loss):
    "From the next epoch on at the latest, batches are split"
    class Puts(Callback):
        order = 98
        def __call__(self, name):
            if name==event and not hasattr(self.learn, 'micro_batch'): self.learn.to_microbatch(5)
    large,small = (learner(41, BS, loss_func=loss, cbs=[*cbs,Passes()]) for cbs in ([],[Puts()]))
    for l in (large,small): run(l, fit)
    same(large, small)
    assert small.passes.ns[True][-10:]==[4]*8+[4,5]

@pytest.mark.parametrize('valid', (True,False))
@pytest.mark.parametrize('bs', (5,'auto'))
@pytest.mark.parametrize('event,inner', (('after_step',True), ('after_batch',False), ('after_batch',True), ('after_train',True), ('after_validate',True),
                                         ('after_epoch',False)))
def test_validation_in_between(event, inner, bs, valid):
    "Another callback validates in mid-epoch, and puts back what that changes"
    class Between(Callback):
        order = 98
        def __call__(self, name):
            if name!=event or self.busy or name in EVENTS and not (self.learn.training and self.learn.iter==1): return
            changed = 'epoch loss train_iter pct_train dl iter n_iter xb yb pred loss_grad training'.split()
            state = {k:v for k,v in vars(self.learn).items() if k in changed}
            self.busy = True
            self.vals.append(self.learn.get_preds(with_loss=True, inner=inner)[2])
            self.busy = False
            for k,v in state.items(): setattr(self.learn, k, v)
            self.model.train(self.learn.training)
    large,small = (learner(41, BS, acc, cbs=[Between(), Passes()]) for acc in (None, MicroBatch(bs, valid=valid)))
    for l in (large,small):
        l.between.vals,l.between.busy = [],False
        run(l, fit)
    same(large, small)
    assert_same_values(large.between.vals, small.between.vals)
    if bs=='auto' or not inner: return
    assert small.passes.ns=={True:2*([4]*8+[4,5]), False:[4]*16 if valid else [16]*4}

class HalfPrecision(MixedPrecision):
    "On the CPU, or with all that goes with it but in full precision"
    name,amp = 'mixed_precision',False
    def before_fit(self):
        super().before_fit()
        self.autocast = autocast('cpu', dtype=torch.bfloat16, enabled=self.amp)
    def after_pred(self):
        if self.amp: super().after_pred()

def nesting():
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()

@pytest.mark.parametrize('exc', (Boom,CancelBatchException,CancelFitException))
@pytest.mark.parametrize('event', MICRO_EVENTS)
@pytest.mark.parametrize('order,i', ((-200,0), (-200,2), (99,2)))
def test_autocast_is_left(event, exc, order, i):
    "Wherever a batch ends, also where fastai by itself would stay in autocast; what follows is plain training"
    small = learner(41, BS, MicroBatch(5), cbs=HalfPrecision())
    before = nesting()
    outcome(small, lambda l: l.fit(1, 0.05, cbs=Bomb(event, exc, 1, i, order)))
    assert nesting()==before and not torch.is_autocast_enabled('cpu')
    large = learner(41, BS, cbs=HalfPrecision())
    large.model.load_state_dict(deepcopy(small.model.state_dict()))
    large.create_opt(); large.opt.load_state_dict(deepcopy(small.opt.state_dict()))
    small.trace.steps,small.trace.batches = [],[]
    again(large, small)
    same(large, small)
    assert nesting()==before

def test_autocast_of_each_micro_batch():
    "Forward pass and loss are in it, backward pass and step are not"
    class Where(Callback):
        order = 98
        def before_fit(self): self.where = []
        def __call__(self, name):
            if name=='before_fit': self.before_fit()
            if name in EVENTS: self.where.append((name, torch.is_autocast_enabled('cpu'), nesting()))
    class Low(HalfPrecision): amp = True
    def one(acc):
        l = learner(41, BS, acc, dtype=f32, cbs=[Low(), Where()])
        inner = []
        l.model.register_forward_hook(lambda m,i,o: inner.append((o.dtype, torch.is_autocast_enabled('cpu'))))
        run(l, lambda l: l.fit(1, 0.05))
        return l,inner
    (large,a),(small,b) = one(None),one(MicroBatch(5, valid=True))
    assert set(a)==set(b)=={(torch.bfloat16,True)} and len(b)==10+4
    assert set(large.where.where)==set(small.where.where)

# ---- what can't be

@pytest.mark.parametrize('bs', (0, -1, True, False, 2.5, 4., 'big', None, [4], float('nan'), np.float64(2)), ids=str)
def test_bs(bs):
    with pytest.raises(ValueError, match="`bs`=.*pass a positive integer, 'auto' or 'fast'"): MicroBatch(bs)
    learn = learner(41, BS).to_microbatch(5)
    with pytest.raises(ValueError, match='`bs`='): learn.to_microbatch(bs)
    assert learn.micro_batch.bs==5 # a mistake leaves the callback that was there
    run(learn, lambda l: l.fit(1))

@pytest.mark.parametrize('v', ('mean', 'sample', None, 1, True, ['auto']), ids=str)
def test_normalize_argument(v):
    with pytest.raises(ValueError, match="`normalize`=.*'auto', 'samples', 'none' or a function"): MicroBatch(4, normalize=v)

@pytest.mark.parametrize('v', (3, 'half', True, [4,4]), ids=str)
def test_split_argument(v):
    with pytest.raises(ValueError, match=r'`split`=.*pass a function `\(xb, yb, bs\)`'): MicroBatch(4, split=v)

def test_any_integer():
    "Such as numpy makes of a table"
    same(*pair(mb(np.int64(5))))

def fails(learn, match, **kwargs):
    "Before anything has trained, in a fit and in validation, with the learner left whole"
    before = flat(learn.model.parameters())
    with pytest.raises(ValueError, match=match): learn.fit(1, **kwargs)
    with pytest.raises(ValueError, match=match): learn.validate(**kwargs)
    assert torch.equal(before, flat(learn.model.parameters()))
    assert_clean(learn)

@pytest.mark.parametrize('name', ('AccumulateStep','GradientAccumulation','MicroBatch'))
def test_one_is_enough(name):
    "Said by name; and what the error says to do works"
    def other(): return globals()[name](2)
    match = rf'{name} beside MicroBatch.*one of them is enough.*remove_cb\({name}\)|MicroBatch beside {name}.*one of them is enough'
    fails(learner(41, BS, MicroBatch(5)), match, cbs=other())
    learn = learner(41, BS, L(other(), MicroBatch(5)), cbs=Passes())
    fails(learn, 'remove_cb')
    learn.remove_cb(globals()[name])
    if name=='MicroBatch': learn.to_microbatch(5)
    run(learn, lambda l: l.fit(1))
    assert len(learn.passes.ns[True])==10 and len(learn.trace.steps)==3

class OwnGradOpt(Learner):
    def _do_grad_opt(self): self._backward(); self._step(); self.opt.zero_grad()
class OwnOneBatch(Learner):
    def _do_one_batch(self):
        self.pred = self.model(*self.xb)
        self.loss = self.loss_grad = self.loss_func(self.pred, *self.yb)
        if self.training: self.loss.backward(); self.opt.step(); self.opt.zero_grad()
class OwnParts(Learner):
    def _backward(self): self.loss_grad.backward(); self.n_back = getattr(self, 'n_back', 0)+1
    def _step(self): self.opt.step(); self.n_steps = getattr(self, 'n_steps', 0)+1
class OwnBatch(OwnParts):
    _step = Learner._step
    def _do_one_batch(self):
        self.pred = self.model(*self.xb)
        self('after_pred')
        self.loss = self.loss_grad = self.loss_func(self.pred, *self.yb)
        self('after_loss')
        if self.training: self._do_grad_opt()

def of_class(cls):
    def mk(*args, **kwargs):
        l = learner(*args, **kwargs)
        l.__class__ = cls
        return l
    return mk

@pytest.mark.parametrize('kind', ('subclass','patch','whole batch'))
def test_learner_that_steps_by_itself(kind):
    "Its steps would be those of micro-batches, or its own way would not be heard of: said at the first micro-batch at the latest"
    small = of_class(OwnGradOpt if kind=='subclass' else OwnOneBatch if kind=='whole batch' else Learner)(41, BS, MicroBatch(5))
    if kind=='patch': small._do_grad_opt = partial(OwnGradOpt._do_grad_opt, small)
    before = flat(small.model.parameters())
    with pytest.raises(ValueError, match='_do_one_batch' if kind=='whole batch' else '_do_grad_opt'): run(small, fit)
    if kind!='whole batch': assert torch.equal(before, flat(small.model.parameters()))
    small.detach_microbatch()
    run(small, fit)

@pytest.mark.parametrize('cls', (OwnParts,OwnBatch))
def test_learner_with_its_own_parts(cls):
    "Its own backward passes are the micro-batches', its own steps the batches'"
    large,small = pair(mb(5), mk=of_class(cls), n=41)
    same(large, small)
    assert (large.n_back,small.n_back)==(6,20) and getattr(large, 'n_steps', 0)==getattr(small, 'n_steps', 0)

def test_to_and_from():
    "They return the learner, and there is one callback at most"
    learn = learner(41, BS)
    assert learn.to_microbatch() is learn and learn.micro_batch.bs=='auto' and learn.micro_batch.valid
    assert learn.to_microbatch(5, normalize='samples', valid=True) is learn
    assert (learn.micro_batch.bs,learn.micro_batch.normalize,learn.micro_batch.valid)==(5,'samples',True)
    assert not learn.to_microbatch(8).micro_batch.valid and learn.micro_batch.normalize=='auto'
    assert sum(isinstance(cb, MicroBatch) for cb in learn.cbs)==1
    assert learn.detach_microbatch() is learn and not any(isinstance(cb, MicroBatch) for cb in learn.cbs) and not hasattr(learn, 'micro_batch')
    assert learn.detach_microbatch() is learn

# ---- validation and prediction

def picture(i): return PILImage.create((np.random.RandomState(i).rand(12, 12, 3)*255).astype(np.uint8))
def label(i): return 'abc'[i*i%7%3]
def half(xb, yb, bs): return [(tuple(x[i:i+bs] for x in xb), tuple(y[i:i+bs] for y in yb)) for i in range(0, len(xb[0]), bs)]

def pictures(acc=None, path=None):
    seed()
    block = DataBlock((ImageBlock, CategoryBlock), get_x=picture, get_y=label, splitter=RandomSplitter(0.4, seed=1), batch_tfms=Flip())
    dls = block.dataloaders(range(50), bs=8, num_workers=0, device='cpu')
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    learn = Learner(dls, model, metrics=[accuracy, F1Score(average='macro')], cbs=L(acc)+Passes()+Trace(), path=path)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

USES = {
    'validate':       lambda l: l.validate(),
    'validate train': lambda l: l.validate(dl=l.dls.train.new(shuffle=False, drop_last=False)),
    'get_preds':      lambda l: l.get_preds(),
    'with_input':     lambda l: l.get_preds(with_input=True),
    'with_loss':      lambda l: l.get_preds(with_loss=True),
    'with it all':    lambda l: l.get_preds(with_input=True, with_loss=True, with_decoded=True),
    'no reorder':     lambda l: l.get_preds(ds_idx=0, reorder=False, act=noop),
    'test_dl':        lambda l: l.get_preds(dl=l.dls.test_dl(list(range(60, 83)))),
    'one batch':      lambda l: l.get_preds(dl=[l.dls.valid.one_batch()]),
    'tta':            lambda l: l.tta(n=2),
    'tta beta':       lambda l: l.tta(n=2, beta=None),
    'predict':        lambda l: l.predict(picture(3), with_input=True)}

@functools.lru_cache(None)
def trained(bs=None, **kwargs): return run(pictures(None if bs is None else MicroBatch(bs, **kwargs)), lambda l: l.fit(1, 0.05))

@pytest.mark.parametrize('kwargs', (dict(bs=3, valid=True), dict(bs='auto'), dict(bs=1, valid=True, split=half)), ids=('split','auto','function'))
@pytest.mark.parametrize('use', USES)
def test_validation_and_prediction(use, kwargs):
    "Whatever a trained learner is asked, its answer is the plain one's"
    res = []
    for l in (trained(),trained(**kwargs)): run(l, lambda l: res.append(USES[use](l)))
    def plain_types(o):
        if isinstance(o, (list,tuple,L)): return type(o)(plain_types(v) for v in o)
        return o.as_subclass(Tensor) if isinstance(o, Tensor) else np.array(o) if isinstance(o, PILImage) else o
    a,b = map(plain_types, res)
    if use=='predict': a,b = [(d.as_subclass(Tensor) if isinstance(d, Tensor) else np.array(d), *rest) for d,*rest in (a,b)]
    if use.startswith('validate'): a,b = tensor(list(a)),tensor(list(b))
    assert_same_values(a, b, 1e-6)
    ns = trained(**kwargs).passes.ns[False]
    assert ns and max(ns)<=(kwargs['bs'] if kwargs.get('valid') else 8)
    if use!='predict' and not kwargs.get('valid'): assert max(ns)==8
    assert_clean(trained(**kwargs))

@pytest.mark.parametrize('kwargs', (dict(bs=3, valid=True), dict(bs='auto'), dict(bs=1, valid=True, split=half)), ids=('split','auto','function'))
def test_pictures(kwargs):
    "A data block's learner, fastai's types and random transforms of whole batches"
    large,small = pictures(),pictures(MicroBatch(**kwargs))
    for l in (large,small): run(l, lambda l: l.fit_one_cycle(2, 0.05))
    same(large, small, 1e-5)

def test_types_of_predictions():
    "Inputs come back as what they were"
    types = [L(l.get_preds(with_input=True, with_decoded=True)).map(type) for l in (trained(),trained(bs=3, valid=True))]
    assert types[0]==types[1] and types[0][0] is TensorImage

def test_show_results(monkeypatch):
    "The same pictures with the same predictions"
    import matplotlib
    matplotlib.use('Agg')
    from fastai.data.core import TfmdDL
    shown = []
    show = TfmdDL.show_results
    def _show(self, b, out, **kwargs): shown.append((b, out)); return show(self, b, out, **kwargs)
    monkeypatch.setattr(TfmdDL, 'show_results', _show)
    for l in (trained(),trained(bs=3, valid=True)): run(l, lambda l: l.show_results(max_n=5))
    (a,p),(b,q) = shown
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and len(p)==len(q) and all(torch.equal(*o) for o in zip(p, q))

def test_losses_of_samples():
    "`with_loss` for a function, for a loss that says so itself, for sequences, and where a loss is weighed"
    y = problem(41+16)[1]
    losses = F.cross_entropy,CE(),CE(weight=W, ignore_index=1),CE(reduction='sum'),CrossEntropyLossFlat(),MSELossFlat(),nn.MSELoss()
    for loss in losses:
        data = (problem(41+16)[0], y if 'MSE' not in str(loss) else torch.randn(41+16, 3, dtype=f64))
        large,small = (learner(41, BS, acc, loss_func=loss, data=data) for acc in (None, MicroBatch(5, valid=True)))
        for idx in (0,1): assert_same_values(*(L(l.get_preds(idx, with_loss=True)).map(lambda o: o.as_subclass(Tensor)) for l in (large,small)))
        assert large.validate()==small.validate()==None and loss_reduction(large)==loss_reduction(small)

def loss_reduction(l): return getattr(l.loss_func, 'reduction', None)

def test_validation_loss():
    "With targets that are ignored, class weights, and means over elements"
    for case in ('cross-entropy, weights, ignored','cross-entropy, segmentation','bce with logits, weights','CrossEntropyLossFlat, sequences',
                 'FocalLossFlat, weights','DiceLoss, sum'):
        loss,y,*rest = {**EXACT, **FLAT}[case]
        shape,post = (rest+[(3,),noop][len(rest):])[:2]
        vals = []
        for acc in (None, MicroBatch(3, valid=True)):
            l = learner(N_LOSS, 13, acc, data=(X,y), model=partial(Net, shape, post), loss_func=loss, cbs=Keep())
            l.validate()
            l.validate(0)
            vals.append(l.keep.losses)
        assert len(vals[0])==1+4 and rel(*vals)<=(1e-12 if case in EXACT else 1e-6), case

class Keep(Callback):
    losses = ()
    def after_batch(self): self.losses = [*self.losses, float(self.learn.loss)]

@pytest.mark.parametrize('kwargs', (dict(bs=3, valid=True), dict(bs='auto'), dict(bs=3, normalize='samples', split=half)), ids=('number','auto','split'))
def test_export(kwargs, tmp_path):
    "What `load_learner` brings back predicts, has its settings and can train on, in micro-batches"
    l = run(pictures(MicroBatch(**kwargs), tmp_path), lambda l: l.fit(1, 0.05))
    expect = l.predict(picture(3))[2]
    l.export()
    l2 = load_learner(tmp_path/'export.pkl')
    a,b = l.micro_batch,l2.micro_batch
    assert torch.equal(l2.predict(picture(3))[2], expect) and torch.equal(l.predict(picture(3))[2], expect)
    assert all(getattr(a, k)==getattr(b, k) for k in ('bs','normalize','split','valid')) and b.learn is l2
    assert_clean(l2)
    large = pictures()
    large.model.load_state_dict(deepcopy(l2.model.state_dict()))
    l2.dls,l2.logger,l2.trace.steps = large.dls,noop,[]
    again(large, l2)
    assert rel(flat(large.model.parameters()), flat(l2.model.parameters()))<=1e-5 and len(l2.trace.steps)==3
    assert max(l2.passes.ns[True])==(3 if kwargs['bs']==3 else 8)

def test_export_holds_no_batch(tmp_path):
    "Nor what else a fit leaves: the file is that of a plain learner"
    sizes = []
    for acc in (None, MicroBatch(3, valid=True)):
        l = run(pictures(acc, tmp_path), lambda l: l.fit(1, 0.05))
        l.export()
        sizes.append((tmp_path/'export.pkl').stat().st_size)
    assert sizes[1]<sizes[0]+4000 < sizes[0]+8*3*12*12*4
