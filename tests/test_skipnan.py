"Micro-batches whose loss is nan or inf: the run is that of large batches without them"
import pytest,warnings
from fastai.callback.fp16 import MixedPrecision
from common import *
from fastai_accum.skipnan import *
from test_companions import Mixed

class Batches(list): "A loader of given batches"
W = torch.tensor([0.1,1,7], dtype=torch.float64)
BS,N_STEP = 4,4
BAD = 2,3,7,9 # micro-batches of 4, in windows of 4: two, one, one and none of them
WAYS = {'n_step':(BS, partial(AccumulateStep, N_STEP)), 'n_samples':(BS, partial(AccumulateStep, n_samples=15)), 'parts':(BS*N_STEP, partial(MicroBatch, BS)), 'alone':(BS*N_STEP, noop)}
def bn_net(): return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

def data(bad=BAD, n=61):
    "With a nan in micro-batches `bad`, and which of the samples are in none of them"
    x,y = problem(n)
    ok = torch.ones(n, dtype=torch.bool)
    y[[BS*i for i in bad]] = 2 # which no loss here ignores
    for i in bad: x[BS*i,1],ok[BS*i:BS*(i+1)] = math.nan,False
    return x,y,ok

def batches(x, y, bs, ok=None):
    if ok is None: ok = torch.ones_like(y).bool()
    res = ((a[k],b[k]) for a,b,k in zip(x.split(bs), y.split(bs), ok.split(bs)))
    res = Batches(b for b in res if len(b[0]))
    res.bs = bs
    return res

def made(dl, *cbs, **kwargs):
    learn = learner(64, 16, cbs=cbs, **kwargs)
    learn.dls.loaders[0] = dl
    return learn

def fit(l): l.fit_one_cycle(3, 0.05)

@pytest.mark.parametrize('loss', (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(W), nn.CrossEntropyLoss(ignore_index=1), lambda pred,targ: F.cross_entropy(pred, targ, weight=W)), ids=('plain','weights','ignored','shown'))
@pytest.mark.parametrize('way', ('n_step','n_samples','parts'))
def test_same_run(way, loss, capsys):
    "Weights, optimizer, schedule and losses at every step"
    x,y,ok = data()
    bs,acc = WAYS[way]
    large,small = made(batches(x, y, 16, ok), loss_func=loss),made(batches(x, y, bs), acc(), SkipNaN(), loss_func=loss)
    for l in (large,small): run(l, fit)
    assert_same_run(large, small, 1e-12)
    assert (small.skip_nan.n,small.skip_nan.n_left)==(48,12)
    assert 'SkipNaN: left out 12 of 48 micro-batches, as their loss was nan or inf' in capsys.readouterr().out

@pytest.mark.parametrize('way', WAYS)
def test_nothing_left(way):
    "A window of which nothing is left makes no step, and is recorded as the one before; the schedule goes on"
    x,y,ok = data(bad=range(4, 8))
    bs,acc = WAYS[way]
    large,small = made(batches(x, y, 16, ok)),made(batches(x, y, bs), *L(acc()), SkipNaN())
    for l in (large,small): run(l, lambda l: l.fit(3, 0.05))
    assert len(large.trace.steps)==len(small.trace.steps)==9
    for s,t in zip(large.trace.steps, small.trace.steps): assert rel(s['weights'], t['weights'])<1e-12 and rel(s['state'], t['state'])<1e-12
    losses = [b['loss'] for b in small.trace.batches]
    assert len(losses)==12 and losses[1::4]==losses[::4] and rel([b['loss'] for b in large.trace.batches], [l for i,l in enumerate(losses) if i%4!=1])<1e-12
    assert not any(p.grad.any() for p in params(small.model))
    x,y,ok = data(bad=range(4))
    small = run(made(batches(x, y, bs), *L(acc()), SkipNaN()), lambda l: l.fit(1, 0.05))
    assert small.trace.batches[0]['loss']==0 and len(small.trace.steps)==3

@pytest.mark.parametrize('way,sync', (('n_step',False),('n_step','stats'),('parts',False),('parts','stats')))
def test_running_statistics(way, sync):
    "As if the micro-batches had not come, also those of a batch that is tried again"
    x,y,ok = data(bad=(0,2,7), n=64)
    bs,_ = WAYS[way]
    def one(n): return (AccumulateStep(n, sync_bn=sync) if way=='n_step' else MicroBatch(BS, sync_bn=sync))
    kept = Batches((a[k],b[k]) for a,b,k in zip(x.split(bs), y.split(bs), ok.split(bs)) if k.any())
    if way=='n_step': kept,want,got = batches(x[ok], y[ok], BS),one(13),one(16)
    else: want,got = one(4),one(4)
    plain,small = made(kept, want, model=bn_net),made(batches(x, y, bs), got, SkipNaN(), model=bn_net)
    for l in (plain,small): run(l, lambda l: l.fit(2, 0.05))
    for a,b in zip(plain.model.buffers(), small.model.buffers()): assert rel(a, b)<1e-12
    assert rel(flat(plain.model.parameters()), flat(small.model.parameters()))<1e-12

def test_tried_again():
    "Memory runs out in the second micro-batch of an attempt: nothing is counted or put back twice"
    class Limit(nn.Module):
        n = 0
        def forward(self, x):
            self.n += self.training and len(x)==8
            if self.training and (len(x)==16 or len(x)==8 and self.n==2): raise torch.OutOfMemoryError('out of memory')
            return x
    x,y,ok = data(bad=(1,7))
    def model(): return nn.Sequential(*bn_net(), Limit())
    def mk(acc): return made(batches(x, y, 16), acc, SkipNaN(), model=model)
    small = run(mk(MicroBatch('auto')), lambda l: l.fit(2, 0.05))
    plain = run(mk(MicroBatch(small.micro_batch.bs)), lambda l: l.fit(2, 0.05))
    assert small.micro_batch.bs<8 and (small.skip_nan.n,small.skip_nan.n_left)==(plain.skip_nan.n,plain.skip_nan.n_left) and small.skip_nan.n_left>=4
    for f in (nn.Module.parameters, nn.Module.buffers): assert rel(flat(f(plain.model)), flat(f(small.model)))==0

