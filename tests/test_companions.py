"Beside every companion that fastai offers, the run is still that of the large batch beside the same companion"
import argparse,collections,inspect,json,re,textwrap
from unittest import mock
import pytest
from fastai.tabular.all import TabularDataLoaders,tabular_learner,tabular_config,Categorify,FillMissing,Normalize,CategoryBlock
from fastai.text.all import language_model_learner,awd_lstm_lm_config,AWD_LSTM,LMDataLoader
from fastai.vision.all import vision_learner,unet_learner,Perplexity,accuracy,error_rate,resnet18
from fastai.vision.gan import GANLearner,GANDiscriminativeLR,AdaptiveGANSwitcher,FixedGANSwitcher,gan_loss_from_func
from fastai.callback.fp16 import get_master,_copy_state
from sklearn.datasets import load_wine
from torch.amp import GradScaler,autocast
from torch.utils.checkpoint import checkpoint
from common import *

N,BS,N_STEP = 73,4,4 # the last of an epoch's five windows is short, and so is its last micro-batch
f32,f64 = torch.float32,torch.float64
TOL = {f64:1e-12, f32:1e-5}
CE = nn.CrossEntropyLoss
sgd = partial(SGD, mom=0.9)
def fit(l): l.fit_one_cycle(2, 0.05)
def is_small(l): return hasattr(l, 'accumulate_step')
def attrs(**kw): return lambda l: [setattr(l, k, v) for k,v in kw.items()]
def hooks(l): return sum(len(m._forward_hooks)+len(m._backward_hooks) for m in l.model.modules())

def maker(n=N, cbs=list, setup=noop, **kwargs):
    "A function that makes a learner of `bs` with its own `cbs()`"
    def mk(bs, acc=None):
        l = learner(n, bs, acc, cbs=cbs(), **kwargs)
        setup(l)
        return l
    return mk

def pair(mk=None, fit=fit, acc=None, **kwargs):
    "A run of the large batch and a run of micro-batches"
    mk = mk or maker(**kwargs)
    res = mk(BS*N_STEP),mk(BS, acc or AccumulateStep(N_STEP))
    for l in res: run(l, fit)
    return res

def same(*args, tol=None, **kwargs):
    "The pair, found to be the same run that leaves nothing behind"
    large,small = pair(*args, **kwargs)
    assert_same_run(large, small, tol or TOL[kwargs.get('dtype', f64)])
    assert rel(flat(large.model.buffers()), flat(small.model.buffers()))<=1e-12
    assert hooks(small)==hooks(large) and type(small.opt) is type(large.opt) and 'all_batches' not in vars(small)
    return large,small

# ---- optimizers

OPTS = dict(
    sgd=SGD, sgd_l2=partial(SGD, mom=0.9, wd=0.1, decouple_wd=False), rmsprop=RMSProp, rmsprop_mom=partial(RMSProp, mom=0.9, wd=0.1),
    adam=partial(Adam, wd=0.1), adam_l2=partial(Adam, wd=0.1, decouple_wd=False), radam=RAdam, sadam=partial(RAdam, beta=50., wd=0.1),
    qhadam=QHAdam, larc=Larc, lars=partial(Larc, clip=False, wd=0.1), lamb=partial(Lamb, wd=0.1), ranger=partial(ranger, k=3),
    lookahead_sgd=lambda p, lr: Lookahead(SGD(p, lr, mom=0.9), k=3), lookahead_adam=lambda p, lr: Lookahead(Adam(p, lr), k=3),
    **{f'torch_{o.__name__}':partial(OptimWrapper, opt=o) for o in (torch.optim.AdamW,torch.optim.SGD,torch.optim.Adafactor)})

@pytest.mark.parametrize('opt', OPTS)
def test_optimizers(opt):
    "Every optimizer steps as with the large batch, its own counters too"
    large,small = same(fit=lambda l: l.fit(2, 0.02), opt_func=OPTS[opt])
    if not hasattr(large.opt, 'slow_weights'): return
    assert large.opt.count==small.opt.count==10
    assert rel(flat(tensors(large.opt.slow_weights)), flat(tensors(small.opt.slow_weights)))<=1e-12

# ---- what hears of whole batches hears of windows

