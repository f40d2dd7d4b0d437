"Beside every companion that fastai offers, a run in micro-batches is the run of the whole batches beside the same companion"
import gc
import pytest
from fastai.collab import CollabDataLoaders,collab_learner
from fastai.losses import FocalLossFlat,LabelSmoothingCrossEntropy
from fastai.text.all import text_classifier_learner,awd_lstm_clas_config,AWD_LSTM,SortedDL,TensorText,pad_input_chunk
from fastai.vision.all import vision_learner,unet_learner,Perplexity,accuracy,error_rate,resnet18
from fastai.vision.gan import GANDiscriminativeLR
from torch.distributions.beta import Beta
from common import *
from test_companions import (f32,f64,TOL,CE,OPTS,COMPANIONS,MODELS,GANS,BnEval,CancelFit,Mixed,NonNative,Snapshot,Spoil,
                             attrs,convnet,fit,gan_maker,hooks,images,lm_maker,maker,one_hot,pictures,saved,sgd,skipped,tabular,tiny,y_int)

N,BS,MICRO = 75,16,4 # the last of an epoch's five batches has 11 samples
W = tensor([1.,2.,5.])
def is_small(l): return hasattr(l, 'micro_batch')

@pytest.fixture(scope='module', autouse=True)
def frozen():
    "What is imported is not to be looked through in each of the collections after an error"
    gc.collect(); gc.freeze()
    yield
    gc.unfreeze()

def nesting():
    "How many autocasts are entered"
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()

@pytest.fixture(autouse=True)
def left():
    "Autocast is left as often as it is entered"
    yield
    n,on = nesting(),torch.is_autocast_enabled('cpu')
    for _ in range(abs(n)): (torch.autocast_decrement_nesting if n>0 else torch.autocast_increment_nesting)() # else other tests would fail too
    torch.set_autocast_enabled('cpu', False)
    assert n==0 and not on

# ---- the same run

class Room:
    "What a model has memory for: `most` samples in training and twice that in validation, found out `where`; how many it did see at once"
    def __init__(self, model, most, auto, where='forward'):
        store_attr()
        self.seen = {True:0,False:0}
        self.hooks = [model.register_forward_pre_hook(self.before)] + ([model.register_forward_hook(self.after)] if where=='backward' else [])
    def full(self, m, n): return self.auto and n>self.most*(1 if m.training else 2)
    def fail(self, *_): raise torch.OutOfMemoryError('out of memory, as told')
    def before(self, m, xs):
        n = len(xs[0])
        if self.full(m, n) and not (m.training and self.where=='backward'): self.fail()
        self.seen[m.training] = max(self.seen[m.training], n)
    def after(self, m, xs, out):
        if m.training and self.where=='backward' and self.full(m, len(xs[0])): out.register_hook(self.fail)
    def clear(self): [h.remove() for h in self.hooks]

WAYS = ('4','forward'),('6 and valid','forward'),('auto','forward'),('auto','backward')
ACCS = {'4':lambda: MicroBatch(4), '6 and valid':lambda: MicroBatch(6, valid=True), 'auto':MicroBatch}

def pair(mk=None, fit=fit, acc=None, where='forward', **kwargs):
    "A run of whole batches and a run in micro-batches, or in what is found to fit"
    mk = mk or maker(**{'n':N, **kwargs})
    large,small = mk(BS),mk(BS, (acc or ACCS['4'])())
    run(large, fit)
    cb = small.micro_batch
    room = Room(small.model, MICRO if cb.auto else cb.bs, cb.auto, where)
    run(small, fit)
    room.clear()
    assert cb.auto or room.seen[True]<=room.most and (not room.seen[False] or (room.seen[False]<=room.most)==(cb.valid or room.most==BS))
    assert not cb.auto or 1<cb.bs<=MICRO
    return large,small

def same(*args, tol=None, **kwargs):
    "The pair, found to be the same run that leaves nothing behind"
    large,small = pair(*args, **kwargs)
    assert_same_run(large, small, tol or TOL[kwargs.get('dtype', f64)])
    assert rel(flat(large.model.buffers()), flat(small.model.buffers()))<=1e-12
    assert hooks(small)==hooks(large) and set(vars(small))-set(vars(large))=={'micro_batch'} and type(small.opt) is type(large.opt)
    return large,small

# ---- optimizers

@pytest.mark.parametrize('opt', OPTS)
def test_optimizers(opt):
    "Every optimizer steps as with whole batches, its own counters too"
    large,small = same(fit=lambda l: l.fit(2, 0.02), opt_func=OPTS[opt])
    if not hasattr(large.opt, 'slow_weights'): return
    assert large.opt.count==small.opt.count==10
    assert rel(flat(tensors(large.opt.slow_weights)), flat(tensors(small.opt.slow_weights)))<=1e-12

