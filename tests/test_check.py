"`check_accumulation` finds every planted cause and no other, says how much it makes, and leaves the learner as it is"
import pytest
from fastai.callback.training import GradientAccumulation
from fastai.tabular.all import TabularDataLoaders,tabular_learner,tabular_config,Categorify,Normalize
from fastai.text.all import TextDataLoaders,text_classifier_learner,awd_lstm_clas_config,AWD_LSTM
from fastai.vision.all import ConvLayer,DynamicUnet,Flatten
from torch.nn.utils.parametrizations import spectral_norm
from fastai_accum.check import *
from common import *

BS,N_STEP,F64,F32 = 8,4,torch.float64,torch.float32
CE = nn.CrossEntropyLoss
X,Y = problem(80)
SOME = Y.masked_fill(torch.arange(80)<19, -100) # nothing counts in the first two micro-batches, and little in the third

def mlp(*mid, n_in=6): return nn.Sequential(nn.Linear(n_in, 16), nn.Tanh(), *mid, nn.Linear(16, 3))
def make(model=None, acc=None, bs=BS, y=Y, loss=None, **kwargs):
    "A learner whose first 32 samples are those of `X`"
    learn = learner(64, bs, acc, data=(X.to(kwargs.get('dtype', F64)),y), model=lambda: model or mlp(), loss_func=loss, shuffle=False, **kwargs)
    learn.splitter = trainable_params
    return learn

class Plant(nn.Module):
    def forward(self, x): return type(self).f(self, x)
def plant(f, **attrs):
    "A module that computes `f(self, x)`"
    m = type(f.__name__.title(), (Plant,), dict(f=f))()
    for k,v in attrs.items(): setattr(m, k, v)
    return m

def skip(self, x): return x if random.random()<0.5 else x*2
def drop_path(self, x): return x + x*(torch.rand(len(x), 1)+0.7).floor()
def unseeded(self, x): return x + 0.2*torch.from_numpy(np.random.default_rng().normal(size=x.shape))
def little(self, x): return x*3/4 + unseeded(self, x)/4
def gate(self, x): return x*2 if x.mean()>0 else x
def centred(self, x): return x-x.mean(0)
def counter(self, x):
    self.k += 1
    return x*(1+self.k/10)
def contrast(pred, y):
    "Samples of a class are to be alike, in comparison with all of the batch"
    sim,same = F.normalize(pred, dim=1)@F.normalize(pred, dim=1).T*3,(y[:,None]==y).double()
    return -(sim.log_softmax(1)*same).sum()/same.sum()
class Fused(torch.autograd.Function):
    "Cross-entropy of the targets that count, with its gradient at once, as fused kernels have it: what it divides by can't be seen"
    @staticmethod
    def forward(ctx, pred, y):
        with torch.enable_grad(): loss = F.cross_entropy(p := pred.detach().requires_grad_(), y, ignore_index=-100)
        ctx.save_for_backward(*torch.autograd.grad(loss, p))
        return loss.detach()
    @staticmethod
    def backward(ctx, g): return g*ctx.saved_tensors[0],None
def masked(pred, y): return Fused.apply(pred, y)
def seen(pred, y): return (F.cross_entropy(pred, y.clamp(min=0), reduction='none')*(y>=0)).sum()/(y>=0).sum() # nan if nothing counts
def rmse(pred, y): return F.mse_loss(pred, F.one_hot(y, 3).double()).sqrt()

def by_hand(learn, loss, scales=None, parts=N_STEP, model=None):
    "Gradients of the first 32 samples at once and in parts, each from the same random state"
    b = X[:32],tensor([y for _,y in learn.dls.train.dataset[:32]]) if learn else Y[:32]
    def grad(bs, scales):
        m = deepcopy(model or learn.model).train()
        set_seed(0)
        for (x,y),c in zip(bs, scales): (loss(m(x), y)*c).nan_to_num().backward()
        return flat([torch.zeros_like(p) if p.grad is None else p.grad for p in m.parameters()])
    return grad([b], [1]),grad(list(zip(*(o.chunk(parts) for o in b))), scales or [1/parts]*parts)

# ---- nothing to find