def with_norm(): return nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.LayerNorm(8), nn.Tanh()), nn.Linear(8, 3))
def convnet(): return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(4, 3))
def images(n=N, sz=8, c=3):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n+16, c, sz, sz, generator=g, dtype=f64)
    return x, (x.mean((2,3))@torch.randn(c, 3, generator=g, dtype=f64)).argmax(1)

class Log(Callback):
    "What a logger such as `WandbCallback` sends, and when"
    order = Recorder.order+1
    def before_fit(self): self.points,self.at = [],0
    def after_batch(self):
        if not self.training: return
        self.at += 1/self.n_iter
        self.points.append([self.at, self.train_iter, self.pct_train, self.loss.item(), self.smooth_loss.item(), *tensors(self.opt.hypers)])
    def after_epoch(self): self.points.append([round(self.at), *map(float, self.recorder.log[:-1])])

def same_points(a, b): assert len(a.log.points)==12 and rel(flat(tensors(a.log.points)), flat(tensors(b.log.points)))<=1e-5
def same_preds(a, b): assert rel(a.fetch_preds.preds[0], b.fetch_preds.preds[0])<=1e-5 and torch.equal(a.fetch_preds.preds[1], b.fetch_preds.preds[1])
def stopped(a, b): assert len(b.recorder.values)==3
def reduced(a, b): assert b.trace.steps[-1]['hypers'][0]['lr']<0.001

def scheds(): return [ParamScheduler(SCHEDS)]
def group_scheds(): return [ParamScheduler(dict(lr=SchedCos(np.array([1e-3,1e-2]), np.array([1e-2,1e-1])), wd=SchedLin(0.1, 0.)))]
def between(l): l.fit(1, 0.1); l.validate(); l.get_preds(with_loss=True); l.summary(); l.fit(1, 0.1)
SCHEDS = dict(lr=SchedLin(1e-3, 0.1), mom=SchedCos(0.95, 0.8), wd=SchedPoly(0.1, 0.01, 2), sqr_mom=SchedExp(0.9, 0.99),
              eps=combine_scheds([0.4,0.6], [SchedNo(1e-5, 1e-5), SchedLin(1e-5, 1e-3)]))
COMPANIONS = {
    'GradientClip': dict(cbs=lambda: [GradientClip(0.05)]),
    'GradientClip inf': dict(cbs=lambda: [GradientClip(0.01, norm_type=float('inf'))]),
    'wd': dict(setup=attrs(wd=0.3), model=with_norm, opt_func=Adam),
    'wd_bn_bias': dict(setup=attrs(wd=0.3, wd_bn_bias=True), model=with_norm, opt_func=Adam),
    'ParamScheduler': dict(cbs=scheds, fit=lambda l: l.fit(3), opt_func=Adam),
    'ParamScheduler of groups': dict(cbs=group_scheds, fit=lambda l: l.fit(2)),
    'ChannelsLast': dict(setup=lambda l: l.to_channelslast(use_amp=False), model=convnet, data=images()),
    'SkipToEpoch': dict(cbs=lambda: [SkipToEpoch(1)], fit=lambda l: l.fit_one_cycle(3, 0.05)),
    'logger': dict(cbs=lambda: [Log()], dtype=f32, check=same_points),
    'FetchPredsCallback': dict(cbs=lambda: [FetchPredsCallback()], dtype=f32, check=same_preds),
    'validate and get_preds in between': dict(fit=between, dtype=f32),
    'TerminateOnNaNCallback': dict(cbs=lambda: [TerminateOnNaNCallback()]),
    'EarlyStoppingCallback': dict(cbs=lambda: [EarlyStoppingCallback(min_delta=10, patience=2)], fit=lambda l: l.fit(4), dtype=f32, check=stopped),
    'ReduceLROnPlateau': dict(cbs=lambda: [ReduceLROnPlateau(min_delta=10, patience=1)], fit=lambda l: l.fit(4, 0.05), dtype=f32, check=reduced),
    **{f'ShortEpochCallback {pct} {short}': dict(cbs=partial(lambda *args: [ShortEpochCallback(*args)], pct, short), dtype=f32)
       for pct in (0.,0.2,0.3,0.5,0.99) for short in (True,False)},
}
@pytest.mark.parametrize('o', COMPANIONS)
def test_companions(o):
    "Clipping, schedules, loggers and trackers act once per window, on all of it"
    kw = dict(COMPANIONS[o])
    check = kw.pop('check', noop)
    check(*same(**kw))

