"What callbacks show of themselves, what they warn of once a fit, and arguments that are set later"
import pydoc,pytest,warnings
from fastprogress.fastprogress import ProgressBar
from fastai.callback.schedule import SchedLin
from fastai.callback.training import BnFreeze,GradientAccumulation
from fastai_accum.loop import Accumulator
from common import *

def fit(l): l.fit(2, 0.1)
def normed(norm=nn.BatchNorm1d): return nn.Sequential(nn.Linear(6, 8), norm(8), nn.Linear(8, 3))

def frozen():
    "A BatchNorm that `BnFreeze` takes"
    m = normed()
    for p in m[1].parameters(): p.requires_grad_(False)
    return m

# ---- what they show

SHOWN = {'AccumulateStep':AccumulateStep(), 'AccumulateStep(n_step=1)':AccumulateStep(1), 'AccumulateStep(n_step=4)':AccumulateStep(4), "AccumulateStep(n_samples=32, leftover='drop')":AccumulateStep(n_samples=32, leftover='drop'),
    'AccumulateStep(n_step=SchedLin(1, 8))':AccumulateStep(SchedLin(1, 8)), 'AccumulateStep(n_step=4, normalize=len)':AccumulateStep(4, normalize=len), 'MicroBatch':MicroBatch(),
    'MicroBatch(8, sync_bn=True)':MicroBatch(8, sync_bn=True), 'MicroBatch(valid=True)':MicroBatch('auto', valid=True), 'NoiseScale':NoiseScale(), 'NoiseScale(beta=0.9)':NoiseScale(0.9)}
def test_repr():
    for s,cb in SHOWN.items(): assert repr(cb)==str(cb)==s
    learn = learner(64, 8, [AccumulateStep(4),NoiseScale()], dtype=torch.float32)
    assert 'AccumulateStep(n_step=4)' in str(learn.cbs) and '  - AccumulateStep(n_step=4)\n' in learn.summary() and (learn.accumulate_step.name,learn.noise_scale.name)==('accumulate_step','noise_scale')

def test_repr_after_a_size_was_found():
    learn = learner(64, 32, MicroBatch())
    run(learn, fit)
    assert learn.micro_batch.bs==32 and repr(learn.micro_batch)=='MicroBatch'

def test_repr_of_copies(tmp_path):
    for cb in (AccumulateStep(4, leftover='drop'),MicroBatch(8)):
        copy = pickle.loads(pickle.dumps(cb))
        assert repr(copy)==repr(deepcopy(cb))==repr(cb)
        copy.normalize = 'samples'
        assert "normalize='samples'" in repr(copy) and "normalize='samples'" not in repr(cb) and cb.normalize=='auto'

def loop(**kwargs):
    m = net().double()
    return m,Accumulator(m, torch.optim.SGD(m.parameters(), lr=0.1), nn.CrossEntropyLoss(), **kwargs)

def test_loop():
    "Shows its arguments, and checks those that are set later"
    m,acc = loop(n_step=4)
    assert repr(acc)=='Accumulator(n_step=4)'
    acc.resize(2)
    assert repr(acc)=='Accumulator(n_step=2)' and (acc.n_step,acc.size)==(2,2)
    for k,v in dict(n_step=8, n_samples=32, normalize='tokens', scaler=3).items():
        with pytest.raises(ValueError, match=f'`{k}`=.*'+('`acc.resize`' if k[0]=='n' and k!='normalize' else '')): setattr(acc, k, v)
    assert repr(acc)=='Accumulator(n_step=2)' and acc.normalize=='auto'
    x,y = problem(4)
    acc.backward(m(x), y)
    with pytest.raises(ValueError, match='`before_step` is set within a window.*`acc.flush'): acc.before_step = noop
    acc.flush()
    acc.before_step = lambda: heard.append(1)
    heard = []
    for _ in range(2): acc.backward(m(x), y)
    assert heard==[1]

def test_help():
    "It fits a screen, with each argument's comment, and tab completion shows what there is to set and to read"
    for cls,args in ((AccumulateStep,'n_step n_samples normalize leftover sync_bn unsharded'), (MicroBatch,'bs normalize split sync_bn offload valid preds sync_loss pool unsharded')):
        text = pydoc.plain(pydoc.render_doc(cls))
        assert text.count('\n')<50 and all(f'      {k}: ' in text for k in args.split()) and 'in all processes together' in text
        assert {*args.split(),'effective_bs','learn','win'} <= {*dir(cls())} and len(dir(cls()))<20
    assert all(f'      {k}: ' in pydoc.plain(pydoc.render_doc(cls)) for cls,k in ((NoiseScale,'beta'),(Accumulator,'n_samples')))
    class Own(AccumulateStep):
        def mine(self): pass
    assert {'mine','n_step'} <= {*dir(Own(4))} and 'weigh' not in dir(Own) and repr(Own(4))=='Own(n_step=4)'

