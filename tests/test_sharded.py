"`MicroBatch` on a model that two processes share is the plain run of it, or is refused; this file is also what they run"
import gc
from types import SimpleNamespace
import pytest
from common import *
from processes import *
try: from torch.distributed.fsdp import fully_shard
except ImportError: pytest.skip('torch without `fully_shard`', allow_module_level=True)

BS,MICRO = 16,5

class Own(nn.CrossEntropyLoss):
    "A loss that says what it divides by"
    def denominator(self, pred, targ): return (targ>=0).sum()

class Unknown(nn.Module):
    "A mean over samples, whose type does not tell"
    def forward(self, pred, targ): return F.multi_margin_loss(pred, targ.clamp(min=0))

def split(xb, yb, bs): return [(tuple(x[i:i+bs] for x in xb),tuple(y[i:i+bs] for y in yb)) for i in range(0, len(xb[0]), bs)]
def counted(learn): return max(1, int((learn.y>=0).sum()))
def case(loss=nn.CrossEntropyLoss, b=partial(MicroBatch, MICRO), model=net): return SimpleNamespace(**locals())
def norm(): return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

SAME = {'ignored targets':case(), 'samples':case(Unknown, b=partial(MicroBatch, MICRO, normalize='samples')), 'sums':case(partial(nn.CrossEntropyLoss, reduction='sum'))}
NORMED = case(b=partial(MicroBatch, MICRO, sync_bn='stats'), model=norm)
REFUSED = {'normalize':case(b=partial(MicroBatch, MICRO, normalize=counted)), 'denominator':case(Own), 'unknown':case(Unknown), 'split':case(b=partial(MicroBatch, MICRO, split=split)),
           'exact BatchNorm':case(b=partial(MicroBatch, MICRO, sync_bn=True), model=norm), 'accumulate':case(b=partial(AccumulateStep, 4)), 'auto':case(b=MicroBatch)}
CASES = {**SAME, **REFUSED, 'stats':NORMED}

# what each of the processes does
def work(c):
    def trained(acc=None):
        rank = torch.distributed.get_rank()
        x,y = problem(73+16, seed=rank)
        y[torch.rand(len(y), generator=torch.Generator().manual_seed(rank))<0.3+0.3*rank] = -100
        learn = learner(73, BS, acc, data=(x,y), loss_func=c.loss(), model=c.model)
        learn.remove_cb(Trace)
        learn.splitter = trainable_params
        seed(0)
        learn.model.load_state_dict(c.model().double().state_dict()) # the same for both
        fully_shard(learn.model)
        try: run(learn, lambda l: l.fit(2, 0.05))
        except ValueError as e: return str(e)
        return flat(p.full_tensor() if hasattr(p, 'full_tensor') else p for p in learn.model.parameters())
    return [trained(),trained(c.b())]

@pytest.fixture(scope='module')
def two(tmp_path_factory): return in_two(__file__, tmp_path_factory.mktemp('two'), CASES)

@pytest.mark.parametrize('name', SAME)
def test_same_run(name, two):
    for a,b in two(name): assert torch.is_tensor(b) and rel(a, b)<1e-12, b

@pytest.mark.parametrize('name', REFUSED)
def test_refused(name, two):
    for a,b in two(name): assert torch.is_tensor(a) and 'the model is a FSDPSequential' in b

def test_running_statistics(two):
    "The cure for exact BatchNorm trains, each micro-batch normalized by itself"
    for a,b in two('stats'): assert torch.is_tensor(b) and 1e-6 < rel(a, b) < 1

if __name__=='__main__':
    gc.freeze()
    work_on(CASES, work)
