"Exact BatchNorm in two processes is that of each process's whole batch, as without micro-batches; this file is also what the two processes run"
from types import SimpleNamespace
import pytest
from common import *
from processes import *
from test_distributed import Cut
from test_batchnorm import BN,MODELS,Res,Seen,exact,images,first_norm,stats
from test_companions import Mixed

BS = 8
def fit(l): l.fit_one_cycle(2, 0.1)
def still(l): l.fit(2, 0.)

class Sync(Callback):
    "Make `SyncBatchNorm` of BatchNorm where `distrib_ctx` does so, if there is no GPU too"
    order = 13
    def before_fit(self): nn.SyncBatchNorm.convert_sync_batchnorm(self.model.module)

class Extra(Res):
    "With a parameter that is not used"
    def __init__(self): super().__init__(); self.p = nn.Parameter(torch.ones(2))

def clips(): return [Mixed(full=True, init_scale=2.**10, growth_interval=3), GradientClip(0.05)]
def case(a=noop, b=exact, n=29, bs=(BS,BS), dl=None, ddp=None, fit=fit, model=Res, data=None, cbs=list, opt=partial(SGD, mom=0.9)): return SimpleNamespace(**locals())
SAME = {'residual':case(), 'uneven shards':case(n=71, dl=Cut), 'momentum None':case(model=partial(Res, partial(BN, momentum=None))), 'no broadcast':case(ddp=dict(broadcast_buffers=False)),
        'DynamicUnet':case(**MODELS['DynamicUnet']), 'attributes':case(**MODELS['attributes']), 'unused parameters':case(model=Extra, ddp=dict(find_unused_parameters=True)),
        'bucket views':case(opt=partial(OptimWrapper, opt=torch.optim.AdamW, eps=1e-3), ddp=dict(gradient_as_bucket_view=True)), 'scaler and clip':case(cbs=clips)}
STATS = {'MicroBatch':case(b=stats, fit=still, model=first_norm()), 'AccumulateStep':case(b=lambda: AccumulateStep(2, sync_bn='stats'), bs=(BS,BS//2), fit=still, model=first_norm())}
REFUSED = {'SyncBatchNorm':case(cbs=lambda: [Sync()]), "SyncBatchNorm, 'stats'":case(b=stats, cbs=lambda: [Sync()])}
CASES = {**SAME, **STATS, **REFUSED}

# what each of the processes does
def work(c, acc, bs):
    learn = learner(c.n, bs, acc, data=c.data or images(c.n), model=c.model, opt_func=c.opt, cbs=[*c.cbs(), Seen()])
    if c.dl: learn.dls.loaders[0] = c.dl(learn.dls.train, device='cpu')
    err = None
    try:
        with learn.distrib_ctx(sync_bn=False, cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(**c.ddp)] if c.ddp else None): run(learn, c.fit)
    except (ValueError,RuntimeError) as e: err = f'{type(e).__name__}: {e}'
    return dict(err=err, trace=SimpleNamespace(steps=getattr(learn.trace, 'steps', []), batches=getattr(learn.trace, 'batches', [])), grads=learn.seen.grads, bufs=learn.seen.bufs,
                end=[b.clone() for b in learn.model.buffers()], rng=torch.get_rng_state())

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "Run all cases in two processes; what each of them saw of one case, with `a` and with `b`"
    return in_two(__file__, tmp_path_factory.mktemp('two'), CASES)

@pytest.mark.parametrize('name', SAME)
def test_same_run(name, two):
    "Gradients, weights, losses and the buffers of each process are those of plain training; processes agree to the bit"
    ranks = two(name)
    for a,b in ranks:
        assert a['err'] is None and b['err'] is None, b['err']
        assert_same_run(*(SimpleNamespace(trace=o['trace']) for o in (a,b)), 1e-12)
        for k in ('grads','bufs'):
            assert len(a[k])==len(b[k])>0
            for s,t in zip(a[k], b[k]): assert max(map(rel, s, t))<=1e-12, k
        assert torch.equal(a['rng'], b['rng'])
    for s,t in zip(*(b['trace'].steps for _,b in ranks)): assert torch.equal(s['weights'], t['weights'])

@pytest.mark.parametrize('name', STATS)
def test_stats(name, two):
    "The first layer's running statistics are those of plain training, and its count is that of steps"
    for a,b in two(name):
        assert a['err'] is None and b['err'] is None, b['err']
        assert len(a['bufs'])==len(b['bufs'])==4
        for s,t in zip(a['bufs'], b['bufs']): assert max(map(rel, s[:3], t[:3]))<=1e-12 and int(t[2])==int(t[5])

@pytest.mark.parametrize('name', REFUSED)
def test_refused(name, two):
    for a,b in two(name): assert not b['trace'].steps and b['err'].startswith('ValueError') and 'take `distrib_ctx(sync_bn=False)`' in b['err']

if __name__=='__main__': work_on(CASES, lambda c: [work(c, acc(), bs) for acc,bs in zip((c.a,c.b), c.bs)])
