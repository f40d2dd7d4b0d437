"fastai 1: `learn.to_fp16()` beside `AccumulateStep` and `MicroBatch`, by its logic in half precision on the CPU, against a large batch in half precision"
import pytest
from common1 import *

HOSTS = {'accumulate':(BS,acc4), 'microbatch':(16,partial(MicroBatch, bs=4))}
each_host = pytest.mark.parametrize('host', HOSTS)

class Scales(LearnerCallback):
    "The loss scale of each batch, and the master weights after it"
    _order = 1000
    def __init__(self, learn): super().__init__(learn); learn.scales,learn.masters,learn.told = [],[],[]
    def on_batch_begin(self, train, **kw): self.was = self.learn.mp_cb.loss_scale
    def on_batch_end(self, train, last_loss, **kw):
        if not train: return
        self.learn.scales.append(self.was)
        self.learn.told.append(float(last_loss))
        self.learn.masters.append(flat(p for g in self.learn.mp_cb.master_params for p in g))

def wide(): return nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3))

def small_problem(n, big=()):
    x,y = problem(n+16)
    x = x.float()
    seed()
    model = wide()
    for i in big: # predicted wrongly, and with certainty
        x[i] *= 4000
        y[i] = model(x[i]).argmin()
    return x,y

def half(bs, acc, data, n=64, epochs=3, lr=0.1, **kw):
    learn = learner(n, bs, acc, model=wide, data=data, shuffle=False, fns=[Scales], wd=0.).to_fp16(**kw)
    seed(3)
    learn.fit(epochs, lr)
    assert clean(learn)
    return learn

class Full(Callback):
    "Weights after each batch in float32"
    def __init__(self, learn): self.learn,learn.masters = learn,[]
    def on_batch_end(self, train, **kw):
        if train: self.learn.masters.append(flat(p for g in self.learn.opt.opt.param_groups for p in g['params']))

def full(bs, data, n=64, epochs=3, lr=0.1, clip=None):
    "The run in float32, that half precision comes near"
    learn = learner(n, bs, None, model=wide, data=data, shuffle=False, fns=[Full], wd=0.)
    if clip: learn.callback_fns.append(partial(ClipGroups, clip=clip))
    seed(3)
    learn.fit(epochs, lr)
    return learn

class ClipGroups(LearnerCallback):
    "As `MixedPrecision` does, each group by itself"
    def __init__(self, learn, clip): super().__init__(learn); self.clip = clip
    def on_backward_end(self, **kw):
        for g in self.learn.opt.opt.param_groups: nn.utils.clip_grad_norm_(g['params'], self.clip)

KINDS = {'dynamic':dict(loss_scale=2.**24, max_noskip=3), 'static':dict(dynamic=False), 'flat':dict(flat_master=True, dynamic=False), 'clip':dict(dynamic=False, clip=0.05)}

@each_host
@pytest.mark.parametrize('kind', KINDS)
def test_fp16(host, kind):
    "The scale moves once a window and as the large batch's does; the run is as near the one in float32 as the large batch's is"
    data,kw = small_problem(64),KINDS[kind]
    large,small = half(16, None, data, **kw),half(*HOSTS[host], data, **kw)
    assert large.scales==small.scales and len(small.scales)==12
    if kind=='dynamic':
        assert len({*small.scales})>3 and any(b>a for a,b in zip(small.scales, small.scales[1:])) # down and up again
        assert [torch.equal(a, b) for a,b in zip(large.masters, large.masters[1:])]==[torch.equal(a, b) for a,b in zip(small.masters, small.masters[1:])]
        assert rel(large.masters[-1], small.masters[-1])<1e-3
    else:
        exact = full(16, data, clip=kw.get('clip'))
        assert rel(exact.masters[-1], small.masters[-1])<=1.5*rel(exact.masters[-1], large.masters[-1])<1e-3
    assert np.allclose(large.told, small.told, rtol=1e-2) and np.allclose([float(x) for x in large.recorder.losses], [float(x) for x in small.recorder.losses], rtol=1e-3)
    assert large.recorder.lrs==small.recorder.lrs

@each_host
@pytest.mark.parametrize('i', (16,21,31)) # in the first, the second and the last micro-batch of the second window
def test_one_overflow(host, i):
    "In one micro-batch: the step of its window is left out, and the scale is halved once"
    data = small_problem(64, big=[i])
    large,small = half(16, None, data, epochs=1, loss_scale=2.**13),half(*HOSTS[host], data, epochs=1, loss_scale=2.**13)
    assert large.scales==small.scales==[2.**13,2.**13,2.**12,2.**12]
    assert torch.equal(small.masters[0], small.masters[1]) and not torch.equal(small.masters[1], small.masters[2])

def test_sums_are_in_float32():
    "However many there are, they lose no digits: a step of 256 samples, one by one; sums in half precision would be ten times as far off"
    n = 256
    data,kw = small_problem(n),dict(n=n, epochs=1, dynamic=False, loss_scale=64.)
    large,small = half(n, None, data, **kw),half(1, partial(AccumulateStep, n_step=n), data, **kw)
    assert 0<rel(large.masters[0], small.masters[0])<4e-6

@each_host
def test_a_fit_that_dies(host):
    data = small_problem(64)
    learn = learner(64, *HOSTS[host], model=wide, data=data).to_fp16(dynamic=False)
    class Boom(Callback):
        n = 0
        def on_backward_begin(self, **kw):
            self.n += 1
            if self.n==3: raise ValueError('boom')
    with pytest.raises(ValueError, match='boom'): learn.fit(1, 0.1, callbacks=[Boom()])
    assert clean(learn)
    seed(3); learn.fit(1, 0.1)
    assert len(learn.recorder.losses)==4 and not torch.isnan(weights(learn)).any()

def test_on_and_off(tmp_path):
    "`lr_find`, one cycle, in half precision and back, on one learner"
    data = small_problem(64)
    learn = learner(64, BS, acc4, model=wide, data=data, path=tmp_path)
    for f in (lambda: learn.to_fp16(), lambda: learn.to_fp32(), lambda: learn.to_fp16(dynamic=False)):
        f()
        learn.lr_find(num_it=8, stop_div=False)
        assert len(learn.recorder.losses)==8
        learn.fit_one_cycle(2, 0.05)
        assert len(learn.recorder.losses)==8 and len(learn.recorder.lrs)==8
    assert float(learn.recorder.val_losses[-1])<1.
