"Two processes under `distrib_ctx` against one process with the global batch; this file is also what the two processes run"
from collections import Counter
from types import SimpleNamespace
import pytest
from common import *
from processes import *
from fastai_accum.skipnan import SkipNaN

BS,N_STEP = 4,4
W = torch.tensor([0.1,1,7], dtype=torch.float64)
CE,WEIGHTED = nn.CrossEntropyLoss(),nn.CrossEntropyLoss(W)
def shows(pred, targ): return F.cross_entropy(pred, targ, weight=W) # only its graph tells what it divides by
def counted(learn): return W[learn.y].sum()
OPTS = {'sgd':partial(SGD, mom=0.9), 'adam':Adam, 'adamw':partial(OptimWrapper, opt=torch.optim.AdamW)}
def fit(l): l.fit_one_cycle(2, 0.05)

class Seen(Callback):
    "The samples of every micro-batch that counts; raise `exc` at `event` of the micro-batches `at`, given as (epoch, number)"
    order,run_valid = 50,False
    def __init__(self, event=None, exc=None, at=(), ranks=range(WORLD)): store_attr()
    def before_fit(self): self.ids = []
    def before_train(self):
        self.ids.append([])
        self.n_dl,self.said = len(self.dl),getattr(getattr(self.learn, 'accumulate_step', None), 'effective_bs', None)
    def before_batch(self): self.ids[-1].append((self.x[:,None]==self.learn.data_x).all(-1).int().argmax(1).tolist())
    def __call__(self, event_name):
        super().__call__(event_name)
        if event_name!=self.event or not self.training or (self.epoch, len(self.ids[-1])-1) not in self.at or rank_distrib() not in self.ranks: return
        if event_name!='after_backward': self.ids[-1][-1] = []
        raise self.exc

class Spoils(Seen):
    "Make losses nan instead, which `SkipNaN` leaves out"
    def before_fit(self):
        super().before_fit()
        if not hasattr(self.learn, 'skip_nan'): self.learn.add_cb(SkipNaN())
        self.skip_nan.before_fit()
    def after_loss(self):
        if (self.epoch, len(self.ids[-1])-1) not in self.at or rank_distrib() not in self.ranks: return
        self.ids[-1][-1],self.learn.loss_grad = [],self.loss_grad*math.nan

class Comm(Callback):
    "Numbers in every all-reduce: with this hook DDP's own go through `torch.distributed.all_reduce` too"
    order = 12
    def __init__(self): self.log = []
    def before_fit(self):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
        self.ddp = self.model
        self.ddp.register_comm_hook(None, allreduce_hook)
        self.all_reduce = torch.distributed.all_reduce
        torch.distributed.all_reduce = self
    def after_fit(self): torch.distributed.all_reduce = self.all_reduce
    def __call__(self, *args, **kwargs):
        if isinstance(args[0], str): return super().__call__(*args, **kwargs)
        self.log.append(args[0].numel())
        return self.all_reduce(*args, **kwargs)