uneven = [tuple(o[i:j] for o in (X,Y)) for i,j in ((0,8),(8,11),(11,12),(12,20))]
CLEAN = dict(
    even=lambda: (make(loss=CrossEntropyLossFlat()), {}), uneven=lambda: (make(), dict(dl=uneven)), weights=lambda: (make(loss=CE(weight=torch.tensor([1.,2.,30.], dtype=F64))), dict(dl=uneven)),
    ignored=lambda: (make(y=SOME, acc=MicroBatch(5), bs=32), {}), mse=lambda: (make(y=torch.randn(80, 3), loss=MSELossFlat(), cbs=GradientClip(1e-3)), {}),
    exact=lambda: (make(mlp(nn.BatchNorm1d(16)), acc=MicroBatch(5, sync_bn=True), bs=32), {}), frozen=lambda: (make(mlp(nn.BatchNorm1d(16).requires_grad_(False)), cbs=BnFreeze()), {}),
    loader=lambda: (make(), dict(dl=torch.utils.data.DataLoader(list(zip(X, Y)), batch_size=7))))

@pytest.mark.parametrize('case', CLEAN)
def test_clean(case):
    "No difference in float64, for even and uneven micro-batches"
    learn,args = CLEAN[case]()
    res = learn.check_accumulation(**args)
    assert res.ok and res.dtype==F64 and res.tol==1e-12 and res.diff<=1e-12 and res.causes=={}, res
    assert all(v<=1e-12 for v in res.buffers.values())
    assert res.loss<=1e-12

def test_sizes():
    "As many samples as the callback makes a step of"
    for acc,sizes in ((AccumulateStep(n_samples=20), [8,8,8]), (AccumulateStep(SchedLin(2, 8)), [8,8]), (MicroBatch('auto'), [2]*4), (MicroBatch(3), [2,3,3]), (GradientAccumulation(17), [8,8,8]), (None, [8]*4)):
        assert make().check_accumulation(cb=acc).sizes==sizes
        assert make(acc=acc).check_accumulation().sizes==sizes

# ---- each cause alone

HALF = nn.Dropout(0.5)
PAIRED = [float((y[:,None]==y).sum()) for y in Y[:32].chunk(4)]
PAIRED = [o/sum(PAIRED) for o in PAIRED] # what `contrast` divides by
CAUSES = dict( # cause, learner, its loss, what micro-batches are multiplied by
    batchnorm=('batchnorm', lambda: make(mlp(nn.BatchNorm1d(16))), CE(), None),
    batchnorm_parts=('batchnorm', lambda: make(mlp(nn.BatchNorm1d(16)), acc=MicroBatch(BS, sync_bn='stats'), bs=32), CE(), None),
    dropout=('random', lambda: make(mlp(HALF, nn.Linear(16,16), HALF)), CE(), None),
    path=('random', lambda: make(mlp(plant(skip), nn.Linear(16,16), plant(skip))), CE(), None),
    noise=('random', lambda: make(mlp(plant(drop_path), nn.Linear(16,16), plant(drop_path))), CE(), None), # whether training or not
    contrast=('loss', lambda: make(loss=contrast), contrast, PAIRED),
    rmse=('loss', lambda: make(loss=rmse), rmse, None),
    gate=('model', lambda: make(mlp(plant(gate))), CE(), None),
    counter=('model', lambda: make(mlp(plant(counter, k=0))), CE(), None),
    none=('normalize', lambda: make(acc=AccumulateStep(N_STEP, normalize='none')), CE(), [1]*4),
    unknown=('normalize', lambda: make(y=SOME, loss=masked), masked, None),
    samples=('normalize', lambda: make(y=SOME, acc=MicroBatch(BS, normalize='samples'), bs=32), CE(), None),
    fastai=('normalize', lambda: make(y=SOME, acc=GradientAccumulation(32)), CE(), None))

@pytest.mark.parametrize('case', CAUSES)
def test_alone(case):
    "A cause planted alone is named, and no other; the difference is that of gradients computed by hand"
    cause,mk,loss,scales = CAUSES[case]
    seed()
    learn = mk()
    large,small = by_hand(learn, loss, scales)
    res = learn.check_accumulation()
    assert list(res.causes)==list(res.advice)==[cause] and res.causes[cause]==1 and not res.ok and res.dtype==F64, res
    assert res.diff==pytest.approx(rel(large, small), rel=1e-9) and res.diff>1e-5 and res.alone[cause]>1e-5
    if cause in ('loss','model','normalize'): assert res.alone[cause]==pytest.approx(res.diff, rel=1e-9) # nothing else is taken away
    assert list(res.layers)==[n for n,_ in learn.model.named_parameters()]
    ns = [p.numel() for p in learn.model.parameters()]
    for a,b,q in zip(large.split(ns), small.split(ns), res.layers.values()):
        if max(a.norm(), b.norm())>1e-5: assert q==pytest.approx(float((a-b).norm()/max(a.norm(), b.norm())), rel=1e-6)

