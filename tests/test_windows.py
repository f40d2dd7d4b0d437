"Windows by samples and by a function of progress, leftovers, `lr_find`, metrics, and what `normalize` does"
import pytest
from common import *

N_EPOCH = 2
def fit(l): l.fit_one_cycle(N_EPOCH, 0.05)

def pair(n, acc, fit=fit, bs_large=16, bs=4, **kwargs):
    large,small = learner(n, bs_large, **kwargs),learner(n, bs, acc, **kwargs)
    run(large, fit); run(small, fit)
    return large,small

@pytest.mark.parametrize('n', (64,73))
@pytest.mark.parametrize('bs,n_samples', ((4,16), (4,14), (16,16), (16,3)))
def test_n_samples(n, bs, n_samples):
    "A window is full as soon as it has `n_samples`: of batches of 4, both 14 and 16 take four"
    assert_same_run(*pair(n, AccumulateStep(n_samples=n_samples), bs=bs), 1e-12)

def test_n_samples_counts_what_comes():
    "A loader that decides on its sizes itself: windows close by what was counted"
    small,large = (3,9,4,1,7,8,2,6,10,5),(12,12,16,15)
    a,b = resize(learner(55, 4), large),resize(learner(55, 4, AccumulateStep(n_samples=12)), small)
    for l in (a,b): run(l, lambda l: l.fit(2, 0.1))
    assert_same_run(a, b, 1e-12, batches=False)

def test_schedule_ends_where_it_should():
    "A loader whose `bs` says nothing of its batches does not drive a schedule beyond its end, where it would rise again"
    learn = resize(learner(64, 1, AccumulateStep(n_samples=8)), [8]*8)
    run(learn, fit)
    lrs = [s['hypers'][-1]['lr'] for s in learn.trace.steps]
    assert len(lrs)==16 and set(lrs[-7:])=={min(lrs)}

class Counts(Callback):
    "Micro-batches and samples of every window, by epoch"
    order = 200
    def before_fit(self): self.n,self.samples = [],[[] for _ in range(self.n_epoch)]
    def before_step(self):
        win = self.accumulate_step.win
        self.n.append(win.count); self.samples[self.epoch].append(int(win.denom))