class Cut(DistributedDL):
    "Rank 0 gets the first `cut` samples, the other the rest"
    cut,n_dl = 38,None
    def __len__(self): return self.n_dl or -(-(self.cut, self.dl.n-self.cut)[self.rank]//self.bs)
    def get_idxs(self):
        idxs = self._broadcast(list(self.dl.get_idxs()), 0)
        return (idxs[:self.cut],idxs[self.cut:])[self.rank]
class EndsEarly(Cut): n_dl = 10

class Buffered(nn.Sequential):
    "A net with a buffer, which DDP takes from rank 0 at the start of each window"
    def __init__(self):
        super().__init__(*net())
        self.register_buffer('n', torch.zeros(3))
    def forward(self, x):
        if self.training: self.n += 1
        return super().forward(x)

class Extra(nn.Sequential):
    "A net with a parameter that it does not use"
    def __init__(self): super().__init__(*net(), nn.Module()); self[3].p = nn.Parameter(torch.ones(2))
    def forward(self, x): return self[2](self[1](self[0](x)))

def case(n=72, acc=partial(AccumulateStep, N_STEP), opt='sgd', loss=CE, large_loss=None, seen=Seen, dl=None, ddp=None, n_step=N_STEP, fit=fit,
         dtype=torch.float64, model=None, **kwargs): return SimpleNamespace(**{**locals(), 'large_loss':large_loss or loss})
def stop(event, exc, *at, **kwargs): return partial(Seen, event, exc, at, **kwargs)
CASES = {f'{name} {opt}':case(opt=opt, **kw) for opt in ('sgd','adam') for name,kw in {
    'even shards':dict(n=64),
    'short last window':dict(n=72),
    'padded shard':dict(n=73),
    'uneven shards':dict(n=71, dl=Cut),
    'one rank ends early':dict(n=71, dl=EndsEarly),
    'loader shorter than its length':dict(n=76, drop_last=True),
    'unequal denominators':dict(n=73, loss=WEIGHTED, acc=partial(AccumulateStep, N_STEP, normalize=counted)),
    'unequal denominators, uneven shards':dict(n=71, dl=Cut, loss=WEIGHTED, acc=partial(AccumulateStep, N_STEP, normalize=counted)),
    'loss that sums':dict(n=73, loss=nn.CrossEntropyLoss(reduction='sum'), large_loss=CE),
    'window of one':dict(n=73, loss=WEIGHTED, acc=partial(AccumulateStep, 1, normalize=counted), n_step=1),
    'n_samples':dict(n=73, acc=partial(AccumulateStep, n_samples=N_STEP*BS)),
    'train cancelled':dict(loss=WEIGHTED, acc=partial(AccumulateStep, N_STEP, normalize=counted), seen=stop('before_batch', CancelTrainException, (0,6))),
    'fit cancelled':dict(loss=WEIGHTED, acc=partial(AccumulateStep, N_STEP, normalize=counted), seen=stop('after_backward', CancelFitException, (1,5))),
    }.items()}
def unequal(**kw): return case(n=73, loss=WEIGHTED, acc=partial(AccumulateStep, N_STEP, normalize=counted), **kw)
CASES.update({
    'no normalization':case(n=73, acc=partial(AccumulateStep, N_STEP, normalize='none'), loss=nn.CrossEntropyLoss(reduction='sum'), fit=lambda l: l.fit_one_cycle(2, 1e-3)),
    'last micro-batch cancelled before forward':unequal(seen=stop('before_batch', CancelBatchException, (0,3),(1,7))),
    'last micro-batch cancelled after forward':unequal(seen=stop('after_loss', CancelBatchException, (0,3),(1,7))),
    'last micro-batch cancelled after forward on one rank':unequal(seen=stop('after_loss', CancelBatchException, (0,3),(1,7), ranks=[1])),
    'last backward cancelled':unequal(seen=stop('before_backward', CancelBackwardException, (0,3),(1,7))),
    'micro-batch cancelled on one rank':unequal(seen=stop('after_loss', CancelBatchException, (0,1),(0,4),(1,2), ranks=[0])),
    'window cancelled on one rank':unequal(seen=stop('after_loss', CancelBatchException, (0,0),(0,1),(0,2),(0,3),(1,8),(1,9), ranks=[1])),
    'nan on one rank':unequal(seen=partial(Spoils, at=((0,1),(0,3),(1,2),(1,7)), ranks=[1])),
    'windows of nan on one rank':unequal(seen=partial(Spoils, at=((0,0),(0,1),(0,2),(0,3),(1,8),(1,9)), ranks=[0])),
    'one rank ends early, with buffers':case(n=71, dl=EndsEarly, model=Buffered),
    'last micro-batch cancelled before forward on one rank, with buffers':unequal(seen=stop('before_batch', CancelBatchException, (0,3),(1,7), ranks=[1]), model=Buffered),
    'class weights':case(n=73, loss=WEIGHTED),
    'loss that shows its denominator':case(n=73, loss=shows),
    'micro-batches that count nothing':case(n=73, loss=nn.CrossEntropyLoss(ignore_index=1)),
    'gradients as bucket views':unequal(opt='adamw', ddp=dict(gradient_as_bucket_view=True), seen=stop('before_batch', CancelTrainException, (0,6))),
    'unused parameters':unequal(ddp=dict(find_unused_parameters=True), model=Extra, seen=stop('before_batch', CancelTrainException, (0,6))),
    'dropped leftover':case(n=72, acc=partial(AccumulateStep, N_STEP, leftover='drop')),
    'recorder':case(n=73, dtype=torch.float32),
})
class Finder(LRFinder):
    "`lr_find`'s training, without the saving and loading that make it hang under `distrib_ctx`, with or without accumulation"
    def before_fit(self):
        ParamScheduler.before_fit(self)
        self.best_loss = float('inf')
    after_fit = ParamScheduler.after_fit

OTHERS = {'fastai':case(n=64, acc=partial(GradientAccumulation, N_STEP*BS)),
          'lr_find':case(n=73, dtype=torch.float32, fit=lambda l: l.fit(1, cbs=Finder(num_it=30, stop_div=False))),
          'nan everywhere':unequal(seen=partial(Spoils, at=((0,4),(0,5),(0,6),(0,7)))),
          'lr_find diverges':case(n=73, dtype=torch.float32, fit=lambda l: l.fit(1, cbs=Finder(end_lr=1e4, num_it=30)))}

def make(c, acc=None, loss=None, **kwargs):
    data = problem(c.n+16)
    learn = learner(c.n, BS, acc, opt_func=OPTS[c.opt], loss_func=loss or c.loss, data=data, dtype=c.dtype, model=c.model, **kwargs)
    learn.data_x = data[0].to(c.dtype)
    return learn

# what each of the processes does
def work(c):
    comm,seen = Comm(),c.seen()
    learn = make(c, c.acc(), cbs=[seen,comm], **c.kwargs)
    if c.dl: learn.dls.loaders[0] = c.dl(learn.dls.train, device='cpu')
    with learn.distrib_ctx(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(**c.ddp)] if c.ddp else None): run(learn, c.fit)
    rec = {k:getattr(learn.recorder, k) for k in ('lrs','iters','losses','values','metric_names','hps')} if hasattr(learn, 'recorder') else None
    return dict(steps=learn.trace.steps, batches=learn.trace.batches, ids=seen.ids, n_dl=seen.n_dl, log=comm.log, rec=rec, said=seen.said, synced=comm.ddp.require_backward_grad_sync)

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "Run all cases in two processes; what each of them saw of one case"
    return in_two(__file__, tmp_path_factory.mktemp('two'), {**CASES, **OTHERS})

