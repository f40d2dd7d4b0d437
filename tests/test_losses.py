"Every loss, with denominators that differ wildly between the micro-batches of a window, against the real large batch"
import pytest
from fastai.losses import *
from fastai.losses import DiceLoss,LabelSmoothingCrossEntropy
from common import *

N,C,T,BS,N_STEP = 52,3,5,3,4 # samples, classes, targets of a sample
g = torch.Generator().manual_seed(1)
X = torch.randn(N+16, 6, generator=g, dtype=torch.float64)
W = torch.tensor([0.1, 1., 30.], dtype=torch.float64)
values = torch.randn(N+16, C, generator=g, dtype=torch.float64)
bits,probs = (values>0).double(),values.softmax(1)

def labels(*shape, p=0.6):
    "Class labels, a share `p` of them ignored; in some micro-batches all of them"
    y = torch.randint(C, (N+16, *shape), generator=g)
    return y.masked_fill(torch.rand(y.shape, generator=g)<p, -100)

class Net(nn.Module):
    "From 6 numbers to `shape`"
    def __init__(self, shape, post):
        super().__init__()
        self.shape,self.post,self.net = shape,post,nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, math.prod(shape)))
    def forward(self, x): return self.post(self.net(x).view(-1, *self.shape))

def both(loss, y, shape=(C,), post=noop, large_loss=None, shuffle=True):
    def one(bs, loss, acc=None):
        learn = learner(N, bs, acc, data=(X,y), model=partial(Net, shape, post), loss_func=loss, shuffle=shuffle)
        return run(learn, lambda l: l.fit_one_cycle(2, 0.02))
    return one(BS*N_STEP, large_loss or loss),one(BS, loss, AccumulateStep(N_STEP))

logp = partial(F.log_softmax, dim=1)
EXACT = {
    'cross-entropy, ignored':       (nn.CrossEntropyLoss(), labels()),
    'cross-entropy, ignore_index':  (nn.CrossEntropyLoss(ignore_index=1), labels(p=0)),
    'cross-entropy, weights':       (nn.CrossEntropyLoss(weight=W), labels(p=0)),
    'cross-entropy, weights, ignored': (nn.CrossEntropyLoss(weight=W), labels()),
    'cross-entropy, smoothing':     (nn.CrossEntropyLoss(label_smoothing=0.1), labels()),
    'cross-entropy, all of it':     (nn.CrossEntropyLoss(weight=W, ignore_index=2, label_smoothing=0.1), labels(p=0)),
    'cross-entropy, probabilities': (nn.CrossEntropyLoss(weight=W), probs),
    'cross-entropy, sequences':     (nn.CrossEntropyLoss(weight=W), labels(T), (C,T)),
    'cross-entropy, segmentation':  (nn.CrossEntropyLoss(), labels(2,2), (C,2,2)),
    'a function, ignored':          (F.cross_entropy, labels()),
    'a partial':                    (partial(F.cross_entropy, weight=W, ignore_index=1), labels(p=0)),
    'nll':                          (nn.NLLLoss(weight=W), labels(), (C,), logp),
    'nll, segmentation':            (partial(F.nll_loss, weight=W), labels(2,2), (C,2,2), logp),
    'bce with logits':              (nn.BCEWithLogitsLoss(), bits),
    'bce with logits, weights':     (nn.BCEWithLogitsLoss(weight=W, pos_weight=W.flip(0)), bits),
    'bce':                          (nn.BCELoss(), bits, (C,), torch.sigmoid),
    'mse':                          (nn.MSELoss(), values),
    'l1':                           (nn.L1Loss(), values),
    'smooth l1':                    (nn.SmoothL1Loss(), values),
    'huber':                        (nn.HuberLoss(delta=0.3), values),
    'soft margin':                  (nn.SoftMarginLoss(), bits*2-1),
    'poisson':                      (nn.PoissonNLLLoss(), values.exp()),
    'kl, mean':                     (nn.KLDivLoss(reduction='mean'), probs, (C,), logp),
    'kl, batchmean':                (nn.KLDivLoss(reduction='batchmean'), probs, (C,), logp),
    'multi-margin, weights':        (nn.MultiMarginLoss(weight=W), labels(p=0)),
    'unknown function':             (lambda pred,targ: (pred.mean(1)-targ.mean(1)).pow(4).mean(), values)}