# ---- the effective batch size

class Seen(Callback):
    "Samples of each step"
    order = 300
    def before_fit(self): self.n,self.ns = 0,[]
    def after_loss(self): self.n += len(self.y)*self.training
    def before_step(self): self.ns.append(self.n); self.n = 0

@pytest.mark.parametrize('acc,bs,n', ((AccumulateStep(4),8,73), (AccumulateStep(n_samples=20),8,73), (AccumulateStep(n_samples=3),8,73), (AccumulateStep(20),8,73), (AccumulateStep(10),8,73), (AccumulateStep(9, leftover='drop'),8,73),
    (AccumulateStep(14, leftover='carry'),8,64), (MicroBatch(8),32,73), (MicroBatch(3),32,30), (MicroBatch(),32,73)), ids=str)
def test_effective_bs(acc, bs, n):
    "What a step's samples are, at most"
    learn = learner(n, bs, acc, cbs=Seen())
    said = acc.effective_bs
    run(learn, fit)
    assert said==acc.effective_bs==max(learn.seen.ns)

def test_effective_bs_is_not_known(monkeypatch):
    for cb in (AccumulateStep(SchedLin(1, 4)),AccumulateStep(n_samples=SchedLin(8, 32))): assert learner(64, 8, cb) and cb.effective_bs is None
    learn = learner(64, 8, AccumulateStep(4))
    learn.dls.loaders[0] = [learn.dls.one_batch()]*8
    assert learn.accumulate_step.effective_bs is None and AccumulateStep(4).effective_bs is None and learn.to_microbatch(4).micro_batch.effective_bs is None

class Stored(list):
    "A loader that keeps its batches in what others have for their size"
    @property
    def bs(self): return self[:]

@pytest.mark.parametrize('acc,bs', ((AccumulateStep(4),8), (AccumulateStep(n_samples=32),8), (AccumulateStep(n_samples=32, leftover='drop'),8), (MicroBatch(8),32), (MicroBatch(),32)), ids=str)
def test_loader_whose_bs_is_no_number(acc, bs):
    large,small = learner(64, 32, shuffle=False),learner(64, bs, acc, shuffle=False)
    small.dls.loaders[0] = Stored(small.dls.train)
    for l in (large,small): run(l, fit)
    counted = bs==8 and acc.unit=='n_samples' # then windows of an epoch can't be known before
    assert_same_run(large, small, 1e-12, batches=not counted)
    if bs==32 or counted: assert acc.effective_bs is None

def test_effective_bs_of_processes(monkeypatch):
    "Before the fit, when the loader is not sharded yet"
    monkeypatch.setenv('WORLD_SIZE', '2')
    for n,size in ((200,64),(40,40)):
        learn = learner(n, 8, AccumulateStep(4))
        learn.distributed_trainer = None
        assert learn.accumulate_step.effective_bs==size

# ---- hints

NOTHING,FEW,NORMS = 'nothing is accumulated','do not fill one window','normalizes each micro-batch by its own statistics'
def hints(learn, fit=fit):
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        run(learn, fit)
    return [k for w in ws for k in (NOTHING,FEW,NORMS) if k in str(w.message)]

@pytest.mark.parametrize('acc,bs,said', ((AccumulateStep,8,[NOTHING]), (AccumulateStep(leftover='drop'),8,[NOTHING]), (AccumulateStep(1),8,[]), (AccumulateStep(n_samples=8),8,[NOTHING]), (AccumulateStep(n_samples=9),8,[]), (AccumulateStep(2),8,[]), (AccumulateStep(32),8,[FEW]), (AccumulateStep(9),8,[FEW]),
    (AccumulateStep(8),8,[]), (AccumulateStep(n_samples=65),8,[FEW]), (AccumulateStep(n_samples=64),8,[]), (AccumulateStep(32, leftover='carry'),8,[]), (AccumulateStep(SchedLin(1, 32)),8,[]), (MicroBatch(32),8,[NOTHING]), (MicroBatch(8),8,[NOTHING]), (MicroBatch(8),9,[]), (MicroBatch,8,[])), ids=str)
