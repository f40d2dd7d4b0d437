"A model over two GPUs, which PyTorch's fake tensors stand for: they have devices and no values, and refuse what mixes devices"
import pytest
from torch._subclasses import FakeTensorMode
from fastai_accum.window import Window,by_device,rescale
from fastai_accum.loop import Accumulator
from common import *

A,B = 'cuda:0','cuda:1'
f32 = torch.float32

@pytest.fixture(autouse=True)
def fake(monkeypatch):
    "PyTorch makes no backward pass on a GPU that is not there: gradients that it would leave stand for it"
    def backward(self, *args, **kwargs):
        assert self.device==torch.device(B) and self.requires_grad and not self.ndim
        for hook in list((self._backward_hooks or {}).values()): hook(torch.ones_like(self))
        for p in Spread.last.parameters(): p.grad = torch.ones_like(p) if p.grad is None else p.grad.add_(1)
    def mul(ts, scale, mul=torch._foreach_mul_):
        assert len({t.device for t in (*ts,scale) if isinstance(t, Tensor)})==1 # which fake tensors let pass
        mul(ts, scale)
    monkeypatch.setattr(Tensor, 'backward', backward)
    monkeypatch.setattr(torch, '_foreach_mul_', mul)
    with FakeTensorMode(): yield

class Spread(nn.Module):
    "A layer on each of two devices, as in pipelines and Hugging Face's `device_map`"
    def __init__(self):
        super().__init__()
        Spread.last,self.a,self.b = self,nn.Linear(6, 8, device=A),nn.Linear(8, 3, device=B)
    def forward(self, x): return self.b(self.a(x).tanh().to(B))

class MovesTargets(nn.Module):
    "Targets come on one device, outputs on another"
    def __init__(self, **kwargs): super().__init__(); self.loss = nn.CrossEntropyLoss(**kwargs)
    def forward(self, x, y): return self.loss(x, y.to(x.device))

class Subclass(nn.CrossEntropyLoss):
    def forward(self, x, y): return super().forward(x, y.to(x.device))

MOVES = {'moves':partial(MovesTargets, ignore_index=0), 'moves, all count':MovesTargets, 'moves, sum':partial(MovesTargets, reduction='sum'), 'subclass':partial(Subclass, ignore_index=0)}
LOSSES = MOVES | {'mean':nn.CrossEntropyLoss, 'ignored':partial(nn.CrossEntropyLoss, ignore_index=0), 'sum':partial(nn.CrossEntropyLoss, reduction='sum')}
def targets(name, n): return torch.zeros(n, dtype=torch.long, device=A if name in MOVES else B)
def batch(name, n): return torch.zeros(n, 6, device=A),targets(name, n)
def placed(m): return {(p.device,p.grad.device) for p in m.parameters()}=={(torch.device(d),)*2 for d in (A,B)}

@pytest.mark.parametrize('known', (False,True))
@pytest.mark.parametrize('c_device', (A,B))
@pytest.mark.parametrize('loss_device', (A,B))
def test_window(loss_device, c_device, known):
    "Losses, denominators and gradients, each where they are"
    m = Spread()
    for p in m.parameters(): p.grad = torch.ones_like(p)
    counts = torch.ones(2, dtype=torch.long, device=c_device)
    win = Window(2, counts=counts if known else None)
    for c in counts.unbind():
        loss = torch.ones((), device=loss_device, requires_grad=True)
        win.begin()
        w = win._known_share(loss) if known else win.weigh(loss, c, 2, (loss,))
        assert w.device==loss.device
        win.add(loss)
    assert win.close(m.parameters, counted=not known) and placed(m)
    rescale(m.parameters(), win.scale)
    assert win.mean_loss.device==torch.device(loss_device) and placed(m) and len(by_device(m.parameters()))==2

@pytest.mark.parametrize('o', LOSSES)
def test_loop(o):
    m = Spread()
    opt = torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)
    with Accumulator(m, opt, LOSSES[o](), n_step=2) as acc:
        for n in (4,4,3):
            x,y = batch(o, n)
            acc.backward(m(x), y)
        assert acc.win is not None
    assert len(acc.losses)==2 and {l.device for l in acc.losses}=={torch.device(B)}

class Batches(list): "A loader; fastai brings batches to the device of the first parameter"

class Stays(TrainEvalCallback):
    "Leaves the model where it is"
    def before_fit(self): self.learn.train_iter,self.learn.pct_train = 0,0.

def fit(o, n, k, *cbs):
    l = Learner(DataLoaders(Batches(batch(o, n) for _ in range(k)), Batches()), Spread(), loss_func=LOSSES[o](), opt_func=partial(SGD, mom=0.9), cbs=[Stays(),*cbs], default_cbs=False, splitter=trainable_params)
    l.logger,steps = noop,[]
    l.add_cb(Callback(before_step=lambda _: steps.append(placed(l.model))))
    l.fit(1, 0.1)
    assert steps and all(steps)
    return l

@pytest.mark.parametrize('o', MOVES)
@pytest.mark.parametrize('mk', (lambda: AccumulateStep(2), lambda: MicroBatch(3)), ids=('AccumulateStep','MicroBatch'))
def test_hosts(mk, o): fit(o, 8, 4, mk())

@pytest.mark.parametrize('o', ('moves','subclass'))
@pytest.mark.parametrize('mk', (lambda: AccumulateStep(3), lambda: MicroBatch(3)), ids=('AccumulateStep','MicroBatch'))
def test_noise_scale(mk, o):
    l = fit(o, 8, 6, mk(), NoiseScale())
    assert len(l.noise_scale.rows)==1 and l.noise_scale.rows[0].shape[1]==5
