"`sync_bn`: BatchNorms that see the whole batch though it is computed in parts, or that only move their running statistics by it"
import contextvars,gc,itertools,os,signal,sys,threading,time,traceback,types,weakref,_thread
import pytest
from contextlib import contextmanager,nullcontext
from functools import cache
from hypothesis import example,given,settings,strategies as st
from torch.amp import autocast
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18
from fastai.callback.hook import Hook as FastaiHook,HookCallback,Hooks
from fastai.callback.training import BnFreeze
from fastai.layers import BatchNorm,ConvLayer,LinBnDrop,NormType,ToTensorBase
from fastai.text.all import text_classifier_learner,AWD_LSTM,awd_lstm_clas_config
from fastai.vision.all import DynamicUnet,TensorImage,accuracy,unet_learner,vision_learner
from fastai.vision.gan import GANLearner
import test_oom as oom
from test_oom import little_garbage
from test_offload import Host,hosts
from fastai_accum import batchnorm,microbatch,offload
from fastai_accum.batchnorm import joint_batch_norm,jointly
from fastai_accum.lockstep import Lockstep,LockstepThread,lockstep,meet
from fastai_accum.offload import Offload
from test_companions import Mixed,Spoil,gan_maker,images,skipped,words,y_int,GAN_LOSSES
from common import *

N,BS = 29,8 # batches of 8, 8, 8 and 5
f16,bf16,f32,f64 = torch.float16,torch.bfloat16,torch.float32,torch.float64
TOL = {f64:1e-12, f32:1e-5}
_BatchNorm = nn.modules.batchnorm._BatchNorm
def fit(l): l.fit_one_cycle(2, 0.1)
def exact(bs=3, **kwargs): return MicroBatch(bs, sync_bn=True, **kwargs)
def stats(bs=3, **kwargs): return MicroBatch(bs, sync_bn='stats', **kwargs)
def norms(m): return [o for o in m.modules() if isinstance(o, _BatchNorm)]
class Boom(Exception): pass

OLD = set()
@pytest.fixture(autouse=True)
def threads_of_others():
    "What a test that fails leaves behind is no failure of those that follow"
    OLD.update(lanes())
def lanes(): return [t for t in threading.enumerate() if isinstance(t, LockstepThread) and t not in OLD]

class Seen(Callback):
    "Gradients before every step, buffers after every batch"
    order = 99
    def __init__(self): self.grads,self.bufs = [],[]
    def before_step(self): self.grads.append([flat(p.grad for p in self.model.parameters() if p.grad is not None)])
    def after_batch(self):
        if self.training: self.bufs.append([b.clone() for b in self.model.buffers()])

def one(acc=None, n=N, bs=BS, dtype=f64, data=None, cbs=list, setup=noop, **kwargs):
    "A learner for small pictures, with a residual net unless told otherwise"
    l = learner(n, bs, acc, dtype=dtype, data=data or images(n), cbs=[*cbs(), Seen()], **{'model':Res, **kwargs})
    setup(l)
    return l

def clean(l):
    "No thread is left, and nothing stands in for anything"
    assert not lanes() and not {'all_batches','_do_one_batch','_do_grad_opt','_backward'} & set(vars(l)) and isinstance(l.model, nn.Module)
    assert all('forward' not in vars(m) for m in norms(l.model)) and torch.is_grad_enabled()

def assert_same(large, small, tol=1e-12, **kwargs):
    "Each gradient and each buffer too is the other run's"
    assert_same_run(large, small, tol, **kwargs)
    for k in ('grads','bufs'):
        a,b = getattr(large.seen, k),getattr(small.seen, k)
        assert len(a)==len(b)>0
        for i,(s,t) in enumerate(zip(a, b)): assert max(map(rel, s, t), default=0)<=tol, f'{k} of batch {i}'
    clean(small)

def same(acc=exact, fit=fit, mk=one, tol=None, **kwargs):
    "The plain run and the one with `acc()`, found to be the same"
    large,small = (run(mk(a, **kwargs), fit) for a in (None,acc()))
    assert_same(large, small, tol or TOL[kwargs.get('dtype', f64)])
    return large,small

def forget(l): l.trace.steps,l.trace.batches,l.seen.grads,l.seen.bufs = [],[],[],[]
def goes_on(l, **kwargs):
    "What follows on a fit that failed is what follows on it without micro-batches"
    other = one(**{**kwargs, 'model':partial(deepcopy, l.model)})
    other.create_opt(); l.create_opt()
    forget(l)
    for o in (other,l):
        o.dls.train.rng = random.Random(3)
        run(o, lambda l: l.fit(1, 0.1))
    assert_same(other, l)

@contextmanager
def deadline(secs=20):
    "What hangs fails"
    def alarm(*_): raise TimeoutError('it hangs')
    was = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(secs)
    try: yield
    finally: signal.alarm(0); signal.signal(signal.SIGALRM, was)

# ---- models

def conv(i, o, **kwargs): return nn.Conv2d(i, o, 3, padding=1, bias=False, **kwargs)
class Res(nn.Module):
    "A residual net that works in place; `norms` make its layers for 6 channels"
    def __init__(self, *norms):
        super().__init__()
        self.stem,self.a,self.b,self.head = conv(3, 6),conv(6, 6),conv(6, 6),nn.Linear(6, 3)
        self.n1,self.n2,self.n3 = (f(6) for f in ((norms or (nn.BatchNorm2d,))*3)[:3])
    def block(self, x): return F.relu_(self.n2(self.a(x)))
    def forward(self, x):
        x = F.relu_(self.n1(self.stem(x)))
        y = self.n3(self.b(self.block(x)))
        y += x
        return self.head(F.relu_(y).mean((2,3)))

class Wrap(nn.Module):
    "No `nn.Sequential`, of which `learner` would train two layers"
    def __init__(self, *ms): super().__init__(); self.net = nn.Sequential(*ms)
    def forward(self, x): return self.net(x)

def mlp(): return Wrap(nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
def pooled(n): return [nn.ReLU(), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(n, 3)]
def sequences(): return Wrap(nn.Flatten(2), nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 6, 3, stride=2), nn.BatchNorm1d(6), *pooled(6))
def volumes(): return Wrap(nn.Unflatten(1, (1,3)), nn.Conv3d(1, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), nn.Conv3d(6, 6, 3), nn.BatchNorm3d(6), *pooled(6))

class Often(nn.Module):
    "One BatchNorm, used at three places"
    def __init__(self, **kwargs): super().__init__(); self.stem,self.a,self.n,self.head = conv(3, 6),conv(6, 6),nn.BatchNorm2d(6, **kwargs),nn.Linear(6, 3)
    def forward(self, x):
        x = self.n(self.stem(x))
        for _ in range(2): x = F.avg_pool2d(F.relu_(self.n(self.a(x))), 2)
        return self.head(x.mean((2,3)))

class Dense(nn.Module):
    "What was normalized is normalized again with more, and one layer's output is not used"
    def __init__(self):
        super().__init__()
        self.ns,self.cs,self.head = nn.ModuleList(nn.BatchNorm2d(3+4*i) for i in range(4)),nn.ModuleList(conv(3+4*i, 4) for i in range(3)),nn.Linear(15, 3)
    def forward(self, x):
        for n,c in zip(self.ns, self.cs): x = torch.cat([x, c(F.relu(n(x)))], 1)
        return self.head(self.ns[-1](x).mean((2,3)))+0*self.ns[-1](x.detach()).mean()

class Down(nn.Module):
    def __init__(self, i, o): super().__init__(); self.c,self.n = conv(i, o),nn.BatchNorm2d(o)
    def forward(self, x): self.kept = F.relu(self.n(self.c(x))); return F.max_pool2d(self.kept, 2)
class Keeps(nn.Module):
    "A U-Net whose layers remember what its second half is to have"
    def __init__(self):
        super().__init__()
        self.d1,self.d2,self.mid,self.n = Down(3, 4),Down(4, 6),conv(6, 6),nn.BatchNorm2d(6)
        self.u2,self.n2,self.u1 = conv(12, 4),nn.BatchNorm2d(4),conv(8, 3)
    def forward(self, x):
        self.sizes = []
        for d in (self.d1,self.d2): x = d(x); self.sizes.append(d.kept.shape[2:])
        x = F.interpolate(F.relu(self.n(self.mid(x))), self.sizes.pop())
        x = F.interpolate(F.relu(self.n2(self.u2(torch.cat([x, self.d2.kept], 1)))), self.sizes.pop())
        return self.u1(torch.cat([x, self.d1.kept], 1))

def unet(dtype=f64, **kwargs):
    "fastai's, whose hooks remember; in float64 without the layer that makes float32 of it"
    m = DynamicUnet(nn.Sequential(ConvLayer(3, 4), ConvLayer(4, 8, stride=2), ConvLayer(8, 8, stride=2)), 3, (8,8), **kwargs)
    if dtype==f64: m.layers = nn.ModuleList(o for o in m.layers if not isinstance(o, ToTensorBase))
    return m
def masks(n=N): x,_ = images(n); return x,(x.sum(1)>0).long()

MODELS = dict(residual=dict(), MLP=dict(model=mlp), sequences=dict(model=sequences), volumes=dict(model=volumes), shared=dict(model=Often), dense=dict(model=Dense),
              attributes=dict(model=Keeps, data=masks()), DynamicUnet=dict(model=unet, data=masks()), attention=dict(model=partial(unet, self_attention=True), data=masks()))

# ---- the same run

@pytest.mark.parametrize('k', (3,1))
@pytest.mark.parametrize('o', MODELS)
def test_models(o, k):
    "In parts of 2 and 3 samples, or of one: gradients, weights, losses and buffers, over epochs"
    _,small = same(partial(exact, k), **MODELS[o])
    assert [int(m.num_batches_tracked) for m in norms(small.model)]==[8*(3 if o=='shared' else 2 if o=='dense' and m.num_features==15 else 1) for m in norms(small.model)]

@pytest.mark.parametrize('o', ('residual','MLP','attributes','DynamicUnet'))
def test_float32(o):
    "Records too"
    same(dtype=f32, **{**MODELS[o], **(dict(model=partial(unet, f32)) if o=='DynamicUnet' else {})})

def test_resnet18(): same(fit=lambda l: l.fit(2, 1e-3), n=8, data=images(8, 16), model=partial(resnet18, num_classes=3))

def split_by(*ns): return lambda xb,yb,bs: list(zip(zip(*(x.split(list(ns)) for x in xb)), zip(*(y.split(list(ns)) for y in yb))))
@pytest.mark.parametrize('ns', ((1,7),(7,1),(1,1,6),(3,4,1),(1,)*8), ids=str)
@pytest.mark.parametrize('o', ('residual','MLP','DynamicUnet'))
def test_parts(o, ns): same(lambda: exact(8, split=split_by(*ns)) if len(ns)<8 else exact(7, split=split_by(*ns)), n=24, **{k:v for k,v in MODELS[o].items() if k!='data'}, data=(masks if 'Unet' in o else images)(24))

