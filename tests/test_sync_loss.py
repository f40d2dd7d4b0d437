"`MicroBatch(sync_loss=True)`: a loss that looks at the whole batch is the one of a learner that computes it whole"
import collections,gc,io
from copy import deepcopy
import pytest
from torch.amp import autocast
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from fastai.text.all import AWD_LSTM
from fastai.vision.all import accuracy
from common import *
from fastai_accum import check,wholeloss
from fastai_accum.losses import loss_params
from fastai_accum.split import even_sizes
from fastai_accum.patching import autocast_depth
from test_companions import Mixed,Spoil,y_int,lm_maker

gc.freeze() # else each of the collections after an error takes long
N,BS,MICRO = 41,16,5 # batches of 16, 16 and 9; micro-batches of 4 or 5
f32,f64 = torch.float32,torch.float64
def fit(l): l.fit_one_cycle(2, 0.05)
def one(*args, **kwargs): return MicroBatch(*(args or (MICRO,)), sync_loss=True, **kwargs)

# ---- losses that compare samples, or divide by what they all have; each takes embeddings `z` and classes `y`

def pairs(z): return F.normalize(z[0], dim=-1),F.normalize(z[1], dim=-1)
def ntxent(z, y, t=0.5):
    z = torch.cat(pairs(z))
    sim = (z@z.T/t).fill_diagonal_(-1e4)
    return F.cross_entropy(sim, torch.arange(len(z)).roll(len(z)//2))

class Clip(nn.Module):
    "With a temperature that it learns"
    def __init__(self): super().__init__(); self.scale = nn.Parameter(torch.tensor(1., dtype=f64))
    def forward(self, z, y):
        a,b = pairs(z)
        sim,i = self.scale.exp()*a@b.T,torch.arange(len(a))
        return (F.cross_entropy(sim, i)+F.cross_entropy(sim.T, i))/2

def scaled(z, y):
    "The same with a temperature of the model's"
    a,b = pairs((z['a'],z['b']))
    return F.cross_entropy(z['scale']*a@b.T, torch.arange(len(a)))

def supcon(z, y):
    z = torch.cat(pairs(z))
    y,eye = y.repeat(2),torch.eye(len(z), dtype=torch.bool)
    logp = (z@z.T/0.3).masked_fill(eye, -1e9).log_softmax(1)
    pos = (y[:,None]==y)&~eye
    return -((logp*pos).sum(1)/pos.sum(1)).mean()

def batch_hard(z, y, margin=0.5):
    d,same = torch.cdist(z, z, compute_mode='donot_use_mm_for_euclid_dist')+1e-9,y[:,None]==y
    return F.relu(margin + d.masked_fill(~same, -1).amax(1) - d.masked_fill(same, 1e9).amin(1)).mean()

def off_diag(c): return c-torch.diag(c.diag())
def barlow(z, y):
    a,b = [(o-o.mean(0))/o.std(0) for o in z]
    c = a.T@b/len(a)
    return (c.diag()-1).pow(2).sum() + 0.01*off_diag(c).pow(2).sum()

def vicreg(z, y):
    def var(o): return F.relu(1-(o.var(0)+1e-4).sqrt()).mean()
    def cov(o): return off_diag((o-o.mean(0)).T@(o-o.mean(0))/(len(o)-1)).pow(2).sum()/o.shape[1]
    return 25*F.mse_loss(*z) + sum(25*var(o)+cov(o) for o in z)

def ranknet(z, y):
    s = z[:,0]
    return F.softplus(s[None]-s[:,None])[y[:,None]>y].sum()/(y[:,None]>y).sum()

def cox(z, y):
    "The partial likelihood; classes stand for times, and class 2 is censored"
    s,event = z[:,0],y<2
    risk = (s.exp()[None]*(y[None]>=y[:,None])).sum(1).log()
    return -((s-risk)*event).sum()/event.sum()

def dice(z, y):
    p,t = z.softmax(1),F.one_hot(y.clamp(min=0), z.shape[1])*(y>=0)[:,None]
    return (1 - 2*(p*t).sum(0)/(p.sum(0)+t.sum(0))).mean()
def ce_dice(z, y): return F.cross_entropy(z, y, ignore_index=-1)+dice(z, y)

# ---- models, with outputs of every form

Two = collections.namedtuple('Two', 'a b')
class Net(nn.Module):
    "Dropout with `p`, if it has any, and BatchNorm if that is asked for"
    def __init__(self, n_out=3, p=0., norm=None):
        super().__init__()
        self.net,self.ns = nn.Sequential(nn.Linear(6, 8), norm(8) if norm else nn.Identity(), nn.Tanh(), nn.Dropout(p), nn.Linear(8, n_out)),[]
        self.register_forward_pre_hook(lambda m, xb: self.ns.append(len(xb[0])) if m.training else None)
    def forward(self, x): return self.net(x)
class Views(Net):
    def forward(self, x): return self.net(x),self.net(x.flip(1))
class Named(Net):
    def forward(self, x): return Two(*Views.forward(self, x))
class Towers(Net):
    "Two inputs, an output that is by samples in its second dimension, one that has no gradient, and one that is no tensor"
    def __init__(self, **kwargs): super().__init__(**kwargs); self.scale = nn.Parameter(torch.zeros(()))
    def forward(self, x, x2): return dict(a=self.net(x), b=self.net(x2), t=[self.net(x).T, x2.argmax(1), None], scale=self.scale.exp())

LOSSES = {'NT-Xent':(lambda: ntxent,Views), 'CLIP':(Clip,Named), 'SupCon':(lambda: supcon,Views), 'triplet, batch-hard':(lambda: batch_hard,Net), 'Barlow Twins':(lambda: barlow,Views),
          'VICReg':(lambda: vicreg,Named), 'RankNet':(lambda: ranknet,Net), 'Cox':(lambda: cox,Net), 'Dice':(lambda: dice,Net), 'cross-entropy with ignored targets, and Dice':(lambda: ce_dice,Net)}

class Records(Callback):
    "What loggers see, and how often: whole batches"
    order = 90
    def before_fit(self): self.seen,self.bufs = [],[]
    def __call__(self, name):
        super().__call__(name)
        if name in ('after_pred','after_loss','before_backward','after_backward','after_step'):
            pred = flat(o for o in tensors(self.learn.pred))
            self.seen.append((name, self.learn.training, len(self.x), len(self.learn.yb and self.y), pred, *([] if name=='after_pred' else [flat([self.learn.loss])])))
    def after_step(self): self.bufs.append(flat(self.model.buffers()))

def all_params(m, loss): return trainable_params(m)+[p for p in loss_params(loss) if p.requires_grad]

def made(acc, loss, model, cbs=list, dtype=f64, ignored=False, **kwargs):
    x,y = problem(N+16)
    if ignored: y = y.masked_fill(x[:,0]>0.8, -1)
    loss = loss()
    l = learner(N, BS, acc, data=(x,y), loss_func=loss, model=model, dtype=dtype, cbs=[*cbs(), Records()], **kwargs)
    l.splitter = lambda m: [all_params(m, loss)]
    return l

def two_inputs(*args, **kwargs):
    l = made(*args, **kwargs)
    l.dls.loaders[:] = [dl.new(dataset=[(x,x*0.9+0.1,y) for x,y in dl.dataset]) for dl in l.dls.loaders]
    return l

def states(): return [torch.get_rng_state().tolist(),random.getstate(),np.random.get_state()[1].tolist()]

def same(*args, micro=one, mk=made, tol=1e-12, fit=fit, rng=True, **kwargs):
    "The whole batch's run and that in micro-batches: the same, down to what callbacks see and to the next random number"
    res = []
    for acc in (None,micro()):
        l = run(mk(acc, *args, **kwargs), fit)
        res.append((l,states()))
    (a,s),(b,t) = res
    assert_same_run(a, b, tol)
    assert rel(flat(loss_params(a.loss_func)), flat(loss_params(b.loss_func)))<=tol
    assert len(a.records.seen)==len(b.records.seen)>0
    for o,p in zip(a.records.seen, b.records.seen):
        assert o[:4]==p[:4] and all(rel(*ts)<=tol for ts in zip(o[4:], p[4:])), o[:4]
    assert rel(flat(a.records.bufs), flat(b.records.bufs))<=tol
    assert not rng or s==t
    return a,b

@pytest.mark.parametrize('name', LOSSES)
def test_losses(name):
    "Weights, records, buffers and random states, in uneven parts"
    loss,model = LOSSES[name]
    a,b = same(loss, model, ignored='ignored' in name)
    assert b.model.ns==2*(2*2*[4]*4 + 2*[4,5])
    c = run(made(MicroBatch(MICRO), loss, model, ignored='ignored' in name), fit)
    assert rel(flat(a.model.parameters()), flat(c.model.parameters()))>1e-3, 'a loss that micro-batches would do for'

# ---- sizes, outputs, companions

@pytest.mark.parametrize('micro', (partial(one, 1, valid=True), partial(one, 40), partial(one, 'auto')))
def test_sizes(micro):
    "Single samples; and what needs no splitting is not touched, to the bit"
    a,b = same(lambda: ranknet, Net, micro=micro, tol=1e-12 if micro.args==(1,) else 0.)
    assert len(b.model.ns)==2*(2*41 if micro.args==(1,) else 3)

def test_nested_outputs_of_several_inputs(): same(lambda: scaled, Towers, mk=two_inputs, micro=partial(one, valid=True))

def split(xb, yb, bs): return [(tuple(x[i::4] for x in xb),tuple(y[i::4] for y in yb)) for i in range(4)]
def test_split():
    "The loss finds targets beside the outputs of their samples, in whatever order; who reads predictions would find them in that one"
    a,b = (run(made(acc, lambda: ce_dice, Net).remove_cb(Records), fit) for acc in (None,one(split=split)))
    assert_same_run(a, b, 1e-12)

class Limit(nn.Module):
    "Runs out of memory with more than `n` samples, in the first or second forward pass of a micro-batch or its backward pass"
    seen = 0 # passes, of the class, as what an instance keeps is undone
    def __init__(self, n, where): super().__init__(); self.n,self.where = n,where; Limit.seen = 0
    def forward(self, x):
        if not self.training: return x
        Limit.seen += 1
        if len(x)<=self.n or self.where=='second' and self.seen in (2,3): return x # of 8 samples, after one with all 16
        if self.where=='backward': return Fails.apply(x)
        raise torch.OutOfMemoryError('out of memory, as told')
class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g): raise torch.OutOfMemoryError('out of memory, as told')

@pytest.mark.parametrize('where', ('first','second','backward'))
def test_auto(where):
    "A batch that does not fit is undone and split further, wherever memory ended; random masks and BatchNorm's statistics too"
    def net(): return nn.Sequential(Net(p=0.3, norm=nn.BatchNorm1d), Limit(5, where))
    a,b = (run(made(acc, lambda: batch_hard, net), fit) for acc in (one(4),one('auto')))
    assert b.micro_batch.bs==4 and Limit.seen==2*2*(4+4+3)+3+dict(first=5, second=7, backward=10)[where] # 3 once more, as 3 samples have 3 classes
    assert_same_run(a, b, 0.)
    assert torch.equal(flat(a.records.bufs), flat(b.records.bufs)) and a.records.seen[-1][-1]==b.records.seen[-1][-1]

COMPANIONS = {'clip':lambda: [GradientClip(0.05)], 'scaler':lambda: [Mixed(full=True, init_scale=2.**10, growth_interval=3)],
              'scaler, overflow':lambda: [Mixed(full=True, init_scale=2.**10, growth_interval=3), Spoil(float('inf'))]}
@pytest.mark.parametrize('name', COMPANIONS)
def test_companions(name): same(lambda: ntxent, Views, cbs=COMPANIONS[name])

@pytest.mark.parametrize('valid', (False,True))
def test_mixup_metrics_and_records(valid):
    "Partners, losses and metrics are those of the whole batch, in validation too"
    def mk(acc, *args, **kwargs):
        l = made(acc, *args, metrics=[accuracy, AvgMetric(dice)], **kwargs)
        l.recorder.train_metrics = True
        return l
    _,b = same(y_int, Net, mk=mk, micro=partial(one, valid=valid), cbs=lambda: [MixUp()], dtype=f32, tol=1e-5)
    assert len(b.recorder.values[0])==6
    b = made(one(valid=True), lambda: ce_dice, Net)
    b.model.register_forward_pre_hook(lambda m, xb: m.ns.append(len(xb[0])))
    run(b, lambda l: l.validate())
    assert b.model.ns==[4]*4

def test_predictions():
    "Without targets there is no loss to join outputs for"
    a,b = made(None, lambda: dice, Net),made(one(valid=True), lambda: dice, Net)
    for o,p in zip(a.get_preds(), b.get_preds()): assert rel(o, p)<=1e-12

def test_language_model():
    "Hidden states go on from batch to batch, and penalties on activations that the model returns are the whole batch's"
    a,b = (run(lm_maker(alpha=2, beta=1, n=51)(BS, acc), lambda l: l.fit(2, 0.5)) for acc in (None,one()))
    assert_same_run(a, b, 1e-5)
    for h,k in zip(tensors(a.model[0].hidden), tensors(b.model[0].hidden)): assert h.shape==k.shape and rel(h, k)<=1e-4

@pytest.mark.parametrize('by', (1.,float('inf')))
def test_autocast(by):
    "Both passes are in it, and the loss is scaled once; the run is as near to that in float32 as the whole batch's own"
    class Low(Views):
        def forward(self, x): self.where.append((torch.is_autocast_enabled('cpu'), torch.get_autocast_dtype('cpu'))); return super().forward(x)
    def mk(acc, amp=True):
        l = made(acc, lambda: ntxent, Low, dtype=f32, cbs=lambda: [Mixed('fp16', init_scale=2.**10, growth_interval=3),Spoil(by)] if amp else [Spoil(1.)])
        l.model.where = []
        return run(l, lambda l: l.fit(2, 0.05))
    full,a,b = mk(None, False),mk(None),mk(one())
    assert len(b.model.where)==2*(2*(4+4+2)+1) and all(o==(True,torch.float16) for o in b.model.where)
    assert a.mixed.seen==b.mixed.seen and len(a.trace.steps)==len(b.trace.steps)==6
    w = [flat(l.model.parameters()) for l in (full,a,b)]
    if by==1.: assert rel(w[0], w[2])<=1.2*rel(w[0], w[1])<=0.01
    assert not torch.is_autocast_enabled('cpu') and autocast_depth()==0

# ---- the passes are the same twice: the reference is a plain learner whose model computes the parts in one graph

class InParts(nn.Module):
    "A model that computes a batch in parts of at most `MICRO`"
    def __init__(self, m): super().__init__(); self.m = m
    def forward(self, x):
        if not self.training: return self.m(x)
        return torch.cat([self.m(o) for o in x.split(even_sizes(len(x), MICRO))])

class Noise(nn.Module):
    "Draws from all random generators, and moves a buffer that it uses"
    def __init__(self): super().__init__(); self.register_buffer('mean', torch.zeros(8)); self.register_buffer('other', torch.zeros(8))
    def forward(self, x):
        if not self.training: return x
        with torch.no_grad(): self.mean.lerp_(x.mean(0), 0.3)
        self.other = 0.5*self.other + x.detach().mean(0)
        return x*(1+random.random()*0.1) + 0.1*np.random.rand() + 0.1*torch.randn(8, dtype=x.dtype) - self.mean - self.other

def noisy(): return nn.Sequential(nn.Linear(6, 8), Noise(), nn.Tanh(), nn.Linear(8, 4))
def spectral(): return nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 8)), nn.Tanh(), nn.utils.parametrizations.spectral_norm(nn.Linear(8, 4)))
class Checkpointed(Net):
    def forward(self, x): return checkpoint(self.net, x, use_reentrant=False)