# ---- what hears of batches hears of whole ones

@pytest.mark.parametrize('o,acc', [(o,a) for o in COMPANIONS for a in ACCS if a=='4' or not o.startswith('ShortEpoch')])
def test_companions(o, acc):
    "Clipping, schedules, loggers and trackers act once per batch, on all of it"
    kw = dict(COMPANIONS[o])
    check = kw.pop('check', noop)
    check(*same(acc=ACCS[acc], **kw))

@pytest.mark.parametrize('acc', ACCS)
def test_CollectDataCallback(acc):
    "Inputs, targets, predictions and losses of whole batches, in training and validation"
    large,small = same(acc=ACCS[acc], cbs=lambda: [CollectDataCallback()])
    a,b = [l.collect_data.data for l in (large,small)]
    assert len(a)==len(b)==12 and all(rel(p, q)<=1e-12 for p,q in zip(tensors(a), tensors(b)))

def test_TerminateOnNaNCallback():
    "A NaN in one micro-batch ends training with its batch"
    x,y = problem(N+16)
    x[30] = float('nan')
    large,small = pair(data=(x,y), cbs=lambda: [TerminateOnNaNCallback()])
    assert [s['weights'].isnan().any() for s in large.trace.steps]==[s['weights'].isnan().any() for s in small.trace.steps]
    assert 1<len(large.trace.steps)<5
    large.trace.steps.pop(); small.trace.steps.pop()
    assert_same_run(large, small, 1e-12, batches=False)

def test_ShowGraphCallback():
    "The same points, and the progress bar counts batches"
    def setup(l):
        def before_epoch(self): self.progress.mbar.update_graph = lambda *o: l.seen.append(tensors(list(o)))
        def after_train(self): l.seen.append([self.progress.pbar.total])
        l.seen = []
        l.add_cbs([ProgressCallback(), ShowGraphCallback(), Callback(before_epoch=before_epoch, after_train=after_train)])
    large,small = same(dtype=f32, setup=setup)
    assert len(large.seen)==len(small.seen)==4 and rel(flat(tensors(large.seen)), flat(tensors(small.seen)))<=1e-5

def mean_hook(m, i, o): return o.mean()
class Means(Callback):
    "The mean of each forward pass, by batch"
    run_valid = False
    def before_fit(self): self.seen = []
    def before_batch(self): self.seen.append([])
    def after_pred(self): self.seen[-1].append(self.pred.mean().item())

@pytest.mark.parametrize('every', (None,2))
def test_ActivationStats(every):
    "One record per batch as without micro-batches, but of the last of these: the whole batch's activations are never in one place"
    large,small = same(cbs=lambda: [ActivationStats(every=every), Means()])
    a,b = large.activation_stats.stats,small.activation_stats.stats
    assert len(a)==len(b)==(10 if every is None else 5)
    assert all(len(o)==math.ceil(n/MICRO) for o,n in zip(small.means.seen, 2*[16,16,16,16,11]))
    assert rel([o[-1] for o in small.means.seen[::every]], [o[-1]['mean'] for o in b])<=1e-6

class Stored(Callback):
    "How many hooks there are after each batch, and what the last one stored"
    run_valid = False
    def before_fit(self): self.seen = []
    def after_batch(self): self.seen.append((hooks(self.learn), self.learn.hook.hooks.stored[-1].item()))

@pytest.mark.parametrize('every', (None,2))
def test_HookCallback(every):
    "Hooks come and go as without micro-batches, and store what the last of these gives; if there is but one, the same"
    for bs in MICRO,BS:
        large,small = same(acc=lambda: MicroBatch(bs), cbs=lambda: [HookCallback(hook=mean_hook, every=every), Stored(), Means()])
        a,b = [list(zip(*l.stored.seen)) for l in (large,small)]
        assert a[0]==b[0] and (bs<BS or rel(a[1], b[1])<=1e-12)
        assert rel([o[-1] for o in small.means.seen], b[1])<=1e-12

class Once(Callback):
    "Take yourself out at `event` of the third batch, and put another in"
    run_valid = False
    def __init__(self, event): store_attr()
    def __call__(self, event):
        super().__call__(event)
        if event==self.event and self.train_iter==2: self.learn.remove_cb(self).add_cb(GradientClip(0.01))

