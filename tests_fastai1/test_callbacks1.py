"fastai 1: the other callbacks beside `AccumulateStep` and `MicroBatch`, against a large-batch learner that has the same ones"
import contextlib,io,warnings
import pytest
from common1 import *
from fastai.callbacks import *
from fastai.callbacks.csv_logger import CSVLogger
from fastai.callbacks.hooks import HookCallback
from fastai.callbacks.loss_metrics import LossMetrics
from fastai.callbacks.misc import StopAfterNBatches
from fastai.callbacks.mixup import MixUpCallback
from fastai.callbacks.oversampling import OverSamplingCallback
from fastai.callbacks.rnn import RNNTrainer
from fastai.callbacks.tracker import *
from fastai.callbacks.tracker import TrackEpochCallback
from fastai.vision.gan import GANDiscriminativeLR,GANLearner,AdaptiveGANSwitcher,FixedGANSwitcher
import torch.nn.functional as F

HOSTS = {'accumulate':(BS,acc4), 'accumulate samples':(BS,partial(AccumulateStep, n_samples=16)), 'microbatch':(16,partial(MicroBatch, bs=4))}
each_host = pytest.mark.parametrize('host', HOSTS)

def pair(host, n=73, fit=lambda l: l.fit_one_cycle(2, 0.1), both=lambda l: l, cbs=lambda l: [], tol=1e-12, losses=1e-5, **kwargs):
    "The large batch's learner and the other one, after `fit`, if they are the same"
    bs,acc = HOSTS[host]
    res = [learner(n, *o, **kwargs) for o in ((16,None), (bs,acc))]
    for l in res:
        both(l)
        seed(3)
        with contextlib.redirect_stdout(io.StringIO()): fit(l)
        assert clean(l)
    assert_same_run(*res, tol, losses)
    return res

@each_host
def test_clipping(host):
    for clip in (0.05,0.5): pair(host, both=lambda l: l.clip_grad(clip))

class Heard(Callback):
    "What a callback of one's own hears, at each event that a window has once"
    def __init__(self, learn): learn.heard = self.log = []
    def note(self, event, numbers=(), **kwargs):
        self.log.append((event, *(kwargs[k] for k in ('epoch','iteration','num_batch','n_epochs','stop_training')), *(float(kwargs[k]) for k in numbers if kwargs.get(k) is not None)))
    def on_epoch_begin(self, **kw): self.note('epoch begins', **kw)
    def on_backward_end(self, **kw): self.note('backward pass ended', ('last_loss','smooth_loss'), **kw)
    def on_step_end(self, **kw): self.note('step ended', ('last_loss','smooth_loss'), **kw)
    def on_batch_end(self, train, **kw): self.note(f'batch ended, {train}', ('last_loss','smooth_loss'), **kw)
    def on_epoch_end(self, **kw): self.note('epoch ended', ('smooth_loss',), **kw)
    def on_train_end(self, **kw): self.note('training ended', ('smooth_loss',), **kw)

def assert_heard(a, b):
    assert [o[:6] for o in a]==[o[:6] for o in b]
    for o,p in zip(a, b): assert np.allclose(o[6:], p[6:], rtol=1e-5), f'{o}, {p}'

@each_host
@pytest.mark.parametrize('reduction', ('mean','sum'))
def test_events(host, reduction):
    "Counters, losses and order"
    if host=='microbatch' or reduction=='mean': large,small = pair(host, fns=[Heard], loss=CE(reduction=reduction), fit=lambda l: l.fit(2, 0.01))
    else:
        large,small = (run(learner(73, bs, acc, fns=[Heard], loss=loss), lambda l: l.fit(2, 0.1)) for bs,acc,loss in ((16,None,CE()), (*HOSTS[host],CE(reduction='sum'))))
        assert_same(large, small)
        large,small = (SimpleLog([o for o in l.heard if o[0]!='batch ended, False']) for l in (large,small)) # the validation loss stays a sum
    assert_heard(large.heard, small.heard)

class SimpleLog:
    def __init__(self, heard): self.heard = heard