MODELS = {'dropout':partial(Net, p=0.4), 'BatchNorm':partial(Net, norm=nn.BatchNorm1d), 'BatchNorm, cumulative':partial(Net, norm=partial(nn.BatchNorm1d, momentum=None), p=0.3),
          'all generators, and buffers':noisy, 'spectral norm':spectral, 'checkpointed':partial(Checkpointed, p=0.4)}

@pytest.mark.parametrize('name', MODELS)
def test_same_passes_twice(name):
    "Weights, buffers and random states are those of one graph"
    (a,s),(b,t) = ((run(made(acc, lambda: batch_hard, m), fit),states()) for acc,m in ((None,lambda: InParts(MODELS[name]())), (one(),MODELS[name])))
    assert_same_run(a, b, 1e-12)
    assert rel(flat(a.records.bufs), flat(b.records.bufs))<=1e-12 and s==t

def normed(p=0.): return Net(norm=nn.BatchNorm1d, p=p)
def test_exact_batchnorm():
    "All micro-batches have one forward pass in lock-step, and one loss"
    _,b = same(lambda: batch_hard, normed, micro=partial(one, sync_bn=True))
    assert b.model.ns==2*(2*[4]*4 + [4,5])

def test_running_statistics():
    "`sync_bn='stats'` moves running statistics once a batch, in the first passes, by the moments of all; micro-batches are normalized as without it"
    a = run(made(None, lambda: batch_hard, lambda: InParts(normed(0.3))), fit)
    b = run(made(one(sync_bn='stats'), lambda: batch_hard, partial(normed, 0.3)), fit)
    assert_same_run(a, b, 1e-12)
    c,d = (made(acc, lambda: batch_hard, normed, cbs=lambda: [Stop()]) for acc in (one(sync_bn='stats'),MicroBatch(MICRO, sync_bn='stats')))
    for l in (c,d): run(l, fit)
    assert int(b.model.net[1].num_batches_tracked)==6 and int(c.model.net[1].num_batches_tracked)==1
    assert torch.equal(flat(c.model.buffers()), flat(d.model.buffers()))