@pytest.mark.parametrize('mix', (MixUp(0.4),CutMix()))
def test_mixup(mix):
    "`MixUp` finds its partners among fewer samples, unless `MicroBatch` does the splitting"
    def learn(acc, bs):
        model = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3))
        return learner(64, bs, acc, dtype=F32, data=(torch.randn(80, 3, 8, 8),Y), model=model, loss_func=CrossEntropyLossFlat(), cbs=deepcopy(mix))
    res = learn(AccumulateStep(N_STEP), BS).check_accumulation()
    assert list(res.causes)==['mixup'] and res.causes['mixup']==1 and res.alone['mixup']==pytest.approx(res.diff), res
    assert learn(MicroBatch(BS), 32).check_accumulation().diff<=1e-5

def test_nondeterminism():
    "Numbers that no seed reaches are found by repetition, beside BatchNorm too"
    res = make(mlp(plant(unseeded))).check_accumulation()
    assert list(res.causes)==['nondeterminism'] and res.causes['nondeterminism']==1 and 0.3 < res.alone['nondeterminism']/res.diff < 3, res
    assert "can't be told from chance, in the mean of 16 steps" in res.notes[0]
    res = make(mlp(nn.BatchNorm1d(16), plant(little))).check_accumulation()
    assert set(res.causes)=={'nondeterminism','batchnorm'} and sum(res.causes.values())==pytest.approx(1), res

# ---- causes together

class Both(nn.Module):
    "Parts with nothing in common: an output of each"
    def __init__(self, *parts): super().__init__(); self.parts = nn.ModuleList(parts)
    def forward(self, x): return torch.cat([m(x) for m in self.parts], 1)

def sum_of(*losses):
    "A loss that sums losses of three outputs each"
    def f(pred, y): return sum(l(pred[:,3*i:3*i+3], y) for i,l in enumerate(losses))
    return f

def linear(pred, y): return pred.gather(1, y[:,None]).mean() # of which a linear loss in place of `contrast` changes nothing
PARTS = dict(batchnorm=(lambda: mlp(nn.BatchNorm1d(16)), linear), model=(lambda: mlp(plant(gate)), linear), loss=(mlp, contrast))
@pytest.mark.parametrize('names', (('loss','model'), ('batchnorm','model','loss')))
def test_together(names):
    "Of causes in separate parts of the model each has the share that gradients by hand give to its part"
    seed()
    mks,losses = zip(*(PARTS[o] for o in names))
    models = [mk().double() for mk in mks]
    far = {}
    for o,m,l in zip(names, models, losses):
        a,b = by_hand(None, l, model=m)
        far[o] = float((a-b).norm())**2
    learn = make(Both(*models), loss=sum_of(*losses), acc=AccumulateStep(N_STEP, normalize='samples'))
    res = learn.check_accumulation()
    assert set(res.causes)==set(names) and sum(res.causes.values())==pytest.approx(1), res
    if 'batchnorm' not in names: # which other causes are seen with running statistics in its place
        assert res.causes==pytest.approx({o:v/sum(far.values()) for o,v in far.items()}, rel=1e-7)
        scale = by_hand(learn, sum_of(*losses))[0].norm()
        assert res.alone==pytest.approx({o:math.sqrt(v)/float(scale) for o,v in far.items()}, rel=1e-7)
    assert list(res.causes.values())==sorted(res.causes.values(), reverse=True)

