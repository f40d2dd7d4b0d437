"`MicroBatch(sync_loss=True)` in two processes is the plain run of these two processes; this file is also what they run"
import gc
from types import SimpleNamespace
import pytest
from common import *
from processes import *
from torch.distributed.nn.functional import all_gather
from test_distributed import Cut
from test_microbatch_distributed import BS,Limited,Normal,Normed,NormedExtra,Scaled,case,clip,mixed,shift,traced,unused,views,work
from test_sync_loss import batch_hard,supcon
try: from torch.distributed.fsdp import fully_shard
except ImportError: fully_shard = None

def one(z, y): return supcon((z,z.roll(1, 1)), y)
def gathered(z, y):
    "A loss of all samples of all processes"
    if not torch.is_grad_enabled(): return one(z, y) # validation has batches of one process
    return batch_hard(torch.cat(all_gather(z)), torch.cat(all_gather(y)))

def micro(*args, **kwargs): return partial(MicroBatch, *(args or (5,)), sync_loss=True, **kwargs)
CASES = {
    'contrastive':case(b=micro(), loss=one, n=73),
    'uneven shards':case(b=micro(valid=True), loss=one, n=71, dl=Cut),
    'one sample each':case(b=micro(1), loss=one, n=64),
    'gathered':case(b=micro(), loss=gathered, n=64, opt='adam'),
    'gathered, exact BatchNorm':case(b=micro(sync_bn=True), loss=gathered, n=64, model=Normal),
    'gathered, scaler and clip':case(b=micro(), loss=gathered, n=64, opt='adam', cbs=lambda: mixed()()+clip()),
    'buffers':case(b=micro(4, valid=True), loss=one, model=Scaled, cbs=shift),
    'unused parameters':case(b=micro(), loss=one, model=NormedExtra, a=micro(5), **unused),
    'bucket views':case(b=micro(), loss=one, **views),
    'auto':case(b=micro('auto'), loss=gathered, n=64, model=Scaled, cbs=shift, most={1:5}),
    'auto, in backward':case(b=micro('auto'), loss=gathered, n=64, model=Scaled, cbs=shift, most={1:5}, where='backward'),
    'auto, exact BatchNorm':case(b=micro('auto', sync_bn=True), loss=gathered, n=64, model=Normal, most={1:5}),
    'auto, enough memory':case(b=micro('auto'), loss=gathered, n=64, model=Normal),
}

def sharded():
    "Weights of a model that both processes share, after a plain run and one in micro-batches"
    def trained(acc=None):
        rank = torch.distributed.get_rank()
        learn = learner(73, BS, acc, data=problem(73+16, seed=rank), loss_func=one)
        learn.remove_cb(Trace)
        learn.splitter = trainable_params
        seed(0)
        learn.model.load_state_dict(net().double().state_dict()) # the same for both
        fully_shard(learn.model)
        run(learn, lambda l: l.fit(2, 0.05))
        return flat(p.full_tensor() if hasattr(p, 'full_tensor') else p for p in learn.model.parameters())
    return trained(),trained(micro()())

@pytest.fixture(scope='module')
def two(tmp_path_factory): return in_two(__file__, tmp_path_factory.mktemp('two'), ALL)

@pytest.mark.parametrize('name', CASES)
def test_same_run(name, two):
    "Weights, optimizer state, losses, buffers and the next random number in each process; both have the same weights; gradients are reduced once a batch"
    res = two(name)
    for a,b in res:
        assert a['err'] is None and b['err'] is None, b['err']
        assert_same_run(traced(a), traced(b), 1e-12)
        assert rel(flat(a['bufs']), flat(b['bufs']))<=1e-12 and rel(a['end'], b['end'])<=1e-12 and torch.equal(a['rng'], b['rng'])
        assert b['synced'] and [n for n in b['log'] if n!=1]==[n for n in a['log'] if n!=1] and len(a['log'])==len(a['steps'])>0
    (_,b),(_,c) = res
    for s,t in zip(b['steps'], c['steps']): assert torch.equal(s['weights'], t['weights'])
    if 'auto' in name: assert all(list(o['found'].values())==([] if 'enough' in name else [4]) for o in (b,c))

@pytest.mark.skipif(fully_shard is None, reason='torch without `fully_shard`')
def test_sharded(two):
    for a,b in two('sharded'): assert rel(a, b)<=1e-12

ALL = {**CASES, 'sharded':None}
if __name__=='__main__':
    gc.freeze() # else each of the collections after an error takes as long as a case
    work_on(ALL, lambda c: [work(c, cb) for cb in (c.a, c.b)] if c else sharded())