class Stop(Callback):
    "End the fit after its first batch"
    order = 95
    def after_step(self): raise CancelFitException

# ---- what else there is to a batch

def test_random_losses():
    "What a loss draws goes on from the first passes, and the next batch from what the loss drew"
    def loss(z, y): return (z*torch.rand(3, dtype=f64)*random.random()).pow(2).mean()
    same(lambda: loss, Net)
    def drop(acc, m): return run(made(acc, lambda: loss, m), fit)
    a,b = drop(None, lambda: InParts(Net(p=0.3))),drop(one(), partial(Net, p=0.3))
    assert_same_run(a, b, 1e-12)

class At(Callback):
    "Raise `exc` at `event` of the second batch, or change the prediction there in place"
    order,run_valid = 50,False
    def __init__(self, event, exc=None): store_attr()
    def __call__(self, name):
        if name!=self.event or self.train_iter!=1 or not self.learn.training: return
        if self.exc: raise self.exc
        self.learn.pred.mul_(2)

@pytest.mark.parametrize('event,exc', (('after_pred',CancelBatchException), ('after_loss',CancelTrainException), ('before_backward',CancelBackwardException),
                                       ('after_loss',CancelFitException), ('after_pred',None)))
def test_cancelled(event, exc): same(lambda: ranknet, Net, cbs=lambda: [At(event, exc)])