def test_TerminateOnNaNCallback():
    "A NaN in one micro-batch ends training with its window"
    x,y = problem(N+16)
    x[30] = float('nan')
    large,small = pair(data=(x,y), cbs=lambda: [TerminateOnNaNCallback()])
    assert [s['weights'].isnan().any() for s in large.trace.steps]==[s['weights'].isnan().any() for s in small.trace.steps]
    assert 1<len(large.trace.steps)<5
    large.trace.steps.pop(); small.trace.steps.pop()
    assert_same_run(large, small, 1e-12, batches=False)

def test_ShowGraphCallback():
    "One point per step, and the progress bar counts steps"
    def setup(l):
        def before_epoch(self): self.progress.mbar.update_graph = lambda *o: l.seen.append(tensors(list(o)))
        def after_train(self): l.seen.append([self.progress.pbar.total])
        l.seen = []
        l.add_cbs([ProgressCallback(), ShowGraphCallback(), Callback(before_epoch=before_epoch, after_train=after_train)])
    large,small = same(dtype=f32, setup=setup)
    assert len(large.seen)==len(small.seen)==4 and rel(flat(tensors(large.seen)), flat(tensors(small.seen)))<=1e-5

def test_HookCallback_reads_the_last_micro_batch():
    "One record per window as for the large batch, but of the last micro-batch's activations: the whole batch's are never in one place"
    means = []
    def after_batch(self):
        if self.training: means.append(self.pred.mean().item())
    large,small = same(cbs=lambda: [ActivationStats(), Callback(after_batch=after_batch)])
    assert len(large.activation_stats.stats)==len(small.activation_stats.stats)==10
    assert rel(means[10:], [o[-1]['mean'] for o in small.activation_stats.stats])<=1e-6

@pytest.mark.parametrize('cb', (ActivationStats, partial(HookCallback, hook=lambda m,i,o: o.mean())), ids=('ActivationStats','HookCallback'))
def test_HookCallback_every(cb):
    "It would hook for every micro-batch and unhook once a window"
    with pytest.raises(ValueError, match="take `every=None`"): maker(cbs=lambda: [cb(every=2)])(BS, AccumulateStep(N_STEP)).fit(1)

@pytest.mark.parametrize('metrics', (lambda: [accuracy,error_rate], lambda: [Perplexity()]), ids=('accuracy','Perplexity'))
def test_train_metrics(metrics):
    "Metrics on the training set, of predictions and of the loss"
    large,small = same(dtype=f32, setup=lambda l: (attrs(metrics=metrics())(l), setattr(l.recorder, 'train_metrics', True)))
    assert len(small.recorder.values[0])==2+2*len(small.metrics)

# ---- files

def at_home(tmp_path):
    "Each learner has its own folder"
    def f(l): l.path = tmp_path/('small' if is_small(l) else 'large'); l.path.mkdir()
    return f
def saved(l, name='model'): return flat(tensors(torch.load(l.path/l.model_dir/f'{name}.pth', weights_only=False)))

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
    assert rel(flat(small.model.parameters()), small.trace.steps[-1 if kw else 4]['weights'])<=1e-7

class Snapshot(Callback):
    "Save all there is after the first epoch"
    order = 200
    def after_epoch(self):
        if self.epoch: return
        self.learn.save('snapshot', with_opt=True)
        self.rng = self.dls.train.rng.getstate()

@pytest.mark.parametrize('opt', ('sgd_l2','adam','lookahead_adam','torch_AdamW'))
def test_resume(opt, tmp_path):
    "A new learner that loads model and optimizer goes on exactly as the run that was not interrupted, and as the large batch"
    def fit(l, **kw): l.fit_one_cycle(3, 0.02, **kw)
    large,small = same(fit=fit, opt_func=OPTS[opt], setup=at_home(tmp_path), cbs=lambda: [Snapshot()])
    for l in (large,small):
        l2 = learner(N, l.dls.train.bs, AccumulateStep(N_STEP) if is_small(l) else None, opt_func=OPTS[opt], path=l.path).load('snapshot', with_opt=True)
        l2.dls.train.rng.setstate(l.snapshot.rng)
        fit(l2, start_epoch=1)
        l2.trace.steps = l.trace.steps[:5]+l2.trace.steps
        assert_same_run(large, l2, 1e-12, batches=False)

