"`MicroBatch` in two processes under `distrib_ctx` is the plain run of these two processes; this file is also what they run"
import gc,re
from contextlib import nullcontext
from types import SimpleNamespace
import pytest
from common import *
from processes import *
from test_distributed import W,CE,WEIGHTED,OPTS,counted,fit,stop,Comm,Cut,Extra
from test_companions import Mixed,Spoil,y_int,lm_maker

BS,MICRO = 16,4
TOL = {torch.float64:1e-12, torch.float32:1e-5}

# ---- what the processes train

class Fails(torch.autograd.Function):
    "Memory runs out in the backward pass"
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g): raise torch.OutOfMemoryError('out of memory, as told')

class Limited(nn.Sequential):
    "A net that runs out of memory with more than `most` samples, by the number of the forward pass from which on that is so, on `ranks`"
    most,where,ranks,training_part = {},'forward',(1,),True
    calls = 0 # of the class, as what a model keeps is undone
    def __init__(self): super().__init__(*net()); Limited.calls = 0
    def forward(self, x):
        res = super().forward(x)
        if self.training!=self.training_part or rank_distrib() not in self.ranks: return res
        Limited.calls += 1
        most = [m for i,m in {0:10**6, **self.most}.items() if i<=Limited.calls][-1]
        if len(x)<=most: return res
        if self.where=='backward': return Fails.apply(res)
        raise torch.OutOfMemoryError('out of memory, as told')

class Normal(Limited):
    "With a BatchNorm, whose statistics are a process's own"
    def __init__(self): super().__init__(); self.insert(1, nn.BatchNorm1d(8))

class Normed(Limited):
    "BatchNorm, dropout and a count of forward passes: what a batch that is repeated has to put back"
    def __init__(self):
        super().__init__()
        self.insert(1, nn.BatchNorm1d(8))
        self.insert(3, nn.Dropout(0.3))
        self.register_buffer('n', torch.zeros(2))
    def forward(self, x):
        if self.training: self.n += 1
        return super().forward(x)

class NormedExtra(Normed):
    "With a parameter that it does not use"
    def __init__(self): super().__init__(); self.p = nn.Parameter(torch.ones(2))

class Scaled(Limited):
    "A net that uses a buffer, which DDP takes from rank 0"
    def __init__(self): super().__init__(); self.register_buffer('by', torch.ones(3))
    def forward(self, x): return super().forward(x)*self.by

class Mean(Scaled):
    "A net of the mean of a sample's rows"
    def forward(self, x): return super().forward(x.mean(1))

class Rows(Callback):
    "Samples have more rows in one process than in the other, and then it is the other way round"
    def before_batch(self): self.learn.xb = (self.x[:,None].repeat(1, 8 if (self.iter+rank_distrib())%2 else 1, 1),)

class Shift(Callback):
    "Each process has its own idea of the buffer, before every batch"
    def before_batch(self): self.model.module.by += 0.1*(1+rank_distrib())

class Own(nn.CrossEntropyLoss):
    "A loss that says what it divides by"
    def denominator(self, pred, targ): return W[targ].sum()

def shows(pred, targ):
    "Only its graph tells what it divides by"
    return F.cross_entropy(pred, targ, weight=W)

class NothingCounts(nn.Module):
    "A loss for which no target counts in the other process, that says so by a number or a tensor"
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, pred, targ): return F.cross_entropy(pred, targ)*(1-rank_distrib())
    def denominator(self, pred, targ): return self.f(len(targ)*(1-rank_distrib()))

class Buffers(Callback):
    "The model's buffers after each step, and how many batches there were for validation"
    order = 99
    def before_fit(self): self.seen,self.n_valid = [],0
    def after_step(self): self.seen.append(flat(self.model.buffers()))
    def after_batch(self): self.n_valid += not self.training

class Sync(Callback):
    "Make `SyncBatchNorm` of BatchNorm where `distrib_ctx` does so, if there is no GPU too"
    order = 13
    def before_fit(self): nn.SyncBatchNorm.convert_sync_batchnorm(self.model.module)

class CancelLast(Callback):
    "Cancel the backward pass of the last micro-batch"
    order,run_valid = 50,False
    def before_batch(self): self.n = 0
    def before_backward(self):
        self.n += len(self.x)
        if self.n==BS: raise CancelBackwardException

def split(xb, yb, bs): return [(tuple(x[i::2] for x in xb),tuple(y[i::2] for y in yb)) for i in range(2)]

# ---- cases: the runs with `a` and with `b` are to be the same

def case(a=noop, b=partial(MicroBatch, MICRO), n=73, opt='sgd', loss=CE, dl=None, ddp=None, fit=fit, dtype=torch.float64, model=net,
         cbs=list, make=None, distrib=True, rng=True, losses=True, **limits): return SimpleNamespace(**locals())