class Frozen(nn.Module):
    "Some of the outputs have no gradient"
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(6, 4),nn.Linear(6, 4).requires_grad_(False)
    def forward(self, x): return self.a(x),self.b(x)
def test_outputs_without_gradient():
    def loss(z, y): assert z[0].requires_grad and not z[1].requires_grad; z[1].numpy(); return F.mse_loss(*z)*len(y)
    same(lambda: loss, Frozen, fit=lambda l: l.fit(2, 0.05, cbs=NoValid()))
class NoValid(Callback):
    order = -200
    def before_validate(self): raise CancelValidException

def test_gradients_through_gradients():
    "A penalty on the gradient of the loss by the outputs, and one on weights, are no penalties on activations"
    class Loss(nn.Module):
        def forward(self, z, y):
            loss = supcon(z, y)
            if not z[0].requires_grad: return loss
            return loss + sum(o.pow(2).sum() for o in torch.autograd.grad(loss, z, create_graph=True)) + 0.01*sum(p.pow(2).sum() for p in self.model.parameters())
    def mk(acc, *args, **kwargs):
        l = made(acc, *args, **kwargs)
        vars(l.loss_func)['model'] = l.model
        return l
    same(Loss, Views, mk=mk)

@pytest.mark.parametrize('how', ('torch.compile','model.compile'))
def test_compiled(how):
    def mk(acc, *args, **kwargs):
        l = made(acc, *args, **kwargs)
        l.model._forward_pre_hooks.clear()
        if how=='torch.compile': l.model = torch.compile(l.model, backend='eager')
        else: l.model.compile(backend='eager')
        return l
    _,b = same(lambda: ntxent, Views, mk=mk, fit=lambda l: l.fit(1, 0.05))
    assert '_call_impl' not in vars(b.model) and '_call_impl' not in vars(getattr(b.model, '_orig_mod', b.model))