@pytest.mark.parametrize('event', ('before_batch','after_pred','after_loss','before_backward','after_backward','before_step','after_step','after_batch'))
def test_callbacks_that_come_and_go(event):
    "A callback may leave and another may come at any time"
    large,small = same(cbs=lambda: [Once(event)])
    assert [type(cb) for cb in large.cbs]==[type(cb) for cb in small.cbs if not isinstance(cb, MicroBatch)] and isinstance(small.cbs[-1], GradientClip)

@pytest.mark.parametrize('metrics', (lambda: [accuracy,error_rate], lambda: [Perplexity()]), ids=('accuracy','Perplexity'))
@pytest.mark.parametrize('acc', ACCS)
def test_train_metrics(acc, metrics):
    "Metrics on the training set, of predictions and of the loss"
    large,small = same(dtype=f32, acc=ACCS[acc], setup=lambda l: (attrs(metrics=metrics())(l), setattr(l.recorder, 'train_metrics', True)))
    assert len(small.recorder.values[0])==2+2*len(small.metrics)

# ---- files

def at_home(tmp_path):
    "Each learner has its own folder"
    def f(l): l.path = tmp_path/('small' if is_small(l) else 'large'); l.path.mkdir()
    return f

def test_CSVLogger(tmp_path):
    "The same table"
    large,small = same(dtype=f32, setup=at_home(tmp_path), cbs=lambda: [CSVLogger()])
    a,b = [l.csv_logger.read_log().drop(columns='time') for l in (large,small)]
    assert len(a)==2 and list(a)==list(b) and rel(a.values, b.values)<=1e-5

@pytest.mark.parametrize('kw', (dict(), dict(every_epoch=True), dict(at_end=True)), ids=('best','every_epoch','at_end'))
@pytest.mark.parametrize('with_opt', (False,True))
def test_SaveModelCallback(tmp_path, kw, with_opt):
    "What is saved, and what is loaded at the end"
    large,small = same(dtype=f32, setup=at_home(tmp_path), opt_func=Adam, fit=lambda l: l.fit(3, 0.05),
        cbs=lambda: [SaveModelCallback(with_opt=with_opt, monitor='train_loss', comp=np.greater, **kw)])
    for n in ['model_0','model_1','model_2'] if 'every_epoch' in kw else ['model']:
        assert rel(saved(large, n), saved(small, n))<=1e-5 and (len(saved(large, n))>83)==with_opt
    for f in (lambda l: l.model.parameters(), lambda l: tensors(l.opt.state_dict())): assert rel(flat(f(large)), flat(f(small)))<=1e-5

@pytest.mark.parametrize('opt', ('sgd_l2','adam','lookahead_adam','torch_AdamW'))
def test_resume(opt, tmp_path):
    "A new learner that loads model and optimizer goes on exactly as the run that was not interrupted, and as that of whole batches"
    def fit(l, **kw): l.fit_one_cycle(3, 0.02, **kw)
    large,small = same(fit=fit, opt_func=OPTS[opt], setup=at_home(tmp_path), cbs=lambda: [Snapshot()])
    for l in (large,small):
        l2 = learner(N, BS, MicroBatch(MICRO) if is_small(l) else None, opt_func=OPTS[opt], path=l.path).load('snapshot', with_opt=True)
        l2.dls.train.rng.setstate(l.snapshot.rng)
        fit(l2, start_epoch=1)
        l2.trace.steps = l.trace.steps[:5]+l2.trace.steps
        assert_same_run(large, l2, 1e-12, batches=False)

@pytest.mark.parametrize('acc', ACCS)
def test_tabular_learner(acc):
    "Categories, continuous columns, fastai's flattened loss, in float32"
    same(tabular, acc=ACCS[acc], fit=lambda l: l.fit_one_cycle(2), dtype=f32)

def test_export(tmp_path):
    "What `load_learner` brings back predicts, still has its settings and can train on"
    l = tabular(BS, MicroBatch(6, normalize='samples', valid=True))
    run(l, fit)
    l.path,row = tmp_path,l.dls.train_ds.items.iloc[0]
    expect = l.predict(row)[2]
    l.show_results()
    l.export()
    l2 = load_learner(tmp_path/'export.pkl')
    assert torch.equal(l2.predict(row)[2], expect) and torch.equal(l.predict(row)[2], expect)
    for k in ('bs','normalize','valid','auto','split','sync_bn','offload'): assert getattr(l.micro_batch, k)==getattr(l2.micro_batch, k)
    l2.dls,l2.logger,l2.trace.steps = l.dls,noop,[]
    room = Room(l2.model, 6, False)
    l2.fit(1, 0.01)
    assert len(l2.trace.steps)==len(l.dls.train) and 0<room.seen[True]<=6