def micro(*args, **kw): return dict(b=partial(MicroBatch, *args, **kw))
def counting(*args): return dict(micro(*args, normalize=counted), loss=WEIGHTED)
def mixed(*by): return lambda: [Mixed(full=True, init_scale=2.**10, growth_interval=3), *map(Spoil, by)]
def shift(): return [Shift()]
def clip(): return [GradientClip(0.05)]
def cancel(*args): return dict(cbs=lambda: [stop(*args)()])
views,unused = dict(opt='adamw', ddp=dict(gradient_as_bucket_view=True)),dict(ddp=dict(find_unused_parameters=True))

SAME = {**{f'{name} {opt}':case(opt=opt, **kw) for opt in ('sgd','adam') for name,kw in {
    'even shards':dict(n=64),
    'uneven last batch':dict(),
    'uneven shards':dict(n=71, dl=Cut),
    'uneven micro-batches':micro(6),
    'custom denominators':counting(4)}.items()},
    'one sample each':case(**micro(1)),
    'records':case(dtype=torch.float32),
    'class weights':case(loss=WEIGHTED),
    'micro-batches that count nothing':case(**micro(1), n=64, loss=nn.CrossEntropyLoss(ignore_index=1)),
    'loss that sums':case(loss=nn.CrossEntropyLoss(reduction='sum'), fit=lambda l: l.fit_one_cycle(2, 1e-3)),
    'loss with a denominator':case(n=71, dl=Cut, loss=Own(weight=W)),
    'loss that shows its denominator':case(n=71, dl=Cut, loss=shows),
    'uneven shards, custom denominators':case(**counting(4), n=71, dl=Cut),
    'own split':case(**micro(8, split=split), n=64),
    'clip':case(cbs=clip),
    'clip, custom denominators':case(**counting(4), cbs=clip),
    'scaler':case(opt='adam', cbs=mixed()),
    'scaler, overflow':case(opt='adam', n=64, cbs=mixed(float('inf'))),
    'scaler, custom denominators':case(**counting(4), opt='adam', cbs=mixed()),
    'bucket views':case(**views),
    'bucket views, custom denominators':case(**counting(4), **views),
    'unused parameters':case(model=Extra, **unused),
    'unused parameters, custom denominators':case(**counting(4), model=Extra, **unused),
    'buffers':case(model=Scaled, cbs=shift),
    'buffers, custom denominators':case(**counting(4), model=Scaled, cbs=shift),
    'buffers, validation in parts':case(**micro(4, valid=True), model=Scaled, cbs=shift),
    'BatchNorm, whole batches':case(**micro(BS), model=Normed),
    'exact BatchNorm':case(**micro(4, sync_bn=True), model=Normal),
    'exact BatchNorm, custom denominators':case(**{**counting(4), **micro(4, normalize=counted, sync_bn=True)}, model=Normal),
    'exact BatchNorm, scaler and clip':case(**micro(4, sync_bn=True), model=Normal, opt='adam', cbs=lambda: mixed()()+clip()),
    'MixUp':case(n=71, dtype=torch.float32, loss=y_int(), cbs=lambda: [MixUp()]),
    # what is recorded is the loss of the micro-batch
    'batch cancelled':case(**cancel('after_loss', CancelBatchException, (0,1),(1,0)), losses=False),
    'backward cancelled':case(**cancel('before_backward', CancelBackwardException, (0,1),(1,0)), losses=False),
    'train cancelled':case(**cancel('after_loss', CancelTrainException, (0,1))),
    # a forward pass draws a mask of the weights, of ones
    'language model':case(make=lm_maker(n=73, alpha=0, beta=0), dtype=torch.float32, rng=False),
    'language model, AR and TAR':case(make=lm_maker(n=73, alpha=2, beta=1), dtype=torch.float32, rng=False),
}
def auto(bs=None, normalize='auto', **kw):
    "A size that is found, against `bs` from the start, or against no callback for a model to which the size does not matter"
    kw = {**(dict(model=Normed) if bs else dict(model=Scaled, cbs=shift)), **kw}
    return case(**{**dict(a=partial(MicroBatch, bs, normalize, valid=True) if bs else noop, b=partial(MicroBatch, normalize=normalize)), **kw})