def tabular(bs, acc=None):
    d = load_wine(as_frame=True).frame.sample(N+16, random_state=0).reset_index(drop=True)
    d['heavy'] = (d.ash>2.3).map({True:'yes',False:'no'})
    seed()
    dls = TabularDataLoaders.from_df(d, procs=[Categorify,FillMissing,Normalize], cat_names=['heavy'], cont_names=list(d.columns[:6]), y_names='target',
                                     y_block=CategoryBlock(), valid_idx=range(N, N+16), bs=bs)
    dls.train.drop_last = False
    seed()
    l = tabular_learner(dls, layers=[8,4], config=tabular_config(use_bn=False, bn_cont=False), cbs=L(acc)+Trace(), opt_func=Adam, lr=0.01, metrics=accuracy)
    l.remove_cb(ProgressCallback)
    l.logger = noop
    return l

def test_tabular_learner():
    "Categories, continuous columns, fastai's flattened loss, in float32"
    same(tabular, fit=lambda l: l.fit_one_cycle(2), dtype=f32)

@pytest.mark.parametrize('acc', (lambda: AccumulateStep(N_STEP), lambda: AccumulateStep(n_samples=SchedLin(4, 16), leftover='carry')), ids=('n_step','n_samples'))
def test_export(acc, tmp_path):
    "What `load_learner` brings back predicts, still has its settings and can train on"
    l = tabular(BS, acc())
    run(l, fit)
    l.path,row = tmp_path,l.dls.train_ds.items.iloc[0]
    expect = l.predict(row)[2]
    l.show_results()
    l.export()
    l2 = load_learner(tmp_path/'export.pkl')
    a,b = l.accumulate_step,l2.accumulate_step
    assert torch.equal(l2.predict(row)[2], expect) and torch.equal(l.predict(row)[2], expect)
    for k in ('n_step','normalize','leftover','unit'): assert getattr(a, k)==getattr(b, k)
    assert a._size(0)==b._size(0) and a._size(1)==b._size(1)
    l2.dls,l2.logger,l2.trace.steps = l.dls,noop,[]
    l2.fit(1, 0.01)
    assert 5<=len(l2.trace.steps)==len(l2.recorder.losses)<len(l.dls.train)

def test_export_without_optimizer(tmp_path):
    "As a plain learner's, an exported file holds no optimizer, and a fit holds on to none"
    sizes = []
    for l in pair(tabular, fit=lambda l: l.fit_one_cycle(1, 0.05)):
        l.path = tmp_path
        l.export()
        sizes.append((tmp_path/'export.pkl').stat().st_size)
        assert not is_small(l) or not any(o is l.opt or getattr(o, 'wrapped', None) is not None for o in vars(l.accumulate_step).values())
    assert sizes[1]<sizes[0]+1500

# ---- precision

class Spoil(Callback):
    "Multiply the loss by `by` in the `epochs`, if the data set's first sample is in the batch"
    def __init__(self, by, epochs=(0,2)): store_attr()
    def before_backward(self):
        if self.epoch in self.epochs and (self.x==self.dls.train.dataset[0][0]).flatten(1).all(1).any(): self.learn.loss_grad = self.loss_grad*self.by