@pytest.mark.parametrize('case', EXACT)
def test_exact(case): assert_same_run(*both(*EXACT[case]), 1e-12)

W32 = W.float()
FLAT = { # these compute in float32, whatever they are given
    'CrossEntropyLossFlat':            (CrossEntropyLossFlat(), labels()),
    'CrossEntropyLossFlat, weights':   (CrossEntropyLossFlat(weight=W32, ignore_index=2), labels(p=0)),
    'CrossEntropyLossFlat, axis':      (CrossEntropyLossFlat(axis=1, weight=W32), labels(2,2), (C,2,2)),
    'CrossEntropyLossFlat, sequences': (CrossEntropyLossFlat(label_smoothing=0.1), labels(T), (T,C)),
    'LabelSmoothingCrossEntropyFlat':  (LabelSmoothingCrossEntropyFlat(), labels(T, p=0), (T,C)),
    'FocalLossFlat':                   (FocalLossFlat(), labels(p=0)),
    'FocalLossFlat, weights':          (FocalLossFlat(weight=W32, axis=1), labels(2,2,p=0), (C,2,2)),
    'BCEWithLogitsLossFlat':           (BCEWithLogitsLossFlat(), bits),
    'BCEWithLogitsLossFlat, weights':  (BCEWithLogitsLossFlat(pos_weight=W32, weight=W32), bits),
    'BCELossFlat':                     (BCELossFlat(), bits, (C,), torch.sigmoid),
    'MSELossFlat':                     (MSELossFlat(), values),
    'L1LossFlat':                      (L1LossFlat(), values),
    'DiceLoss':                        (DiceLoss(reduction='mean'), labels(4,4,p=0), (C,4,4)),
    'DiceLoss, sum':                   (DiceLoss(), labels(4,4,p=0), (C,4,4), noop, lambda p,t: C*DiceLoss(reduction='mean')(p,t))}

@pytest.mark.parametrize('case', FLAT)
def test_fastai_losses(case): assert_same_run(*both(*FLAT[case]), 1e-6)

@pytest.mark.parametrize('case', [k for k,v in FLAT.items() if isinstance(v[0], BaseLoss) and 'Focal' not in k and 'Label' not in k])
def test_denominator_is_that_of_the_wrapped_loss(case):
    "The loss, times its denominator, is the sum over what counts: that is what denominator means"
    from fastai_accum.losses import denominator
    loss,y,*rest = FLAT[case]
    pred = (rest[1] if len(rest)>1 else noop)(torch.randn(N+16, *(rest[0] if rest else (C,)), generator=g))
    y = y.float() if y.is_floating_point() else y
    total = deepcopy(loss); total.reduction = 'sum'
    assert rel(total(pred, y), loss(pred, y)*denominator(loss, pred, y)) < 1e-6

def all_ignored(case):
    y = EXACT[case][1]
    return sum(bool((b==-100).all()) for b in y[:N].split(BS))

def test_some_micro_batches_count_nothing():
    "The cases above do hold micro-batches in which every target is ignored"
    assert all_ignored('cross-entropy, ignored')>=3 and all_ignored('nll')>=3

@pytest.mark.parametrize('loss', (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(weight=W, label_smoothing=0.1)), ids=str)
def test_a_window_that_counts_nothing(loss):
    "Weights are the large batch's, whose gradient is 0 then; of its NaN there is no trace"
    y = labels(p=0); y[24:36] = -100
    large,small = both(loss, y, shuffle=False)
    assert_same_run(large, small, 1e-12, batches=False)
    losses = [[b['loss'] for b in l.trace.batches] for l in (large,small)]
    assert math.isnan(losses[0][2]) and losses[1][2]==0 and rel(losses[0][:2], losses[1][:2])<1e-12

class MaskedMSE(nn.Module):
    "A loss of somebody else's, that says what it divides by"
    def forward(self, pred, targ):
        mask = ~targ.isnan()
        return F.mse_loss(pred[mask], targ[mask])
    def denominator(self, pred, targ): return (~targ.isnan()).sum()

class CountsOnHost(MaskedMSE):
    def denominator(self, pred, targ): return int((~targ.isnan()).sum())