class Forward(Callback):
    "Events of forward and backward passes, of which each micro-batch has its own; and of batches, which are split later"
    def __init__(self, learn): learn.n_begun,learn.n_lost,learn.backs = 0,0,[]; self.learn = learn
    def on_batch_begin(self, last_input, train, **kw): self.learn.n_begun += train
    def on_loss_begin(self, train, **kw): self.learn.n_lost += train
    def on_backward_begin(self, last_loss, **kw): self.learn.backs.append(float(last_loss.detach()))

def test_events_of_micro_batches():
    "With the window's last micro-batch, they hear the window's loss"
    for host,begun in (('accumulate',32), ('microbatch',8)):
        large,small = pair(host, n=64, fns=[Forward])
        assert (large.n_begun,small.n_begun,small.n_lost)==(8,begun,32)
        assert np.allclose(large.backs, small.backs[3::4], rtol=1e-12)

def test_the_whole_batch_at_its_end():
    "`MicroBatch`: input, target and output of all of it"
    class Whole(Callback):
        def __init__(self, learn): learn.seen = self.seen = []
        def on_batch_end(self, last_input, last_target, last_output, **kw): self.seen.append((last_input, last_target, last_output.detach()))
    large,small = pair('microbatch', fns=[Whole])
    for a,b in zip(large.seen, small.seen): assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and torch.allclose(a[2], b[2], rtol=1e-10)

class Average(LearnerCallback):
    "Of the weights, over steps"
    def on_train_begin(self, **kw): self.learn.avg = weights(self.learn)
    def on_step_end(self, **kw): self.learn.avg = self.learn.avg.lerp(weights(self.learn), 0.1)

@each_host
def test_average_of_weights(host):
    large,small = pair(host, fns=[Average])
    assert rel(large.avg, small.avg)<1e-12

class TextNet(nn.Module):
    "Returns what fastai's text models do: predictions, raw outputs, outputs"
    def __init__(self): super().__init__(); self.emb,self.rnn,self.out = nn.Embedding(7, 6),nn.LSTM(6, 8, batch_first=True),nn.Linear(8, 3)
    def forward(self, x):
        h,_ = self.rnn(self.emb(x))
        return self.out(h[:,-1]),[h],[h]

class SequentialRNN(TextNet): # as fastai's is called
    def reset(self): pass

def texts(n):
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 7, (n,5), generator=g),torch.randint(0, 3, (n,), generator=g)

@each_host
@pytest.mark.parametrize('reduction', ('mean','sum'))
def test_rnn_trainer(host, reduction):
    "It adds its regularization to a loss; with one that sums, `AccumulateStep` makes the mean first, and `MicroBatch`, for which a sum stays one, refuses it"
    R,kw = partial(RNNTrainer, alpha=2., beta=1.),dict(n=66, data=texts(66+16), model=lambda: SequentialRNN().double())
    if reduction=='mean':
        large,small = pair(host, fns=[R,Heard], **kw)
        assert_heard(large.heard, small.heard)
    elif host=='microbatch':
        with pytest.raises(ValueError, match='RNNTrainer beside MicroBatch: it adds means to a loss that sums'): learner(bs=16, acc=HOSTS[host][1], loss=CE(reduction='sum'), fns=[R], **kw).fit(1)
    else:
        large,small = (learner(bs=bs, acc=acc, loss=loss, fns=[R], **kw) for bs,acc,loss in ((16,None,CE()), (*HOSTS[host],CE(reduction='sum'))))
        run_both(lambda l: l.fit(2, 0.1), large, small)
        assert_same(large, small)

def test_rnn_trainer_warns():
    kw = dict(n=65, data=texts(65+16), model=lambda: SequentialRNN().double(), fns=[partial(RNNTrainer, alpha=2., beta=1.)])
    with pytest.warns(UserWarning, match='`RNNTrainer` leaves out its `beta` term'): learner(bs=4, acc=acc4, **kw).fit(1, 0.1)
    with pytest.warns(UserWarning, match='weighs targets or leaves some out, and `RNNTrainer` does not'): learner(bs=5, acc=acc4, loss=CE(ignore_index=1), **kw).fit(1, 0.1)
    with pytest.raises(ValueError, match="`normalize`='none' adds gradients up"): learner(bs=5, acc=partial(AccumulateStep, n_step=4, normalize='none'), **kw).fit(1, 0.1)