class Mixed(MixedPrecision):
    "`MixedPrecision` on a CPU; in `full` precision it only scales, by powers of two"
    def __init__(self, *args, full=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.full = full
    def before_fit(self):
        dtype = torch.float16 if self.amp_mode==AMPMode.FP16 else torch.bfloat16
        self.kwargs['enabled'] = dtype==torch.float16
        self.autocast,self.learn.scaler,self.scales = autocast('cpu', dtype=dtype, enabled=not self.full),GradScaler('cpu', **self.kwargs),L()
    def after_pred(self):
        if not self.full: super().after_pred()
    def after_fit(self):
        self.seen = self.scales,self.scaler.state_dict()
        super().after_fit()

def skipped(l, start):
    "Steps that left the weights as they were"
    w = [start] + [s['weights'] for s in l.trace.steps]
    return sum(torch.equal(p, q) for p,q in zip(w, w[1:]))

@pytest.mark.parametrize('by', (None,float('inf'),float('nan')))
@pytest.mark.parametrize('clip', (False,True))
@pytest.mark.parametrize('dtype', (f64,f32), ids=str)
def test_GradScaler(dtype, clip, by):
    "The scale rises and falls as the large batch's; an overflow in one micro-batch skips its window and leaves nothing behind"
    def cbs(): return [Mixed(full=True, init_scale=2.**10, growth_interval=3)] + ([GradientClip(0.05)] if clip else []) + ([Spoil(by)] if by else [])
    starts = []
    large,small = same(dtype=dtype, cbs=cbs, opt_func=Adam, setup=lambda l: starts.append(flat(l.model.parameters())), fit=lambda l: l.fit(3, 0.05))
    a,b = large.mixed.seen,small.mixed.seen
    assert a==b and len(b[0])==(13 if by else 15) and len(set(b[0]))>2
    assert skipped(small, starts[1])==(2 if by else 0)

@pytest.mark.parametrize('mode', ('fp16','bf16'))
def test_MixedPrecision(mode):
    "Sums are rounded elsewhere, so weights differ; but they are as near to full precision as the large batch's, within the precision's epsilon"
    full = maker(dtype=f32)(BS*N_STEP)
    run(full, fit)
    large,small = pair(dtype=f32, cbs=lambda: [Mixed(mode)])
    assert large.mixed.seen==small.mixed.seen and large.recorder.lrs==small.recorder.lrs and len(small.recorder.losses)==10
    for f,a,b in zip(full.trace.steps, large.trace.steps, small.trace.steps):
        assert rel(f['weights'], b['weights']) <= 2*rel(f['weights'], a['weights']) <= torch.finfo(getattr(torch, dict(fp16='float16', bf16='bfloat16')[mode])).eps

def test_MixedPrecision_that_overflows():
    "A scale too high falls, each time in place of a step; sums over a micro-batch are smaller, so no lower than the large batch's"
    start = []
    large,small = pair(dtype=f32, cbs=lambda: [Mixed(init_scale=2.**22)], setup=lambda l: start.append(flat(l.model.parameters())))
    for l,w in zip((large,small), start): assert skipped(l, w)==10-len(l.mixed.seen[0])==22-math.log2(l.mixed.seen[1]['scale'])>0
    assert large.mixed.seen[1]['scale']<=small.mixed.seen[1]['scale'] and flat(small.model.parameters()).isfinite().all()

class NonNative(NonNativeMixedPrecision):
    "`NonNativeMixedPrecision` that does not insist on a GPU; in `full` precision it only scales"
    def __init__(self, full=True, **kwargs):
        super().__init__(**kwargs)
        self.full = full
    def before_fit(self):
        self.model_pgs,self.master_pgs = get_master(self.opt, self.flat_master)
        self.old_pgs = self.opt.param_lists
        _copy_state(self.learn.opt, self.model_pgs, self.master_pgs)
        self.count = 0
    def before_batch(self):
        if not self.full: super().before_batch()

@pytest.mark.parametrize('leftover', ('step','drop'))
@pytest.mark.parametrize('by', (None,float('inf')))
@pytest.mark.parametrize('n', (64,74))
def test_NonNativeMixedPrecision(n, by, leftover):
    "Gradients of the model's copy of the parameters are the window's, and forgotten with it"
    def cbs(): return [NonNative(max_loss_scale=2.**10, scale_wait=4)] + ([Spoil(by)] if by else [])
    def mk(bs, acc=None): return maker(n=n, dtype=f32, cbs=cbs, drop_last=leftover=='drop' and acc is None)(bs, acc)
    large,small = same(mk, acc=AccumulateStep(N_STEP, leftover=leftover), fit=lambda l: l.fit(3, 0.05), tol=1e-5)
    assert large.non_native.loss_scale==small.non_native.loss_scale

def test_ModelToHalf():
    "A model in float16: the distance from the large batch is that of the precision"
    large,small = pair(n=64, dtype=f32, cbs=lambda: [NonNative(full=False, max_loss_scale=2.**10), ModelToHalf()])
    assert max(rel(a['weights'], b['weights']) for a,b in zip(large.trace.steps, small.trace.steps))<=torch.finfo(torch.float16).eps

# ---- MixUp: partners are found within a micro-batch, so here the large batch has to find them there too

def within(n): i = torch.arange(n); return i//BS*BS + (i%BS+1)%(n-i//BS*BS).clamp(max=BS)
class Fixed:
    "Partners within blocks of `BS`, and how much of them is `lam`, or depends on the sample"
    def __init__(self, lam=None): super().__init__(); self.fixed,self.distrib = lam,self
    def sample(self, size): return torch.full(size, self.fixed, dtype=self.x.dtype) if self.fixed else self.x.flatten(1)[:,0].sigmoid()
    def before_batch(self):
        with mock.patch('torch.randperm', within), mock.patch('torch.randint', lambda lo,hi,size: torch.full(size, hi//2)): super().before_batch()
class FixedMixUp(Fixed,MixUp): pass
class FixedCutMix(Fixed,CutMix): pass

def y_int(reduction='mean', **kw):
    res = CE(reduction=reduction, **kw)
    res.y_int = True
    return res
def one_hot(data): return data[0], F.one_hot(data[1], 3).to(f64)
vision = dict(model=convnet, data=images(75), dtype=f32)
MIXES = {'MixUp': dict(cbs=lambda: [FixedMixUp()], loss=y_int), 'MixUp lam=1': dict(cbs=lambda: [FixedMixUp(1.)], loss=y_int),
         'CutMix': dict(cbs=lambda: [FixedCutMix(0.7)], loss=y_int, **vision), 'CutMix lam=1': dict(cbs=lambda: [FixedCutMix(1.)], loss=y_int, **vision),
         # a mean over samples, whatever they count
         'MixUp weights': dict(cbs=lambda: [FixedMixUp()], loss=partial(y_int, weight=tensor([1.,2.,5.]).to(f64), ignore_index=2)),
         'MixUp of targets': dict(cbs=lambda: [FixedMixUp()], loss=CE, data=one_hot(problem(75+16)))}
@pytest.mark.parametrize('reduction', ('mean','sum'))
@pytest.mark.parametrize('o', MIXES)
def test_mix(o, reduction):
    "Given the same partners, weighting and reduction are the large batch's, and the loss function is the learner's own again"
    kw = dict(MIXES[o])
    loss = kw.pop('loss')
    large,small = same(n=75, setup=lambda l: (l.remove_cb(Recorder), attrs(loss_func=loss(reduction=reduction if is_small(l) else 'mean'))(l)), **kw)
    assert isinstance(small.loss_func, nn.Module) and small.loss_func.reduction==reduction

def test_mix_of_nothing():
    "With lam=1 it is the run without `MixUp`"
    a,b = maker(n=75)(BS*N_STEP),maker(n=75, cbs=lambda: [FixedMixUp(1.)], loss_func=y_int())(BS, AccumulateStep(N_STEP))
    for l in (a,b): run(l, fit)
    assert_same_run(a, b, 1e-12)

class CancelFit(Callback):
    "End the fit within a window"
    def after_pred(self):
        if self.training and len(self.trace.steps)==2: raise CancelFitException
@pytest.mark.parametrize('cb', (MixUp,CutMix))
def test_real_mix(cb):
    "Random partners: schedule, counters and number of records; nothing is left of it after a fit that was cut short either"
    loss = y_int()
    large,small = pair(n=75, cbs=lambda: [cb()], loss_func=loss, **vision)
    assert [b['pct'] for b in large.trace.batches]==[b['pct'] for b in small.trace.batches] and large.recorder.lrs==small.recorder.lrs
    assert len(small.recorder.losses)==10 and flat(small.model.parameters()).isfinite().all() and small.loss_func is loss
    l = maker(n=75, cbs=lambda: [cb(), CancelFit()], loss_func=loss, **vision)(BS, AccumulateStep(N_STEP))
    run(l, fit)
    assert l.loss_func is loss

# ---- models

class Reset(Callback):
    "Every batch starts without a hidden state"
    def before_batch(self): self.model.reset()

def words():
    "Python's documentation strings as numbers, and what these stand for"
    docs = [inspect.getdoc(o) or '' for m in (argparse,collections,json,random,textwrap) for _,o in inspect.getmembers(m) if callable(o)]
    ws = re.findall('[a-z]+', ' '.join(docs).lower())
    vocab = ['xxunk','xxpad'] + [w for w,_ in collections.Counter(ws).most_common(48)]
    return tensor([vocab.index(w) if w in vocab else 0 for w in ws]),vocab

# of 0. `F.dropout` makes nothing new, which `WeightDropout` can't do with
LM = dict(awd_lstm_lm_config, emb_sz=8, n_hid=10, n_layers=2, output_p=0., hidden_p=0., input_p=0., embed_p=0., weight_p=1e-30)
def lm_maker(sl=6, n=75, stream=False, cbs=list, setup=noop, **kwargs):
    ids,vocab = words()
    ids = ids[:(n+16)*sl+1]
    def mk(bs, acc=None):
        seed()
        if stream: dls = DataLoaders(*[LMDataLoader([(o,)], lens=[len(o)], bs=bs, seq_len=sl) for o in (ids[:n*sl+1],ids[n*sl:])])
        else: dls = loaders(ids[:-1].view(-1, sl), ids[1:].view(-1, sl), bs)
        dls.vocab = vocab
        l = language_model_learner(dls, AWD_LSTM, config=LM, pretrained=False, opt_func=sgd, cbs=L(acc)+cbs()+Trace(), **kwargs)
        l.remove_cb(ProgressCallback)
        l.logger = noop
        setup(l)
        return l
    return mk

# 75 sequences, since TAR knows nothing of a batch of one
@pytest.mark.parametrize('alpha,beta', ((0,0), (2,1)))
def test_language_model(alpha, beta):
    "The large batch of the same sequences, each read from its beginning, with AR and TAR regularization"
    large,small = same(lm_maker(alpha=alpha, beta=beta, cbs=lambda: [Reset()]), fit=lambda l: l.fit_one_cycle(2, 1.), dtype=f32, tol=1e-5)
    assert hasattr(small, 'model_resetter') and hasattr(small, 'rnn') and (not alpha or small.rnn_regularizer)

def test_language_model_stream():
    "Micro-batches that follow each other in a text are no slices of a large batch: steps and schedule are all that can be right"
    l = lm_maker(stream=True, alpha=2, beta=1)(BS, AccumulateStep(N_STEP))
    run(l, fit)
    n = len(l.dls.train)
    assert len(l.recorder.losses)==len(l.trace.steps)==2*-(-n//N_STEP) and 0.5<l.trace.batches[-1]['pct']<=1 and flat(l.model.parameters()).isfinite().all()

def test_RNNRegularizer_and_sum():
    "It adds means to the loss, so a loss that sums gives them no weight that would be right"
    l = lm_maker(alpha=2, beta=1, setup=attrs(loss_func=CrossEntropyLossFlat(reduction='sum')))(BS, AccumulateStep(N_STEP))
    with pytest.raises(ValueError, match="reduction"): l.fit(1)

class BnEval(Callback):
    "BatchNorm keeps to its running statistics"
    run_after = TrainEvalCallback
    def before_train(self): [m.eval() for m in self.model.modules() if isinstance(m, bn_types)]

def pictures(make, dtype, n=25, masks=False):
    def mk(bs, acc=None):
        x,y = images(n, sz=32)
        seed()
        l = make(loaders(x.to(dtype), (x.sum(1)>0).long() if masks else y, bs), n_out=3, pretrained=False, normalize=False, loss_func=CE(),
                 opt_func=sgd, cbs=L(acc)+BnEval()+Trace())
        l.remove_cbs([ProgressCallback,Recorder] if dtype==f64 else [ProgressCallback])
        l.model.to(dtype)
        l.logger = noop
        return l
    return mk
def tiny(pretrained=False):
    def layer(a, b): return nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU())
    return nn.Sequential(layer(3, 8), layer(8, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))

def test_vision_learner():
    "A frozen ResNet, its BatchNorm layers evaluating"
    same(pictures(partial(vision_learner, arch=resnet18, ps=0.), f64), fit=lambda l: l.fit(1, 0.01))

def test_unet_learner():
    "Segmentation, BatchNorm evaluating; no closer, as the last layer makes float32 of its output"
    same(pictures(partial(unet_learner, arch=tiny), f64, masks=True), fit=lambda l: l.fit_one_cycle(2, 0.05), tol=1e-6)

class TwoIn(Module):
    def __init__(self): self.a,self.b,self.c = nn.Linear(3, 8),nn.Linear(3, 8),nn.Linear(8, 3)
    def forward(self, x, y): return self.c((self.a(x)*self.b(y)).tanh())
class TwoOut(Module):
    def __init__(self): self.a,self.b,self.c = nn.Linear(6, 8),nn.Linear(8, 3),nn.Linear(8, 1)
    def forward(self, x): h = self.a(x).tanh(); return self.b(h),self.c(h)
def two_losses(pred, cat, val): return F.cross_entropy(pred[0], cat) + F.mse_loss(pred[1].squeeze(1), val)
def items(f, n_inp):
    "The learner's data, each sample as `f` makes it"
    def g(l):
        seed()
        l.dls.loaders = [DataLoader([f(x, y) for x,y in dl.dataset], bs=dl.bs, shuffle=not i) for i,dl in enumerate(l.dls.loaders)]
        l.dls.n_inp = n_inp
    return g

class Checkpointed(nn.Sequential):
    def forward(self, x): return self[2](checkpoint(self[1], self[0](x), use_reentrant=self.reentrant))
def checkpointed(reentrant):
    m = Checkpointed(*net())
    m.reentrant = reentrant
    return m
def compiled(backend):
    torch._dynamo.reset()
    return torch.compile(net(), backend=backend)

MODELS = {'several inputs': dict(model=TwoIn, setup=items(lambda x,y: (x[:3],x[3:],y), 2)),
          'several targets': dict(model=TwoOut, loss_func=two_losses, setup=items(lambda x,y: (x,y,x.sum()), 1)),
          'checkpoint': dict(model=partial(checkpointed, False)), 'checkpoint reentrant': dict(model=partial(checkpointed, True)),
          'compile': dict(model=partial(compiled, 'eager')), 'compile aot': dict(model=partial(compiled, 'aot_eager'))}
@pytest.mark.parametrize('dtype', TOL, ids=str)
@pytest.mark.parametrize('o', MODELS)
def test_models(o, dtype):
    "However a model takes its inputs, returns its outputs and runs"
    same(dtype=dtype, **MODELS[o])

class Smooth(AvgSmoothLoss):
    def reset(self): self.count,self.val = 0,torch.zeros((), dtype=f64)

def gan_maker(make=None, cbs=list, switcher=noop):
    make = make or partial(GANLearner, gen_loss_func=GAN_LOSSES[0], crit_loss_func=GAN_LOSSES[1])
    def mk(bs, acc=None):
        seed()
        noise,real = torch.randn(N+16, 4, dtype=f64),torch.randn(N+16, 3, 2, 2, dtype=f64)
        gen = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 12), nn.Unflatten(1, (3,2,2))).to(f64)
        crit = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1), nn.Flatten(0)).to(f64)
        l = make(loaders(noise, real, bs), gen, crit, switcher=switcher(), opt_func=partial(Adam, mom=0.5), default_cbs=False,
                 cbs=L(TrainEvalCallback)+L(acc)+cbs()+Trace())
        l.gan_trainer.gen_loss,l.gan_trainer.crit_loss = Smooth(),Smooth()
        return l
    return mk

