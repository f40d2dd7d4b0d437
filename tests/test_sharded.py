"Models of `fully_shard` in two and in four processes against one process with the whole batch; this file is also what they run"
import contextlib,gc
from collections import Counter
from types import SimpleNamespace
import pytest
from common import *
from processes import *
try: from torch.distributed.fsdp import CPUOffloadPolicy,MixedPrecisionPolicy,fully_shard
except ImportError: pytest.skip('torch without `fully_shard`', allow_module_level=True)
from fastai_accum.loop import Accumulator
from torch.distributed.device_mesh import init_device_mesh

BS,N_STEP,MICRO = 4,4,5
N = 72 # samples of a process in an epoch: four windows and a half
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
def split(xb, yb, bs): return [(tuple(x[i:i+bs] for x in xb),tuple(y[i:i+bs] for y in yb)) for i in range(0, len(xb[0]), bs)]
def counted(learn): return W[learn.y].sum()
def norm(): return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
def whole(m, **kw): fully_shard(m, **kw)
def ddp(m): return nn.parallel.DistributedDataParallel(m)
def nested(m, **kw):
    "Each layer with parameters is gathered by itself"
    for o in m:
        if [*o.parameters()]: fully_shard(o, **kw)
    fully_shard(m, **kw)
def part(m): fully_shard(m[0]); fully_shard(m, ignored_params={*m[2].parameters()})
def hybrid(m): nested(m, mesh=init_device_mesh('cpu', (2,2), mesh_dim_names=('replicate','shard')))
def factor(m):
    nested(m)
    for o in (m[0],m[2],m): o.set_gradient_divide_factor(3.)
def factors(m):
    nested(m)
    m[0].set_gradient_divide_factor(3.)