AUTO = {
    'enough memory':auto(BS),
    'in forward':auto(4, most={1:5}),
    'in backward':auto(4, most={1:5}, where='backward'),
    'on rank 0':auto(4, most={1:5}, ranks=(0,)),
    'on both, in backward':auto(4, most={1:5}, ranks=(0,1), where='backward'),
    'uneven shards':auto(most={1:4}, n=71, dl=Cut),
    'adam, in backward':auto(3, most={1:3}, n=64, opt='adam', where='backward'),
    'custom denominators':auto(4, counted, most={1:5}, loss=WEIGHTED),
    'bucket views':auto(4, most={1:5}, **views),
    'bucket views, in backward':auto(4, most={1:5}, where='backward', **views),
    'unused parameters':auto(4, most={1:5}, model=NormedExtra, **unused),
    'scaler':auto(4, most={1:5}, cbs=mixed(), where='backward'),
    'clip':auto(4, most={1:5}, cbs=clip),
    'exact BatchNorm':auto(most={1:5}, b=partial(MicroBatch, sync_bn=True), model=Normal, cbs=list),
    'exact BatchNorm, in backward':auto(most={1:5}, b=partial(MicroBatch, sync_bn=True), model=Normal, cbs=list, where='backward'),
    'one sample':auto(most={1:1}),
    'buffers':auto(most={1:5}),
    'buffers, in backward':auto(most={1:5}, where='backward'),
    'once':auto(most={1:5, 2:BS}),
    'later':auto(most={3:5}, opt='adam'),
    'later, in backward':auto(most={3:5}, opt='adam', where='backward'),
    'within a batch':auto(most={1:5, 11:3}), # the second of four parts of the second batch
    'within a batch, in backward':auto(most={1:5, 11:3}, where='backward'),
    'in validation':auto(most={1:3}, training_part=False),
    'inputs of different shapes':auto(most={1:5}, model=Mean, cbs=lambda: [Rows(), Shift()]),
}
ERRORS = {
    'no memory for one sample':auto(most={1:0}),
    'no memory for one sample, in backward':auto(most={1:0}, where='backward'),
    'SyncBatchNorm':auto(model=Normed, cbs=lambda: [Sync()]),
    'no DDP':auto(distrib=False, cbs=list),
}
LAST = {
    'backward of the last micro-batch cancelled':case(n=64, cbs=lambda: [CancelLast()]),
    'backward of the last micro-batch cancelled, custom denominators':case(**counting(4), n=64, cbs=lambda: [CancelLast()]),
}
NOTHING = {
    'nothing counts in one process, a tensor':case(loss=NothingCounts(torch.tensor)),
    'nothing counts in one process, a number':case(loss=NothingCounts(int)),
}
CASES = {**SAME, **{f'auto: {k}':c for k,c in AUTO.items()}, **ERRORS, **LAST, **NOTHING}

# what each of the processes does
def work(c, cb):
    acc,comm,seen = cb(),Comm(),Buffers()
    if c.make: learn = c.make(BS, acc).add_cbs([comm, seen])
    else:
        data = problem(c.n+16)
        learn = learner(c.n, BS, acc, opt_func=OPTS[c.opt], loss_func=c.loss, data=data, dtype=c.dtype, model=c.model, cbs=[*c.cbs(), comm, seen])
        learn.data_x = data[0].to(c.dtype)
    if acc is not None and acc.auto:
        for k,v in c.limits.items(): setattr(learn.model, k, v)
    if c.dl: learn.dls.loaders[0] = c.dl(learn.dls.train, device='cpu')
    handlers = [DistributedDataParallelKwargs(**c.ddp)] if c.ddp else None
    ctx = partial(learn.distrib_ctx, sync_bn=False, cpu=True, kwargs_handlers=handlers) if c.distrib else nullcontext
    if not c.distrib: learn.remove_cb(comm)
    err,start = None,flat(learn.model.parameters())
    try:
        with ctx(): run(learn, c.fit)
    except (ValueError,RuntimeError) as e: err = type(e).__name__,str(e)
    finally:
        if hasattr(comm, 'all_reduce'): torch.distributed.all_reduce = comm.all_reduce
    rec = {k:getattr(learn.recorder, k) for k in ('lrs','iters','losses','values','metric_names','hps')} if hasattr(learn, 'recorder') else None
    return dict(steps=getattr(learn.trace, 'steps', []), batches=getattr(learn.trace, 'batches', []), bufs=seen.seen, n_valid=seen.n_valid, log=comm.log,
                rec=rec, err=err, start=start, end=flat(learn.model.parameters()), rng=torch.get_rng_state(), bs=getattr(acc, 'bs', None), auto=getattr(acc, 'auto', False),
                found=getattr(acc, 'sizes', {}), synced=not hasattr(comm, 'ddp') or comm.ddp.require_backward_grad_sync)

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "Run all cases in two processes; what each of them saw of one case, with `a` and with `b`"
    return in_two(__file__, tmp_path_factory.mktemp('two'), CASES)