@pytest.mark.parametrize('loss', (MaskedMSE(), CountsOnHost(), partial(MaskedMSE())), ids=str)
def test_declared_denominator(loss):
    y = values.masked_fill(torch.rand(values.shape, generator=g)<0.5, float('nan'))
    y[6:9] = float('nan') # one micro-batch without any
    assert_same_run(*both(loss, y, shuffle=False), 1e-12)

class MaskedMean(nn.Module):
    "As it is often written: where nothing counts, loss and gradient are nan, unless it is `safe`"
    def __init__(self, count, safe=False): super().__init__(); self.count,self.safe = count,safe
    def forward(self, pred, targ):
        mask = ~targ.isnan()
        return ((pred-targ.nan_to_num())**2*mask).sum()/mask.sum().clamp(min=1 if self.safe else 0)
    def denominator(self, pred, targ): return self.count((~targ.isnan()).sum())

@pytest.mark.parametrize('nothing', ((6,9), (9,12), (0,12), (24,36)), ids=str)
@pytest.mark.parametrize('count', (noop,int), ids=('tensor','int'))
@pytest.mark.parametrize('acc,bs', ((AccumulateStep(N_STEP),BS), (MicroBatch(BS),BS*N_STEP)), ids=str)
def test_nan_where_nothing_counts(acc, bs, count, nothing):
    "Micro-batches, or windows, in which nothing counts leave no nan behind; if it is all of a window, weight decay acts as with a gradient of 0"
    y = values.masked_fill(torch.rand(values.shape, generator=g)<0.5, float('nan'))
    y[slice(*nothing)] = float('nan')
    large,small = (run(learner(N, *o, data=(X,y), loss_func=MaskedMean(count, safe), opt_func=partial(Adam, wd=0.1), shuffle=False), lambda l: l.fit_one_cycle(2, 0.02))
                   for safe,o in ((True,(BS*N_STEP,)), (False,(bs,deepcopy(acc)))))
    assert large.trace.steps[-1]['weights'].isfinite().all()
    assert_same_run(large, small, 1e-12)

def test_variable_lengths():
    "Micro-batches of sequences of different lengths count their elements; the large batch has them padded, and its loss leaves the padding out"
    lens = [2,7,1,5,3,9,4,6,2,8,3,5,1,7,4,2,6,3]
    x = torch.randn(len(lens)*BS, 9, 6, generator=g, dtype=torch.float64)
    y = torch.randn(len(lens)*BS, 9, generator=g, dtype=torch.float64)
    for i,n in enumerate(lens): y[i*BS:(i+1)*BS, n:] = float('nan')
    def trim(b):
        n = int((~b[1].isnan()).any(0).sum())
        return b[0][:,:n],b[1][:,:n]
    class PerStep(nn.Module):
        def __init__(self): super().__init__(); self.net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))
        def forward(self, x): return self.net(x).squeeze(-1)
    def one(bs, loss, acc=None, **kwargs):
        learn = learner(52, bs, acc, model=PerStep, loss_func=loss)
        learn.dls.loaders[:] = [DataLoader(list(zip(x,y)), bs=bs, **kwargs)]*2
        return run(learn, lambda l: l.fit(2, 0.1))
    assert_same_run(one(BS*N_STEP, MaskedMSE()), one(BS, nn.MSELoss(), AccumulateStep(N_STEP), after_batch=trim), 1e-12)

def test_two_denominators_are_told():
    "fastai's label smoothing with class weights is no mean that could be split: said once, by name, before training"
    loss = LabelSmoothingCrossEntropyFlat(weight=W32)
    with pytest.warns(UserWarning, match='LabelSmoothingCrossEntropy.*class weights'): both(loss, labels(p=0))

def test_samples_on_request():
    "`normalize='samples'` does not look at the targets, and is off where they are ignored: which is why 'auto' looks"
    y = labels(p=0)
    large,auto,samples = (learner(N, bs, acc, data=(X,y), model=partial(Net, (C,), noop), loss_func=nn.CrossEntropyLoss(ignore_index=0))
                          for bs,acc in ((12,None), (3,AccumulateStep(4)), (3,AccumulateStep(4, normalize='samples'))))
    for l in (large,auto,samples): run(l, lambda l: l.fit(1, 0.1))
    off = [rel(large.trace.steps[-1]['weights'], l.trace.steps[-1]['weights']) for l in (auto,samples)]
    assert off[0]<1e-12 and not off[1]<1e-3