class WithItself(MixUpCallback):
    "Partners are the samples themselves, so that batches of any size can be compared"
    def on_batch_begin(self, last_input, last_target, train, **kwargs):
        if train: return {'last_target':torch.cat([last_target[:,None].double(), (last_target[:,None]+1).double()%3, torch.full((len(last_target),1), 0.7).double()], 1)}

@each_host
@pytest.mark.parametrize('loss', (dict(), dict(reduction='sum'), dict(weight=torch.tensor([1.,3.,0.3]).double())), ids=('mean','sum','weight'))
def test_mixup(host, loss):
    "A loss that sums is a mean under mixup"
    large,small = pair(host, fns=[WithItself], loss=CE(**loss))
    assert large.loss_func.reduction==small.loss_func.reduction==loss.get('reduction', 'mean')

def test_mixup_of_the_whole_batch():
    "With `MicroBatch`, partners and shares are the large batch's"
    for kw in (dict(), dict(stack_y=False)):
        data = problem(73+16)
        if kw: data = data[0],F.one_hot(data[1], 3).double()
        pair('microbatch', fns=[partial(MixUpCallback, **kw)], data=data, loss=nn.MSELoss() if kw else CE())

def gan(bs, acc, switcher, fns=(), clip=None):
    g = torch.Generator().manual_seed(0)
    z,r = (torch.randn(72, k, generator=g, dtype=torch.float64) for k in (4,6))
    data = DataBunch(*(DataLoader(TensorDataset(z[i], r[i]), batch_size=b) for i,b in ((slice(64),bs),(slice(64,None),8))), device=torch.device('cpu'))
    seed()
    G,C = (nn.Sequential(nn.Linear(a, 8), nn.Tanh(), nn.Linear(8, b)).double() for a,b in ((4,6),(6,1)))
    loss_c = lambda real,fake: F.mse_loss(real, torch.ones_like(real))+F.mse_loss(fake, torch.zeros_like(fake))
    learn = GANLearner(data, G, C, lambda fake,output,target: F.mse_loss(fake, torch.ones_like(fake))+F.l1_loss(output, target), loss_c, switcher=switcher, show_img=False, opt_func=SGD, silent=True, clip=clip)
    learn.callback_fns += [*fns, *([acc] if acc else [])]
    seed(3)
    with contextlib.redirect_stdout(io.StringIO()): learn.fit(3, 0.05)
    return learn

@each_host
@pytest.mark.parametrize('kind', ('fixed','adaptive','rates'))
def test_gan(host, kind):
    "Who is trained changes with windows, losses are the windows'"
    switcher = partial(AdaptiveGANSwitcher, gen_thresh=2.5, critic_thresh=0.65) if kind=='adaptive' else partial(FixedGANSwitcher, n_crit=2, n_gen=1)
    kw = dict(fns=[GANDiscriminativeLR]) if kind=='rates' else dict(clip=0.3)
    a,b = gan(16, None, switcher, **kw),gan(*HOSTS[host], switcher, **kw)
    assert rel(weights(a), weights(b))<1e-12 and rel(weights(a), weights(gan(16, None, partial(FixedGANSwitcher, n_crit=10**6), **kw)))>1e-3
    for k in ('closses','glosses'):
        xs,ys = (np.array([float(x) for x in getattr(l.gan_trainer, k)]) for l in (a,b))
        assert len(xs)==len(ys)>0 and np.allclose(xs, ys, rtol=1e-5)
    assert a.recorder.lrs==b.recorder.lrs

def files(path): return {p.name for p in (path/'models').glob('*')}

@each_host
def test_trackers(host, tmp_path):
    "Early stopping, the best model, a rate that goes down"
    def cbs(l):
        l.path,l.model_dir = tmp_path/str(id(l)),'models'
        return [EarlyStoppingCallback(l, monitor='valid_loss', min_delta=0.05, patience=1), SaveModelCallback(l, monitor='valid_loss', every='epoch', name='m'),
                ReduceLROnPlateauCallback(l, monitor='train_loss', min_delta=0.2, patience=0)]
    large,small = pair(host, fit=lambda l: l.fit(9, 0.15, callbacks=cbs(l)))
    assert files(large.path)==files(small.path)!=set() and len({s[1] for s in small.steps.log})>1 and len(small.recorder.nb_batches)<9
    large,small = pair(host, fit=lambda l: l.fit(3, 0.3, callbacks=[SaveModelCallback(l, monitor='train_loss')]), path=tmp_path)
    assert rel(weights(large), weights(small))<1e-12