def test_windows_that_were_hardly_meant(acc, bs, said):
    learn = learner(64, bs, acc)
    assert hints(learn)==said # of two epochs
    assert hints(learn)==said # of another fit

@pytest.mark.parametrize('acc', (AccumulateStep(4),MicroBatch(8),MicroBatch('auto')), ids=str)
def test_no_batch(acc):
    with pytest.warns(UserWarning, match='an epoch has no batch, so nothing is trained.*a smaller `bs`'): learner(40, 64, acc, drop_last=True).fit(1)

def test_cures():
    for acc,cure in ((AccumulateStep(32),r'`GradientAccumulation\(32\)` counts samples, which is `n_samples`=32'), (AccumulateStep(),r'`AccumulateStep\(4\)`'), (MicroBatch(32),'take `AccumulateStep`')):
        with pytest.warns(UserWarning, match=cure): run(learner(64, 8, acc), fit)
    habit,cured = learner(64, 8, GradientAccumulation(32)),learner(64, 8, AccumulateStep(n_samples=32))
    for l in (habit,cured): run(l, fit)
    assert len(cured.trace.steps)==len(habit.trace.steps)==4

BNS = {'acc':(8,AccumulateStep,4), 'micro':(32,MicroBatch,8)}
@pytest.mark.parametrize('way', BNS)
def test_batch_norms(way):
    bs,cls,n = BNS[way]
    def said(model=normed, n=n, cbs=None, **kwargs): return hints(learner(64, bs, cls(n, **kwargs), model=model, cbs=cbs))
    assert said()==said(model=partial(normed, partial(nn.BatchNorm1d, track_running_stats=False)))==[NORMS]
    assert said(sync_bn=False)==said(sync_bn='stats')==said(model=frozen, cbs=BnFreeze())==said(model=net)==[] and said(model=frozen)==[NORMS]
    assert said(model=partial(normed, partial(nn.GroupNorm, 2)))==[]
    assert NORMS not in said(n=1 if way=='acc' else 32) # there is no window of several micro-batches
    if way=='micro':
        assert said(sync_bn=True)==[] and said(sync_loss=True)==[NORMS]
        assert hints(learner(64, bs, MicroBatch('auto'), model=normed))==[]
    else: assert said(n=SchedLin(1, 4))==[NORMS]

def test_targets():
    "How many windows take is not known"
    learn = learner(64, 8, AccumulateStep(n_targets=32))
    assert hints(learn)==[] and learn.accumulate_step.effective_bs is None and repr(learn.accumulate_step)=='AccumulateStep(n_targets=32)'

def test_no_batch_norm_and_none_is_false():
    "What is warned of is what `sync_bn=False` does"
    for bs,cls,n in BNS.values():
        a,b = (run(learner(64, bs, cls(n, sync_bn=s), model=normed), fit) for s in (False,None))
        assert_same_run(a, b, 0.)

def test_silence():
    "Where micro-batches are computed for another purpose"
    for acc in (AccumulateStep(),MicroBatch(4)):
        learn = learner(64, 8, acc, model=normed, dtype=torch.float32)
        assert hints(learn, lambda l: l.bs_find(n_it=4, show_plot=False))==hints(learn, lambda l: l.check_accumulation())==hints(learn, lambda l: l.validate())==[] and not acc.quiet
        assert hints(learn)==[NOTHING if isinstance(acc, AccumulateStep) else NORMS]

def test_training_without_a_fit():
    "Nothing is said, and nothing fails"
    learn = learner(64, 32, MicroBatch(8), model=normed).remove_cb(Trace)
    learn.create_opt()
    learn.epoch,learn.n_epoch,learn.train_iter,learn.pct_train,learn.training,learn.dl = 0,1,0,0.,True,learn.dls.train
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn.all_batches()
    assert learn.train_iter==2

def test_a_fit_within_a_fit_has_its_own():
    class Inner(Callback):
        n = 0
        def after_train(self):
            self.n += 1
            self.learn.validate()
            if self.n==1: self.learn.fit(1)
    assert hints(learner(64, 8, AccumulateStep(), cbs=Inner()))==[NOTHING]*2

# ---- one takes the place of the other