GAN_LOSSES = gan_loss_from_func(F.l1_loss, F.binary_cross_entropy_with_logits)
GANS = {'turns': dict(), 'turns 3 to 2': dict(switcher=lambda: FixedGANSwitcher(3, 2)), 'wgan': dict(make=partial(GANLearner.wgan, clip=0.05)),
        'adaptive': dict(switcher=lambda: AdaptiveGANSwitcher(0.5, 0.7))}
@pytest.mark.parametrize('o', GANS)
def test_GANLearner(o):
    "Generator and critic take turns by windows"
    large,small = same(gan_maker(**GANS[o]), fit=lambda l: l.fit(3, 0.01))
    a,b = large.gan_trainer,small.gan_trainer
    assert min(len(a.gen_losses), len(a.crit_losses))>=2
    for k in ('gen_losses','crit_losses'): assert rel(getattr(a, k), getattr(b, k))<=1e-12

def test_GANLearner_and_carry():
    "Validation turns to the generator, so no window can be left open for it"
    l = gan_maker()(BS, AccumulateStep(N_STEP, leftover='carry'))
    with pytest.raises(ValueError, match="leftover"): l.fit(2)

def test_GANDiscriminativeLR():
    "It would raise learning rates for every micro-batch and lower them once a window"
    with pytest.raises(ValueError, match="GANDiscriminativeLR beside.*`splitter`"): gan_maker(cbs=lambda: [GANDiscriminativeLR(5.)])(BS, AccumulateStep(N_STEP)).fit(1)