@each_host
def test_csv_logger(host, tmp_path):
    fit = lambda l: l.fit(2, 0.1, callbacks=[CSVLogger(l, filename=str(id(l)))])
    large,small = pair(host, fit=fit, path=tmp_path)
    a,b = ([r.split(',')[:3] for r in (tmp_path/f'{id(l)}.csv').read_text().split('\n')] for l in (large,small))
    assert len(a)==4 and a[0]==b[0] and np.allclose(*(np.array([[float(x) for x in r] for r in o[1:3]]) for o in (a,b)), rtol=1e-5)

@each_host
def test_terminate_on_nan(host):
    "In the same batch"
    x,y = problem(73+16)
    x[37] = float('nan')
    bs,acc = HOSTS[host]
    large,small = (learner(73, *o, data=(x,y), shuffle=False) for o in ((16,None), (bs,acc)))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for l in (large,small): l.fit(2, 0.1, callbacks=[TerminateOnNaNCallback()])
    said = [s.split('\r')[-1] for s in out.getvalue().split('\n') if 'Invalid loss' in s]
    assert len(said)==2 and said[0][-50:]==said[1][-50:] and large.recorder.lrs==small.recorder.lrs and len(large.recorder.losses)==len(small.recorder.losses)==3

@each_host
def test_stop_after_n_batches(host):
    _,small = pair(host, fit=lambda l: l.fit(2, 0.1, callbacks=[StopAfterNBatches(3)]))
    assert len(small.steps.log)==3

@each_host
def test_track_epoch(host, tmp_path):
    "Interrupted, and taken up again"
    def fit(l):
        l.path = tmp_path/str(id(l))
        class Stop(Callback):
            def on_epoch_end(self, epoch, **kw): return {'stop_training':epoch==1}
        l.fit_one_cycle(4, 0.1, callbacks=[TrackEpochCallback(l), Stop()])
        l.fit_one_cycle(4, 0.1, callbacks=[TrackEpochCallback(l)])
    _,small = pair(host, fit=fit)
    assert len(small.recorder.nb_batches)==2 and len(small.steps.log)==4*5

@each_host
def test_hooks(host):
    "They see each micro-batch, and last the last one's output"
    class Stored(HookCallback):
        def __init__(self, learn): super().__init__(learn); learn.n_hooked = 0
        def hook(self, m, i, o): self.learn.n_hooked += 1
    _,small = pair(host, n=64, fns=[Stored])
    assert small.n_hooked==2*2*(16+(4 if host=='microbatch' else 1)) or small.n_hooked==2*2*(16+1)

@each_host
def test_frozen_batch_norm(host):
    "`BnFreeze`: statistics that do not move are the same for all"
    model = lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    def both(l):
        for p in l.model[1].parameters(): p.requires_grad = False
    large,small = pair(host, fns=[BnFreeze], both=both, model=model, layer_groups=None)
    assert rel(flat(large.model.buffers()), flat(small.model.buffers()))==0

@each_host
def test_loss_metrics(host):
    class Loss(nn.Module):
        metric_names = ['part']
        def forward(self, pred, y): self.metrics = {'part':(pred**2).mean()}; return F.cross_entropy(pred, y)
    _,small = pair(host, fns=[LossMetrics], loss=Loss())
    assert len(small.recorder.metrics)==2 and small.recorder.names[3]=='part'

class Labelled(TensorDataset):
    def __init__(self, *ts): super().__init__(*ts); self.y,self.c = type('Y', (), dict(items=ts[1].numpy())),3