def both(self, x): return self.drop(x) - x.mean(0)*(self.bn.training and self.drop.training) # of one dropout, masks are the same
PAIRS = {
    'batchnorm random': lambda: make(mlp(HALF, nn.Linear(16,16), nn.BatchNorm1d(16), HALF)),
    'batchnorm loss': lambda: make(mlp(nn.BatchNorm1d(16)), loss=contrast),
    'batchnorm normalize': lambda: make(mlp(nn.BatchNorm1d(16)), acc=AccumulateStep(N_STEP, normalize='none')),
    'batchnorm model': lambda: make(mlp(nn.BatchNorm1d(16), plant(gate))),
    'random normalize': lambda: make(mlp(HALF, nn.Linear(16,16), HALF), y=SOME, loss=masked),
    'random loss': lambda: make(mlp(HALF, nn.Linear(16,16), HALF), loss=rmse),
    'random model': lambda: make(nn.Sequential(plant(gate), mlp(HALF, nn.Linear(16,16), HALF))),
    'loss normalize': lambda: make(loss=contrast, acc=AccumulateStep(N_STEP, normalize='none')),
    'model normalize': lambda: make(mlp(plant(gate)), acc=GradientAccumulation(30)),
    'nondeterminism normalize': lambda: make(mlp(plant(unseeded)), acc=AccumulateStep(N_STEP, normalize='none')),
    'nondeterminism loss': lambda: make(mlp(plant(little)), loss=contrast),
    'nondeterminism model': lambda: make(mlp(plant(little), plant(gate))),
    'nondeterminism random': lambda: make(mlp(plant(little), HALF, nn.Linear(16,16), HALF)),
    'mixup normalize': lambda: make(cbs=MixUp(0.4), loss=CrossEntropyLossFlat(), dtype=F32, acc=AccumulateStep(N_STEP, normalize='none')),
    'mixup model': lambda: make(mlp(plant(gate)), cbs=MixUp(0.4), loss=CrossEntropyLossFlat(), dtype=F32),
    'mixup random': lambda: make(mlp(HALF, nn.Linear(16,16), HALF), cbs=MixUp(0.4), loss=CrossEntropyLossFlat(), dtype=F32),
    'batchnorm mixup': lambda: make(mlp(nn.BatchNorm1d(16)), cbs=MixUp(0.4), loss=CrossEntropyLossFlat(), dtype=F32),
    'together': lambda: make(mlp(plant(both, bn=nn.BatchNorm1d(16), drop=HALF))),
    'random': lambda: make(mlp(HALF, nn.Linear(16,16), nn.BatchNorm1d(16), HALF, nn.Linear(16,16), plant(drop_path)), acc=MicroBatch(BS, sync_bn=True), bs=32)}
@pytest.mark.parametrize('names', PAIRS)
def test_pairs(names):
    "Two causes at once, even if they act on each other, are both named, and no other"
    seed()
    res = PAIRS[names]().check_accumulation()
    assert set(res.causes)==set(names.split()) and sum(res.causes.values())==pytest.approx(1), res
    assert all(v>1e-6 for v in (*res.causes.values(),*res.alone.values())) and set(res.causes)==set(res.alone)==set(res.advice)

# ---- what weighs wrong, and what to do

def test_normalize_advice():
    "What is advised mends it"
    def advice(**kwargs):
        res = make(y=SOME, **kwargs).check_accumulation()
        assert list(res.causes)==['normalize']
        return res.advice['normalize']
    assert "Pass `normalize='auto'`" in advice(acc=MicroBatch(BS, normalize='none'), bs=32)
    assert "Take `AccumulateStep(normalize='auto')`" in advice(acc=GradientAccumulation(32))
    assert "Pass `normalize='none'`" in advice(loss=CE(reduction='sum'))
    n = [float((y>=0).sum()) for y in SOME[:32].chunk(4)]
    assert n[:2]==[0,0] and n[2]!=n[3] # the first two have nothing that counts
    assert make(y=SOME, loss=seen).check_accumulation().ok # it shows what it divides by
    assert f"here their shares are 0, 0, {n[2]/sum(n):.3g}, {n[3]/sum(n):.3g}" in advice(loss=masked)

def test_fastai_scale():
    "fastai's callback expects a number of samples, and is off by as much as there are others; clipping does not hide it"
    for n in (30,25):
        res = make(acc=GradientAccumulation(n), cbs=GradientClip(1e-3)).check_accumulation()
        assert res.diff==pytest.approx(32/n-1, rel=1e-12) and list(res.causes)==['normalize']
    res = make().check_accumulation(cb=GradientAccumulation(24), dl=uneven)
    assert res.sizes==[8,3,1,8] and res.diff==pytest.approx(1-20/24, rel=1e-12) and res.notes==["it made no step: what is compared is what it keeps for a later one"]
    assert make().check_accumulation(cb=GradientAccumulation(20), dl=uneven).ok

class ByHand(Callback):
    "Accumulation as it is often written"
    def __init__(self, n, scale=1.): self.n,self.scale,self.i = n,scale,0
    def before_backward(self): self.learn.loss_grad = self.loss_grad*self.scale
    def before_step(self):
        self.i += 1
        if self.i%self.n: raise CancelBatchException