class Given(DataLoader):
    "The batches of sample ids in `epochs`, whatever the length"
    n_dl,epochs = None,None
    def __len__(self): return self.n_dl
    def create_batches(self, samps):
        for ids in self.epochs.pop(0): yield self.do_batch([self.do_item(i) for i in ids])

def chunks(mbs, n): return [mbs[i:i+n] for i in range(0, len(mbs), n)]
def n_windows(c, ranks): return (math.floor if c.acc().leftover=='drop' else math.ceil)(max(r['n_dl'] for r in ranks)/c.n_step)
def windows(c, ranks):
    "The samples of each global batch, by epoch"
    epochs = [[sum(sum(w, []), []) for w in zip(*(chunks(mbs, c.n_step) for mbs in e))] for e in zip(*(r['ids'] for r in ranks))]
    return [e[:n_windows(c, ranks)] for e in epochs]

def large(c, ranks):
    "One process, one batch a step"
    learn,epochs = make(c, loss=c.large_loss),windows(c, ranks)
    learn.dls.loaders[0] = Given(learn.dls.train.dataset, bs=1)
    learn.dls.train.epochs,learn.dls.train.n_dl = list(epochs),n_windows(c, ranks)
    run(learn, c.fit)
    return learn,sum(map(len, epochs))

@pytest.mark.parametrize('name', CASES)
def test_global_batch(name, two):
    "Weights, optimizer state, schedule, counters and losses are the one process's, and ranks agree to the bit"
    c,ranks = CASES[name],two(name)
    one,n = large(c, ranks)
    a,b = ([{k:v for k,v in s.items() if k in ('weights','state')} for s in r['steps']] for r in ranks)
    assert str(a)==str(b) and all((s['weights']==t['weights']).all() and (s['state']==t['state']).all() for s,t in zip(a, b))
    tol = 1e-12 if c.dtype==torch.float64 else 1e-5
    for r in ranks:
        small = SimpleNamespace(trace=SimpleNamespace(**{k:r[k] for k in ('steps','batches')}))
        small.trace.steps = r['steps']
        assert_same_run(SimpleNamespace(trace=one.trace), small, tol)
    if c.dtype==torch.float32: assert_same_records(one.recorder, SimpleNamespace(**ranks[0]['rec']), tol)
    assert len(one.trace.steps)==n

@pytest.mark.parametrize('name', CASES)
def test_all_reduces(name, two):
    "A window has one all-reduce of the gradients and one of two numbers, however many micro-batches it has"
    c,ranks = CASES[name],two(name)
    n,n_par = sum(map(len, windows(c, ranks))),sum(p.numel() for p in (c.model or net)().parameters())
    twice = 2 if name=='last backward cancelled' else 0 # these windows have counted a micro-batch that then had no gradient
    for r in ranks:
        log = Counter(r['log'])
        assert log=={n_par:n, 2:n+twice}, log
        assert r['synced']

def test_fastai_all_reduces(two):
    "fastai's own callback communicates at every micro-batch"
    for r in two('fastai'): assert len(r['log'])==sum(map(len, r['ids']))==16 and len(r['steps'])==4

def test_lr_find(two):
    "It takes `num_it` steps, though an epoch is shorter on several processes; if training diverges, all stop at the same step"
    assert [len(r['steps']) for r in two('lr_find')]==[30,30]
    n,m = (len(r['steps']) for r in two('lr_find diverges'))
    assert n==m<30

@pytest.mark.parametrize('name', ('even shards sgd','padded shard sgd','window of one sgd','n_samples sgd'))
def test_effective_bs(name, two):
    "Samples of a step in both processes"
    ranks = two(name)
    assert [r['said'] for r in ranks]==[max(map(len, sum(windows(CASES[name], ranks), [])))]*2

def test_padding(two):
    "What the shards of 73 samples hold: 37 each, one sample twice"
    seen = [Counter(sum(r['ids'][0], [])) for r in two('padded shard sgd')]
    assert [sum(s.values()) for s in seen]==[37,37] and sorted((seen[0]+seen[1]).values())==[1]*72+[2]

def test_nan_everywhere(two):
    "A window of which nothing is left in any process makes no step, and is recorded as the one before"
    for r in two('nan everywhere'):
        w,losses = [s['weights'] for s in r['steps']],[b['loss'] for b in r['batches']]
        assert (w[0]==w[1]).all() and (w[1]!=w[2]).any() and losses[0]==losses[1]!=losses[2] and len(losses)==6

if __name__=='__main__': work_on({**CASES, **OTHERS}, work)