def test_nothing_is_left():
    b = run(made(one(), lambda: ntxent, Views), fit)
    assert not {'_call_impl','forward'} & set(vars(b.model)) and b.micro_batch.passes is None and not {'all_batches','_do_one_batch'} & set(vars(b))

class Saved:
    "Counts the bytes that are saved for backward at a time"
    def __init__(self): self.now = self.most = 0
    def pack(self, t): return Held(self, t)
class Held:
    def __init__(self, saved, t):
        self.saved,self.t,self.n = saved,t,0 if isinstance(t if t._base is None else t._base, nn.Parameter) else t.nbytes
        saved.now += self.n
        saved.most = max(saved.most, saved.now)
    def __del__(self): self.saved.now -= self.n

def test_memory():
    "At 8 of 128 samples, what is saved for backward is what `MicroBatch(8)` saves, plus outputs"
    def most(acc):
        saved,l = Saved(),made(acc, lambda: supcon, lambda: Wide(nn.Sequential(nn.Linear(6, 512), *[nn.Tanh() for _ in range(20)], nn.Linear(512, 4))))
        l.dls.loaders[0] = DataLoader(list(zip(*problem(128))), bs=128)
        with saved_tensors_hooks(saved.pack, lambda o: o.t): l.fit(1, 0.01, cbs=NoValid())
        return saved.most
    large,plain,small = map(most, (None, MicroBatch(8), one(8)))
    assert plain*4<large and small<=1.1*plain, (large,plain,small)