@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('bad', (BAD, range(4), range(12, 16)))
def test_mixed_precision(way, bad):
    "The scaler is that of the large batch without the samples"
    x,y,ok = data(bad=bad)
    bs,acc = WAYS[way]
    if way=='alone': bad = ok = ok.view(-1) if bad is not BAD else torch.cat([o.all().expand(len(o)) for o in ok.split(16)])
    large,small = made(batches(x, y, 16, ok), Mixed(full=True, growth_interval=2)),made(batches(x, y, bs), *L(acc()), SkipNaN(), Mixed(full=True, growth_interval=2))
    for l in (large,small): run(l, lambda l: l.fit(2, 0.05))
    assert rel(flat(large.model.parameters()), flat(small.model.parameters()))<1e-12
    assert str(large.mixed.seen)==str(small.mixed.seen)

def test_overflow_is_the_scalers():
    "A loss that is finite, with a gradient that overflows, skips the step and lowers the scale"
    class Overflow(Callback):
        order = 5
        def before_backward(self):
            if self.training and self.train_iter==1: self.learn.loss_grad = self.loss_grad*math.inf
    x,y,_ = data(bad=())
    small = run(made(batches(x, y, BS), AccumulateStep(N_STEP), SkipNaN(), Mixed(full=True), Overflow()), lambda l: l.fit(1, 0.05))
    assert small.skip_nan.n_left==0 and len(small.mixed.seen[0])==3 and small.mixed.seen[1]['scale']==2.**15

@pytest.mark.parametrize('by', (math.nan,math.inf,-math.inf))
def test_what_is_added_to_a_loss(by):
    "A penalty that is nan or inf counts, too"
    class Penalty(Callback):
        order,run_valid = 20,False
        def before_fit(self): self.n = 0
        def after_loss(self):
            self.n += 1
            self.learn.loss_grad = self.loss_grad + (by if self.n in (2,7) else 0)
    x,y,_ = data(bad=())
    small = run(made(batches(x, y, BS), AccumulateStep(N_STEP), SkipNaN(), Penalty()), lambda l: l.fit(1, 0.05))
    assert small.skip_nan.n_left==2 and flat(small.model.parameters()).isfinite().all()

def test_records():
    "Metrics of the training set and recorded losses do not see what is left out; `lr_find` goes through"
    x,y,ok = data(n=64)
    large,small = (made(dl, *cbs, dtype=torch.float32) for dl,cbs in ((batches(x.float(), y, 16, ok),()), (batches(x.float(), y, BS),(AccumulateStep(N_STEP),SkipNaN()))))
    for l in (large,small):
        l.recorder.train_metrics,l.metrics = True,[accuracy]
        run(l, fit)
    assert_same_records(large.recorder, small.recorder, 1e-5)
    assert np.isfinite(small.recorder.losses).all()
    a,b = (run(l, lambda l: l.lr_find(show_plot=False, num_it=30)) or l.recorder.losses for l in (large,small))
    assert rel(large.recorder.losses, small.recorder.losses)<1e-4

def test_all_of_an_epoch():
    x,y,_ = data(bad=range(16))
    learn = made(batches(x, y, BS), AccumulateStep(N_STEP), SkipNaN())
    with pytest.warns(UserWarning, match='all 16 micro-batches of epoch 0 .* Begin anew with a lower learning rate'): run(learn, lambda l: l.fit(1, 0.05))
    assert not learn.trace.steps and learn.skip_nan.n_left==16

def test_dropped_leftover():
    "What a dropped window had left out is counted"
    x,y,_ = data(bad=(0,13))
    learn = run(made(batches(x[:56], y[:56], BS), AccumulateStep(N_STEP, leftover='drop'), SkipNaN()), lambda l: l.fit(1, 0.05))
    assert learn.skip_nan.n_left==1 and len(learn.trace.steps)==3 # the last two never begin
    learn = run(made(batches(x[:56], y[:56], BS), AccumulateStep(n_samples=15, leftover='step'), SkipNaN()), lambda l: l.fit(1, 0.05))
    assert learn.skip_nan.n_left==2 and len(learn.trace.steps)==4

@pytest.mark.parametrize('acc,match', ((MicroBatch(4, sync_bn=True), "Take `sync_bn='stats'`"), (MicroBatch(4, sync_loss=True), 'Leave out `sync_loss`')))
def test_refused(acc, match):
    x,y,_ = data()
    learn = made(batches(x, y, 16), acc, SkipNaN(), model=bn_net)
    with pytest.raises(ValueError, match=match): learn.fit(1)
    assert type(learn.opt).__name__!='AccumulateOptimizer'
    if acc.sync_bn: run(made(batches(x, y, 16), MicroBatch(4, sync_bn=True), SkipNaN()), fit) # without a BatchNorm it is no matter

@pytest.mark.parametrize('acc', (MicroBatch(4), None), ids=('MicroBatch','alone'))
def test_refused_in_several_processes(acc, monkeypatch):
    "As others wait for its backward pass"
    monkeypatch.setattr('fastai_accum.skipnan.several_processes', lambda: True)
    x,y,_ = data()
    with pytest.raises(ValueError, match='Take `AccumulateStep` and `DistributedDataParallel`'): made(batches(x, y, 16), *L(acc), SkipNaN()).fit(1)