class OwnForward(nn.CrossEntropyLoss):
    "Made of a loss that we know, but not it"
    def __init__(self, **kwargs): super().__init__(ignore_index=0, **kwargs)
    def forward(self, pred, targ): return F.cross_entropy(pred, targ, ignore_index=0, reduction='none').mean()

@pytest.mark.parametrize('loss', (OwnForward(), OwnForward(reduction='none')), ids=('mean','none'))
def test_subclass_with_its_own_forward(loss):
    "A subclass that computes something else counts samples"
    assert_same_run(*both(loss, labels(p=0)), 1e-12)

class Combined:
    "As in fastai's docs: a mean and, by `DiceLoss`'s default, a sum"
    def __init__(self, reduction): self.focal,self.dice = FocalLossFlat(axis=1),DiceLoss(reduction=reduction)
    def __call__(self, pred, targ): return self.focal(pred, targ) + self.dice(pred, targ)

def test_a_part_that_sums():
    "Said once, by name; with a mean in its place the run is the large batch's"
    y = labels(4, 4, p=0)
    with pytest.warns(UserWarning, match='Combined.*has a part that sums'): both(Combined('sum'), y, (C,4,4))
    assert_same_run(*both(Combined('mean'), y, (C,4,4)), 1e-6)

@pytest.mark.parametrize('bad', (-4, float('nan'), None, torch.ones(3), torch.tensor(-4.), torch.tensor([float('nan')])), ids=str)
def test_bad_declared_denominator(bad):
    class Bad(nn.MSELoss):
        def denominator(self, pred, targ): return bad
    with pytest.raises(ValueError, match='`denominator` of Bad.* returned'): both(Bad(), values)

def of_strings(pred, targ): return F.cross_entropy(pred, tensor([int(t) for t in targ]))
def of_dicts(pred, targ): return F.cross_entropy(pred, torch.stack([t['label'] for t in targ]))
def of_dict(pred, targ): return F.cross_entropy(pred, targ['label'])
@pytest.mark.parametrize('kind', ('strings','dicts','dict','no targets yet'))
@pytest.mark.parametrize('unit', ('n_step','n_samples'))
def test_samples_are_counted_whatever_the_targets(kind, unit):
    "Lists of strings, of dicts, a dict of tensors; targets that another callback makes of the inputs"
    class Own(Callback):
        def before_batch(self): self.learn.yb = ((self.learn.x[:,0]>0).long(),)
    boxes = torch.zeros(7, 4)
    def collate(b):
        x,y = torch.stack([o[0] for o in b]),[int(o[1]) for o in b]
        if kind=='strings': return x,[str(o) for o in y]
        if kind=='dicts': return x,[{'boxes':boxes, 'label':tensor(o)} for o in y]
        return (x,{'label':tensor(y)}) if kind=='dict' else (x,)
    loss = {'strings':of_strings, 'dicts':of_dicts, 'dict':of_dict}.get(kind, F.cross_entropy)
    def one(bs, acc=None):
        learn = learner(N, bs, acc, loss_func=loss, cbs=Own() if kind=='no targets yet' else None)
        ds = list(zip(*problem(N+16)))
        learn.dls.loaders[:] = [DataLoader(o, bs=bs, create_batch=collate) for o in (ds[:N], ds[N:])]
        learn.dls.n_inp = 1
        return run(learn, lambda l: l.fit(2, 0.1))
    assert_same_run(one(12), one(3, AccumulateStep(4) if unit=='n_step' else AccumulateStep(n_samples=12)), 1e-12)

def test_float16_losses_do_not_overflow():
    "Counts of elements are larger than float16 can hold"
    from fastai_accum.window import Window
    win = Window(4)
    for _ in range(4): win.weigh(torch.tensor(0.5, dtype=torch.float16), 131072); win.add(torch.tensor(0.5, dtype=torch.float16))
    assert win.mean_loss==0.5

def test_loss_set_by_another_callback():
    "A loss that another callback's `before_fit` puts in place is the one that is weighed"
    class Sums(Callback):
        def before_fit(self): self.learn.loss_func = nn.CrossEntropyLoss(reduction='sum')
    large,small = learner(73, 16),learner(73, 4, AccumulateStep(4), cbs=Sums())
    for l in (large,small): run(l, lambda l: l.fit(2, 0.1))
    assert_same_run(large, small, 1e-12)