@pytest.mark.parametrize('sched', (SchedLin(1,4), lambda p: 1 if p<0.5 else 3, SchedCos(6,1)))
@pytest.mark.parametrize('unit', ('n_step','n_samples'))
def test_function_of_progress(sched, unit):
    "Sizes follow the function, read when a window opens; the run is that of a plain loader with batches of those sizes"
    n,bs = 78,4
    def arg(p): return sched(p) if unit=='n_step' else bs*sched(p)
    learn = learner(n, bs, AccumulateStep(**{unit:arg}), cbs=Counts())
    run(learn, lambda l: l.fit(N_EPOCH, 0.1))
    n_dl,expect = len(learn.dls.train),[]
    for epoch in range(N_EPOCH):
        i = 0
        while i<n_dl:
            size = max(1, round(float(arg((epoch+i/n_dl)/N_EPOCH))))
            expect.append(min(size if unit=='n_step' else -(-size//bs), n_dl-i))
            i += expect[-1]
    assert learn.counts.n==expect and len(set(expect))>1
    large = resize(learner(n, bs), learn.counts.samples)
    small = resize(learner(n, bs, AccumulateStep(**{unit:arg})), [4]*19+[2])
    for l in (large,small): run(l, lambda l: l.fit(N_EPOCH, 0.1))
    assert_same_run(large, small, 1e-12, batches=False)

@pytest.mark.parametrize('n', (64,70,73))
def test_leftover_drop(n):
    "As a large-batch loader with `drop_last`"
    small = learner(n//4*4, 4, AccumulateStep(4, leftover='drop'))
    large = learner(n//4*4, 16, drop_last=True)
    for l in (large,small): run(l, fit)
    assert_same_run(large, small, 1e-12)
    assert all(p.grad.abs().sum()==0 for p in small.model.parameters())

def test_leftover_carry():
    "10 micro-batches an epoch: windows of 4 run on into the next epoch, and the fit's last one is stepped as it is"
    a,b = learner(40, 4, shuffle=False),learner(40, 4, AccumulateStep(4, leftover='carry'), shuffle=False)
    a.dls.loaders[0] = DataLoader(a.dls.train.dataset*2, bs=16) # both epochs in a row
    run(a, lambda l: l.fit(1, 0.1)); run(b, lambda l: l.fit(2, 0.1))
    assert_same_run(a, b, 1e-12, batches=False)
    assert [o['epoch'] for o in b.trace.batches]==[0,0,1,1,1]

def test_drop_that_never_steps():
    with pytest.raises(ValueError, match="`leftover`='drop' and `n_step`=20: the 10 micro-batches"): learner(40, 4, AccumulateStep(20, leftover='drop')).fit(1)

@pytest.mark.parametrize('opt,end_lr', (('sgd',3), ('adam',0.3), ('adamw',0.3)))
@pytest.mark.parametrize('n,num_it', ((203,30), (64,60)))
def test_lr_find(n, num_it, opt, end_lr, tmp_path):
    "Points, curve and suggestions, up to where training diverges and so does rounding; `num_it` counts steps, also if an epoch of micro-batches is longer than that, and accumulation is still on"
    large,small = pair(n, AccumulateStep(4), dtype=torch.float32, opt_func=OPTS[opt], path=tmp_path,
        fit=lambda l: setattr(l, 'found', l.lr_find(num_it=num_it, end_lr=end_lr, show_plot=False, suggest_funcs=(valley,slide,minimum,steep))))
    assert large.found==small.found
    assert len(small.recorder.losses)==len(large.recorder.losses)
    assert_same_run(large, small, 1e-5)
    for l in (large,small):
        l.trace.steps,l.trace.batches = [],[]
        run(l, fit)
    assert_same_run(large, small, 1e-5)

@pytest.mark.parametrize('reduction', ('mean','sum'))
def test_train_metrics(reduction):
    "Metrics on the training set see every sample, and `loss` is the window's mean"
    def one(bs, acc=None, reduction='mean'):
        learn = learner(73, bs, acc, dtype=torch.float32, loss_func=nn.CrossEntropyLoss(reduction=reduction), metrics=[accuracy, error_rate])
        learn.recorder.train_metrics = True
        run(learn, fit)
        return learn
    a,b = one(16),one(4, AccumulateStep(4), reduction)
    names = L(a.recorder.metric_names)[1:-1]
    assert names==['train_loss','train_accuracy','train_error_rate','valid_loss','valid_accuracy','valid_error_rate']
    assert len(set(L(a.recorder.values).itemgot(1)))>1
    for v,w in zip(a.recorder.values, b.recorder.values):
        for name,p,q in zip(names, v, w):
            if name!='valid_loss' or reduction=='mean': assert rel(p, q)<=1e-5, name # fastai's own mean over a sum loss knows no mean
    assert_same_run(a, b, 1e-5, batches=False)

OPTS = {'sgd':partial(SGD, mom=0.9), 'adam':Adam, 'adamw':partial(OptimWrapper, opt=torch.optim.AdamW)}
CE = nn.CrossEntropyLoss

@pytest.mark.parametrize('loss', (CE(reduction='sum'), partial(F.cross_entropy, reduction='sum'), CE(), F.cross_entropy), ids=('sum','function, sum','mean','function'))
@pytest.mark.parametrize('normalize', ('auto','samples', lambda learn: len(learn.y), lambda learn: torch.tensor(float(len(learn.y)))), ids=lambda v: 'function' if callable(v) else str(v))
def test_normalize_is_the_mean(loss, normalize):
    "Whether a loss sums or averages, the step is that of the mean over the window"
    large,small = learner(73, 16),learner(73, 4, AccumulateStep(4, normalize=normalize), loss_func=loss)
    for l in (large,small): run(l, fit)
    assert_same_run(large, small, 1e-12)

def test_normalize_none():
    "Gradients just add up: with a loss that sums, the large batch's sum"
    large,small = pair(73, AccumulateStep(4, normalize='none'), lambda l: l.fit(2, 1e-3), loss_func=CE(reduction='sum'))
    assert_same_run(large, small, 1e-12)

def test_normalize_function_weighs():
    "A function is what counts: here the targets that are not ignored"
    loss = CE(ignore_index=1)
    large,small = pair(73, AccumulateStep(2, normalize=lambda learn: (learn.y!=1).sum()), bs=8, loss_func=loss)
    assert_same_run(large, small, 1e-12)