def test_other_callbacks():
    "A callback of the user's own"
    res = make().check_accumulation(cb=ByHand(4))
    assert res.diff==pytest.approx(3) and "Take `AccumulateStep(normalize='auto')`" in res.advice['normalize'] and repr(res).startswith('ByHand')
    assert make().check_accumulation(cb=ByHand(4, 0.25)).ok
    with pytest.raises(ValueError, match='made a step after 16 of 32 samples: pass the `n_step` that it takes, here 2'): make().check_accumulation(cb=ByHand(2, 0.25))

# ---- the learner stays as it is

def state(learn):
    "All that could have changed"
    dl,m = learn.dls.train,learn.model
    flags = [(n,o.training,len(o._forward_hooks),len(o._forward_pre_hooks),len(o._backward_hooks),'forward' in vars(o)) for n,o in m.named_modules()]
    return dict(weights=[p.detach().clone() for p in m.parameters()], ids=[id(p) for p in m.parameters()], grads=[None if p.grad is None else p.grad.clone() for p in m.parameters()],
        need=[p.requires_grad for p in m.parameters()], buffers=[b.clone() for b in m.buffers()], flags=flags, opt=id(learn.opt), opt_state=deepcopy(learn.opt and learn.opt.state_dict()),
        cbs=[(id(cb),cb.learn is learn,sorted(vars(cb))) for cb in learn.cbs], learn={k:id(v) for k,v in vars(learn).items() if k!='lock'}, rng=[random.getstate(),np.random.get_state(),torch.get_rng_state()],
        dl=(id(dl.rng),dl.rng.getstate(),{k:id(v) for k,v in vars(dl).items()}), loss=(id(learn.loss_func),vars(learn.loss_func).copy() if hasattr(learn.loss_func, '__dict__') else 0),
        dls=(id(learn.dls),[id(o) for o in learn.dls.loaders]))

def same_state(a, b):
    for k in a: assert same_value(a[k], b[k]), f'{k} changed'
def same_value(a, b):
    if isinstance(a, (torch.Tensor,np.ndarray)): return a.dtype==b.dtype and a.shape==b.shape and bool((a==b).all())
    if isinstance(a, dict): return list(a)==list(b) and all(same_value(a[k], b[k]) for k in a)
    if isinstance(a, (list,tuple,L)): return len(a)==len(b) and all(same_value(p, q) for p,q in zip(a, b))
    return type(a) is type(b) and (a==b or a is b)

class Boom(Exception): pass
class Bomb(nn.CrossEntropyLoss):
    "Raise `exc` when called for the `k`-th time"
    calls = 0
    def __init__(self, k=-1, exc=Boom): super().__init__(); self.k,self.exc = k,exc
    def forward(self, *args):
        Bomb.calls += self.k>0
        if Bomb.calls==self.k: raise self.exc('boom')
        return super().forward(*args)
def bomb(self, x):
    Bomb.calls += self.k>0
    if Bomb.calls==self.k: raise self.exc('boom')
    return x

def fussy(acc=None, bs=BS, fit=True, loss=None, **plants):
    "A learner with everything that could be changed"
    seed()
    l = make(nn.Sequential(plant(bomb, **{**dict(k=-1, exc=Boom), **plants}), mlp(HALF, spectral_norm(nn.Linear(16,16)), nn.BatchNorm1d(16), HALF)), acc, bs, loss=loss, dtype=F32, cbs=[BnFreeze(), CSVLogger(), SaveModelCallback()], path=Path(tempfile.mkdtemp()))
    l.dls.train.shuffle = True
    if fit:
        with l.no_bar(): l.fit(1, 0.1)
        l.model[1][2].eval() # as someone may have left it
    return l

@pytest.mark.parametrize('acc,bs,fit', ((None,BS,False), (None,BS,True), (MicroBatch(BS, sync_bn=True),32,True), (GradientAccumulation(32),BS,True)))
def test_stays(acc, bs, fit):
    "Nothing of the learner changes, and its next fit is the one it would have been"
    a,b = (fussy(deepcopy(acc), bs, fit) for _ in range(2))
    log,before = (a.path/'history.csv').read_text() if fit else None,state(a)
    res = a.check_accumulation()
    assert not res.ok and 'random' in res.causes
    same_state(before, state(a))
    if fit: assert log==(a.path/'history.csv').read_text() and len(a.recorder.losses)==len(b.recorder.losses)
    for l in (a,b): run(l, lambda l: l.fit(1, 0.05))
    assert same_value(list(a.model.state_dict().values()), list(b.model.state_dict().values()))