def mixed(m): nested(m, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
def tensor_parallel(m):
    from torch.distributed.tensor.parallel import ColwiseParallel,RowwiseParallel,parallelize_module
    parallelize_module(m, init_device_mesh('cpu', (2,)), {'0':ColwiseParallel(),'2':RowwiseParallel()})
def both(m):
    from torch.distributed.tensor.parallel import ColwiseParallel,RowwiseParallel,parallelize_module
    mesh = init_device_mesh('cpu', (2,2), mesh_dim_names=('dp','tp'))
    parallelize_module(m, mesh['tp'], {'0':ColwiseParallel(),'2':RowwiseParallel()})
    nested(m, mesh=mesh['dp'])

OPTS = {'sgd':partial(SGD, mom=0.9), 'adam':Adam, 'adamw':partial(OptimWrapper, opt=torch.optim.AdamW)}

class Stop(Callback):
    "Raise `exc` at `event` of the micro-batches `at` of each epoch"
    order,run_valid = 50,False
    def __init__(self, event, exc, at): self.event,self.exc,self.at = event,exc,[at]
    def before_train(self): self.i = -1
    def __call__(self, event_name):
        if event_name=='before_batch' and self.training: self.i += 1
        super().__call__(event_name)
        if event_name==self.event and self.training and self.i in self.at: raise self.exc

class Within(Callback):
    "Validate in the midst of a window"
    order,run_valid = 60,False
    def before_train(self): self.i = 0
    def after_backward(self):
        self.i += 1
        if self.i!=2: return
        self.learn.validate()

class Comm:
    "Count collectives by name while it is entered"
    names = 'reduce_scatter_tensor','all_gather_into_tensor','all_reduce'
    def __enter__(self):
        self.n,self.was = Counter(),{k:getattr(torch.distributed, k) for k in self.names}
        def count(k, *args, **kwargs):
            self.n[k] += 1
            return self.was[k](*args, **kwargs)
        for k in self.names: setattr(torch.distributed, k, partial(count, k))
        return self
    def __exit__(self, *_):
        for k,f in self.was.items(): setattr(torch.distributed, k, f)

def full(o): return [t.full_tensor() if hasattr(t, 'full_tensor') else t for t in o]
class FullTrace(Callback):
    "Weights and optimizer state after every step, put together"
    order = 100
    def before_fit(self): self.steps,self.losses = [],[]
    def after_step(self): self.steps.append((flat(full(self.model.parameters())),flat(full(tensors(self.opt.state_dict()['state'])))))
    def after_batch(self):
        if self.training: self.losses.append(float(self.loss.detach()))

def case(acc=STEP, opt='sgd', loss=nn.CrossEntropyLoss, shard=nested, model=net, n=N, ignore=(0.3,0.6), cbs=list, hides=(), n_epoch=2, size=BS*N_STEP, dtype=torch.float64, loop=None, dies=None, beside=False, large=None, carry=False):
    "`hides`: the samples of a process that a callback leaves out; `size`: those that make a step"
    return SimpleNamespace(**locals())
def micro(acc=SPLIT, **kw): return case(acc, **kw)

def data(c, rank):
    "The samples of a process, of which others than those of the next one are to be ignored; all of its first micro-batch"
    x,y = problem(c.n+16, seed=rank)
    y[torch.rand(len(y), generator=torch.Generator().manual_seed(rank))<c.ignore[rank%2]] = -100
    if rank%2: y[:BS] = -100 if c.ignore[1] else 0
    return x.to(c.dtype),y

def make(c, bs, acc, d, cbs=()):
    learn = learner(len(d[0])-16, bs, acc, data=d, opt_func=OPTS[c.opt], loss_func=c.loss() if isinstance(c.loss, (type,partial)) else c.loss, model=c.model, shuffle=False, dtype=c.dtype, cbs=[FullTrace(),*cbs])
    learn.remove_cbs([Trace,Recorder])
    learn.splitter = trainable_params
    seed(0)
    learn.model.load_state_dict(c.model().to(c.dtype).state_dict()) # the same for all
    return learn

# what each of the processes does
def work(c):
    if c.beside: return trained(c),trained(SimpleNamespace(**{**vars(c), 'acc':partial(MicroBatch, BS*N_STEP, pool=False)}))
    return trained(c)

def trained(c):
    rank,micro_host = torch.distributed.get_rank(),isinstance(c.acc(), MicroBatch)
    rank = rank//2 if c.shard is both else rank # two of them have the same samples
    learn = make(c, BS*N_STEP if micro_host else BS, c.acc(), data(c, rank), c.cbs())
    learn.model = c.shard(learn.model) or learn.model
    err = None
    with Comm() as comm:
        try:
            if c.loop: steps,losses = c.loop(learn, c)
            else:
                if c.dies: broken(learn, c.dies)
                run(learn, lambda l: l.fit(c.n_epoch, 0.05))
                steps,losses = learn.full_trace.steps,learn.full_trace.losses
        except ValueError as e: return str(e)
        except Exception as e: import traceback; return traceback.format_exc() #DEBUG
    return dict(steps=steps, losses=losses, n=comm.n)

def broken(learn, at):
    "A fit that dies in the midst of a window"
    def dies(*_): raise KeyError('died')
    hook = learn.model[1].register_forward_hook(dies) if at=='forward' else None
    with learn.added_cbs(Stop('after_backward', KeyError('died'), 1)), contextlib.suppress(KeyError): learn.fit(1, 0.05)
    if hook: hook.remove()
    learn.create_opt()
    seed(0)

def loop(learn, c, **kw):
    steps,accs = [],[]
    opt = torch.optim.AdamW(learn.model.parameters(), lr=0.05) if c.opt=='adamw' else torch.optim.SGD(learn.model.parameters(), lr=0.05, momentum=0.9)
    def state(): return flat(full(tensors(opt.state_dict()['state'])))
    with Accumulator(learn.model, opt, learn.loss_func, **{**dict(n_step=N_STEP), **kw}, after_step=lambda: steps.append((flat(full(learn.model.parameters())),state()))) as acc:
        for _ in range(c.n_epoch):
            for x,y in learn.dls.train: acc.backward(learn.model(x), y)
            acc.flush()
    return steps,acc.losses
def plain(learn, c):
    steps,losses = [],[]
    opt = torch.optim.AdamW(learn.model.parameters(), lr=0.05) if c.opt=='adamw' else torch.optim.SGD(learn.model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(c.n_epoch):
        for x,y in learn.dls.train:
            l = learn.loss_func(learn.model(x), y)
            l.backward(), opt.step(), opt.zero_grad()
            losses.append(l.detach()), steps.append((flat(learn.model.parameters()),flat(tensors(opt.state_dict()['state']))))
    return steps,losses

def stop(*args): return lambda: [Stop(*args)]
def clip(): return [GradientClip(0.1)]
UNSHARDED = {f'{k} unsharded':partial(STEP, unsharded=k) for k in ('all',None)}
SAME = {**{opt:case(opt=opt) for opt in OPTS},
    **{k:case(acc) for k,acc in UNSHARDED.items()},
    'one unit':case(shard=whole),
    'n_samples':case(partial(AccumulateStep, n_samples=BS*N_STEP)),
    'clip':case(cbs=clip, opt='adamw'),
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
    'within a window':case(cbs=lambda: [Within()]),
    'carry':case(partial(STEP, leftover='carry'), n=24, n_epoch=4, carry=True),
    **{f'{k}{u}':case(partial(STEP, **kw), cbs=stop(*how), **o) for u,kw in {'':{}, ', all unsharded':dict(unsharded='all'), ', None unsharded':dict(unsharded=None)}.items() for k,(how,o) in {
        'last cancelled before forward':(('before_batch', CancelBatchException, 3),dict(hides=range(12, 16))),
        'last cancelled after forward':(('after_loss', CancelBatchException, 3),dict(hides=range(12, 16))),
        'last backward cancelled':(('before_backward', CancelBackwardException, 3),dict(hides=range(12, 16))),
        'cut short':(('after_backward', CancelFitException, 9),dict(n=40, n_epoch=1)),
    }.items()},
    **{f'micro ddp {k}':micro(shard=ddp, **kw) for k,kw in {'':{}, 'normalize':dict(acc=partial(SPLIT, normalize=counted), loss=partial(nn.CrossEntropyLoss, W), ignore=(0,0)), 'constant':dict(loss=positives),
        'cancelled':dict(cbs=stop('before_backward', CancelBackwardException, 3), hides=range(12, 16))}.items()},
    'micro cancelled':micro(cbs=stop('before_backward', CancelBackwardException, 3), hides=range(12, 16)),
    'micro':micro(), 'micro adam':micro(opt='adam', cbs=clip), 'micro all':micro(partial(SPLIT, unsharded='all')), 'micro None':micro(partial(SPLIT, unsharded=None)),
    'micro normalize':micro(partial(SPLIT, normalize=counted), loss=partial(nn.CrossEntropyLoss, W), ignore=(0,0)), 'micro own':micro(loss=Own), 'micro split':micro(partial(SPLIT, split=split)), 'micro constant':micro(loss=positives),
    'loop':case(loop=loop), 'loop adamw':case(loop=loop, opt='adamw'), 'loop n_samples':case(loop=partial(loop, n_step=None, n_samples=16)), 'loop None':case(loop=partial(loop, unsharded=None)),
}
def local(acc, **kw): return micro(acc, beside=True, **kw)
LOCAL = {'ignored targets':local(partial(MicroBatch, MICRO)), 'ignored targets, None':local(partial(MicroBatch, MICRO, unsharded=None)),
    'normalize':local(partial(MicroBatch, MICRO, normalize=counted), loss=partial(nn.CrossEntropyLoss, W), ignore=(0,0)), 'own':local(partial(MicroBatch, MICRO), loss=Own), 'unknown':local(partial(MicroBatch, MICRO), loss=Unknown),
    'split':local(partial(MicroBatch, MICRO, split=split)), 'samples':local(partial(MicroBatch, MICRO, normalize='samples', unsharded=None), loss=Unknown),
    'sums':local(partial(MicroBatch, MICRO), loss=partial(nn.CrossEntropyLoss, reduction='sum')), 'last backward cancelled':local(partial(MicroBatch, MICRO), cbs=stop('before_backward', CancelBackwardException, 3), loss=partial(nn.CrossEntropyLoss, W))}
def late(**kw): return micro(partial(MicroBatch, MICRO, unsharded=None, **kw.pop('acc', {})), **kw)
REFUSED = {
    'normalize':(late(acc=dict(normalize=counted)),'before it is known what'), 'denominator':(late(loss=Own),'before it is known what'), 'unknown':(late(loss=Unknown),'before it is known what'), 'split':(late(acc=dict(split=split)),'before it is known what'),
    'exact BatchNorm':(micro(partial(SPLIT, sync_bn=True), model=norm),'come and go'), 'auto':(micro(MicroBatch),'only a `DistributedDataParallel` can wait'), 'auto pool':(micro(partial(MicroBatch, pool=True)),'only a `DistributedDataParallel` can wait|before it is known whether'),
    'a part':(case(shard=part),'`2.weight` is not sharded'), 'micro a part':(micro(shard=part),'`2.weight` is not sharded'), 'loop a part':(case(shard=part, loop=loop),'`2.weight` is not sharded'), 'factors':(case(shard=factors),'different numbers'),
    'tensor parallel':(case(shard=tensor_parallel),'the model is a Sequential in one of several processes'), 'tensor parallel loop':(case(shard=tensor_parallel, loop=loop),'whose gradients nothing averages')}
MIXED = {'mixed':case(shard=mixed, dtype=torch.float32), 'mixed None':case(UNSHARDED['None unsharded'], shard=mixed, dtype=torch.float32), 'mixed plain':case(partial(MicroBatch, BS*N_STEP), shard=mixed, dtype=torch.float32)}
STATS = {'stats':micro(partial(MicroBatch, MICRO, sync_bn='stats'), model=norm)}
CASES = {**SAME, **{f'local: {k}':c for k,c in LOCAL.items()}, **{f'refused: {k}':c for k,(c,_) in REFUSED.items()}, **MIXED, **STATS}
FOUR = {'four':case(), 'four micro':micro(), 'hybrid':case(shard=hybrid, opt='adam', cbs=clip), 'hybrid None':case(UNSHARDED['None unsharded'], shard=hybrid), 'with tensor parallel':case(shard=both)}

if 'ONLY' in os.environ: CASES = SAME = {k:v for k,v in CASES.items() if k in os.environ['ONLY'].split(';')} #DEBUG

def reference(c, world):
    "The same in one process, with the samples of all processes that make a step in one batch"
    ds = [data(c, r) for r in range(world)]
    for _,y in ds: y[list(c.hides)] = -100
    n_epoch,all_ = (1,[tuple(torch.cat([o[:c.n]]*c.n_epoch+[o[c.n:]]) for o in d) for d in ds]) if c.carry else (c.n_epoch,ds) # epochs do not end windows
    n = len(all_[0][0])-16
    def joined(i): return torch.cat([torch.cat([d[i][k:min(k+c.size, n)] for d in all_]) for k in range(0, n, c.size)] + [ds[0][i][-16:]])
    learn = make(SimpleNamespace(**{**vars(c), 'loss':c.large or c.loss}), c.size*world, None, (joined(0),joined(1)), [cb for cb in c.cbs() if isinstance(cb, GradientClip)])
    if c.loop: return plain(learn, c)
    run(learn, lambda l: l.fit(n_epoch, 0.05))
    return learn.full_trace.steps,learn.full_trace.losses

@pytest.fixture(scope='module')
def two(tmp_path_factory): return in_two(__file__, tmp_path_factory.mktemp('two'), CASES)

def check_same(c, res, tol=1e-12):
    steps,losses = reference(c, len(res))
    for r in res:
        assert isinstance(r, dict), r
        assert len(steps)==len(r['steps'])>0
        for (w,s),(v,t) in zip(steps, r['steps']): assert rel(w, v)<tol and rel(s, t)<tol, (rel(w, v), rel(s, t))
        if not c.hides and not isinstance(c.loss, partial): assert rel(losses, r['losses'])<tol

@pytest.mark.parametrize('name', SAME)
def test_same_run(name, two):
    "Weights and optimizer state after each step, and losses, are those of one process with the whole batch"
    check_same(CASES[name], two(name))

@pytest.mark.parametrize('name', LOCAL)
def test_local(name, two):
    "Without `pool`, a batch in parts is the sharded model's whole batch in each process"
    for a,b in two(f'local: {name}'):
        assert isinstance(a, dict), a
        assert len(a['steps'])==len(b['steps'])>0 and rel(b['losses'], a['losses'])<1e-12
        for (w,s),(v,t) in zip(a['steps'], b['steps']): assert rel(v, w)<1e-12 and rel(t, s)<1e-12

@pytest.mark.parametrize('name', REFUSED)
def test_refused(name, two):
    for r in two(f'refused: {name}'): assert isinstance(r, str) and re.search(REFUSED[name][1], r), r

def test_running_statistics(two):
    "The cure for exact BatchNorm trains, each micro-batch normalized by itself"
    for r in two('stats'): assert isinstance(r, dict) and len(r['steps'])==10

if __name__=='__main__':
    gc.freeze()
    work_on(CASES if int(os.environ['WORLD_SIZE'])==WORLD else FOUR, work)
