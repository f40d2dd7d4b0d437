"Models of `fully_shard` in two and in four processes against one process with the whole batch; this file is also what they run"
import contextlib,gc
from types import SimpleNamespace
import pytest
from common import *
from processes import *
try: from torch.distributed.fsdp import CPUOffloadPolicy,MixedPrecisionPolicy,fully_shard
except ImportError: pytest.skip('torch without `fully_shard`', allow_module_level=True)
from fastai_accum.loop import Accumulator
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType,FullyShardedDataParallelPlugin
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

BS,N_STEP,MICRO = 4,4,5
N = 40 # samples of a process in an epoch: two windows and a half
W = torch.tensor([0.1,1,7], dtype=torch.float64)
STEP,SPLIT = partial(AccumulateStep, N_STEP),partial(MicroBatch, MICRO, pool=True)

class Own(nn.CrossEntropyLoss):
    "A loss that says what it divides by"
    def denominator(self, pred, targ): return (targ>=0).sum()

class Unknown(nn.Module):
    "A mean over samples, whose type does not tell"
    def forward(self, pred, targ): return F.multi_margin_loss(pred, targ.clamp(min=0))

def shows(pred, targ): return F.cross_entropy(pred, targ, weight=W) # only its graph tells what it divides by
def positives(pred, targ): return F.cross_entropy(pred[targ>0], targ[targ>0]) if (targ>0).any() else pred.new_zeros(()) # a constant where it has nothing to divide
def two_means(pred, targ): return F.cross_entropy(pred, targ, ignore_index=0)+pred.pow(2).mean() # no one number weighs it
def split(xb, yb, bs): return [(tuple(x[i:i+bs] for x in xb),tuple(y[i:i+bs] for y in yb)) for i in range(0, len(xb[0]), bs)]
def counted(learn): return W[learn.y].sum()
def norm(): return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
class Recomputed(nn.Sequential):
    "Its first layers are gathered once more in the backward pass"
    def forward(self, x): return self[2](checkpoint(lambda x: self[1](self[0](x)), x, use_reentrant=False))
def recomputed(): return Recomputed(*net())
def whole(m, **kw): fully_shard(m, **kw)
def ddp(m): return nn.parallel.DistributedDataParallel(m)
def nested(m, **kw):
    "Each layer with parameters is gathered by itself"
    for o in m:
        if [*o.parameters()]: fully_shard(o, **kw)
    fully_shard(m, **kw)
def late_opt(m):
    whole(m)
    with torch.no_grad(): m(torch.zeros(1, 6, dtype=torch.float64)) # its parameters are whole now
def part(m): fully_shard(m[0]); fully_shard(m, ignored_params={*m[2].parameters()})
def hybrid(m): nested(m, mesh=init_device_mesh('cpu', (2,2), mesh_dim_names=('replicate','shard')))
def factor(m):
    nested(m)
    for o in (m[0],m[2],m): o.set_gradient_divide_factor(3.)
def factors(m):
    nested(m)
    m[0].set_gradient_divide_factor(3.)