@each_host
def test_oversampling(host):
    "It puts another dataloader in place as training begins, and back as it ends; schedules are as long as that one"
    def both(l):
        x,y = l.data.train_dl.dataset.tensors
        bs = l.data.train_dl.batch_size
        l.data = DataBunch(DataLoader(Labelled(x, y), bs, shuffle=True), DataLoader(Labelled(x[:16], y[:16]), 16), device=torch.device('cpu'))
    large,small = pair(host, both=both, fns=[OverSamplingCallback])
    assert type(small.data.train_dl).__name__=='DeviceDataLoader' and len(small.data.train_dl)*HOSTS[host][0]-len(large.data.train_dl)*16<16
    assert small.recorder.lrs[-1]<small.recorder.lrs[0]

class SkipNan(Callback):
    "Leaves out what has no loss"
    def on_backward_begin(self, last_loss, **kwargs):
        if torch.isnan(last_loss.detach()): return {'skip_bwd':True, 'skip_step':True}

@pytest.mark.parametrize('i', (1,5,15)) # in the first, a middle, the last micro-batch of the first window
def test_a_micro_batch_is_left_out(i):
    x,y = problem(64+16)
    keep = [j for j in range(80) if j//4!=i//4]
    x[i] = float('nan')
    small = run(learner(64, BS, acc4, data=(x,y), shuffle=False, fns=[lambda l: SkipNan()]), lambda l: l.fit(1, 0.1))
    cuts = [0,12,28,44,60]
    large = learner(60, 60, data=(x[keep],y[keep]), shuffle=False)
    large.data.train_dl.dl = DataLoader(large.data.train_dl.dataset, batch_sampler=[list(range(a, b)) for a,b in zip(cuts, cuts[1:])])
    run(large, lambda l: l.fit(1, 0.1))
    assert_same(large, small)

@each_host
def test_a_step_is_left_out(host):
    "By a callback that looks at the gradient, which is the window's"
    class NoSmall(LearnerCallback):
        def on_backward_end(self, **kw): return {'skip_step':float(self.learn.model[0].weight.grad.norm())<0.25}
    _,small = pair(host, fns=[NoSmall], fit=lambda l: l.fit(3, 0.1))
    assert 0 < len(small.steps.log) < 15

@each_host
def test_gradients_of_one_s_own_accumulation(host):
    "A callback that steps every other batch does so every other window"
    class EveryOther(Callback):
        def on_backward_end(self, iteration, **kw): return {'skip_step':iteration%2==0}
        def on_step_end(self, iteration, **kw): return {'skip_zero':iteration%2==0}
    _,small = pair(host, n=61, fns=[lambda l: EveryOther()], fit=lambda l: l.fit(2, 0.1))
    assert len(small.steps.log)==4

@each_host
def test_validation_and_prediction_within_a_fit(host):
    "By a callback, with the callbacks of the learner, on any dataloader, at any event: no window is used up, opened or dropped"
    class Look(LearnerCallback):
        _order = 50
        def look(self, **kw):
            if kw.get('train') is False or getattr(self.learn, 'looking', False): return
            self.learn.looking = True
            was,recorder = self.learn.model.training,self.learn.recorder
            with contextlib.redirect_stdout(io.StringIO()):
                self.learn.n_looks = getattr(self.learn, 'n_looks', 0)+len(self.learn.get_preds(DatasetType.Train)[0])
                self.learn.validate(self.learn.data.train_dl)
            self.learn.recorder = recorder
            self.learn.model.train(was)
            self.learn.looking = False
    from fastai.basic_data import DatasetType
    for k in ('on_epoch_begin','on_batch_begin','on_loss_begin','on_backward_begin','on_backward_end','on_step_end','on_batch_end','on_epoch_end'): setattr(Look, k, Look.look)
    def fit(l):
        cb = Look(l)
        l.fit(1, 0.1, callbacks=[cb])
    for way in ('callback_fns','callbacks'):
        bs,acc = HOSTS[host]
        large,small = learner(18, 16, shuffle=False),learner(18, bs, shuffle=False)
        if way=='callback_fns': small.callback_fns.append(acc)
        else: small.callbacks.append(acc(small))
        run_both(fit, large, small)
        assert_same(large, small)
        assert small.n_looks>0 and small.n_looks%18==0

def test_a_fit_within_a_fit():
    "Between windows; within one it is refused"
    class InnerFit(LearnerCallback):
        def __init__(self, learn, event): super().__init__(learn); setattr(self, event, self.fit)
        def fit(self, train=True, **kw):
            if not train or getattr(self.learn, 'inner', False): return
            self.learn.inner = True
            try: self.learn.fit(1, 0.01)
            finally: self.learn.inner = False
    for event in ('on_batch_end','on_epoch_begin'):
        large,small = learner(33, 16),learner(33, BS, acc4)
        run_both(lambda l: l.fit(1, 0.1, callbacks=[InnerFit(l, event)]), large, small)
        assert_same(large, small)
    learn = learner(33, BS, acc4)
    with pytest.raises(ValueError, match='a fit begins within a window of another fit'): learn.fit(1, 0.1, callbacks=[InnerFit(learn, 'on_loss_begin')])
    assert clean(learn)
    learn.steps.log.clear(); run(learn, lambda l: l.fit(1, 0.1))
    assert len(learn.steps.log)==3

@pytest.mark.parametrize('event', ('on_batch_begin','on_loss_begin','on_backward_begin'))
def test_zero_grad_within_a_window(event):
    "Does nothing, and is warned of"
    class Zero(LearnerCallback):
        def zero(self, train, **kw):
            if train: self.learn.opt.zero_grad()
    setattr(Zero, event, Zero.zero)
    with pytest.warns(UserWarning, match=r'`opt.zero_grad\(\)` was called within a window of AccumulateStep'): pair('accumulate', fns=[Zero])

def test_cycle_gan_is_refused():
    class CycleGANTrainer(Callback): pass
    with pytest.raises(ValueError, match='CycleGANTrainer beside AccumulateStep: it trains its critics'): learner(40, BS, acc4).fit(1, 0.1, callbacks=[CycleGANTrainer()])

def test_gradients_outside_of_the_optimizer():
    "No one zeroes them; they go on adding up, as with the large batch"
    def both(l):
        l.freeze_to(1)
        for p in l.model.parameters(): p.requires_grad = True
    bs,acc = HOSTS['accumulate']
    large,small = learner(61, 16),learner(61, bs, acc)
    for l in (large,small): both(l); l.clip_grad(0.5); seed(3); l.fit(2, 0.1)
    assert_same(large, small)
    assert rel(large.model[0].weight.grad, small.model[0].weight.grad)<1e-12 and large.model[0].weight.grad.any()

def test_several_processes_are_refused(monkeypatch):
    import fastai_accum.fastai1 as room
    monkeypatch.setattr(room, 'several_processes', lambda: True)
    for acc,name in ((acc4,'AccumulateStep'), (partial(MicroBatch, bs=4),'MicroBatch')):
        with pytest.raises(ValueError, match=f'{name} of fastai 1 is for one process'): learner(40, BS, acc).fit(1, 0.1)

@each_host
@pytest.mark.parametrize('event,warned', (('on_backward_begin',True), ('on_loss_begin',True), ('on_backward_end',False)))
def test_gradients_by_hand(host, event, warned):
    "Written between the backward passes of a window they are warned of; once it is complete they are the large batch's"
    class Writes(LearnerCallback):
        def write(self, train, **kw):
            if not train: return
            for p in self.learn.model.parameters(): p.grad = 0.1*p.detach() if p.grad is None else p.grad.add_(p.detach(), alpha=0.1)
    setattr(Writes, event, Writes.write)
    if not warned:
        with warnings.catch_warnings(record=True) as ws:
            warnings.simplefilter('always')
            pair(host, fns=[Writes])
        assert not [w for w in ws if '`.grad`' in str(w.message)]
    else:
        with pytest.warns(UserWarning, match='`.grad` was changed between the backward passes of a window.*`on_backward_end`'): learner(73, *HOSTS[host], fns=[Writes]).fit(1, 0.1)

@each_host
def test_another_loss_in_its_place(host):
    class Replaces(Callback):
        _order = 1001
        def __init__(self, learn): self.learn = learn
        def on_backward_begin(self, last_output, last_target, **kw): return {'last_loss':2*self.learn.loss_func(last_output, last_target)}
    learn = learner(73, *HOSTS[host], fns=[Replaces])
    with pytest.raises(ValueError, match='another loss was put in the place of `last_loss` after'): learn.fit(1, 0.1)
    assert clean(learn)