def test_one_takes_the_place_of_the_other():
    learn = learner(64, 8)
    for f,cls in ((lambda: learn.to_accum(4),AccumulateStep), (lambda: learn.to_microbatch(4),MicroBatch), (lambda: learn.to_accum(2),AccumulateStep), (lambda: learn.to_accum(4),AccumulateStep)):
        assert f() is learn and [type(cb) for cb in learn.cbs if isinstance(cb, (AccumulateStep,MicroBatch))]==[cls]
    with pytest.raises(ValueError, match='`bs`=0'): learn.to_microbatch(0)
    assert repr(learn.accumulate_step)=='AccumulateStep(n_step=4)' and not hasattr(learn, 'micro_batch')
    other = run(learner(64, 32), fit)
    assert_same_run(other, run(learn, fit), 1e-12)
    with pytest.raises(ValueError, match='MicroBatch beside AccumulateStep: one of them is enough'): learn.fit(1, cbs=MicroBatch(4))

# ---- arguments that are set later

@pytest.mark.parametrize('first,later,last', (
    (dict(n_step=4), dict(n_samples=16), dict(n_samples=16)), (dict(n_samples=16), dict(n_step=3), dict(n_step=3)), (dict(n_step=4), dict(n_targets=20), dict(n_targets=20)), (dict(n_step=4), dict(leftover='drop'), dict(n_step=4, leftover='drop')),
    (dict(n_step=4), dict(normalize='none'), dict(n_step=4, normalize='none')), (dict(n_step=4), dict(sync_bn='stats'), dict(n_step=4, sync_bn='stats')), (dict(n_samples=16), dict(n_samples=None, n_step=2), dict(n_step=2))), ids=str)
@pytest.mark.parametrize('fits', (0,1))
def test_set_later(first, later, last, fits):
    "It acts from the next fit on, as if the callback had been made with it"
    a,b = (learner(76, 8, AccumulateStep(**o), model=normed) for o in (last,first))
    for l in (a,b):
        if fits: run(l, lambda l: l.detach_accum().fit(1, 0.1))
    if fits: a.to_accum(**last); b.to_accum(**first)
    for k,v in later.items(): setattr(b.accumulate_step, k, v)
    assert repr(a.accumulate_step)==repr(b.accumulate_step)
    for l in (a,b): run(l, fit)
    assert_same_run(a, b, 0.)

@pytest.mark.parametrize('first,later,last', ((dict(bs=16), dict(bs=5), dict(bs=5)), (dict(), dict(bs=5), dict(bs=5)), (dict(bs=8), dict(sync_bn=True), dict(bs=8, sync_bn=True)), (dict(bs=8), dict(valid=True, normalize='samples'), dict(bs=8, valid=True, normalize='samples')),
    (dict(bs=8), dict(bs='auto'), dict()), (dict(), dict(preds=True), dict(preds=True))), ids=str)
def test_set_later_on_a_micro_batch(first, later, last):
    a,b = (learner(73, 16, MicroBatch(**o), model=normed) for o in (last,first))
    if not first: run(b, lambda l: l.validate())
    for k,v in later.items(): setattr(b.micro_batch, k, v)
    assert repr(a.micro_batch)==repr(b.micro_batch)
    for k in ('auto','bs','valid','run_valid'): assert getattr(a.micro_batch, k)==getattr(b.micro_batch, k)
    for l in (a,b): run(l, fit)
    assert_same_run(a, b, 0.)

@pytest.mark.parametrize('cb,k,v,why', ((AccumulateStep(4),'n_step',0,'`n_step`=0: pass a positive integer'), (AccumulateStep(4),'n_step',True,"`n_step`=True: pass a positive integer.*or 'noise'"), (AccumulateStep(4),'n_samples','8',"`n_samples`='8'"), (AccumulateStep(4),'leftover','flush',"`leftover`='flush'"), (AccumulateStep(4),'sync_bn',True,'use `MicroBatch`'),
    (AccumulateStep(4),'sync_loss',True,r'`MicroBatch\(sync_loss=True\)`'), (MicroBatch(8),'bs',0,'`bs`=0'), (MicroBatch(8, normalize='samples'),'sync_loss',True,'leave out `normalize`'), (MicroBatch(8),'split',3,'`split`=3')), ids=str)
def test_refused_as_at_construction(cb, k, v, why):
    was = dict(vars(cb))
    with pytest.raises(ValueError, match=why): setattr(cb, k, v)
    assert vars(cb)==was
    run(learner(64, 16, cb), fit)