FITS = {'fit_one_cycle':fit, 'fit_flat_cos':lambda l: l.fit_flat_cos(2, 0.05), 'fine_tune':lambda l: l.fine_tune(1, 0.02), 'two fits':lambda l: (l.fit(1, 0.05), l.validate(), l.fit(1, 0.02))}
@pytest.mark.parametrize('opt', (partial(SGD, mom=0.9),partial(Adam, eps=1e-3)), ids=('sgd','adam'))
@pytest.mark.parametrize('f', FITS)
def test_fits(f, opt): same(fit=FITS[f], opt_func=opt)

def test_lr_find(tmp_path):
    "Curve and suggestions, and the buffers that it puts back"
    def find(l): l.found = l.lr_find(num_it=40, end_lr=1, show_plot=False, suggest_funcs=(valley,slide,minimum,steep))
    large,small = same(fit=find, dtype=f32, path=tmp_path)
    assert large.found==small.found and len(small.recorder.losses)==40
    for l in (large,small): forget(l); run(l, fit)
    assert_same(large, small, 1e-5)

@pytest.mark.parametrize('loss', (nn.CrossEntropyLoss(torch.tensor([0.1,1.,7.], dtype=f64), ignore_index=1), nn.CrossEntropyLoss(reduction='sum'), nn.MultiMarginLoss(), F.cross_entropy),
                         ids=('weights, ignored','sum','unknown','function'))
def test_losses(loss): same(loss_func=loss, fit=lambda l: l.fit(2, 0.02))

def test_whole_batches():
    "What is not split is the plain run, to the bit"
    for acc in (exact(8), MicroBatch(sync_bn=True), stats(8)): assert_same(run(one(), fit), run(one(acc), fit), 0.)

def test_validation():
    "In parts it is what it was; also where BatchNorms have no running statistics, and so normalize by the batch"
    for norm in (nn.BatchNorm2d, partial(nn.BatchNorm2d, track_running_stats=False)):
        large,small = same(partial(exact, valid=True), dtype=f32, model=partial(Res, norm), metrics=accuracy)
        for f in (lambda l: list(l.validate()), lambda l: l.get_preds(with_loss=True)[2], lambda l: l.get_preds(0)[0]): assert rel(f(large), f(small))<=1e-5

# ---- layers

class Act(nn.BatchNorm2d):
    "With a forward pass of its own and an activation, as timm's `BatchNormAct2d`"
    def count(self): self.num_batches_tracked.add_(1)
    def forward(self, x):
        train = self.training or self.running_mean is None
        if self.training and self.track_running_stats: self.count()
        momentum = 1/float(self.num_batches_tracked) if self.momentum is None else self.momentum
        return F.silu(F.batch_norm(x, self.running_mean, self.running_var, weight=self.weight, bias=self.bias, training=train, momentum=momentum, eps=self.eps))
class Recounts(Act):
    "Its count is a new tensor each time, as in timm and PyTorch of old"
    def count(self): self.num_batches_tracked = self.num_batches_tracked+1
class Twice(nn.BatchNorm2d):
    "Normalizes twice in one forward pass, and once by its running statistics"
    def forward(self, x): return super().forward(super().forward(x)) + 0.1*F.batch_norm(x, self.running_mean, self.running_var)

class NoGrad(nn.BatchNorm2d):
    def forward(self, x):
        with torch.no_grad(): return super().forward(x)
class Evaluates(nn.BatchNorm2d):
    "Keeps to its running statistics"
    def train(self, mode=True): return super().train(False)
BN = nn.BatchNorm2d
def evaluating(n): return Evaluates(n).eval()
def frozen(n): return BN(n).requires_grad_(False)
def without(name, n): m = BN(n); m.register_parameter(name, None); return m
LAYERS = {'momentum None':partial(BN, momentum=None), 'momentum 1':partial(BN, momentum=1.), 'eps':partial(BN, eps=0.5), 'not tracked':partial(BN, track_running_stats=False),
          'not affine':partial(BN, affine=False), 'neither':partial(BN, affine=False, track_running_stats=False), 'weight only':partial(without, 'bias'), 'bias only':partial(without, 'weight'),
          'frozen':frozen, 'no_grad':NoGrad, 'evaluating':evaluating, 'subclass':Act, 'subclass, momentum None':partial(Act, momentum=None), 'new count':Recounts,
          'new count, momentum None':partial(Recounts, momentum=None), 'twice':Twice, 'fastai':lambda n: BatchNorm(n, ndim=2), 'BatchZero':lambda n: BatchNorm(n, ndim=2, norm_type=NormType.BatchZero)}
@pytest.mark.parametrize('o', LAYERS)
def test_layers(o):
    "Each kind of BatchNorm everywhere, and between two plain ones"
    for ns in ((LAYERS[o],), (BN,LAYERS[o],BN)): same(model=partial(Res, *ns))

@pytest.mark.parametrize('kwargs', (dict(momentum=None), dict(track_running_stats=False), dict(affine=False)), ids=str)
def test_shared_layers(kwargs): same(model=partial(Often, **kwargs))

def test_fastai_layers():
    same(model=lambda: Wrap(ConvLayer(3, 6), ConvLayer(6, 6, norm_type=NormType.BatchZero, bn_1st=False), ConvLayer(6, 6, norm_type=None), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                            LinBnDrop(6, 8, act=nn.ReLU()), LinBnDrop(8, 8, lin_first=True), nn.Linear(8, 3)))

def test_other_layers_beside():
    "GroupNorm, LayerNorm and InstanceNorm are what they were"
    same(model=partial(Res, partial(nn.GroupNorm, 2), BN, partial(nn.InstanceNorm2d, affine=True)))

class ByHand(BN):
    def forward(self, x):
        m,v = (o[:,None,None] for o in (x.mean((0,2,3)),x.var((0,2,3), unbiased=False)))
        return (x-m)/(v+self.eps).sqrt()
class Direct(BN):
    def forward(self, x): return torch.batch_norm(x, self.weight, self.bias, self.running_mean, self.running_var, self.training, 0.1, self.eps, False)
@pytest.mark.parametrize('cls', (ByHand,Direct))
def test_layers_with_arithmetic_of_their_own(cls):
    "A subclass that does not go through `F.batch_norm` is refused, if it is not computed right"
    right_or_refused(model=partial(Res, cls))

def right_or_refused(**kwargs):
    "The plain run, or an error that says why not, before anything is trained"
    small = one(exact(4), **kwargs)
    try: run(small, fit)
    except (ValueError,RuntimeError) as e:
        assert re.search('sync_bn|BatchNorm', str(e)) and not small.trace.steps
        return clean(small)
    assert_same(run(one(**kwargs), fit), small)

# ---- the function

def whole(xs, running, w, b, momentum, eps): return F.batch_norm(torch.cat(xs), *running, w, b, True, momentum, eps)
def layer(c, dtype=f64, affine=True, tracked=True):
    running = [torch.randn(c, dtype=dtype), torch.rand(c, dtype=dtype)+0.5] if tracked else [None,None]
    return running, *([torch.randn(c, dtype=dtype, requires_grad=True) for _ in range(2)] if affine else [None,None])

@settings(max_examples=100)
@given(ns=st.lists(st.integers(1, 5), min_size=1, max_size=6), c=st.integers(1, 5), dims=st.lists(st.integers(1, 4), max_size=3), affine=st.booleans(), tracked=st.booleans(),
       momentum=st.floats(0, 1), eps=st.sampled_from((1e-5,0.1)), last=st.booleans(), s=st.integers(0, 99))
@example(ns=[1], c=2, dims=[], affine=True, tracked=True, momentum=0.1, eps=1e-5, last=False, s=0)
@example(ns=[1,1], c=2, dims=[], affine=True, tracked=True, momentum=0.1, eps=1e-5, last=False, s=0)
def test_any_parts(ns, c, dims, affine, tracked, momentum, eps, last, s):
    "Outputs, running statistics and gradients are those of `F.batch_norm` on all of it"
    torch.manual_seed(s)
    running,w,b = layer(c, affine=affine, tracked=tracked)
    xs = [torch.randn(n, c, *dims, dtype=f64)*3+1 for n in ns]
    if last and len(dims)>1: xs = [x.contiguous(memory_format=torch.channels_last if len(dims)==2 else torch.channels_last_3d) for x in xs]
    for x in xs: x.requires_grad_()
    mine,ins = [None if o is None else o.clone() for o in running],[*xs, *([w,b] if affine else [])]
    if sum(ns)*math.prod(dims)<2:
        for f in (lambda: whole(xs, running, w, b, momentum, eps), lambda: joint_batch_norm(xs, *mine, w, b, momentum, eps)):
            with pytest.raises(ValueError, match='Expected more than 1 value per channel when training'): f()
        return
    y,ys = whole(xs, running, w, b, momentum, eps),joint_batch_norm(xs, *mine, w, b, momentum, eps)
    assert [o.shape for o in ys]==[x.shape for x in xs] and rel(y.detach(), torch.cat(ys).detach())<=1e-12
    if tracked: assert max(map(rel, running, mine))<=1e-12
    dys = [torch.randn_like(o) for o in ys]
    spread = torch.cat(xs).transpose(0, 1).flatten(1).var(1, correction=0).min().item()
    size = max(1., float(w.abs().max()) if affine else 1.)*10/(spread+eps)**0.5 # of a gradient that does not come to nearly nothing, as that of two samples does
    for g,h in zip(torch.autograd.grad(y, ins, torch.cat(dys)), torch.autograd.grad(ys, ins, dys)): assert (g-h).abs().max()<=1e-12*max(size, float(g.abs().max()))

@pytest.mark.parametrize('last', (False,True))
@pytest.mark.parametrize('affine', ('w','b','wb',''))
@pytest.mark.parametrize('shapes', (((3,2),(1,2),(2,2)), ((2,2,3),(1,2,3)), ((1,2,2,2),(2,2,2,2),(1,2,2,2)), ((1,1,2,1,2),(2,1,2,1,2))), ids=str)
def test_gradcheck(shapes, affine, last):
    "Against differences of the function itself"
    torch.manual_seed(0)
    c = shapes[0][1]
    xs,w,b = [torch.randn(s, dtype=f64) for s in shapes],*(torch.randn(c, dtype=f64, requires_grad=True) if k in affine else None for k in 'wb')
    if last and len(shapes[0])==4: xs = [x.contiguous(memory_format=torch.channels_last) for x in xs]
    k = len(xs)
    def f(*ts): return tuple(joint_batch_norm(list(ts[:k]), None, None, *ts[k:]))
    assert torch.autograd.gradcheck(f, [*(x.requires_grad_() for x in xs), w, b])
    assert torch.autograd.gradcheck(lambda x,*ts: f(*xs[:-1], x, *ts), [xs[-1], w, b])

def test_part_of_the_inputs_need_gradients():
    torch.manual_seed(0)
    running,w,b = layer(4)
    xs = [torch.randn(3, 4, 5, dtype=f64, requires_grad=i==1) for i in range(3)]
    grads = [torch.autograd.grad(y.pow(3).sum(), [xs[1],w]) for y in (whole(xs, [None]*2, w, b, 0.1, 1e-5), torch.cat(joint_batch_norm(xs, None, None, w, b)))]
    assert max(map(rel, *grads))<=1e-12
    assert not any(o.requires_grad for o in joint_batch_norm([x.detach() for x in xs]))