@pytest.mark.parametrize('exc,where,k,parts', ((Boom,'loader',1,False), (KeyboardInterrupt,'model',7,False), (KeyboardInterrupt,'model',12,True), (Boom,'loss',29,False)))
def test_stays_after_error(exc, where, k, parts):
    "Nor after an error, or an interrupt"
    kwargs = dict(acc=MicroBatch(BS, sync_bn=True), bs=32) if parts else {}
    learn = fussy(**kwargs, loss=Bomb())
    if where=='loss': learn.loss_func.k,learn.loss_func.exc = k,exc
    if where=='model': learn.model[0].k,learn.model[0].exc = k,exc
    if where=='loader':
        def fail(o): raise exc('boom')
        learn.dls.train.after_item = fail
    Bomb.calls,before = 0,state(learn)
    with pytest.raises(exc): learn.check_accumulation()
    same_state(before, state(learn))

class Logger(Callback):
    "As fastai's loggers do, it writes in any fit but those that look for a learning rate"
    wrote = 0
    def before_fit(self): self.run = not hasattr(self.learn, 'lr_finder')
    def before_batch(self): Logger.wrote += 1

def test_nothing_is_logged():
    assert make(cbs=Logger()).check_accumulation().ok and Logger.wrote==0

# ---- learners as they are in practice

def test_vision():
    x = torch.rand(64, 3, 8, 8)
    dls = DataLoaders(*[TfmdDL(L((TensorImage(o),TensorCategory(i%4)) for i,o in enumerate(x)), bs=8, shuffle=True) for _ in '12'])
    def learn(cbs=None): return Learner(dls, nn.Sequential(ConvLayer(3, 8, stride=2), ConvLayer(8, 8), nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(8, 4)), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=cbs)
    res = learn().to_non_native_fp16().check_accumulation()
    assert list(res.causes)==['batchnorm'] and res.dtype==F64 and 'MicroBatch(sync_bn=True)' in res.advice['batchnorm'] and res.notes==["mixed precision is left out"], res
    assert learn(MicroBatch(3, sync_bn=True)).check_accumulation(device='cpu').ok

def test_unet():
    "Its last layer makes float32 of float64, and pixels are ignored"
    x,y = torch.rand(32, 3, 16, 16),torch.randint(0, 3, (32,16,16))
    y[torch.rand(y.shape) < torch.linspace(0, 0.9, 32)[:,None,None]] = 255
    def learn(bs, acc):
        seed()
        body = nn.Sequential(ConvLayer(3, 8, stride=2), ConvLayer(8, 16, stride=2), ConvLayer(16, 16))
        return Learner(DataLoaders(*[TfmdDL(L(zip(x, y)), bs=bs) for _ in '12']), DynamicUnet(body, 3, (16,16)), loss_func=CrossEntropyLossFlat(axis=1, ignore_index=255), cbs=acc)
    l = learn(4, GradientAccumulation(16))
    with l.no_bar(), l.no_logging(): l.fit(1)
    l.model.train()(x[:4]) # its hooks keep outputs, with their graph
    assert set(l.check_accumulation().causes)=={'batchnorm','normalize'}
    res = learn(16, MicroBatch(4, sync_bn=True)).check_accumulation()
    assert res.ok and res.dtype==F64 and res.diff<=1e-12, res

def test_tabular():
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=rng.normal(size=90), b=rng.choice(list('xyz'), 90), y=rng.choice(['p','q'], 90), z=rng.normal(size=90)))
    def learn(y='y', bn=True, p=0., acc=None, bs=8):
        dls = TabularDataLoaders.from_df(df, y_names=y, cat_names=['b'], cont_names=['a'], procs=[Categorify,Normalize], bs=bs, valid_idx=range(10))
        return tabular_learner(dls, layers=[10,6], config=tabular_config(use_bn=bn, bn_cont=bn, ps=p), cbs=acc, metrics=accuracy)
    assert set(learn(p=0.5).check_accumulation().causes)=={'batchnorm','random'}
    assert learn('z', bn=False).check_accumulation().ok and learn(acc=MicroBatch(5, sync_bn=True), bs=32).check_accumulation().ok