class Wide(Views):
    def __init__(self, net): nn.Module.__init__(self); self.net = net

# ---- what can't be, and says so

def refused(l, kind, *says, fit=fit):
    "The error has all of `says`; nothing is trained, no gradient and no stand-in is left, and the learner trains without the callback"
    was = flat(l.model.parameters())
    with pytest.raises(kind) as e: run(l, fit)
    for o in says: assert o in str(e.value), e.value
    assert torch.equal(was, flat(l.model.parameters())) and not any(p.grad is not None and p.grad.any() for p in l.model.parameters())
    assert not {'_call_impl','forward'} & set(vars(l.model)) and l.micro_batch.passes is None

def mean_out(m): return lambda x: (o := m.net(x),o.pow(2).mean())
class Aux(Net):
    "An auxiliary loss of the micro-batch"
    def forward(self, x): o = self.net(x); return o,o.pow(2).mean()
class Cat(Net):
    "Both views in one tensor, the first ones first"
    def forward(self, x): return torch.cat(Views.forward(self, x))
class Lists(Net):
    def forward(self, x): return [dict(z=o) for o in self.net(x)]
class Cat4(Cat):
    "With as many channels as a micro-batch has samples"
    def __init__(self): super().__init__(4)
class Similar(Net):
    def forward(self, x): return self.net(x)@self.net(x).T
class Labels(Net):
    "Each sample's place"
    def forward(self, x): return self.net(x),torch.arange(len(x))
class Says(Net):
    def forward(self, x): return self.net(x),f'from {x[0,0]}'
OUTPUTS = {'auxiliary loss':(Aux,'`learn.pred[1]`, a Tensor of shapes [(), (), (), ()]'), 'views in one':(Cat,'`learn.pred`, a Tensor of shapes [(8, 3), (8, 3)'), 'lists':(Lists,"can't be joined"),
           'views in one, by chance of another form':(Cat4,'`learn.pred`, a Tensor of shapes [(8, 4), (8, 4)'), 'similarities':(Similar,'`learn.pred`, a Tensor of shapes [(4, 4), (4, 4)'),
           'places':(Labels,'`learn.pred[1]`, a Tensor of shapes [(4,), (4,)'), 'text':(Says,"`learn.pred[1]`, a str for")}
@pytest.mark.parametrize('name', OUTPUTS)
def test_outputs_that_cant_be_joined(name):
    model,says = OUTPUTS[name]
    refused(made(one(), lambda: lambda z,y: z[0].mean(), model), ValueError, says, 'let the model return one entry for each sample')
    refused(made(one(valid=True), lambda: lambda z,y: z[0].mean(), model), ValueError, says, fit=lambda l: l.validate())

class ByChannel(Views):
    "Channels first, and as many of them as samples in a micro-batch; with dropout, BatchNorm and a hook that has to see the passes as they are"
    def __init__(self): super().__init__(4, p=0.3, norm=nn.BatchNorm1d)
    def forward(self, x): return self.net(x).T,self.net(x)
def test_sizes_that_agree_by_chance():
    "One pass of one sample fewer shows which dimension has samples, and leaves no trace"
    def loss(z, y): return batch_hard(z[0].T, y)+dice(z[1], y)
    class Parts(InParts):
        def forward(self, x):
            if not self.training: return self.m(x)
            return tuple(torch.cat(o, d) for o,d in zip(zip(*[self.m(o) for o in x.split(even_sizes(len(x), MICRO))]), (1,0)))
    (a,s),(b,t) = ((run(made(acc, lambda: loss, m), fit),states()) for acc,m in ((None,lambda: Parts(ByChannel())), (one(),ByChannel)))
    assert_same_run(a, b, 1e-12)
    assert rel(flat(a.records.bufs), flat(b.records.bufs))<=1e-12 and s==t and len(b.model.ns)==2*(2*10)+4
    refused(made(one(), lambda: loss, ByChannel, cbs=lambda: [Penalty(2)]), RuntimeError, 'the loss depends on what a hook or a layer has kept')

class Penalty(Callback):
    "On what a hook has taken of a layer, or what a layer keeps"
    run_valid = False
    def __init__(self, layer, detach=False): store_attr()
    def before_fit(self): self.handle = self.model.net[self.layer].register_forward_hook(self.hook)
    def hook(self, m, i, o): self.act = o.detach() if self.detach else o
    def after_loss(self): self.learn.loss_grad = self.learn.loss_grad + 0.3*self.act.pow(2).mean()
    def after_fit(self): self.handle.remove()