@pytest.mark.parametrize('acc', ACCS)
def test_holds_on_to_nothing(acc):
    "After a fit, the callback has no optimizer, no batch and no graph, which would take memory and be exported"
    _,small = pair(tabular, acc=ACCS[acc])
    cb = small.micro_batch
    held = [o for x in (cb,cb.win,cb.moments) for o in vars(x).values()]
    assert not any(o is small.opt for o in held) and all(t.numel()==1 and not t.requires_grad for t in tensors(held) if isinstance(t, Tensor))

def collab(bs, acc=None):
    seed()
    d = pd.DataFrame(dict(user=np.random.randint(0, 12, N+16), item=np.random.randint(0, 9, N+16), rating=np.random.rand(N+16)*5))
    dls = CollabDataLoaders.from_df(d, valid_pct=16/(N+16), seed=1, bs=bs)
    dls.train.drop_last = False
    seed()
    l = collab_learner(dls, n_factors=4, y_range=(0,5.5), opt_func=sgd, cbs=L(acc)+Trace())
    l.remove_cb(ProgressCallback)
    l.logger = noop
    return l

def test_collab_learner():
    "Embeddings of users and items"
    same(collab, fit=lambda l: l.fit_one_cycle(2, 0.05), dtype=f32)

# ---- precision

@pytest.mark.parametrize('by', (None,float('inf'),float('nan')))
@pytest.mark.parametrize('clip', (False,True))
@pytest.mark.parametrize('dtype', (f64,f32), ids=str)
def test_GradScaler(dtype, clip, by):
    "The scale rises and falls as without micro-batches; an overflow in one of these skips the batch and leaves nothing behind"
    def cbs(): return [Mixed(full=True, init_scale=2.**10, growth_interval=3)] + ([GradientClip(0.05)] if clip else []) + ([Spoil(by)] if by else [])
    starts = []
    large,small = same(dtype=dtype, cbs=cbs, opt_func=Adam, setup=lambda l: starts.append(flat(l.model.parameters())), fit=lambda l: l.fit(3, 0.05))
    a,b = large.mixed.seen,small.mixed.seen
    assert a==b and len(b[0])==(13 if by else 15) and len(set(b[0]))>2
    assert skipped(small, starts[1])==(2 if by else 0)

class Casts(Callback):
    "Is autocast on, in each forward pass and loss and at the events that follow?"
    order = 100
    def before_fit(self):
        self.seen = []
        self.hook = self.model.register_forward_pre_hook(lambda *_: self.note('forward'))
        self.learn.loss_func.casts = self
    def after_fit(self): self.hook.remove()
    def note(self, what): self.seen.append((what, self.learn.training, torch.is_autocast_enabled('cpu')))
    def __call__(self, event):
        super().__call__(event)
        if event in ('before_backward','after_backward','before_step','after_step','after_batch'): self.note(event)
class Told(nn.CrossEntropyLoss):
    def forward(self, pred, targ):
        self.casts.note('loss')
        return super().forward(pred, targ)

@pytest.mark.parametrize('acc,where', WAYS)
@pytest.mark.parametrize('mode', ('fp16','bf16'))
def test_autocast(mode, acc, where):
    "It is on in the forward pass and loss of every micro-batch, and off in all else, also after memory ran out"
    large,small = pair(dtype=f32, acc=ACCS[acc], where=where, loss_func=Told(), cbs=lambda: [Mixed(mode), Casts()])
    assert set(large.casts.seen)==set(small.casts.seen) and len(small.casts.seen)>len(large.casts.seen)
    for k in 'forward','loss': assert {on for what,_,on in small.casts.seen if what==k}=={True}
    assert {on for what,_,on in small.casts.seen if what not in ('forward','loss')}=={False}

@pytest.mark.parametrize('acc,where', (('4','forward'), ('auto','forward'), ('auto','backward')))
@pytest.mark.parametrize('mode', ('fp16','bf16'))
def test_MixedPrecision(mode, acc, where):
    "Sums are rounded elsewhere, so weights differ; but they are as near to full precision as without micro-batches, within the precision's epsilon"
    full = maker(n=N, dtype=f32)(BS)
    run(full, fit)
    large,small = pair(dtype=f32, acc=ACCS[acc], where=where, cbs=lambda: [Mixed(mode)])
    assert large.mixed.seen==small.mixed.seen and large.recorder.lrs==small.recorder.lrs and len(small.recorder.losses)==10
    for f,a,b in zip(full.trace.steps, large.trace.steps, small.trace.steps):
        assert rel(f['weights'], b['weights']) <= 2*rel(f['weights'], a['weights']) <= torch.finfo(getattr(torch, dict(fp16='float16', bf16='bfloat16')[mode])).eps