def runs(name, two):
    "Of each process what it saw with `a` and with `b`"
    res = two(name)
    for a,b in res: assert a['err'] is None and b['err'] is None, b['err']
    return res
def traced(r):
    res = SimpleNamespace(trace=SimpleNamespace(steps=r['steps'], batches=r['batches']))
    if r['rec']: res.recorder = SimpleNamespace(**r['rec'])
    return res
def tried(n, most):
    "`n` samples in 1, 2, 3, 4, 6, 8, ... parts, until there is memory for one: their sizes"
    sizes = [-(-n//k) for k in (1,2,3,4,6,8,12,16)]
    return [*dict.fromkeys(s for s in sizes if s>most), next(s for s in sizes if s<=most)]

@pytest.mark.parametrize('name', [k for k in CASES if k not in {**ERRORS, **LAST}])
def test_same_run(name, two):
    "Weights, optimizer state, schedule, counters, losses and buffers are the other run's in each process, and so is the next random number"
    c = CASES[name]
    tol = TOL[c.dtype]
    for a,b in runs(name, two):
        assert_same_run(traced(a), traced(b), tol, batches=c.losses)
        assert len(a['batches'])==len(b['batches'])
        assert rel(flat(a['bufs']), flat(b['bufs']))<=tol and rel(a['end'], b['end'])<=tol
        assert not c.rng or torch.equal(a['rng'], b['rng'])

@pytest.mark.parametrize('name', [k for k in CASES if k not in ERRORS])
def test_processes_agree(name, two):
    "After each step, both processes have the same weights and optimizer state, to the bit"
    for a,b in zip(*runs(name, two)):
        assert len(a['steps'])==len(b['steps'])>0
        for s,t in zip(a['steps'], b['steps']): assert torch.equal(s['weights'], t['weights']) and torch.equal(s['state'], t['state'])

@pytest.mark.parametrize('name', [k for k in CASES if k not in {**ERRORS, **LAST}])
def test_all_reduces(name, two):
    "Gradients are reduced once a batch, as without the callback; a size that is to be found takes one number each time that a batch is tried"
    for a,b in runs(name, two):
        assert a['synced'] and b['synced'] and len(a['log'])==len(a['steps'])-2*(name=='backward cancelled')
        # whoever cancels the backward pass of a whole batch leaves DDP waiting for one, which is the next batch's first
        assert name=='backward cancelled' or [n for n in b['log'] if n!=1]==a['log']
        retries = sum(len(tried(BS if train else BS//WORLD, n))-1 for (train,_),n in b['found'].items())
        assert b['log'].count(1)==(len(b['batches'])+b['n_valid']+retries if b['auto'] else 0)

@pytest.mark.parametrize('name', [f'auto: {k}' for k in AUTO])
def test_size(name, two):
    "Both processes find the size that the one with less memory needs, for training or for validation"
    c = CASES[name]
    train = c.limits.get('training_part', True)
    sizes = tried(BS if train else BS//WORLD, min(c.limits.get('most', {0:BS}).values()))
    if name=='auto: once': sizes = tried(BS, BS//2)
    for _,b in two(name):
        assert list(b['found'].values())==sizes[-1:]*(len(sizes)>1)
        assert b['bs']==(sizes[-1] if train else BS)

def errors(name, two):
    "What was raised; nothing was trained"
    for _,b in two(name): assert b['steps']==[] and torch.equal(b['start'], b['end']) and b['synced']
    return [b['err'] for _,b in two(name)]

@pytest.mark.parametrize('name', [k for k in ERRORS if k.startswith('no memory')])
def test_no_memory_for_one_sample(name, two):
    "The process in which that is so tells what could be done, and so does the other, instead of waiting for it"
    (kind0,other),(kind1,one) = errors(name, two)
    assert kind0=='RuntimeError' and re.search('another process ran out of memory with a micro-batch of one sample.*checkpointing', other)
    assert kind1=='OutOfMemoryError' and re.search(f"as told\n.*ran out of memory with 1 of a batch's {BS} samples.*checkpointing", one)

@pytest.mark.parametrize('name,why', (('SyncBatchNorm',r'SyncBatchNorm.*sync_bn=False'), ('no DDP','the model is a Scaled.*DistributedDataParallel')))
def test_refusals(name, why, two):
    "No size can be found where processes can't agree on one"
    for kind,err in errors(name, two): assert kind=='ValueError' and re.search(why, err) and re.search('Pass a number that fits', err)

if __name__=='__main__':
    gc.freeze() # else each of the collections after an error takes as long as a case
    work_on(CASES, lambda c: [work(c, cb) for cb in (c.a, c.b)])