class Pos(Net):
    "A parameter is added to the inputs, so that nothing is saved on the way to it"
    def __init__(self): super().__init__(); self.pos = nn.Parameter(torch.ones(6)); self.net = nn.Sequential(nn.Identity(), *self.net)
    def forward(self, x): return self.net(x+self.pos)
class Kept(Net):
    "A layer that keeps an auxiliary loss for whoever asks"
    def forward(self, x): o = self.net(x); self.aux = o.pow(2).mean(); return o

@pytest.mark.parametrize('model,layer,kw', ((Net,2,{}), (Pos,0,{}), (Checkpointed,2,{}), (normed,2,dict(sync_bn=True)), (normed,2,dict(sync_bn='stats'))))
def test_penalties_on_activations(model, layer, kw):
    refused(made(one(**kw), lambda: ranknet, model, cbs=lambda: [Penalty(layer)]), RuntimeError, 'the loss depends on what a hook or a layer has kept', 'let the model return it')

def test_auxiliary_losses_that_a_layer_keeps():
    def mk(acc):
        l = made(acc, lambda: lambda z,y: ranknet(z, y)+l.model.aux, Kept)
        return l
    refused(mk(one()), RuntimeError, 'the loss depends on what a hook or a layer has kept')

def test_what_hooks_take_without_graph(): 
    "A number that goes with the loss is none of its business"
    l = run(made(one(), lambda: ranknet, Net, cbs=lambda: [Penalty(2, detach=True)]), fit)
    assert len(l.trace.steps)==6

class Own(Net):
    "Noise from a generator of its own"
    def __init__(self): super().__init__(); self.g = torch.Generator().manual_seed(0)
    def forward(self, x): return self.net(x+0.01*torch.randn(x.shape, generator=self.g, dtype=x.dtype) if self.training else x)
class Counts(Net):
    "A state that is no buffer"
    n = 0
    def forward(self, x): self.n += self.training; return self.net(x)*(1+0.01*self.n)