def test_MixedPrecision_that_overflows():
    "A scale too high falls, each time in place of a step; sums over a micro-batch are smaller, so no lower than without micro-batches"
    start = []
    large,small = pair(dtype=f32, cbs=lambda: [Mixed(init_scale=2.**22)], setup=lambda l: start.append(flat(l.model.parameters())))
    for l,w in zip((large,small), start): assert skipped(l, w)==10-len(l.mixed.seen[0])==22-math.log2(l.mixed.seen[1]['scale'])>0
    assert large.mixed.seen[1]['scale']<=small.mixed.seen[1]['scale'] and flat(small.model.parameters()).isfinite().all()

@pytest.mark.parametrize('flat_master,acc,where', [(False,*o) for o in WAYS] + [(True,'4','forward')])
@pytest.mark.parametrize('by', (None,float('inf')))
def test_NonNativeMixedPrecision(by, flat_master, acc, where):
    "The optimizer's copy of the parameters gets the batch's gradients, which are forgotten after it"
    def cbs(): return [NonNative(max_loss_scale=2.**10, scale_wait=4, flat_master=flat_master)] + ([Spoil(by)] if by else [])
    large,small = same(dtype=f32, cbs=cbs, acc=ACCS[acc], where=where, fit=lambda l: l.fit(3, 0.05))
    assert large.non_native.loss_scale==small.non_native.loss_scale

@pytest.mark.parametrize('counted', (lambda learn: W[learn.y].sum().item(), lambda learn: W[learn.y].sum()), ids=('number','tensor'))
def test_NonNativeMixedPrecision_and_rescaling(counted):
    "Where the scale is known only after the last micro-batch, it is that of the model's gradients, and of copies that have some"
    same(dtype=f32, loss_func=CE(weight=W), cbs=lambda: [NonNative(max_loss_scale=2.**10, scale_wait=4)], acc=lambda: MicroBatch(MICRO, normalize=counted),
         fit=lambda l: l.fit(3, 0.05))

def test_ModelToHalf():
    "A model in float16: the distance from the whole batches' run is that of the precision"
    large,small = pair(n=64, dtype=f32, cbs=lambda: [NonNative(full=False, max_loss_scale=2.**10), ModelToHalf()])
    assert max(rel(a['weights'], b['weights']) for a,b in zip(large.trace.steps, small.trace.steps))<=torch.finfo(torch.float16).eps

# ---- MixUp and CutMix: the whole batch is mixed before it is split, so the same random numbers make the same partners

def attrs_of(o, **kw):
    for k,v in kw.items(): setattr(o, k, v)
    return o
MIX_LOSSES = {'y_int':y_int, 'y_int, sum':partial(y_int, reduction='sum'), 'weights':lambda: y_int(weight=W, ignore_index=2),
              'weights, sum':lambda: y_int('sum', weight=W), 'flat':CrossEntropyLossFlat, 'flat, weights':lambda: CrossEntropyLossFlat(weight=W), 'focal':FocalLossFlat, 'smooth':LabelSmoothingCrossEntropy,
              'one-hot':CE, 'one-hot, weights':lambda: CE(weight=W), 'one-hot, elements':nn.BCEWithLogitsLoss}
def mixes(cls, dtype): return [attrs_of(cls(), distrib=Beta(*torch.full((2,), 0.7, dtype=dtype)))]

class Mixing(Callback):
    "What is left in place for `after_batch`: how the whole batch was mixed"
    run_valid = False
    def before_fit(self): self.seen = []
    def after_batch(self):
        cb = first(cb for cb in self.learn.cbs if isinstance(cb, (MixUp,CutMix)))
        self.seen += tensors([self.x, self.y, cb.lam, cb.yb1])