@pytest.mark.parametrize('last', (False,True))
def test_memory_format(last):
    "Of outputs and gradients it is that of the inputs"
    fmt = torch.channels_last if last else torch.contiguous_format
    xs = [torch.randn(n, 4, 3, 5, dtype=f64).contiguous(memory_format=fmt).requires_grad_() for n in (2,3)]
    ys = joint_batch_norm(xs)
    gs = torch.autograd.grad(sum(y.pow(2).mul(torch.randn_like(y)).sum() for y in ys), xs)
    assert all(o.is_contiguous(memory_format=fmt) and not o.is_contiguous(memory_format=torch.contiguous_format if last else torch.channels_last) for o in (*ys,*gs))

def errors(f, dtype, w_dtype, shift, scale, ns=(5,1,2), c=6):
    "Relative errors of outputs, gradients and running statistics of `f(xs, running, w, b)` against the same inputs in float64; the root of their mean square over 20 trials"
    def once(f, ts, running, dys, dt, wt):
        xs,running = [o.to(dt).requires_grad_() for o in ts[:-2]],[o.to(wt) for o in running]
        wb = [o.to(wt).requires_grad_() for o in ts[-2:]]
        y = f(xs, running, *wb, 0.1, 1e-5)
        if isinstance(y, list): y = torch.cat(y)
        assert y.dtype==dt
        gs = torch.autograd.grad(y, [*xs,*wb], torch.cat(dys).to(dt))
        return [y.detach(), torch.cat(gs[:-2]), *gs[-2:], *running]
    errs = []
    for s in range(20):
        torch.manual_seed(s)
        ts,dys = [(torch.randn(n, c, 7, 7)*scale+shift).to(dtype) for n in ns],[torch.randn(n, c, 7, 7).to(dtype) for n in ns]
        running,w,b = layer(c, w_dtype)
        args = [*ts,w.detach(),b.detach()],running,dys
        errs.append([rel(p, q.double()) for p,q in zip(once(whole, *args, f64, f64), once(f, *args, dtype, w_dtype))])
    return tensor(errs).pow(2).mean(0).sqrt().tolist()
def joint(xs, running, *args): return joint_batch_norm(xs, *running, *args)

@pytest.mark.parametrize('dtype,w_dtype', ((bf16,f32),(f16,f32),(bf16,bf16),(f16,f16),(f32,f32)), ids=str)
@pytest.mark.parametrize('shift,scale', ((0,1),(3,0.1),(0,1e-3),(100,1),(-1e5,1)))
def test_precision(dtype, w_dtype, shift, scale):
    "Nothing is farther from float64 than where `F.batch_norm` has all of it, but for a rounding, and the chance in how 20 of them fall; also where variance is tiny beside the mean"
    if torch.finfo(dtype).eps*abs(shift)>scale: return # such inputs are all the same
    for a,b in zip(errors(whole, dtype, w_dtype, shift, scale), errors(joint, dtype, w_dtype, shift, scale)): assert b<=math.hypot(1.25*a, torch.finfo(f32).eps)

def test_types_are_kept():
    "A `TensorImage` that goes in comes out, with what is noted on it"
    xs = [TensorImage(torch.randn(2, 3, 4, 4)) for _ in range(2)]
    for x in xs: x.note = 'kept'
    ys = joint_batch_norm(xs)
    assert all(type(y) is TensorImage and y.note=='kept' for y in ys)
    assert rel(F.batch_norm(torch.cat(xs), None, None, training=True).as_subclass(Tensor), torch.cat(ys).as_subclass(Tensor))<=1e-6

# ---- frozen layers and backbones

def groups(m): return [params(m.stem)+params(m.n1), params(m.a)+params(m.b)+params(m.n2)+params(m.n3), params(m.head)]
def staged(l): l.freeze(); l.fit(1, 0.05); l.freeze_to(1); l.fit(1, 0.05); l.unfreeze(); l.fit(1, 0.05)
@pytest.mark.parametrize('cbs', (list, lambda: [BnFreeze()]), ids=('','BnFreeze'))
@pytest.mark.parametrize('train_bn', (True,False))
def test_freeze(train_bn, cbs):
    "BatchNorms of frozen layers are trained or not, move or not, as they do without"
    def setup(l): l.train_bn,l.splitter = train_bn,groups
    same(fit=staged, cbs=cbs, setup=setup)

@pytest.mark.parametrize('names', (('n1',),('n1','n2','n3'),('n3',)), ids=str)
def test_evaluating(names):
    "Some of them, or all, keep to their running statistics"
    def set_eval(self): [getattr(self.model, k).eval() for k in names]
    _,small = same(cbs=lambda: [Callback(before_train=set_eval)])
    assert [int(getattr(small.model, k).num_batches_tracked) for k in ('n1','n2','n3')]==[0 if k in names else 8 for k in ('n1','n2','n3')]

# ---- beside others

def mixed(*args, **kwargs): return lambda: [Mixed(*args, **kwargs)]
BESIDE = {'GradientClip':dict(cbs=lambda: [GradientClip(0.05)]), 'ActivationStats':dict(cbs=lambda: [ActivationStats()]), 'ActivationStats with hist':dict(cbs=lambda: [ActivationStats(with_hist=True)]),
          'GradScaler':dict(cbs=lambda: [Mixed(full=True, init_scale=2.**10, growth_interval=3)]),
          'GradScaler, overflow':dict(cbs=lambda: [Mixed(full=True, init_scale=2.**10, growth_interval=3), Spoil(float('inf'))]),
          'GradScaler, GradientClip':dict(cbs=lambda: [Mixed(full=True, init_scale=2.**10), GradientClip(0.05)]),
          'MixUp':dict(cbs=lambda: [MixUp()], loss_func=y_int(), dtype=f32), 'CutMix':dict(cbs=lambda: [CutMix()], loss_func=y_int(), dtype=f32),
          'MixUp, GradientClip':dict(cbs=lambda: [MixUp(), GradientClip(0.05)], loss_func=y_int(), dtype=f32),
          'ChannelsLast':dict(setup=lambda l: l.to_channelslast(use_amp=False)), 'TensorImage':dict(cbs=lambda: [Callback(before_batch=lambda self: setattr(self.learn, 'xb', (self.x.as_subclass(TensorImage),)))])}
@pytest.mark.parametrize('o', BESIDE)
def test_beside(o): same(**BESIDE[o])

def seeded(s): seed(s); return Res()
@cache
def in_full(s): return run(one(dtype=f32, model=partial(seeded, s)), fit)

@pytest.mark.parametrize('mode', ('bf16','fp16'))
def test_MixedPrecision(mode):
    "As near to full precision as the whole batch is, after every step, in the mean of some runs, as what rounding makes of one is chance"
    off = {}
    for s in range(7, 15):
        full,large,small = in_full(s),*(run(one(acc, dtype=f32, cbs=mixed(mode), model=partial(seeded, s)), fit) for acc in (None,exact()))
        assert large.mixed.seen==small.mixed.seen and large.recorder.lrs==small.recorder.lrs
        for name,l in dict(large=large, small=small).items():
            weights = [[rel(f[k], a[k]) for f,a in zip(full.trace.steps, l.trace.steps)] for k in ('weights','state')]
            off.setdefault(name, []).append(np.array(weights + [[max(map(rel, f, a)) for f,a in zip(full.seen.bufs, l.seen.bufs)]]))
    assert (np.mean(off['small'], 0)<=1.5*np.mean(off['large'], 0)).all()

class Noisy(Callback):
    "Hooks that note things down: on `self`, and by module"
    def before_fit(self): self.hooks,self.n,self.outs = [m.register_forward_hook(self.hook) for m in norms(self.model)],0,[]
    def hook(self, m, i, o): self.n += 1; self.outs.append(o.shape[0])
    def after_fit(self): [h.remove() for h in self.hooks]
def test_hooks_on_layers():
    "They are called for each micro-batch, and what a count says afterwards is what it says for the whole batch"
    large,small = same(cbs=lambda: [Noisy()])
    assert sum(large.noisy.outs)==sum(small.noisy.outs) and max(small.noisy.outs)==16 # of validation