class Sets(Callback):
    "Set an argument at an event"
    order = 1
    def __init__(self, event, name, *values): setattr(self, event, self.sets); self.k,self.values = name,iter(values)
    def sets(self):
        for v in itertools.islice(self.values, 1): setattr(self.learn.cbs[1], self.k, v)

@pytest.mark.parametrize('k,sizes', (('n_step',(4,2)), ('n_samples',(32,16))))
def test_between_epochs(k, sizes):
    "The size of windows may change from epoch to epoch: the run of a loader whose batches do"
    large,small = resize(learner(64, 32), [[32]*2, [16]*4]),learner(64, 8, AccumulateStep(4), cbs=Sets('before_epoch', k, *sizes))
    resize(small, [8]*8)
    for l in (large,small): run(l, fit)
    assert_same_run(large, small, 1e-12, batches=False)
    assert [round(b['pct'], 6) for b in small.trace.batches]==[0.25, 0.5, 0.625, 0.75, 0.875, 1.]

def test_a_window_that_is_carried_over_goes_on():
    "A size that is set between epochs is that of the next window, and nothing of the open one is lost"
    kwargs = dict(leftover='carry', sync_bn='stats')
    plain,same = (learner(72, 8, AccumulateStep(4, **kwargs), model=normed, cbs=cbs) for cbs in (None,Sets('before_epoch', 'n_step', 4, 4)))
    for l in (plain,same): run(l, fit)
    assert_same_run(plain, same, 0.)
    assert rel(flat(plain.model.buffers()), flat(same.model.buffers()))==0
    other = learner(72, 8, AccumulateStep(4, **kwargs), model=normed, cbs=[Sets('before_epoch', 'n_step', 4, 2),Seen()])
    run(other, fit)
    assert other.seen.ns==[32,32, 8+24, 16,16,16]

@pytest.mark.parametrize('cb,event,k,v', ((AccumulateStep(4),'after_backward','n_step',2), (AccumulateStep(4),'after_batch','n_samples',16), (AccumulateStep(4),'before_epoch','leftover','drop'), (AccumulateStep(4),'before_batch','sync_bn','stats'),
    (MicroBatch(4),'after_backward','bs',2), (MicroBatch(4),'before_batch','sync_bn',True), (MicroBatch(4),'before_batch','bs','auto'), (MicroBatch(4),'before_batch','bs','fast')), ids=str)
def test_too_late(cb, event, k, v):
    "Within a fit that goes by it, an argument is refused, and nothing of the fit stays"
    learn = learner(64, 8, cb, cbs=Sets(event, k, v))
    was,opt_func = repr(cb),learn.opt_func
    with pytest.raises(ValueError, match=f'`{k}`=.* is set in a fit that goes by what it was'): run(learn, fit)
    assert repr(cb)==was and type(learn.opt) is Optimizer and not any(p.grad is not None and p.grad.any() for p in learn.model.parameters())

def test_refused_between_epochs():
    "A size that the fit would refuse is refused there, and the old one stays"
    learn = learner(64, 8, AccumulateStep(4, leftover='drop'), cbs=Sets('before_epoch', 'n_step', 4, 9))
    with pytest.raises(ValueError, match='do not fill a window'): run(learn, fit)
    assert repr(learn.accumulate_step)=="AccumulateStep(n_step=4, leftover='drop')" and len(learn.trace.steps)==2

# ---- the progress bar

@pytest.mark.parametrize('acc,n_win', ((AccumulateStep(4),3), (AccumulateStep(4, leftover='drop'),2), (AccumulateStep(n_samples=32),3), (None,10)))
def test_progress_bar(acc, n_win, monkeypatch):
    "Where the first window is under way, and at the end"
    texts,shown = [],[]
    monkeypatch.setattr(ProgressBar, 'on_update', lambda self, val, text: texts.append(text.split(']')[0].split()[1]))
    learn = learner(73, 8, acc, dtype=torch.float32, cbs=Callback(before_batch=lambda self: shown.append(texts[-1]) if self.training else None))
    learn.add_cb(ProgressCallback)
    monkeypatch.setattr('fastai.callback.progress.progress_bar', lambda gen, **kwargs: ProgressBar(gen))
    run(learn, lambda l: l.fit(1, 0.1))
    assert shown[0]==f'[0/{n_win}' and f'[{n_win}/{n_win}' in texts