@pytest.mark.parametrize('loss,acc', [(o,a) for o in MIX_LOSSES for a in ACCS if a=='4' or o in ('y_int','one-hot')])
@pytest.mark.parametrize('cb', (MixUp,CutMix))
def test_mix(cb, loss, acc):
    "Random partners: weights, losses and what stays of the mix are those of whole batches, whatever the loss"
    dtype = f64 if cb is MixUp and loss not in ('flat','flat, weights','focal') else f32 # `CutMix`'s own weights are float32, and what fastai's losses return
    x,y = problem(N+16) if cb is MixUp else images(N)
    if loss.startswith('one-hot'): x,y = one_hot((x,y))
    y = y.to(dtype) if y.is_floating_point() else y
    losses = []
    def setup(l):
        f = MIX_LOSSES[loss]()
        if isinstance(f, nn.Module): f.to(dtype)
        losses.append(f)
        l.loss_func = f
    large,small = same(data=(x,y), dtype=dtype, acc=ACCS[acc], model=convnet if cb is CutMix else None, setup=setup, cbs=lambda: [*mixes(cb, dtype), Mixing()],
                       fit=lambda l: l.fit_one_cycle(2, 0.005 if 'sum' in loss else 0.05))
    assert small.loss_func is losses[1] and len(large.mixing.seen)==len(small.mixing.seen)>0
    assert all(rel(a, b)==0 for a,b in zip(large.mixing.seen, small.mixing.seen))

@pytest.mark.parametrize('cb', (MixUp,CutMix))
def test_mix_that_is_cut_short(cb):
    "The loss function is the learner's own again after a fit that was ended within a batch"
    loss = y_int()
    l = maker(n=N, cbs=lambda: [cb(), CancelFit()], loss_func=loss, model=convnet, data=images(N), dtype=f32)(BS, MicroBatch(MICRO))
    run(l, fit)
    assert l.loss_func is loss and len(l.trace.steps)==2

# ---- language

class Hidden(Callback):
    "The state that the model carries on after each batch"
    order = 100
    def before_fit(self): self.seen = []
    def after_batch(self): self.seen.append(self.model[0].hidden)

def same_hidden(large, small, tol):
    a,b = large.hidden.seen,small.hidden.seen
    assert len(a)==len(b)>0 and large.model[0].bs==small.model[0].bs
    for p,q in zip(tensors(a), tensors(b)): assert p.dtype==q.dtype and p.norm()>0 and rel(p, q)<=tol

def flat_loss(pred, targ): return F.cross_entropy(pred.flatten(0, -2), targ.as_subclass(Tensor).flatten()) # fastai's returns float32
def double(l):
    l.remove_cb(Recorder)
    l.model.double()
    l.loss_func = flat_loss
LM_ACCS = {**ACCS, '5 and valid':lambda: MicroBatch(5, valid=True), '16':lambda: MicroBatch(16)}
@pytest.mark.parametrize('alpha,beta,acc', [(0,0,a) for a in LM_ACCS] + [(2,1,a) for a in ACCS] + [(2,0,'4'), (0,1,'4')])
def test_language_model_stream(alpha, beta, acc):
    "Sixteen texts that go on from batch to batch: so do the states of their micro-batches, with AR and TAR regularization"
    exact = not alpha and not beta # these are computed in float32
    mk = lm_maker(stream=True, n=150, alpha=alpha, beta=beta, cbs=lambda: [Hidden()], setup=double if exact else noop)
    large,small = same(mk, acc=LM_ACCS[acc], fit=lambda l: l.fit_one_cycle(2, 1.), dtype=f64 if exact else f32)
    same_hidden(large, small, 1e-12 if exact else 1e-5)

@pytest.mark.parametrize('acc', LM_ACCS)
def test_language_model_of_changing_batches(acc):
    "States come and go with the texts of a batch"
    sizes = [[16,11,16,5,16,11],[3,16,8,8,16,16,8]]
    mk = lm_maker(n=N, alpha=0, beta=0, cbs=lambda: [Hidden()], setup=lambda l: (double(l), resize(l, sizes)))
    same_hidden(*same(mk, acc=LM_ACCS[acc], fit=lambda l: l.fit_one_cycle(2, 1.)), 1e-12)

@pytest.mark.parametrize('kw', (dict(ignore_index=0), dict(weight=torch.arange(1., 51.))), ids=' '.join)
def test_RNNRegularizer_and_weights(kw):
    "Its terms are means over all activations, whatever the loss divides by: that it is weighted as the loss is said"
    mk = lm_maker(n=N, alpha=20, beta=10, setup=lambda l: setattr(l, 'loss_func', CrossEntropyLossFlat(**kw)))
    with pytest.warns(UserWarning, match='RNNRegularizer'): mk(BS, MicroBatch(4)).fit(1)

CLAS = dict(awd_lstm_clas_config, emb_sz=8, n_hid=10, n_layers=2, output_p=0., hidden_p=0., input_p=0., embed_p=0., weight_p=1e-30)
SL = 5
def texts(sizes=(5,10,15,20)):
    "Texts of these lengths, of three classes"
    g = torch.Generator().manual_seed(0)
    xs = [torch.randint(2, 30, (sizes[int(torch.randint(len(sizes), (1,), generator=g))],), generator=g) for _ in range(N+16)]
    return [(TensorText(x),tensor(int(x.sum()%3))) for x in xs]