def kinds(l): return {type(m).__name__ for m in l.model.modules()}
def tiny(pretrained=False): return nn.Sequential(ConvLayer(3, 8, stride=2), ConvLayer(8, 16, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
def pictured(make, dtype=f64, **kwargs):
    def mk(acc=None):
        x,y = images(N, 16)
        seed()
        l = make(loaders(x.to(dtype), (x.sum(1)>0).long() if make is unet_learner else y, BS), tiny, n_out=3, pretrained=False, normalize=False, loss_func=nn.CrossEntropyLoss(),
                 opt_func=partial(SGD, mom=0.9), cbs=L(acc)+Seen()+Trace(), **kwargs)
        l.remove_cbs([ProgressCallback,Recorder] if dtype==f64 else [ProgressCallback])
        l.model.to(dtype)
        l.logger = noop
        return l
    return mk
@pytest.mark.parametrize('kwargs', (dict(), dict(train_bn=False), dict(train_bn=False, cbs=BnFreeze)), ids=str)
def test_vision_learner(kwargs):
    "A backbone that is frozen first"
    def mk(acc): l = pictured(vision_learner, ps=0., **{k:v for k,v in kwargs.items() if k!='cbs'})(acc); return l.add_cbs([o() for o in L(kwargs.get('cbs'))])
    same(mk=mk, fit=lambda l: l.fine_tune(1, 0.02))
def test_unet_learner(): same(mk=pictured(unet_learner, f32), fit=lambda l: l.fit(1, 0.02), tol=1e-5)

def tabular(acc=None):
    from sklearn.datasets import load_wine
    from fastai.tabular.all import TabularDataLoaders,tabular_learner,Categorify,FillMissing,Normalize,CategoryBlock
    d = load_wine(as_frame=True).frame.sample(61, random_state=0).reset_index(drop=True)
    d['heavy'] = (d.ash>2.3).map({True:'yes',False:'no'})
    seed()
    dls = TabularDataLoaders.from_df(d, procs=[Categorify,FillMissing,Normalize], cat_names=['heavy'], cont_names=list(d.columns[:6]), y_names='target',
                                     y_block=CategoryBlock(), valid_idx=range(45, 61), bs=16)
    dls.train.drop_last = False
    seed()
    l = tabular_learner(dls, layers=[16,8], cbs=L(acc)+Seen()+Trace(), opt_func=SGD, lr=0.01, metrics=accuracy)
    l.remove_cb(ProgressCallback)
    l.logger = noop
    return l
@pytest.mark.parametrize('k', (5,1))
def test_tabular_learner(k):
    "BatchNorm of columns and of layers, also where each part is one row"
    _,small = same(partial(exact, k), mk=tabular, fit=lambda l: l.fit_one_cycle(2), tol=1e-5)
    assert len(norms(small.model))==3

def texts(acc=None):
    ids,vocab = words()
    x = ids[:45*11].view(45, 11)
    seed()
    dls = loaders(x, (x>5).sum(1)%3, 8)
    dls.vocab,dls.c = L(vocab, 'abc'),3
    config = {**awd_lstm_clas_config, **dict(emb_sz=8, n_hid=10, n_layers=2, output_p=0., hidden_p=0., input_p=0., embed_p=0., weight_p=1e-30)}
    l = text_classifier_learner(dls, AWD_LSTM, seq_len=4, config=config, pretrained=False, drop_mult=1., ps=[0.], alpha=0, beta=0, opt_func=SGD, loss_func=nn.CrossEntropyLoss(), cbs=L(acc)+Seen()+Trace())
    l.remove_cbs([ProgressCallback,Recorder])
    l.model.double()
    l.logger = noop
    return l
def test_text_classifier_learner():
    "Each text is read in pieces by a layer with a state of its own"
    _,small = same(mk=texts, fit=lambda l: l.fit(2, 0.03)) # a larger one magnifies rounding, on some processors above 1e-12
    assert len(norms(small.model))==2

def test_GANLearner():
    "A loss that calls the model is not part of its forward pass: said, unless there is no BatchNorm in training"
    def with_norm(dls, gen, crit, **kwargs): return GANLearner(dls, nn.Sequential(gen, BN(3).double()), crit, gen_loss_func=GAN_LOSSES[0], crit_loss_func=GAN_LOSSES[1], **kwargs)
    small = gan_maker(with_norm)(16, exact(4))
    with deadline(), pytest.raises(RuntimeError, match='BatchNorm.*(loss|outside)'): run(small, lambda l: l.fit(1, 0.01))
    clean(small)
    large,small = (run(gan_maker()(16, acc), lambda l: l.fit(2, 0.01)) for acc in (None,exact(4)))
    assert_same_run(large, small, 1e-12)

class Again(Callback):
    "Ask the model once more"
    def after_pred(self):
        if self.training: self.learn.pred = self.pred+self.model(self.x.flip(-1))
def test_model_is_called_again():
    "By a callback, for something else"
    right_or_refused(cbs=lambda: [Again()])

# ---- modules that note things down

class Stacks(Res):
    "Shortcuts in a list that is there from the start"
    def __init__(self): super().__init__(); self.stack = []
    def block(self, x): self.stack.append(x); return super().block(x)+self.stack.pop()*0.5
    def forward(self, x): self.stack.append(self.n1(self.stem(x))); return super().forward(x)+self.head(self.n2(self.stack.pop()).mean((2,3)))
class Table(Res):
    "In a dict"
    def __init__(self): super().__init__(); self.table = {}
    def forward(self, x): self.table['x'] = x; return super().forward(x)+self.head(F.pad(self.table['x'], [0,0,0,0,0,3]).mean((2,3)))
class Remember:
    def __call__(self, m, i, o): self.out = o
class Hooked(Res):
    "A hook is an object"
    def __init__(self): super().__init__(); self.seen = Remember(); self.n1.register_forward_hook(self.seen)
    def forward(self, x): return super().forward(x)+self.head(self.seen.out.mean((2,3)))
class Counts(Res):
    "A count that the output depends on"
    calls = 0
    def forward(self, x): self.calls += self.training; return super().forward(x)*(1+0.1*self.calls)

NOTES = {'list':dict(model=Stacks), 'dict':dict(model=Table), 'hook object':dict(model=Hooked), 'count':dict(model=Counts)}
@pytest.mark.parametrize('o', NOTES)
def test_notes(o):
    "What one micro-batch leaves in attributes is not found by another, or that is refused"
    right_or_refused(**{'n':32, 'data':(masks if 'data' in NOTES[o] else images)(32), **{k:v for k,v in NOTES[o].items() if k!='data'}})

# ---- models that put other parameters in place for a while

def swapped(net, f): return {n:f(p) for n,p in net.named_parameters()}
class Hyper(nn.Module):
    "Parameters are functions of others"
    def __init__(self): super().__init__(); self.net,self.h = Res(),nn.Linear(4, 1)
    def forward(self, x):
        s = 1+0.1*torch.tanh(self.h.weight.sum())
        return functional_call(self.net, swapped(self.net, lambda p: p*s), (x,))
class Teacher(nn.Module):
    "A mean teacher: older weights, with buffers of its own that move"
    def __init__(self):
        super().__init__()
        self.net = Res()
        self.old = {n:t.detach().double() for n,t in deepcopy(self.net).state_dict().items() if n!='n1.num_batches_tracked'}
    def forward(self, x):
        with torch.no_grad(): t = functional_call(self.net, self.old, (x,))
        return self.net(x)+0.1*t
class Perturbed(nn.Module):
    "Weights are swapped by hand, and back"
    def __init__(self): super().__init__(); self.net = Res()
    def forward(self, x):
        ms = [m for m in self.net.modules() if 'weight' in m._parameters]
        was = [m._parameters['weight'] for m in ms]
        for m in ms: m._parameters['weight'] = m._parameters['weight']*1.5
        try: return self.net(x)
        finally:
            for m,w in zip(ms, was): m._parameters['weight'] = w
class Scale(nn.Module):
    def __init__(self): super().__init__(); self.s = nn.Parameter(torch.ones(()))
    def forward(self, w): return w*self.s.exp()
def parametrized(*names):
    m = Res()
    for n in names: nn.utils.parametrize.register_parametrization(getattr(m, n), 'weight', Scale())
    return m
def normed(f): m = Res(); f(m.a), f(m.b); return m
class Counted(nn.Module):
    "Buffers that a forward pass makes anew, and one that it replaces by the same"
    def __init__(self):
        super().__init__()
        self.net = Res(Recounts)
        self.register_buffer('calls', torch.zeros((), dtype=f64))
        self.register_buffer('same', torch.ones(3))
    def forward(self, x):
        if self.training: self.calls,self.same = self.calls+1,self.same.clone()
        return self.net(x)*(1+0.1*self.calls)

SWAPS = {'hypernetwork':Hyper, 'teacher':Teacher, 'by hand':Perturbed, 'parametrize':partial(parametrized, 'a', 'b'), 'parametrized BatchNorm':partial(parametrized, 'a', 'n2'),
         'weight_norm':partial(normed, nn.utils.parametrizations.weight_norm), 'old weight_norm':partial(normed, nn.utils.weight_norm),
         'orthogonal':partial(normed, nn.utils.parametrizations.orthogonal), 'buffers made anew':Counted}
@pytest.mark.parametrize('k', (3,1))
@pytest.mark.parametrize('o', SWAPS)
def test_swapped_parameters(o, k):
    "Each micro-batch has its own, and the model's are its own again"
    large,small = same(partial(exact, k), model=SWAPS[o])
    assert [(n,type(p)) for n,p in large.model.named_parameters()]==[(n,type(p)) for n,p in small.model.named_parameters()]
    for a,b in zip(getattr(large.model, 'old', {}).values(), getattr(small.model, 'old', {}).values()): assert rel(a, b)<=1e-12

class Center(Res):
    "A buffer or parameter that becomes a function of the samples"
    def __init__(self, kind): super().__init__(); self.kind = kind; self.register_buffer('center', torch.zeros(6)); self.w = nn.Parameter(torch.ones(6))
    def block(self, x):
        if self.training and self.kind=='buffer': self.center = 0.9*self.center+0.1*x.detach().mean((0,2,3))
        if self.training and self.kind=='parameter': self.w = nn.Parameter(self.w.detach()*0.9)
        return super().block(x)-0.1*(self.center*self.w)[:,None,None]
@pytest.mark.parametrize('kind,match', (('buffer','buffer `center` of Center, where the whole batch has one'),('parameter','the parameters of Center')))
def test_values_of_their_own_are_refused(kind, match):
    "What a micro-batch makes of its own samples is not what the whole batch makes"
    small = one(exact(), model=partial(Center, kind))
    before = flat(small.model.n1.parameters())
    with pytest.raises(RuntimeError, match=match): run(small, fit)
    assert torch.equal(before, flat(small.model.n1.parameters())) and not small.trace.steps
    clean(small)

# ---- what hooks take, for callbacks and losses

def add(l, penalty): l.learn.loss_grad = l.loss_grad+penalty
class Takes(Callback):
    "A penalty on activations that hooks have taken"
    weight,norm = 0.3,'n2'
    def layers(self): return [getattr(self.model, self.norm),self.model.a]
    def before_fit(self): self.start(); self.handles = [m.register_forward_hook(h) for m,h in zip(self.layers(), self.hooks())]
    def start(self): pass
    def after_loss(self):
        if self.training: add(self, self.weight*sum(o.pow(2).mean() for o in self.taken()))
    def after_fit(self): [h.remove() for h in self.handles]

class Method(Takes):
    def hooks(self): return self.hook,self.other
    def hook(self, m, i, o): self.act = o
    def other(self, m, i, o): self.act2 = o*2
    def taken(self): return self.act,self.act2
class ListOfSelf(Takes):
    "In a list that each loss takes from"
    def start(self): self.acts = []
    def hooks(self): return [self.hook]*2
    def hook(self, m, i, o): self.acts.append(o)
    def taken(self): os,self.acts = self.acts[:2],[]; return os
class ListOfBatch(ListOfSelf):
    "In a list that is begun anew with each batch"
    def before_batch(self): self.acts = []
    def taken(self): return self.acts
class ByModule(Takes):
    "By the module that a hook is told"
    def start(self): self.acts = {}
    def hooks(self): return [self.hook]*2
    def hook(self, m, i, o): self.acts[m] = o
    def taken(self): return [self.acts[m] for m in self.layers()]
class ByName(Takes):
    "In lists in a dict"
    def start(self): self.acts = {}
    def hooks(self): return [partial(self.hook, n) for n in 'ab']
    def hook(self, n, m, i, o): self.acts.setdefault(n, [None])[0] = o
    def taken(self): return [self.acts[n][0] for n in 'ab']
class OnModule(Takes):
    "As an attribute of the module"
    def hooks(self): return [lambda m,i,o: setattr(m, 'act', o)]*2
    def taken(self): return [m.act for m in self.layers()]
class Closure(Takes):
    "In a list around a function"
    def hooks(self):
        self.acts = acts = []
        return [lambda m,i,o: acts.append(o)]*2
    def taken(self): os = self.acts[:]; self.acts.clear(); return os
class Cell(Takes):
    "In a variable around a function"
    def hooks(self):
        act = None
        def hook(m, i, o): nonlocal act; act = o
        self.last = lambda: act
        return [hook]
    def taken(self): return [self.last()]
ACTS,ACT = [],None
def to_acts(m, i, o): ACTS.append(o)
def to_act(m, i, o): global ACT; ACT = o
class Global(Takes):
    "In global variables, as in a notebook"
    def start(self): ACTS.clear()
    def hooks(self): return to_acts,to_act
    def taken(self): return [ACTS.pop(),ACT]
class Other(Takes):
    "By an object that the function has at hand"
    def hooks(self):
        self.rec = rec = types.SimpleNamespace()
        def hook(m, i, o): rec.act = o
        return [hook]
    def taken(self): return [self.rec.act]
class OnLearner(Takes):
    "On the learner"
    def hooks(self):
        learn = self.learn
        def hook(m, i, o): learn.act = o
        return [hook]
    def taken(self): return [self.learn.act]
class OfFastai(Takes):
    "fastai's `Hook`"
    def before_fit(self): self.handles = [FastaiHook(m, lambda m,i,o: o, detach=False) for m in self.layers()]
    def taken(self): return [h.stored for h in self.handles]
class AllOfFastai(Takes):
    "fastai's `Hooks`"
    def before_fit(self): self.hs = Hooks(self.layers(), self.take, detach=False); self.handles = [self.hs]
    def take(self, m, i, o): self.last = o; return o*2
    def taken(self): return [*self.hs.stored,self.last]
class OfHookCallback(HookCallback):
    "fastai's `HookCallback`, with a tensor that has a graph"
    def __init__(self): super().__init__(modules=None, detach=False, cpu=False)
    def before_fit(self): self.modules = [self.model.stem,self.model.a]; super().before_fit()
    def hook(self, m, i, o): return o.pow(2).mean()
    def after_loss(self):
        if self.training: add(self, 0.3*sum(self.hooks.stored))
class Before(Takes):
    "What comes to a layer"
    def before_fit(self): self.handles = [self.model.a.register_forward_pre_hook(self.hook)]
    def hook(self, m, i): self.act = i[0].clone()
    def taken(self): return [self.act]
class Late(Method):
    "In `after_pred`, as `RNNRegularizer`"
    def after_pred(self): self.kept = self.act
    def taken(self): return [self.kept,self.act2]
class Weighs(Method):
    "By what is taken without a gradient"
    def hook(self, m, i, o): self.act = o.detach().clone()
    def after_loss(self):
        if self.training: add(self, 0.3*(self.pred.sum(1)*self.act.mean((1,2,3))).mean())
class Attribute(Takes):
    "No hook, but an attribute of a module"
    def hooks(self): return []
    def taken(self): return [self.model.kept]
class KeptNet(Res):
    def block(self, x): self.kept = super().block(x); return self.kept
class AuxLoss(Takes):
    "A loss that the model itself notes"
    def hooks(self): return []
    def after_loss(self):
        if self.training: add(self, self.model.aux)
class AuxNet(Res):
    def block(self, x): x = super().block(x); self.aux = 0.3*x.pow(2).mean(); return x
class HooksItself(Res):
    "A model whose own method is a hook"
    def __init__(self): super().__init__(); self.n1.register_forward_hook(self.keep); self.n2.register_forward_hook(lambda m,i,o: setattr(self, 'second', o))
    def keep(self, m, i, o): self.seen = o
    def forward(self, x): return super().forward(x)+self.head(self.seen.mean((2,3)))+self.head(self.second.mean((2,3)))
class Collector:
    "As timm's `FeatureHooks`: by device, in a dict, taken out by the model"
    def __init__(self, *ms):
        self.outs = {}
        for k,m in enumerate(ms): m.register_forward_hook(partial(self.collect, k))
    def collect(self, k, m, i, o): self.outs.setdefault(o.device, {})[k] = o
    def take(self, device): res = self.outs[device]; self.outs[device] = {}; return res
class Collects(Res):
    def __init__(self): super().__init__(); self.feats = Collector(self.n1, self.n2)
    def forward(self, x): y = super().forward(x); return y+sum(self.head(o.mean((2,3))) for o in self.feats.take(x.device).values())
HOOKS = {o.__name__:dict(cbs=lambda o=o: [o()]) for o in (Method,ListOfSelf,ListOfBatch,ByModule,ByName,OnModule,Closure,Cell,Global,Other,OnLearner,OfFastai,AllOfFastai,OfHookCallback,Before,Late,Weighs)}
HOOKS.update({'attribute':dict(cbs=lambda: [Attribute()], model=KeptNet), 'auxiliary loss':dict(cbs=lambda: [AuxLoss()], model=AuxNet),
              'a method of the model':dict(model=HooksItself), 'a collector':dict(model=Collects), 'in a loss':dict(model=AuxNet, setup=lambda l: setattr(l, 'loss_func', WithAux(l.model)))})
class WithAux(nn.Module):
    "A loss that looks into the model, and says what it divides by"
    def __init__(self, model): super().__init__(); self.__dict__['model'] = model
    def forward(self, p, y): return F.cross_entropy(p, y)+(self.model.aux if self.model.training else 0)
    def denominator(self, p, y): return len(y)

@pytest.mark.parametrize('o', HOOKS)
def test_what_hooks_take(o):
    "Each micro-batch's events find what its own forward pass left: penalties are the whole batch's"
    large,small = same(**HOOKS[o])
    if 'cbs' in HOOKS[o]: # and it matters
        plain = run(one(**{k:v for k,v in HOOKS[o].items() if k=='model'}), fit)
        assert rel(plain.trace.steps[-1]['weights'], small.trace.steps[-1]['weights'])>1e-4

def test_what_hooks_append():
    "Afterwards a list has what all micro-batches added, in their order"
    seen = []
    def count(l): l.handle = l.model.n2.register_forward_hook(lambda m,i,o: seen.append((m.training,len(o))))
    for acc,bs in ((None,[8,8,8,5]),(exact(),[2,3,3]*3+[2,3])):
        seen.clear()
        small = run(one(acc, setup=count), lambda l: l.fit(2, 0.05))
        assert [n for training,n in seen if training]==bs*2

@pytest.mark.parametrize('exc', (Boom,KeyboardInterrupt))
def test_what_hooks_took_in_vain(exc):
    "A batch that fails in the forward pass leaves nothing with them"
    small = one(exact(), model=partial(probed, At(8, lambda: throw(exc('boom')))))
    acts = []
    small.model.net[2].register_forward_hook(lambda m,i,o: acts.append(len(o)))
    with pytest.raises(exc): run(small, fit)
    assert acts==[2,3,3]
    clean(small)

# ---- gradient checkpointing

class Checkpointed(Res):
    "The middle is computed again, with its BatchNorm or without"
    reentrant,norm = False,True
    def again(self, x): return F.dropout(super().block(x) if self.norm else F.relu(self.a(x)), self.p, self.training)
    def block(self, x):
        x = checkpoint(self.again, x, use_reentrant=self.reentrant)
        return x if self.norm else self.n2(x)
def checkpointed(p=0., **kwargs):
    m = Checkpointed()
    for k,v in dict(p=p, **kwargs).items(): setattr(m, k, v)
    return m

@pytest.mark.parametrize('reentrant', (False,True))
def test_checkpoint(reentrant):
    "Around BatchNorms it is refused, and nothing is left of the attempt; around others it is as ever"
    same(model=partial(checkpointed, reentrant=reentrant, norm=False))
    small = one(exact(), model=partial(checkpointed, reentrant=reentrant))
    before = flat(small.model.parameters())
    with deadline(), pytest.raises(RuntimeError, match=r"BatchNorm is called outside.*gradient checkpointing.*`sync_bn='stats'`") as e: run(small, fit)
    assert e.traceback[-1].name in ('_normalize_jointly','meet') and not small.trace.steps and torch.equal(before, flat(small.model.parameters()))
    assert all(p.grad is None or not p.grad.any() for p in small.model.parameters())
    clean(small)
    small.model.norm = False
    goes_on(small)

@pytest.mark.parametrize('acc', (exact, partial(exact, sync_loss=True)), ids=('', 'sync_loss'))
@pytest.mark.parametrize('n', (1,2), ids=('alone','last'))
def test_checkpoint_has_no_need_of_norm(n, acc):
    "A BatchNorm that checkpointing would not come to again, as nothing after it was saved, is refused too: in the whole batch its running statistics move twice"
    small = one(acc(), model=lambda: Wrap(conv(3, 6), Part(nn.Sequential(conv(6, 6), nn.BatchNorm2d(6))[2-n:], False), *pooled(6)))
    with deadline(), pytest.raises(RuntimeError, match="BatchNorm is called outside.*gradient checkpointing"): run(small, fit)
    assert not small.trace.steps
    clean(small)

@pytest.mark.parametrize('reentrant', (False,True))
def test_checkpoint_and_masks(reentrant):
    "What is computed again draws what it drew before, so that checkpointing changes nothing"
    a,b = (run(one(exact(), model=partial(cls, reentrant=reentrant, norm=False, p=0.3)), fit) for cls in (checkpointed,unchecked))
    for s,t in zip(a.trace.steps, b.trace.steps): assert rel(s['weights'], t['weights'])<=1e-12
def unchecked(**kwargs):
    m = checkpointed(**kwargs)
    m.block = lambda x: m.n2(F.dropout(F.relu(m.a(x)), m.p, m.training))
    return m

# ---- the order of things

class Sleeps(nn.Module):
    "Takes its time, in no way that could be foretold"
    def __init__(self, secs): super().__init__(); self.secs,self.rand = secs,random.SystemRandom().random
    def __deepcopy__(self, memo): return Sleeps(self.secs)
    def forward(self, x): time.sleep(self.secs*self.rand()); return x
def drops(secs):
    def drop(): return [nn.Dropout(0.3), oom.Noise(), Sleeps(secs)]
    return Wrap(conv(3, 6), *drop(), BN(6), *drop(), conv(6, 6), BN(6), *drop(), *pooled(6))
def test_dropout():
    "The same seed draws the same masks, however long each part takes"
    runs = [(run(one(exact(), model=partial(drops, secs)), fit), torch.get_rng_state(), random.random(), np.random.rand()) for secs in (0,0,0.003,0.01)]
    for l,*rest in runs[1:]:
        for s,t in zip(runs[0][0].trace.steps, l.trace.steps): assert torch.equal(s['weights'], t['weights'])
        assert torch.equal(runs[0][1], rest[0]) and runs[0][2:]==tuple(rest[1:])
    other = one(exact(), model=partial(drops, 0))
    seed(8); fit(other)
    assert not torch.equal(other.trace.steps[-1]['weights'], runs[0][0].trace.steps[-1]['weights'])

def test_masks_differ_between_parts():
    "Each micro-batch draws its own"
    seen,x = [],torch.ones(2, 6, 4, 4)
    m = nn.Sequential(nn.Dropout(0.5), BN(6), nn.Dropout(0.5))
    m[0].register_forward_hook(lambda m,i,o: seen.append(o))
    with jointly(m, [(x,)]*3) as forward: forward()
    assert len(seen)==3 and not any(torch.equal(a, b) for a,b in itertools.combinations(seen, 2))

def test_order():
    "One after the other to each meeting, in turn"
    log = []
    def f(i):
        for j in range(3): log.append((j,i)); assert meet((i,j))==10*i+j
        return i
    assert lockstep([partial(f, i) for i in range(3)], lambda met: [10*i+j for i,j in met])==[0,1,2]
    assert log==sorted(log) and not lanes()

class Ways(Res):
    "What is done depends on the number of samples"
    def block(self, x):
        if len(x)!=2: return super().block(x)
        return dict(none=noop, other=lambda x: self.n3(self.a(x)), twice=lambda x: self.n2(super(Ways, self).block(x)))[self.way](x)
@pytest.mark.parametrize('way', ('none','other','twice'))
def test_different_ways(way):
    "Micro-batches of which some come to another BatchNorm, or to more or fewer, than others"
    def model(): m = Ways(); m.way = way; return m
    small = one(exact(), model=model)
    before = flat(small.model.parameters())
    with deadline(), pytest.raises(RuntimeError, match='micro-batches of one batch took different ways through the model'): run(small, fit)
    assert torch.equal(before, flat(small.model.parameters())) and not small.trace.steps
    clean(small)

# ---- threads

class Probe(nn.Module):
    "Calls `f` with the input, on the way"
    def __init__(self, f): super().__init__(); self.f = f
    def __deepcopy__(self, memo): return Probe(self.f)
    def forward(self, x): self.f(x); return x
def probed(*fs): return Wrap(conv(3, 6), Probe(fs[0]), BN(6), Probe(fs[-1]), conv(6, 6), BN(6), *pooled(6))

VAR = contextvars.ContextVar('VAR', default='default')
@contextmanager
def told():
    token = VAR.set('told')
    try: yield
    finally: VAR.reset(token)
def state():
    "All that a forward pass may depend on and another thread might not have"
    return (torch.is_autocast_enabled('cpu'), torch.get_autocast_dtype('cpu'), torch.is_autocast_cache_enabled(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_device(),
            torch.get_default_dtype(), torch.zeros(1).device, torch.zeros(1).dtype, torch.is_anomaly_enabled(), torch.get_num_threads(), VAR.get())
@contextmanager
def default_dtype():
    torch.set_default_dtype(f64)
    try: yield
    finally: torch.set_default_dtype(f32)
CONTEXTS = {'nothing':nullcontext, 'bf16':lambda: autocast('cpu', dtype=bf16), 'fp16':lambda: autocast('cpu', dtype=f16), 'no cache':lambda: autocast('cpu', dtype=bf16, cache_enabled=False),
            'autocast off':lambda: autocast('cpu', enabled=False), 'no_grad':torch.no_grad, 'inference_mode':torch.inference_mode, 'device':lambda: torch.device('meta'), 'dtype':default_dtype,
            'anomaly':lambda: torch.autograd.detect_anomaly(check_nan=False), 'context variable':told}
@pytest.mark.parametrize('o', CONTEXTS)
def test_compute_state(o):
    "Threads compute as the one that started them, and leave that as it was"
    seen = []
    m = probed(lambda x: seen.append(state()))
    x = images(8)[0][:8].float()
    with CONTEXTS[o]():
        expect = state()
        with jointly(m, [(x[:3],),(x[3:7],),(x[7:],)]) as forward: ys = forward()
        assert state()==expect
        m2 = deepcopy(m)
        y = m2(x)
    assert len(seen)==2*3+2 and set(seen)=={expect}
    assert y.dtype==ys[0].dtype and y.requires_grad==ys[0].requires_grad and y.is_inference()==ys[0].is_inference()
    assert rel(y.detach().float(), torch.cat(ys).detach().float())<=(1e-5 if y.dtype in (f32,f64) else 2*torch.finfo(y.dtype).eps)
    assert not lanes()

def test_learner_state():
    "fastai's own: what the model is in as it is called by a `Learner`"
    seen = {False:[], True:[]}
    def mk(acc): return run(one(acc, dtype=f32, cbs=mixed('bf16'), model=partial(probed, lambda x: seen[acc is not None].append((*state(), type(x))))), fit)
    mk(None); mk(exact())
    assert set(seen[False])==set(seen[True]) and len(seen[True])>2*len(seen[False])

class At:
    "Raise `exc` in the `i`-th call, or do something else to it"
    def __init__(self, i, f): self.i,self.f,self.n = i,f,0
    def __deepcopy__(self, memo): return self
    def __call__(self, x):
        if not torch.is_grad_enabled(): return
        self.n += 1
        if self.n==self.i: self.f()
def throw(e): raise e

@pytest.mark.parametrize('exc', (Boom,KeyboardInterrupt,SystemExit))
@pytest.mark.parametrize('i', (1,2,3,5,6))
def test_error(i, exc, monkeypatch):
    "In any micro-batch, before or behind a BatchNorm: it comes as it was raised, from where it was, and all others end"
    left = []
    monkeypatch.setattr(threading, 'excepthook', left.append)
    exc = exc('boom')
    at = At(i, lambda: throw(exc))
    small = one(exact(), model=partial(probed, at))
    before = flat(small.model.parameters())
    with deadline(), pytest.raises(type(exc)) as e: run(small, fit)
    names = [(Path(o.filename).name, o.name) for o in traceback.extract_tb(e.tb)]
    assert e.value is exc and names[-3:]==[(Path(__file__).name, o) for o in ('__call__','<lambda>','throw')] and (Path(__file__).name,'forward') in names
    assert ''.join(traceback.format_exception(e.value)).count(f'{type(exc).__name__}: boom')==1 and not left
    assert at.n==i and not small.trace.steps and torch.equal(before, flat(small.model.parameters()))
    clean(small)
    goes_on(small)

@pytest.mark.parametrize('exc', (CancelBatchException,CancelTrainException,CancelFitException))
def test_cancel_in_the_model(exc):
    "What fastai understands does what it says; of that batch there is no step"
    large,small = (run(one(acc, model=partial(probed, At(i, lambda: throw(exc())))), fit) for acc,i in ((None,4),(exact(),8)))
    assert len(small.trace.steps)==len(large.trace.steps)==dict(CancelBatchException=7, CancelTrainException=5, CancelFitException=1)[exc.__name__]
    clean(small)

@pytest.mark.parametrize('exc', (Boom,KeyboardInterrupt))
def test_error_behind_the_model(exc):
    "In the loss, in backward"
    for where in ('loss','backward'):
        def model(): return Wrap(Res(), Hook(At(5, lambda: throw(exc('boom')))))
        small = one(exact(), model=model) if where=='backward' else one(exact(), loss_func=Failing(At(5, lambda: throw(exc('boom')))))
        with deadline(), pytest.raises(exc): run(small, fit)
        assert len(small.trace.steps)==1
        clean(small)
class Hook(nn.Module):
    def __init__(self, f): super().__init__(); self.f = f
    def __deepcopy__(self, memo): return Hook(noop)
    def forward(self, x):
        if x.requires_grad: x.register_hook(lambda g: backward_calls(self.f, g))
        return x
def backward_calls(f, g):
    with torch.enable_grad(): f(g)
class Failing(nn.CrossEntropyLoss):
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, *args): self.f(args[0]); return super().forward(*args)

def own_thread(): signal.raise_signal(signal.SIGINT)
def main_thread(): signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
INTERRUPTS = {'in the lane':lambda: throw(KeyboardInterrupt()), 'raise_signal':own_thread, 'interrupt_main':_thread.interrupt_main, 'kill':lambda: os.kill(os.getpid(), signal.SIGINT), 'main thread':main_thread}
@pytest.mark.parametrize('i', (1,2,5))
@pytest.mark.parametrize('o', INTERRUPTS)
def test_interrupt(o, i):
    "Whichever thread it reaches, and whatever the others are at"
    small = one(exact(), model=partial(probed, At(i, lambda: (INTERRUPTS[o](), time.sleep(0.05)))))
    with deadline(), pytest.raises(KeyboardInterrupt): run(small, fit)
    assert not small.trace.steps
    clean(small)
    goes_on(small)

def test_interrupt_twice():
    "By somebody who does not wait for the threads to end: they end all the same"
    def twice():
        for _ in range(2): main_thread(); time.sleep(0.1)
    small = one(exact(), model=partial(probed, At(2, twice)))
    with deadline(), pytest.raises(KeyboardInterrupt): run(small, fit)
    end = time.time()+2
    while lanes() and time.time()<end: time.sleep(0.01)
    clean(small)

class Stubborn(Res):
    "Catches whatever is raised, and goes on"
    def block(self, x):
        try: return super().block(x)
        except BaseException: return self.n2(x)
def test_stubborn_model():
    "A lane that is told to end and does not is no reason to wait for ever"
    small = one(exact(), model=lambda: Wrap(Stubborn(), Probe(At(2, lambda: throw(Boom())))))
    small.model.net[0].b.register_forward_pre_hook(lambda m,i: small.model.net[1].f(i[0]))
    with deadline(5), pytest.raises(Boom): run(small, fit)
    clean(small)

def test_threads_last():
    "For as long as the fit: one for each micro-batch, and others for batches of another number of micro-batches, such as the last"
    seen,left = [],[]
    small = one(exact(2), model=partial(probed, lambda x: seen.append(threading.get_native_id())), cbs=lambda: [Callback(after_validate=lambda self: left.append(len(lanes())))])
    run(small, lambda l: l.fit(4, 0.1))
    assert len({*seen}-{threading.get_native_id()})==7==max(left) and len(left)==4
    clean(small)

@pytest.mark.parametrize('event', ('before_epoch','before_batch','after_pred','after_step','before_validate','after_epoch','after_fit'))
@pytest.mark.parametrize('exc', (Boom,KeyboardInterrupt,CancelFitException,CancelBatchException))
def test_threads_end(event, exc):
    "Whatever ends the fit, at whatever event, also one within another, of which each has its own; the outer one goes on"
    def die(l): l.n = getattr(l, 'n', 0)+1; throw(exc('boom')) if l.n==2 else None
    def inner(l):
        n,kept = len(lanes()),{k:vars(l)[k] for k in ('epoch','n_epoch','train_iter','pct_train','dl','iter','n_iter','xb','yb') if k in vars(l)}
        l.fit(1, 0.01)
        vars(l).update(kept)
        assert len(lanes())==n
    class Inner(Callback):
        order,done = 90,False
        def after_epoch(self):
            if not self.done: self.done = True; inner(self.learn)
    small = one(exact(), cbs=lambda: [Callback(**{event:lambda self: die(self.learn)}), Inner()])
    try:
        with deadline(): run(small, lambda l: l.fit(2, 0.05))
    except (Boom,KeyboardInterrupt,CancelFitException,CancelBatchException): pass # fastai does not expect them everywhere
    clean(small)
    assert threading.active_count()==len(threading.enumerate())

def test_threads_without_a_fit():
    "Validation by hand: they last as long as their batch"
    small = one(exact(valid=True), model=partial(Often, track_running_stats=False))
    large = one(model=partial(Often, track_running_stats=False))
    for l in (large,small): seed(); l.validate()
    assert rel(large.recorder.values[-1] if hasattr(large, 'recorder') else large.get_preds()[0], small.get_preds()[0])<=1e-12
    clean(small)

def test_threads_forget():
    "Each run has the state of its own caller, whatever the last one had"
    seen,m,x = [],probed(lambda x: seen.append(state())),images(8)[0][:8].float()
    threads = Lockstep()
    for o in [*CONTEXTS,'nothing']:
        seen.clear()
        with CONTEXTS[o]():
            expect = state()
            with jointly(m, [(x[:3],),(x[3:],)], threads=threads) as forward: forward()
        assert set(seen)=={expect}, o
    assert len(lanes())==2
    threads.end()
    assert not lanes()

# ---- an interrupt at any line

class Interrupts:
    "Raise a `KeyboardInterrupt` at the `i`-th line of code in `files` that this thread comes to"
    def __init__(self, i, *files): self.i,self.files,self.n = i,files,0
    def trace(self, frame, event, arg):
        if Path(frame.f_code.co_filename).name not in self.files: return
        if event=='line':
            self.n += 1
            if self.n==self.i: raise KeyboardInterrupt
        return self.trace
    def __enter__(self): sys.settrace(self.trace); return self
    def __exit__(self, *_): sys.settrace(None)

def gone(secs=3):
    "No thread is left, or will be in a moment"
    end = time.time()+secs
    while lanes() and time.time()<end: gc.collect(); time.sleep(0.001)
    return not lanes() and threading.active_count()==len(threading.enumerate())

def each_line(f, *files, step=1):
    "Interrupt `f` at each of its lines"
    with Interrupts(0, *files) as all_of_them: f()
    for i in range(1, all_of_them.n+1, step):
        with deadline():
            try:
                with Interrupts(i, *files): f()
            except KeyboardInterrupt: pass
            assert gone(), f'line {i} of {all_of_them.n}'

@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_interrupt_at_any_line():
    "While threads are started, run, waited for, or ended"
    def share(i): return meet((i,))+meet((i,))
    def all_of_it():
        lockstep([partial(share, i) for i in range(2)], lambda met: [1]*len(met))
        threads = Lockstep()
        for n in (2,3): lockstep([partial(share, i) for i in range(n)], lambda met: [1]*len(met), threads=threads)
        threads.end()
    each_line(all_of_it, 'lockstep.py')

@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_interrupt_at_any_line_of_a_fit():
    "And the next fit is right"
    small = one(exact(), n=8, model=mlp)
    each_line(lambda: small.fit(1, 0.01), 'lockstep.py', 'batchnorm.py', 'hosts.py', step=13)
    clean(small)
    goes_on(small, n=8, model=mlp)

# ---- 'auto'

def auto(mems, where='forward', k=8, **kwargs):
    "'auto' that comes down to `k` on the first batch is the run that starts with `k`, bit for bit"
    a = oom.go(MicroBatch('auto', sync_bn=True), mems, where, **kwargs)
    b = oom.go(exact(k, valid=where not in oom.TRAIN_ONLY), where=where, **kwargs)
    assert a.micro_batch.bs==k
    oom.same(b, a)
    oom.clean(a)
    clean(a)
    return a

@pytest.mark.parametrize('where', ('forward','loss','late after_loss','backward','hook','after_backward'))
def test_auto(where, capsys):
    "Wherever memory ends"
    mem = oom.Memory(10)
    auto(mem, where)
    assert mem.asked[:2]==[32,16] and oom.printed(capsys)[:3]==oom.LINES

@pytest.mark.parametrize('error', ('cpu','cuda','tangled','cudnn'))
@pytest.mark.parametrize('when', ('before','after'))
def test_auto_in_the_join(when, error, monkeypatch):
    "Where all micro-batches are normalized, before or after running statistics have moved"
    mem = oom.Memory(error=oom.ERRORS[error])
    def join(xs, *args):
        if when=='before': mem(max(map(len, xs)))
        res = joint_batch_norm(xs, *args)
        if when=='after': mem(max(map(len, xs)))
        return res
    monkeypatch.setattr(batchnorm, 'joint_batch_norm', join)
    fixed = oom.go(exact(8))
    mem.k = 10
    a = oom.go(MicroBatch('auto', sync_bn=True), oom.Memory(20))
    assert a.micro_batch.bs==8
    oom.same(fixed, a)
    clean(a)

@pytest.mark.parametrize('i', (7,8,10))
def test_auto_later(i):
    "In the second batch, whichever micro-batch it is that has no memory"
    def mem(): return oom.Memory(8, at={i})
    a,(sizes,_) = oom.go(MicroBatch('auto', sync_bn=True), mem()),oom.foretell(oom.EPOCH*2, mem())
    assert [bs for bs,_ in sizes[:3]]==[8,6,6]
    oom.same(oom.go(MicroBatch(oom.MAX, sync_bn=True, valid=True), cbs=[oom.Switch(bs for bs,_ in sizes)]), a)
    clean(a)

@pytest.mark.parametrize('cbs', (lambda: [Mixed('bf16')], lambda: [GradientClip(0.05)], lambda: [MixUp()]), ids=('bf16','GradientClip','MixUp'))
def test_auto_beside(cbs): auto(oom.Memory(10), 'after_loss', dtype=f32, cbs=cbs(), loss_func=y_int())

def test_auto_stats():
    "Running statistics of a failed attempt are no part of the moments"
    a,b = oom.go(MicroBatch('auto', sync_bn='stats'), oom.Memory(10)),oom.go(stats(8, valid=True))
    oom.same(b, a)

def test_auto_one():
    "One sample each, which BatchNorm can't have by itself; and where that is too much, advice"
    a,b = (oom.go(*args, fit=lambda l: l.fit(1, 0.05)) for args in ((MicroBatch('auto', sync_bn=True),oom.Memory(1)), (exact(1, valid=True),)))
    oom.same(b, a)
    l = oom.make(MicroBatch('auto', sync_bn=True), oom.Memory(0))
    with pytest.raises(torch.OutOfMemoryError, match="with 1 of a batch's 32 samples"): run(l, fit)
    oom.clean(l); clean(l)

# ---- what is kept, and where

@pytest.mark.parametrize('o', ('residual','MLP','attributes','DynamicUnet'))
def test_offload(o, hosts):
    "The same run to the bit; each tensor is copied once for all who need it, and parameters not at all"
    off = run(one(exact(offload=None), **MODELS[o]), fit)
    assert not hosts.logs
    on = run(one(exact(), **MODELS[o]), fit)
    for s,t in zip(off.trace.steps, on.trace.steps): assert torch.equal(s['weights'], t['weights'])
    assert len(hosts.logs)==8 and not len(hosts.alive)
    ptrs = {p.untyped_storage().data_ptr():k for k,p in on.model.named_parameters()}
    for packed,copied in hosts.logs:
        at = [(t.data_ptr(), t._version) for t in copied]
        assert len(at)==len(set(at)) and len(copied)<len(packed)
        assert not {ptrs[p] for t in copied if (p := t.untyped_storage().data_ptr()) in ptrs}
    assert_same(run(one(**MODELS[o]), fit), on)

def test_offload_is_on_by_default(hosts):
    for k,n in (({},8),(dict(offload='cpu'),8),(dict(offload=None),0)):
        hosts.logs.clear()
        run(one(exact(**k)), fit)
        assert len(hosts.logs)==n

def test_offload_sees_changes(hosts):
    "A tensor that has changed is another one, and so is one that only has another's address"
    w,off,xs = torch.ones(50, dtype=f64, requires_grad=True),Host(),[]
    with off():
        x = torch.arange(50.)
        unused = w*x
        x.add_(1)
        used = w*x
        for i in range(20):
            t = torch.full((50,), float(i), dtype=f64)
            xs.append(w*t)
            del t
    (used.sum()+sum(xs).sum()).backward()
    assert torch.equal(w.grad, torch.arange(50., dtype=f64)+1+sum(range(20)))

def test_offload_comes_back_once(monkeypatch, hosts):
    "What two operations have saved goes out once and comes back once, and nothing is held on the device after the last has asked"
    went,came = [],[]
    class Counted(offload.Away):
        def __init__(self, *args): super().__init__(*args); went.append(self)
        def back(self):
            held = self.here
            res = super().back()
            if held is None: came.append(self)
            return res
    monkeypatch.setattr(offload, 'Away', Counted)
    model = resnet18(num_classes=3).double()
    with jointly(model, [(o,) for o in torch.randn(6, 3, 32, 32, dtype=f64).split(2)], 'cpu') as forward: sum(o.square().sum() for o in forward()).backward()
    (packed,copied), = hosts.logs
    assert len(went)==len(copied)<len(packed) and len(came)==len(set(map(id, came)))<=len(went)
    assert all(o.here is None for o in went) and sum(o.n for o in went)==0

def test_offload_twice(hosts):
    "A second backward pass gets it again"
    w,off = torch.ones(3, dtype=f64, requires_grad=True),Host()
    with off():
        x = torch.arange(3., dtype=f64)
        y = (w*x + w*w*x).sum()
    a,b = (torch.autograd.grad(y, w, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(a, b) and torch.equal(a, 3*x)

def test_offload_that_does_not_fit(monkeypatch, hosts):
    "The host's memory is looked at before it is full, in the first batch"
    monkeypatch.setattr(offload, 'host_memory', lambda: 2**14)
    small = one(exact())
    with pytest.raises(RuntimeError, match="`offload`='cpu'.*fewer samples, or `offload`=None"): run(small, fit)
    clean(small)
    run(one(exact(offload=None)), fit)
    monkeypatch.undo()
    assert Offload().stays(types.SimpleNamespace(device=torch.device('mps')))
    assert 2**28 < offload.host_memory() < 2**50

class Overwrites(nn.Module):
    "Changes what the backward pass needs"
    def forward(self, x): return x.exp().mul_(2)
@pytest.mark.parametrize('offload', ('cpu',None))
def test_what_stays_is_not_to_change(offload):
    "Where nothing is moved, a tensor that was overwritten is an error, as without hooks, and no other gradient"
    l = one(exact(offload=offload), model=lambda: nn.Sequential(Res(), Overwrites(), nn.Linear(3, 3)))
    with pytest.raises(RuntimeError, match='changed in place|modified by an inplace operation'): run(l, fit)
    clean(l)

class Saved:
    def __init__(self, t): self.t = t.detach() # an output that is saved as it is would keep itself alive
class Watched(nn.Module):
    "What forward passes of `m` saved is in `alive` as long as it is needed"
    alive,n = weakref.WeakSet(),[]
    def __init__(self, m): super().__init__(); self.m = m
    @classmethod
    def pack(cls, t): o = Saved(t); cls.alive.add(o); cls.n.append(1); return o
    def forward(self, x):
        with saved_tensors_hooks(self.pack, lambda o: o.t): return self.m(x)

def watch(monkeypatch, hosts):
    "A list of how much was alive of earlier batches and attempts as each one began"
    at = []
    def start(*args):
        oldest = []
        thread = threading.Thread(target=lambda: oldest.append(torch.ones((), requires_grad=True)*1))
        thread.start(); thread.join()
        oldest.pop().backward() # autograd has its own queue of what a pass that failed was about to do, which it empties in the next
        at.append((len(Watched.alive), len(hosts.alive)))
        return jointly(*args)
    monkeypatch.setattr(microbatch, 'jointly', start)
    Watched.n.clear()
    return at

def test_nothing_is_kept(hosts, monkeypatch):
    "Nor is the garbage collector needed for it"
    at,l = watch(monkeypatch, hosts),one(exact(), model=lambda: Watched(Res()))
    gc.collect(); gc.disable()
    try: run(l, fit)
    finally: gc.enable()
    assert len(Watched.n)>100 and at==[(0,0)]*8

@pytest.mark.parametrize('where', ('forward','backward'))
def test_nothing_is_kept_of_a_failed_attempt(where, hosts, monkeypatch):
    at,mem = watch(monkeypatch, hosts),oom.Memory(5)
    a = oom.go(MicroBatch('auto', sync_bn=True), mem, where, model=lambda: Watched(oom.deep(mem, where)))
    assert a.micro_batch.bs==4 and len(Watched.n)>100 and set(at)=={(0,0)} and len(at)>=8

# ---- what can't be

def compiled(): return torch.compile(Res(), backend='eager')
def compiled_in_place(): m = Res(); m.n2.compile(backend='eager'); return m
def scripted(): m = Res(); m.n2 = torch.jit.script(m.n2.double()); return m
REFUSED = {'SyncBatchNorm':(partial(Res, BN, nn.SyncBatchNorm, BN), r'distrib_ctx\(sync_bn=False\)'), 'DataParallel':(lambda: nn.DataParallel(Res()), 'DistributedDataParallel'),
           'OptimizedModule':(compiled, 'is compiled'), 'BatchNorm2d':(compiled_in_place, 'is compiled'), 'RecursiveScriptModule':(scripted, 'is compiled')}
@pytest.mark.parametrize('acc', (exact, stats, lambda: AccumulateStep(2, sync_bn='stats')), ids=('exact','stats','AccumulateStep'))
@pytest.mark.parametrize('o', REFUSED)
def test_refused(o, acc):
    "Said with the reason before anything is trained; without `sync_bn` it trains"
    model,why = REFUSED[o]
    small = one(acc(), model=model, setup=lambda l: setattr(l, 'splitter', trainable_params))
    before = flat(small.model.parameters())
    with pytest.raises(ValueError, match=f'`sync_bn`=.*{o}.*{why}'): small.fit(1, 0.1)
    assert torch.equal(before, flat(small.model.parameters())) and not small.trace.batches and not lanes()
    assert all('forward' not in vars(m) for m in norms(small.model) if not m._compiled_call_impl)
    small.detach_accum().detach_microbatch()
    if o in ('DataParallel','OptimizedModule'): goes_on(small)

@pytest.mark.parametrize('wrap', (partial(torch.compile, backend='eager'), torch.jit.script, lambda m: (m.compile(backend='eager'), m)[1]), ids=('compile','script','in place'))
def test_compiled_part(wrap):
    "Without its BatchNorms, a model may be compiled, as the error says"
    def model(): m = Res().double(); m.head = wrap(m.head); return m
    same(model=model, setup=lambda l: setattr(l, 'splitter', trainable_params))

@pytest.mark.parametrize('v', ('all','Stats',1.5,'true'))
def test_arguments(v):
    for f in (MicroBatch, AccumulateStep):
        with pytest.raises(ValueError, match='`sync_bn`='): f(4, sync_bn=v)
    with pytest.raises(ValueError, match="`offload`='gpu'.*'cpu', None"): MicroBatch(4, offload='gpu')
    with pytest.raises(ValueError, match="`sync_bn`=True.*`MicroBatch`.*'stats'"): AccumulateStep(4, sync_bn=True)
    with pytest.raises(ValueError, match="`sync_bn`=True.*`MicroBatch`.*'stats'"): one().to_accum(4, sync_bn=True)

# ---- 'stats': running statistics alone

def first_norm(**kwargs): return lambda: Wrap(BN(3, **kwargs), conv(3, 6), BN(6, **kwargs), *pooled(6)) # what the first layer sees does not depend on weights
def chunks(xb, yb, bs): return list(zip(zip(*(x.split(bs) for x in xb)), zip(*(y.split(bs) for y in yb))))
def micro(bs, **kwargs): return MicroBatch(bs, split=chunks, **kwargs)
ALL = {'MicroBatch':(8, micro), 'AccumulateStep':(4, lambda bs, **kw: AccumulateStep(8//bs, **kw))}

def buffers(l, name): return [b[[k for k,_ in l.model.named_buffers()].index(name)] for b in l.seen.bufs]
@pytest.mark.parametrize('momentum', (0.1,None,1.))
@pytest.mark.parametrize('o', ALL)
def test_stats(o, momentum):
    "The first layer's running statistics are those of whole batches, all counts are steps, and the weights are those of plain micro-batches"
    bs,acc = ALL[o]
    large,plain,small = (run(one(a, bs=b, model=first_norm(momentum=momentum)), fit) for a,b in ((None,8), (acc(4),bs), (acc(4, sync_bn='stats'),bs)))
    for s,t in zip(plain.trace.steps, small.trace.steps): assert torch.equal(s['weights'], t['weights']) and torch.equal(s['state'], t['state'])
    a,b = ([dict(zip((k for k,_ in l.model.named_buffers()), bufs)) for bufs in l.seen.bufs] for l in (large,small))
    assert len(a)==len(b)==8
    for i,(s,t) in enumerate(zip(a, b)):
        for k in ('running_mean','running_var','num_batches_tracked'): assert rel(s[f'net.0.{k}'], t[f'net.0.{k}'])<=1e-12
        assert int(t['net.0.num_batches_tracked'])==int(t['net.2.num_batches_tracked'])==i+1
    clean(small)
    assert int(plain.model.net[0].num_batches_tracked)==2*8

@pytest.mark.parametrize('model', (Res, Often, partial(Often, momentum=None), Dense, partial(Res, partial(BN, track_running_stats=False)), partial(Res, partial(BN, affine=False)),
                                   partial(Res, Act), partial(Res, Recounts), partial(Res, evaluating), partial(Res, frozen), sequences, volumes),
                         ids=('Res','Often','Often, momentum None','Dense','not tracked','not affine','Act','Recounts','evaluating','frozen','sequences','volumes'))
def test_stats_layers(model):
    "Both callbacks have the same weights and the same buffers, and counts are those of whole batches"
    large,a,b,plain = (run(one(acc, n=32, bs=bs, data=images(32), model=model), fit) for acc,bs in ((None,8), (micro(4, sync_bn='stats'),8), (AccumulateStep(2, sync_bn='stats'),4), (AccumulateStep(2),4)))
    assert_same(a, b, 1e-12)
    for s,t in zip(plain.trace.steps, b.trace.steps): assert torch.equal(s['weights'], t['weights'])
    for k in [k for k,_ in a.model.named_buffers() if 'tracked' in k]: assert buffers(large, k)==buffers(b, k)

@pytest.mark.parametrize('n', (29,30,36,41))
@pytest.mark.parametrize('kwargs', (dict(leftover='step'), dict(leftover='drop'), dict(leftover='carry')), ids=str)
def test_stats_windows(kwargs, n):
    "Windows that are short, dropped or carried on: what moves running statistics is what made a step"
    acc = AccumulateStep(2, sync_bn='stats', **kwargs)
    small = run(one(acc, n=n, bs=4, data=images(n), model=first_norm(momentum=None)), lambda l: l.fit(2, 0.1))
    seen = [[]]
    plain = run(one(AccumulateStep(2, **kwargs), n=n, bs=4, data=images(n), model=first_norm(),
                    cbs=lambda: [Callback(after_pred=lambda self: seen[-1].append(self.x.clone()) if self.training else None, after_step=lambda self: seen.append([]))]), lambda l: l.fit(2, 0.1))
    wins = seen[:-1]
    if kwargs['leftover']=='drop': wins = [w[-2:] for w in wins]
    assert len(wins)==len(small.trace.steps)==len(plain.trace.steps)
    norm = BN(3, momentum=None).double()
    for w in wins: norm(torch.cat(w))
    ours = small.model.net[0]
    for k in ('num_batches_tracked','running_mean','running_var'): assert rel(getattr(norm, k), getattr(ours, k))<=1e-12, k
    clean(small)

def test_stats_by_samples():
    large,small = (run(one(acc, n=40, bs=bs, data=images(40), model=first_norm()), fit) for acc,bs in ((None,8), (AccumulateStep(n_samples=8, sync_bn='stats'),2)))
    for k in ('running_mean','running_var','num_batches_tracked'):
        for s,t in zip(buffers(large, f'net.0.{k}'), buffers(small, f'net.0.{k}')): assert rel(s, t)<=1e-12

@pytest.mark.parametrize('reentrant', (False,True))
@pytest.mark.parametrize('mid,momentum', ((lambda n: n, 0.1), (lambda n: n, None), (lambda n: nn.Sequential(n, nn.ReLU(), conv(3, 3)), None)), ids=('alone','alone, cumulative','first, cumulative'))
def test_stats_and_checkpoint(mid, momentum, reentrant):
    "As the error for exact BatchNorm says, this can be had; layers that are computed again move twice, as they do for whole batches"
    def model(): return Wrap(conv(3, 3), Part(mid(BN(3, momentum=momentum)), reentrant), conv(3, 6), BN(6), *pooled(6))
    def go(acc, bs=BS): return run(one(acc, n=24, bs=bs, data=images(24), model=model), lambda l: l.fit(1, 0.))
    def moved(l): return [[b for n,b in zip((n for n,_ in l.model.named_buffers()), bs) if n.startswith('net.1.')] for bs in l.seen.bufs]
    large,plain,micro,loss = map(go, (None,MicroBatch(3),stats(),stats(sync_loss=True)))
    for s,t in zip(plain.trace.steps, micro.trace.steps): assert torch.equal(s['weights'], t['weights'])
    assert int(moved(large)[-1][2])==2*len(large.trace.steps)
    for o in (micro,loss):
        for s,t in zip(moved(large), moved(o)): assert all(rel(a, b)<=1e-12 for a,b in zip(s, t))
    window = go(AccumulateStep(2, sync_bn='stats'), BS//2)
    assert all(rel(a, b)<=1e-12 for a,b in zip(moved(large)[-1], moved(window)[-1]))
class Part(nn.Module):
    def __init__(self, m, reentrant=True): super().__init__(); self.m,self.reentrant = m,reentrant
    def forward(self, x): return checkpoint(self.m, x, use_reentrant=self.reentrant)

@pytest.mark.parametrize('acc', (stats, lambda: AccumulateStep(2, sync_bn='stats')), ids=('MicroBatch','AccumulateStep'))
@pytest.mark.parametrize('exc', (Boom,KeyboardInterrupt,CancelBatchException,CancelTrainException,CancelFitException))
def test_stats_of_what_was_cut_short(exc, acc):
    "What did not come to a step has no part in the statistics of a later one"
    def once(self):
        if self.training and self.learn.iter==1 and not self.epoch and not seen: seen.append(1); raise exc('boom')
    seen = []
    small = one(acc(), n=32, data=images(32), model=first_norm(momentum=1.), cbs=lambda: [Callback(after_loss=once)])
    with pytest.raises(exc) if exc in (Boom,KeyboardInterrupt) else nullcontext(): run(small, lambda l: l.fit(1, 0.1))
    clean(small)
    xs = []
    small.add_cb(Callback(after_pred=lambda self: xs.append(self.x.clone()) if self.training else None))
    run(small, lambda l: l.fit(1, 0.1))
    k = {8:3, 16:2}[8 if isinstance(small.cbs[1], MicroBatch) or hasattr(small, 'micro_batch') else 16]
    last = torch.cat(xs[-k:])
    assert rel(last.mean((0,2,3)), small.model.net[0].running_mean)<=1e-12 and rel(last.var((0,2,3)), small.model.net[0].running_var)<=1e-12

@pytest.mark.parametrize('mode', ('bf16','full'))
def test_stats_beside_MixedPrecision(mode):
    def cbs(): return [Mixed(mode) if mode!='full' else Mixed(full=True, init_scale=2.**10)]
    plain,small = (run(one(acc, dtype=f32, cbs=cbs), fit) for acc in (MicroBatch(3),stats()))
    for s,t in zip(plain.trace.steps, small.trace.steps): assert torch.equal(s['weights'], t['weights'])
    assert [int(m.num_batches_tracked) for m in norms(small.model)]==[8]*3