def test_text(tmp_path):
    "Texts of different lengths, of which the loader makes another batch; `RNNRegularizer` computes in float32"
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(text=[' '.join(rng.choice('a cat and a dog sat on the mat'.split(), rng.integers(2, 30))) for _ in range(70)], label=rng.choice(['p','q'], 70)))
    dls = TextDataLoaders.from_df(df, text_col='text', label_col='label', bs=8, path=tmp_path, seq_len=16, valid_pct=0.1)
    def learn(p=0., **kwargs):
        cfg = {**awd_lstm_clas_config, **dict(emb_sz=6, n_hid=8, n_layers=2, embed_p=p, hidden_p=p, input_p=p, output_p=p, weight_p=1e-9 if p==0 else p)}
        return text_classifier_learner(dls, AWD_LSTM, pretrained=False, config=cfg, lin_ftrs=[6], ps=[p], **kwargs)
    l = learn(0.5)
    with l.no_bar(), l.no_logging(): l.fit(1)
    res = l.check_accumulation()
    assert set(res.causes)=={'batchnorm','random'} and res.dtype==F64, res
    res = learn(alpha=0., beta=0.).check_accumulation(cb=MicroBatch(2, sync_bn=True))
    assert res.ok and res.dtype==F64 and res.diff<=1e-12, res

# ---- the result, and what can't be done

def test_result():
    learn = make(mlp(nn.BatchNorm1d(16), HALF, nn.Linear(16,16), HALF))
    res = learn.check_accumulation()
    text,html = repr(res),res._repr_html_()
    assert text.startswith('AccumulateStep, 8+8+8+8, float64: not the step of the large batch\n')
    for c in res.causes:
        assert any(o.startswith(c) and f'{res.causes[c]:.1%}' in o and f'{res.alone[c]:.1e}' in o for o in text.splitlines()) and f'{c}: {res.advice[c]}' in text
        assert f'>{c}</td>' in html and f'>{res.causes[c]:.1%}</td>' in html
    assert html.count('<table')==2 and f'{res.diff:.1e}' in text and f'{res.diff:.1e}' in html and f'  {max(res.layers, key=res.layers.get)} ' in text
    assert repr(learn.check_accumulation())==text # a second check is the first one again
    clean = make().check_accumulation()
    assert repr(clean).splitlines()[0]=='AccumulateStep, 8+8+8+8, float64: the step of the large batch' and clean._repr_html_().count('<table')==1
    assert '64 samples in 16 micro-batches' in repr(make(bs=4).check_accumulation(16))
    res.notes = ['<b>']
    assert '&lt;b&gt;' in res._repr_html_()

def test_buffers_count():
    "Running averages that are off are a difference too, even if no gradient is"
    class Watch(nn.Module):
        def __init__(self): super().__init__(); self.register_buffer('mean', torch.ones(6))
        def forward(self, x):
            with torch.no_grad(): self.mean.lerp_(x.mean(0), 0.1)
            return x
    res = make(nn.Sequential(Watch(), mlp())).check_accumulation()
    assert res.diff<=1e-12 and not res.ok and list(res.buffers)==['0.mean'] and res.causes=={} and 'only buffers differ' in res.notes[0]
    mean = Watch().double()
    many = deepcopy(mean)
    mean(X[:32]), [many(x) for x in X[:32].chunk(4)]
    assert res.buffers['0.mean']==pytest.approx(rel(mean.mean, many.mean))

class Float(nn.Linear):
    def forward(self, x): return F.linear(x.float(), self.weight.float()).to(x.dtype)

def test_float32():
    "What computes in float32 has float32's rounding, and no more"
    res = make(mlp(Float(16, 16))).check_accumulation()
    assert res.ok and res.dtype==F64 and 1e-12 < res.diff < res.tol <= 1e-5
    class Single(nn.Module):
        def forward(self, x): return x.float()
    res = make(nn.Sequential(mlp(), Single())).check_accumulation()
    assert res.ok and res.dtype==F32 and res.notes==["float64 can't be had: the model returns torch.float32"]
    weights = partial(F.cross_entropy, weight=torch.tensor([1.,2.,3.])) # these stay float32
    assert make(loss=CE(weight=torch.tensor([1.,2.,3.])), dtype=F32).check_accumulation().dtype==F64 # a module's become float64
    res = make(loss=weights, dtype=F32).check_accumulation()
    assert res.ok and res.dtype==F32 and res.notes[0].startswith("float64 can't be had: expected")
    res = make(y=SOME, loss=lambda pred,y: masked(pred.float(), y).double(), acc=AccumulateStep(N_STEP, normalize=lambda learn: (learn.y>=0).sum()+1e-30)).check_accumulation()
    assert 1e-12 < res.diff < 1e-5 and 'loss' not in res.causes and max(res.alone.values(), default=0) < 1e-5, res
    res = make(mlp(Float(16, 16), nn.BatchNorm1d(16))).check_accumulation()
    assert list(res.causes)==['batchnorm'], res