def mixed(m): nested(m, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
def mixed_low(m): nested(m, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
@contextlib.contextmanager
def plugin():
    "accelerate's plugin for `fully_shard`, and a function that puts it in force, as it is on GPUs: on a CPU, accelerate leaves it out and takes `DistributedDataParallel`"
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    def force(accelerator):
        assert accelerator.distributed_type==DistributedType.MULTI_CPU and not accelerator.is_fsdp2
        accelerator.state.distributed_type,accelerator.state.fsdp_plugin = DistributedType.FSDP,plugin
    try: yield plugin,force
    finally:
        os.environ.pop('ACCELERATE_USE_FSDP', None)
        AcceleratorState._reset_state(True)
def prepared(m):
    with plugin() as (p,force):
        force(a := Accelerator(cpu=True, fsdp_plugin=p))
        a.prepare(m, torch.optim.SGD(m.parameters(), lr=1.))
def in_distrib_ctx(learn, c):
    with plugin() as (p,force),learn.distrib_ctx(sync_bn=False, cpu=True, fsdp_plugin=p):
        force(learn.distributed_trainer.accelerator)
        learn.fit(1, 0.05)
def tensor_parallel(m):
    from torch.distributed.tensor.parallel import ColwiseParallel,RowwiseParallel,parallelize_module
    parallelize_module(m, init_device_mesh('cpu', (2,)), {'0':ColwiseParallel(),'2':RowwiseParallel()})
def both(m):
    from torch.distributed.tensor.parallel import ColwiseParallel,RowwiseParallel,parallelize_module
    mesh = init_device_mesh('cpu', (2,2), mesh_dim_names=('dp','tp'))
    parallelize_module(m, mesh['tp'], {'0':ColwiseParallel(),'2':RowwiseParallel()})
    nested(m, mesh=mesh['dp'])

OPTS = {'plain':SGD, 'sgd':partial(SGD, mom=0.9), 'adam':Adam, 'adamw':partial(OptimWrapper, opt=torch.optim.AdamW)}

class Stop(Callback):
    "Raise `exc` at `event` of micro-batch `at` of each epoch"
    order,run_valid = 50,False
    def __init__(self, event, exc, at): store_attr()
    def before_train(self): self.i,self.first = -1,'after_pred' if hasattr(self.learn, 'micro_batch') else 'before_batch'
    def __call__(self, event_name):
        super().__call__(event_name)
        if not self.training: return
        if event_name==self.first: self.i += 1
        if event_name==self.event and self.i==self.at: raise self.exc

class Within(Callback):
    "In the midst of a window, validate, and fit an epoch that changes nothing"
    order,run_valid,i = 60,False,0
    def after_backward(self):
        self.i += 1
        if self.i!=2: return
        learn,count,keep = self.learn,self.learn.count,{k:vars(self.learn)[k] for k in 'epoch n_epoch loss train_iter pct_train dl iter n_iter xb yb pred loss_grad training'.split()}
        count.on = False
        learn.validate()
        learn.fit(1, 0.)
        count.on = True
        vars(learn).update(keep)
        learn.model.train()
        learn.opt.set_hyper('lr', 0.05)

class Held(Callback):
    "The precision of gradients that wait for the end of a window"
    def before_fit(self): self.dtypes = set()
    def after_backward(self): self.dtypes |= {o.grad.dtype for o in self.learn.accumulate_step.win.unreduced() if o.grad is not None}

class Comm:
    "Count collectives by name while it is entered"
    names = [next(k for k in ks if hasattr(torch.distributed, k)) for ks in (('reduce_scatter_single','reduce_scatter_tensor'),('all_gather_single','all_gather_into_tensor'),('all_reduce',))]
    def __enter__(self):
        self.n,self.was = [0]*3,{k:getattr(torch.distributed, k) for k in self.names}
        def count(i, *args, **kwargs):
            self.n[i] += 1
            return self.was[self.names[i]](*args, **kwargs)
        for i,k in enumerate(self.names): setattr(torch.distributed, k, partial(count, i))
        return self
    def __exit__(self, *_):
        for k,f in self.was.items(): setattr(torch.distributed, k, f)

def full(o): return [t.full_tensor() if hasattr(t, 'full_tensor') else t for t in o]
def final(model, opt): return flat(full(model.parameters())),flat(full(tensors(opt.state_dict()['state'])))
class Count(Callback):
    "Steps and losses"
    order,on = 100,True
    def __init__(self): self.steps,self.losses = 0,[]
    def after_step(self): self.steps += self.on
    def after_batch(self):
        if self.training and self.on: self.losses.append(float(self.loss.detach()))

def case(acc=STEP, opt='sgd', loss=nn.CrossEntropyLoss, shard=nested, model=net, n=N, ignore=(0.3,0.6), cbs=list, hides=(), n_epoch=2, size=BS*N_STEP, dtype=torch.float64, loop=None, dies=None, beside=False, hidden=False, cut=None, large=None, carry=False):
    "`hides`: the samples of a process that a callback leaves out; `size`: those that make a step"
    return SimpleNamespace(**locals())
def micro(acc=SPLIT, **kw): return case(acc, **kw)

def data(c, rank):
    "The samples of a process, of which others than those of the next one are to be ignored; all of its first micro-batch"
    x,y = problem(c.n+16, seed=rank)
    y[torch.rand(len(y), generator=torch.Generator().manual_seed(rank))<c.ignore[rank%2]] = -100
    if rank%2: y[:BS] = -100 if c.ignore[1] else 0
    if c.hidden: y[list(c.hides)] = -100
    return x.to(c.dtype),y

def make(c, bs, acc, d, cbs=()):
    learn = learner(len(d[0])-16, bs, acc, data=d, opt_func=OPTS[c.opt], loss_func=c.loss() if isinstance(c.loss, (type,partial)) else c.loss, model=c.model, shuffle=False, dtype=c.dtype, cbs=[Count(),*cbs])
    learn.remove_cbs([Trace,Recorder])
    learn.splitter = trainable_params
    seed(0)
    learn.model.load_state_dict(c.model().to(c.dtype).state_dict()) # the same for all
    return learn

# what each of the processes does
def work(c):
    if c.beside: return trained(c),trained(SimpleNamespace(**{**vars(c), 'acc':partial(MicroBatch, BS*N_STEP), 'cbs':list, 'hidden':True}))
    return trained(c)

def trained(c):
    rank,micro_host = torch.distributed.get_rank(),isinstance(c.acc(), MicroBatch)
    rank = rank//2 if c.shard is both else rank # two of them have the same samples
    learn = make(c, BS*N_STEP if micro_host else BS, c.acc(), data(c, rank), c.cbs())
    learn.model = c.shard(learn.model) or learn.model
    err = None
    with Comm() as comm:
        try:
            if c.loop: n_steps,losses,end = c.loop(learn, c)
            else:
                if c.dies: broken(learn, c.dies)
                run(learn, lambda l: l.fit(c.n_epoch, 0.05))
                n_steps,losses,end = learn.count.steps,learn.count.losses,final(learn.model, learn.opt)
        except ValueError as e: return str(e)
    return dict(steps=n_steps, losses=losses, end=end, n=comm.n, held=learn.held.dtypes if hasattr(learn, 'held') else None)

def broken(learn, at):
    "A fit that dies in the midst of a window"
    def dies(*_): raise KeyError('died')
    hook = learn.model[1].register_forward_hook(dies) if at=='forward' else None
    with learn.added_cbs(Stop('after_backward', KeyError('died'), 1)), contextlib.suppress(KeyError): learn.fit(1, 0.05)
    if hook: hook.remove()
    learn.create_opt()
    learn.count.__init__()

def optimizer(learn, c): return torch.optim.AdamW(learn.model.parameters(), lr=0.05) if c.opt=='adamw' else torch.optim.SGD(learn.model.parameters(), lr=0.05, momentum=0.9)
def loop(learn, c, **kw):
    opt = optimizer(learn, c)
    with Accumulator(learn.model, opt, learn.loss_func, **{'n_step':N_STEP, **kw}) as acc:
        for _ in range(c.n_epoch):
            for x,y in learn.dls.train: acc.backward(learn.model(x), y)
            acc.flush()
    return len(acc.losses),acc.losses,final(learn.model, opt)
def plain(learn, c):
    opt,losses = optimizer(learn, c),[]
    for _ in range(c.n_epoch):
        for x,y in learn.dls.train:
            losses.append(learn.loss_func(learn.model(x), y))
            losses[-1].backward(), opt.step(), opt.zero_grad()
    return len(losses),losses,final(learn.model, opt)

def stop(*args): return lambda: [Stop(*args)]
def clip(): return [GradientClip(0.1)]
UNSHARDED = {f'{k} unsharded':partial(STEP, unsharded=k) for k in ('all',None)}
SAME = {**{opt:case(opt=opt) for opt in ('sgd','adam','adamw')},
    **{k:case(acc) for k,acc in UNSHARDED.items()},
    'one unit':case(shard=whole), 'prepared by accelerate':case(shard=prepared), 'prepared by accelerate, micro':micro(shard=prepared),
    'n_samples':case(partial(AccumulateStep, n_samples=BS*N_STEP)),
    'clip':case(cbs=clip, opt='adamw'),
    **{f'checkpointed{u}':case(partial(STEP, **kw), model=recomputed) for u,kw in {'':{}, ', all unsharded':dict(unsharded='all'), ', None unsharded':dict(unsharded=None)}.items()}, 'micro checkpointed':micro(model=recomputed), 'checkpointed, ddp':case(shard=ddp, model=recomputed), 'micro checkpointed, ddp':micro(shard=ddp, model=recomputed),
    'window of one':case(partial(AccumulateStep, 1), size=BS),
    'divide factor':case(shard=factor),
    'class weights':case(loss=partial(nn.CrossEntropyLoss, W)),
    'shown':case(loss=shows, ignore=(0,0)),
    'constant':case(loss=positives),
    'constant, None unsharded':case(UNSHARDED['None unsharded'], loss=positives),
    'own, None unsharded':case(UNSHARDED['None unsharded'], loss=Own),
    'sums':case(loss=partial(nn.CrossEntropyLoss, reduction='sum'), large=nn.CrossEntropyLoss, ignore=(0,0)),
    'died before':case(dies='backward'),
    'died before, all unsharded':case(UNSHARDED['all unsharded'], dies='backward'),
    'died in forward':case(dies='forward'),
    'died in forward, micro':micro(dies='forward'),
    'within a window':case(cbs=lambda: [Within()], opt='plain'), 'within a window, all unsharded':case(UNSHARDED['all unsharded'], cbs=lambda: [Within()], opt='plain'),
    'within a batch':micro(cbs=lambda: [Within()], opt='plain'),
    'carry':case(partial(STEP, leftover='carry'), n=24, n_epoch=4, carry=True),
    **{f'{k}{u}':case(partial(STEP, **kw), cbs=stop(*how), **o) for u,kw in {'':{}, ', all unsharded':dict(unsharded='all'), ', None unsharded':dict(unsharded=None)}.items() for k,(how,o) in {
        'last cancelled before forward':(('before_batch', CancelBatchException, 3),dict(hides=range(12, 16))),
        'last cancelled after forward':(('after_loss', CancelBatchException, 3),dict(hides=range(12, 16))),
        'last backward cancelled':(('before_backward', CancelBackwardException, 3),dict(hides=range(12, 16))),
        'cut short':(('after_backward', CancelFitException, 5),dict(cut=24, n_epoch=1)),
    }.items() if not u or k in ('last backward cancelled','cut short')},
    **{f'micro ddp {k}':micro(shard=ddp, **kw) for k,kw in {'':{}, 'normalize':dict(acc=partial(SPLIT, normalize=counted), loss=partial(nn.CrossEntropyLoss, W), ignore=(0,0)), 'constant':dict(loss=positives),
        'cancelled':dict(cbs=stop('before_backward', CancelBackwardException, 3), hides=range(12, 16))}.items()},
    'micro cancelled':micro(cbs=stop('before_backward', CancelBackwardException, 3), hides=range(12, 16)),
    'micro':micro(), 'micro all':micro(partial(SPLIT, unsharded='all')), 'micro None':micro(partial(SPLIT, unsharded=None)),
    'micro normalize':micro(partial(SPLIT, normalize=counted), loss=partial(nn.CrossEntropyLoss, W), ignore=(0,0)), 'micro own':micro(loss=Own), 'micro split':micro(partial(SPLIT, split=split)), 'micro constant':micro(loss=positives),
    'loop':case(loop=loop), 'loop adamw':case(loop=loop, opt='adamw'), 'loop n_samples':case(loop=partial(loop, n_step=None, n_samples=16)), 'loop None':case(loop=partial(loop, unsharded=None)),
}
def local(acc, **kw): return micro(acc, beside=True, **kw)
LOCAL = {'ignored targets':local(partial(MicroBatch, MICRO)), 'ignored targets, None':local(partial(MicroBatch, MICRO, unsharded=None)),
    'normalize':local(partial(MicroBatch, MICRO, normalize=counted), loss=partial(nn.CrossEntropyLoss, W), ignore=(0,0)), 'own':local(partial(MicroBatch, MICRO), loss=Own), 'unknown':local(partial(MicroBatch, MICRO), loss=Unknown),
    'split':local(partial(MicroBatch, MICRO, split=split)), 'samples':local(partial(MicroBatch, MICRO, normalize='samples', unsharded=None), loss=Unknown),
    'sync_loss':local(partial(MicroBatch, MICRO, sync_loss=True), loss=two_means, ignore=(0,0)), 'sync_loss, None':local(partial(MicroBatch, MICRO, sync_loss=True, unsharded=None), loss=two_means, ignore=(0,0)),
    'sums':local(partial(MicroBatch, MICRO), loss=partial(nn.CrossEntropyLoss, reduction='sum')), 'tensor parallel':local(partial(MicroBatch, MICRO), shard=tensor_parallel), 'last backward cancelled':local(partial(MicroBatch, MICRO), cbs=stop('before_backward', CancelBackwardException, 3), hides=range(12, 16))}
def late(**kw): return micro(partial(MicroBatch, MICRO, unsharded=None, **kw.pop('acc', {})), **kw)
REFUSED = {
    'normalize':(late(acc=dict(normalize=counted)),'before it is known what'), 'denominator':(late(loss=Own),'before it is known what'), 'unknown':(late(loss=Unknown),'before it is known what'), 'split':(late(acc=dict(split=split)),'before it is known what'),
    'exact BatchNorm':(micro(partial(SPLIT, sync_bn=True), model=norm),'come and go'), 'auto':(micro(MicroBatch),'only a `DistributedDataParallel` can wait'), 'auto pool':(micro(partial(MicroBatch, pool=True)),'only a `DistributedDataParallel` can wait|before it is known whether'),
    'late optimizer':(case(shard=late_opt),'call `reshard\\(\\)` of the model'), 'late optimizer, micro':(micro(shard=late_opt),'call `reshard\\(\\)`'), 'late optimizer, loop':(case(shard=late_opt, loop=loop),'call `reshard\\(\\)`'),
    'a part':(case(shard=part),'`2.weight` is not sharded'), 'micro a part':(micro(shard=part),'`2.weight` is not sharded'), 'loop a part':(case(shard=part, loop=loop),'`2.weight` is not sharded'), 'factors':(case(shard=factors),'different numbers'),
    "accelerate's plugin in `distrib_ctx`":(case(shard=noop, loop=in_distrib_ctx),'a model and optimizer must be passed together'),
    'tensor parallel':(case(shard=tensor_parallel),'the model is a Sequential in one of several processes'), 'tensor parallel loop':(case(shard=tensor_parallel, loop=loop),'whose gradients nothing averages')}
def held(): return [Held()]
MIXED = {'mixed':case(shard=mixed, dtype=torch.float32, cbs=held), 'mixed None':case(UNSHARDED['None unsharded'], shard=mixed, dtype=torch.float32, cbs=held), 'mixed low':case(shard=mixed_low, dtype=torch.float32, cbs=held),
    'mixed whole':micro(partial(MicroBatch, BS*N_STEP, pool=True), shard=mixed, dtype=torch.float32), 'mixed local':micro(partial(MicroBatch, BS*N_STEP), shard=mixed, dtype=torch.float32)}
STATS = {'stats':micro(partial(MicroBatch, MICRO, sync_bn='stats'), model=norm)}
CASES = {**SAME, **{f'local: {k}':c for k,c in LOCAL.items()}, **{f'refused: {k}':c for k,(c,_) in REFUSED.items()}, **MIXED, **STATS}
FOUR = {'four':case(), 'hybrid':case(shard=hybrid, opt='adam', cbs=clip), 'hybrid None':case(UNSHARDED['None unsharded'], shard=hybrid), 'with tensor parallel':case(shard=both)}


def reference(c, world):
    "The same in one process, with the samples of all processes that make a step in one batch"
    ds = [data(c, r) for r in range(world)]
    for _,y in ds: y[list(c.hides)] = -100
    n_epoch,all_ = (1,[tuple(torch.cat([o[:c.n]]*c.n_epoch+[o[c.n:]]) for o in d) for d in ds]) if c.carry else (c.n_epoch,ds) # epochs do not end windows
    n = c.cut or len(all_[0][0])-16
    def joined(i): return torch.cat([torch.cat([d[i][k:min(k+c.size, n)] for d in all_]) for k in range(0, n, c.size)] + [ds[0][i][-16:]])
    learn = make(SimpleNamespace(**{**vars(c), 'loss':c.large or c.loss}), c.size*world, None, (joined(0),joined(1)), [cb for cb in c.cbs() if isinstance(cb, GradientClip)])
    if c.loop: return plain(learn, c)
    run(learn, lambda l: l.fit(n_epoch, 0.05))
    return learn.count.steps,learn.count.losses,final(learn.model, learn.opt)

@pytest.fixture(scope='module')
def two(tmp_path_factory): return in_two(__file__, tmp_path_factory.mktemp('two'), CASES)

def check_same(c, res, tol=1e-12):
    steps,losses,end = reference(c, len(res))
    for r in res:
        assert isinstance(r, dict), r
        assert r['steps']==steps>0
        for a,b in zip(end, r['end']): assert rel(a, b)<tol
        if not c.hides and not isinstance(c.loss, partial): assert rel(flat(losses), flat(r['losses']))<tol

@pytest.mark.parametrize('name', SAME)
def test_same_run(name, two):
    "Weights, optimizer state, steps and losses are those of one process with the whole batch"
    check_same(CASES[name], two(name))

@pytest.mark.parametrize('name', LOCAL)
def test_local(name, two):
    "Without `pool`, a batch in parts is the sharded model's whole batch in each process"
    for a,b in two(f'local: {name}'):
        assert isinstance(a, dict), a
        assert a['steps']==b['steps']>0
        for k in ('losses','end')[len(LOCAL[name].hides)>0:]: assert rel(flat(tensors(b[k])), flat(tensors(a[k])))<1e-12

@pytest.mark.parametrize('name', REFUSED)
def test_refused(name, two):
    for r in two(f'refused: {name}'): assert isinstance(r, str) and re.search(REFUSED[name][1], r), r

N_WIN,N_MICRO,UNITS = 3*2,10*2,2 # windows, micro-batches and units with parameters of a case with the defaults
SENT = {'sgd':(N_WIN*UNITS,N_WIN), 'all unsharded':(N_WIN*UNITS,N_WIN), 'None unsharded':(N_MICRO*UNITS,2*N_WIN), 'last cancelled before forward':(N_WIN*UNITS,N_WIN), 'last backward cancelled':(N_WIN*UNITS,N_WIN+2),
    'micro':(N_WIN*UNITS,N_WIN), 'micro None':(N_MICRO*UNITS,2*N_WIN), 'local: ignored targets':(N_WIN*UNITS,0), 'local: sync_loss':(N_WIN*UNITS,0), 'loop':(N_WIN*UNITS,N_WIN+3), 'loop n_samples':(N_WIN*UNITS,N_WIN+3), 'loop None':(N_MICRO*UNITS,2*N_WIN+3)} # the last `flush` is that of `with`

@pytest.mark.parametrize('name', SENT)
def test_sent(name, two):
    "Gradients of each unit are reduced and scattered once a window, or after each micro-batch; denominators and losses are summed once, and `flush` asks whether some are left"
    for r in two(name):
        n = (r if isinstance(r, dict) else r[0])['n']
        assert (n[0],n[2])==SENT[name]

def test_gathered(two):
    "With whole parameters, all micro-batches of a window but the first gather a unit once, for the backward pass"
    for a,b in zip(two('sgd'), two('all unsharded')): assert a['n'][1]-b['n'][1]==(N_MICRO-N_WIN)*UNITS

def test_mixed_precision(two):
    "Passes in bfloat16: gradients wait in the policy's `reduce_dtype`, and the step is at least as near to full precision as the whole batch's under this policy, where a mean of means is far off"
    w0,(_,_,(end,_)) = flat(make(CASES['mixed'], BS, None, data(CASES['mixed'], 0)).model.parameters()),reference(CASES['mixed'], 2)
    off = {k:[rel(end-w0, r['end'][0]-w0) for r in two(k)] for k in MIXED}
    for r in (0,1):
        for k in ('mixed','mixed None','mixed low'): assert 0 < off[k][r] < 1.5*off['mixed whole'][r] < 0.1*off['mixed local'][r], off
        assert [two(k)[r]['held'] for k in ('mixed','mixed None','mixed low')]==[{torch.float32},set(),{torch.bfloat16}]

@pytest.fixture(scope='module')
def four(tmp_path_factory): return in_two(__file__, tmp_path_factory.mktemp('four'), FOUR, 4)

@pytest.mark.parametrize('name', FOUR)
def test_four(name, four):
    "Of four processes, also with two that have a part of each parameter and two with the same, or two that compute a sample together"
    c,res = FOUR[name],four(name)
    check_same(c, res[::2] if c.shard is both else res)

def test_running_statistics(two):
    "The cure for exact BatchNorm trains, each micro-batch normalized by itself"
    for r in two('stats'): assert isinstance(r, dict) and r['steps']==6

if __name__=='__main__':
    gc.freeze()
    work_on(CASES if int(os.environ['WORLD_SIZE'])==WORLD else FOUR, work)