def clas_maker(items=None, cbs=lambda: [BnEval()], alpha=0, beta=0, loss=CE, **kwargs):
    items = items or texts()
    def mk(bs, acc=None):
        def dl(items, shuffle): return SortedDL(items, bs=bs, shuffle=shuffle, before_batch=partial(pad_input_chunk, pad_idx=1, seq_len=SL))
        seed()
        dls = DataLoaders(dl(items[:N], True), dl(items[N:], False))
        dls.vocab = [str(i) for i in range(30)]
        l = text_classifier_learner(dls, AWD_LSTM, seq_len=SL, config=CLAS, pretrained=False, drop_mult=1., ps=[0.], n_out=3, loss_func=loss(), opt_func=sgd,
                                    alpha=alpha, beta=beta, cbs=L(acc)+cbs()+Trace(), **kwargs)
        l.remove_cb(ProgressCallback)
        l.logger = noop
        if not alpha and not beta: double(l)
        return l
    return mk

@pytest.mark.parametrize('alpha,beta,acc', [(0,0,a) for a in ACCS] + [(2,1,'4')])
def test_text_classifier(alpha, beta, acc):
    "Sorted texts of different lengths, some micro-batches of which begin with chunks of nothing but padding; BatchNorm evaluating"
    same(clas_maker(alpha=alpha, beta=beta), acc=ACCS[acc], fit=lambda l: l.fit_one_cycle(1, 0.1), dtype=f32 if alpha else f64)

def test_text_classifier_and_exact_BatchNorm():
    "Its head has BatchNorms, in training here"
    same(clas_maker(cbs=list), acc=lambda: MicroBatch(MICRO, sync_bn=True), fit=lambda l: l.fit_one_cycle(1, 0.1))

def test_SentenceEncoder_depends_on_the_batch():
    "Where texts do not fill their last chunk, fastai's encoder passes over the ends of some, depending on what else is in the batch; micro-batches can't"
    l = clas_maker(texts(range(3, 40)))(BS)
    l.model.eval()
    with torch.no_grad():
        xs = [x.as_subclass(Tensor) for x,_ in l.dls.train]
        assert max(rel(l.model(x)[0], torch.cat([l.model(p)[0] for p in x.split(MICRO)])) for x in xs)>1e-3
    l = clas_maker()(BS)
    l.model.eval()
    with torch.no_grad():
        xs = [x.as_subclass(Tensor) for x,_ in l.dls.train]
        assert max(rel(l.model(x)[0], torch.cat([l.model(p)[0] for p in x.split(MICRO)])) for x in xs)<=1e-12

# ---- models

def test_vision_learner():
    "A frozen ResNet, its BatchNorm layers evaluating"
    same(pictures(partial(vision_learner, arch=resnet18, ps=0.), f64), fit=lambda l: l.fit(1, 0.01))

def test_unet_learner():
    "Segmentation, BatchNorm evaluating; no closer, as the last layer makes float32 of its output"
    same(pictures(partial(unet_learner, arch=tiny), f64, masks=True), fit=lambda l: l.fit_one_cycle(2, 0.05), tol=1e-6)

@pytest.mark.parametrize('o', MODELS)
def test_models(o):
    "However a model takes its inputs, returns its outputs and runs"
    same(**MODELS[o])

@pytest.mark.parametrize('o,acc', [(o,a) for o in GANS for a in ACCS if a=='4' or o=='adaptive'])
def test_GANLearner(o, acc):
    "Generator and critic take turns by batches"
    large,small = same(gan_maker(**GANS[o]), acc=ACCS[acc], fit=lambda l: l.fit(3, 0.01))
    a,b = large.gan_trainer,small.gan_trainer
    assert min(len(a.gen_losses), len(a.crit_losses))>=2
    for k in ('gen_losses','crit_losses','last_gen'): assert rel(flat(tensors(L(getattr(a, k)))), flat(tensors(L(getattr(b, k)))))<=1e-12

def test_GANDiscriminativeLR():
    "The critic's learning rate is raised for a batch and lowered after it"
    class Rates(Callback):
        order = 99
        def before_step(self): rates.append(self.opt.hypers[0]['lr'])
    rates = []
    large,small = same(gan_maker(cbs=lambda: [GANDiscriminativeLR(2.), Rates()]), fit=lambda l: l.fit(2, 0.01))
    n = len(rates)//2
    assert rates[:n]==rates[n:] and len(set(rates))>1