class Grows(Net):
    "Another shape"
    n = 3
    def forward(self, x): self.n += self.training; return self.net(x)[:,:self.n//4+1]
class InPlace(Net):
    def forward(self, x): return self.net(x.mul_(1.1) if self.training else x)
class Carried(Net):
    h = 0.
    def forward(self, x): self.h = 0.5*self.h+self.net(x).mean(0).detach(); return self.net(x)+self.h
@pytest.mark.parametrize('model,says', ((Own,'with values that are'), (Counts,'with values that are'), (InPlace,'with values that are'), (Carried,'with values that are'), (Grows,'of another form')))
def test_models_that_are_not_the_same_twice(model, says):
    refused(made(one(), lambda: ranknet, model), RuntimeError, says, f'{model.__name__} was called twice', 'make the state a buffer')

def test_rounding_is_no_difference():
    "A sum in another order is, on an accelerator, as good"
    class Rounds(Net):
        n = 0
        def forward(self, x): self.n += 1; return self.net(x)*(1+2e-16*(self.n%2))
    same(lambda: ranknet, Rounds)

def test_the_accelerator_is_asked_once(monkeypatch):
    "Outputs are compared in the first batch of a fit only"
    n = []
    off = wholeloss.TwoPasses._off
    monkeypatch.setattr(wholeloss.TwoPasses, '_off', lambda self, *args: n.append(1) or off(self, *args))
    run(made(one(), lambda: ntxent, Views), fit)
    assert len(n)==2*4

class OwnBatch(Learner):
    def _do_one_batch(self):
        self.pred = self.model(self.x*0.5)
        self('after_pred')
        self.loss_grad = self.loss_func(self.pred, *self.yb)
        self.loss = self.loss_grad.clone()
        self('after_loss')
        if self.training: self._do_grad_opt()
@pytest.mark.parametrize('model,kw', ((Net,dict(sync_loss=True)), (normed,dict(sync_loss=True, sync_bn=True)), (normed,dict(sync_bn=True))))
def test_other_inputs(model, kw):
    l = made(MicroBatch(MICRO, **kw), lambda: ranknet, model)
    l.__class__ = OwnBatch
    l.micro_batch._join()
    refused(l, ValueError, 'is called with other inputs than those of the batch')

def test_arguments():
    for v in ('yes',2,None):
        with pytest.raises(ValueError, match='`sync_loss`'): MicroBatch(8, sync_loss=v)
    for v in ('samples','none',len):
        with pytest.raises(ValueError, match='`normalize`=.*beside `sync_loss`=True: .*nothing to weigh'): MicroBatch(8, normalize=v, sync_loss=True)
    with pytest.raises(ValueError, match=r'`sync_loss`=True: micro-batches that come one by one.*`MicroBatch\(sync_loss=True\)`'): AccumulateStep(4, sync_loss=True)
    with pytest.raises(ValueError, match='a loss that sees the whole batch has no gradient of one micro-batch'): made(one(), lambda: ranknet, Net, cbs=lambda: [NoiseScale()]).fit(1)
    def bad(xb, yb, bs): return [(x,(f'from {x[0][0,0]}',)) for x,_ in split(xb, yb, bs)]
    refused(made(one(split=bad), lambda: lambda z,y: z.mean(), Net), ValueError, "`split`=", "beside `sync_loss`=True")

def test_no_warning():
    "There is nothing to warn of, and elsewhere the warning names the cure"
    loss = LabelSmoothingCrossEntropy(weight=torch.tensor([1.,2.,5.], dtype=f64))
    with warnings.catch_warnings():
        warnings.filterwarnings('error', '.*no one number', UserWarning)
        same(lambda: loss, Net)
    for acc,cure in ((MicroBatch(MICRO),'With `sync_loss=True` one loss'), (AccumulateStep(2),r'`MicroBatch\(sync_loss=True\)`, with a loader of whole batches')):
        with pytest.warns(UserWarning, match=f'no one number weighs.*{cure}'): run(made(acc, lambda: loss, Net), fit)

# ---- the check of a learner

def test_check():
    "It names the cure of a loss that compares samples, as it has tried it, and checks it where the learner has it"
    l = made(None, lambda: supcon, Views)
    l.dls.loaders[0] = l.dls.train.new(bs=5)
    said = l.check_accumulation(3).advice
    assert list(said)==['loss'] and '`MicroBatch(sync_loss=True)`, with a loader of whole batches, is exact here, as was tried' in said['loss']
    res = made(one(), lambda: supcon, Views).check_accumulation()
    assert res.ok and res.diff<=1e-12 and res.sizes==[4,4,4,4] and not res.advice
    res = made(MicroBatch(MICRO, sync_bn=True), lambda: supcon, lambda: NormedViews(norm=nn.BatchNorm1d)).check_accumulation()
    assert list(res.advice)==['loss'] and '`MicroBatch(sync_bn=True, sync_loss=True)`, with a loader of whole batches, is exact here' in res.advice['loss'], res
    res = made(one(), lambda: supcon, lambda: NormedViews(norm=nn.BatchNorm1d)).check_accumulation()
    assert list(res.advice)==['batchnorm'] and '`MicroBatch(sync_loss=True, sync_bn=True)`, with a loader of whole batches, is exact here' in res.advice['batchnorm'], res
    assert made(one(sync_bn=True), lambda: supcon, lambda: NormedViews(norm=nn.BatchNorm1d)).check_accumulation().ok
class NormedViews(Views): pass

class Take(Callback):
    "A copy of the model, and one that was saved, at `event` of the first batch"
    run_valid,copy,saved = False,None,None
    def __init__(self, event): self.event = event
    def __call__(self, event_name):
        if event_name!=self.event or self.copy is not None: return
        self.copy,self.saved = deepcopy(self.learn.model),io.BytesIO()
        torch.save(self.learn.model, self.saved)

@pytest.mark.parametrize('kwargs', (dict(sync_loss=True),dict(sync_bn=True),dict(sync_bn='stats'),dict(sync_loss=True, sync_bn=True)), ids=str)
@pytest.mark.parametrize('event', ('after_pred','after_loss','before_backward','after_backward'))
def test_copied(event, kwargs):
    "A model that a callback copies or saves within a batch computes with its own weights"
    def net(): return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    x,y = problem(N)
    take = Take(event)
    learn = learner(N, BS, MicroBatch(MICRO, **kwargs), data=(x,y), loss_func=nn.CrossEntropyLoss(), model=net, cbs=take)
    learn.fit(2, 0.5)
    saved = torch.load(io.BytesIO(take.saved.getvalue()), weights_only=False)
    for m in (take.copy,saved,learn.model): assert not {'_call_impl','_compiled_call_impl'} & {k for k,v in vars(m.eval()).items() if v is not None}
    for m in (take.copy,saved): assert torch.equal(m(x), m.forward(x)) and not torch.equal(m(x), learn.model(x))