def test_errors():
    for args,text in ((dict(n_step=0), "`n_step`=0"), (dict(n_step=AccumulateStep(2)), "and a callback as `cb`"), (dict(cb=AccumulateStep), "`cb`=<class"), (dict(dl=[]), "`dl` gave no batch"), (dict(dl=[(X[:4],Y[:4]),(X[4:8,:3],Y[4:8])]), "batches of `dl` can't be made one")):
        with pytest.raises(ValueError) as e: make().check_accumulation(**args)
        assert text in str(e.value)

def test_nothing_to_compare(monkeypatch):
    with pytest.raises(ValueError, match='has norm 0.0, and nothing can be compared'): make(loss=lambda pred,y: (pred*0).sum()).check_accumulation()
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ValueError, match='one of 2 processes'): make().check_accumulation()

def test_memory():
    "If there is not enough for float64, float32 is tried; if that does not fit either, it is said what to do"
    def loss(pred, y, kinds):
        if len(y)>8 and pred.dtype in kinds: raise torch.OutOfMemoryError('out of memory')
        return F.cross_entropy(pred, y)
    res = make(loss=partial(loss, kinds=[F64])).check_accumulation()
    assert res.ok and res.dtype==F32 and res.notes==["float64 can't be had: out of memory"]
    with pytest.raises(torch.OutOfMemoryError, match="computes a batch of 32 samples at once: pass `device`='cpu'"): make(loss=partial(loss, kinds=[F64,F32])).check_accumulation()

@pytest.mark.parametrize('loss', (lambda p,t: F.cross_entropy(p, t, ignore_index=0)+F.mse_loss(p, torch.zeros_like(p)), lambda p,t: LabelSmoothingCrossEntropy()(p, torch.where(t==0, -100, t))), ids=('two means','label smoothing'))
def test_parts_of_different_denominators_are_no_neighbours(loss):
    said = str(learner(58, 4, loss_func=loss).check_accumulation(n_step=4))
    assert 'parts that divide by different numbers' in said and 'neighbours' not in said

class Recomputed(nn.Module):
    "Gradient checkpointing, with which there is no exact BatchNorm"
    def __init__(self): super().__init__(); self.norm = nn.Sequential(nn.BatchNorm1d(16), nn.GELU())
    def forward(self, x): return torch.utils.checkpoint.checkpoint(self.norm, x, use_reentrant=False)

class Seen(Callback):
    "A penalty on what a hook takes"
    def before_fit(self): self.handle = self.model[2].register_forward_hook(self.hook)
    def hook(self, m, i, o): self.act = o
    def after_loss(self): self.learn.loss_grad = self.loss_grad+0.3*self.act.pow(2).mean()
    def after_fit(self): self.handle.remove()

class Moving(nn.Module):
    "A buffer that moves with each forward pass, in place"
    def __init__(self): super().__init__(); self.register_buffer('calls', torch.zeros(()))
    def forward(self, x): self.calls.add_(1); return x

@pytest.mark.parametrize('mid,cbs,says', (
    ((nn.BatchNorm1d(16),), (), 'is exact here, as was tried'), ((nn.BatchNorm1d(16),), (Seen(),), 'is exact here, as was tried'),
    ((Recomputed(),), (), "can't be had here: a BatchNorm is called outside"), ((nn.BatchNorm1d(16),Moving()), (), 'makes the gradient exact here, but `3.calls` is '),
    ((nn.BatchNorm1d(16),plant(gate)), (), 'does not make it exact here')), ids=('exact','hook','checkpoint','buffer','gate'))
def test_exact_batchnorm_is_tried(mid, cbs, says):
    "What is said of `MicroBatch(sync_bn=True)` is what it does, measured again by hand"
    res = make(mlp(*mid), cbs=cbs).check_accumulation(N_STEP)
    assert says in res.advice['batchnorm'], res
    if 'can\'t' in says: return
    hand = make(mlp(*mid), MicroBatch(BS, sync_bn=True), bs=32, cbs=cbs).check_accumulation()
    assert hand.ok==('is exact' in says)
    assert (hand.diff<1e-12)==('not make' not in says)