# ---- losses that are not known

class Own(nn.Module):
    "Focal, with a mean over samples"
    def forward(self, pred, targ): l = F.cross_entropy(pred, targ, reduction='none'); return ((1-(-l).exp())**2*l).mean()
class Weighted(nn.Module):
    "That says what it divides by"
    def forward(self, pred, targ): return F.cross_entropy(pred, targ, weight=W.to(pred))
    def denominator(self, pred, targ): return W[targ].double().sum()
class Sum(nn.Module):
    "That says that it sums"
    reduction = 'sum'
    def forward(self, pred, targ): return F.cross_entropy(pred, targ, reduction='sum')*0.1
UNKNOWN = {'function':lambda p, y: F.cross_entropy(p, y), 'partial':partial(lambda p, y, by: by*F.cross_entropy(p, y), by=2.),
           'module':Own(), 'denominator':Weighted(), 'sum':Sum()}
@pytest.mark.parametrize('acc', ('4','auto'))
@pytest.mark.parametrize('o', UNKNOWN)
def test_unknown_losses(o, acc):
    "A loss that nobody knows is taken for a mean over samples, unless it says otherwise"
    same(loss_func=UNKNOWN[o], acc=ACCS[acc], fit=lambda l: l.fit_one_cycle(2, 0.05))

# ---- refusals

class Remembers(nn.Sequential):
    "A model with a state that is not fastai's"
    def __init__(self): super().__init__(*net())
    def reset(self): self.h = None
class OwnSteps(Learner):
    def _do_grad_opt(self): super()._do_grad_opt()
def own_steps(l): l.__class__ = OwnSteps
REFUSED = {
    'AccumulateStep':dict(cbs=lambda: [AccumulateStep(4)], match='AccumulateStep beside MicroBatch: one of them is enough'),
    'GradientAccumulation':dict(cbs=lambda: [GradientAccumulation(32)], match=r'GradientAccumulation beside MicroBatch: one of them.*`learn.remove_cb'),
    'MicroBatch':dict(cbs=lambda: [MicroBatch(2)], match='MicroBatch beside MicroBatch: one of them'),
    'ModelResetter':dict(cbs=lambda: [ModelResetter()], model=Remembers, match='ModelResetter beside MicroBatch: Remembers may carry a state.*AccumulateStep'),
    'RNNRegularizer':dict(cbs=lambda: [RNNRegularizer(2, 1)], loss_func=CE(reduction='sum'), match="RNNRegularizer beside MicroBatch.*`reduction='mean'`"),
    'its own steps':dict(setup=own_steps, match="OwnSteps has its own `_do_grad_opt`.*use `AccumulateStep`")}

@pytest.mark.parametrize('first', (True,False), ids=('before','after'))
@pytest.mark.parametrize('o', REFUSED)
def test_refusals(o, first):
    "What can't work is said before anything changes, with a cure; without the other it is the run of whole batches"
    kw = dict(REFUSED[o])
    match,cbs = kw.pop('match'),kw.pop('cbs', list)
    l,mb,others = maker(n=N, **kw)(BS),MicroBatch(MICRO),cbs()
    l.add_cbs([mb,*others] if first else [*others,mb])
    def state(): return {k:v for k,v in vars(l).items() if k not in ('opt','n_epoch')},[p.clone() for p in l.model.parameters()],list(l.cbs),dict(vars(type(l)))
    before = state()
    if first or o!='AccumulateStep': # else that is the first to speak
        with pytest.raises(ValueError, match=match): l.fit(1)
    else:
        with pytest.raises(ValueError, match='MicroBatch beside AccumulateStep: one of them is enough'): l.fit(1)
    after = state()
    assert before[0].keys()==after[0].keys() and all(before[0][k] is after[0][k] or before[0][k]==after[0][k] for k in before[0])
    assert all(map(torch.equal, before[1], after[1])) and before[2]==after[2] and before[3]==after[3] and not l.opt.state_dict()['state'][0]
    l.remove_cbs(others)
    if o=='its own steps': l.__class__ = Learner
    if o=='MicroBatch': l.micro_batch = mb
    l2 = maker(n=N, **{k:v for k,v in kw.items() if k!='setup'})(BS)
    def fit(l): l.fit(2, 0.001, reset_opt=True)
    run(l, fit); run(l2, fit)
    assert_same_run(l2, l, 1e-12)

def test_not_refused():
    "A model that could be reset, but is not"
    same(model=Remembers)
