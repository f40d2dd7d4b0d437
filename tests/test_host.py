"Nothing of ours makes the host wait for the device, and what fastai's own callback gets wrong stays visible"
import pytest
from collections import Counter
from copy import deepcopy
from torch.utils._python_dispatch import TorchDispatchMode
from fastai.callback.training import GradientAccumulation
from common import *
from fastai_accum.hosts import WindowBar

WAITS = '_local_scalar_dense is_nonzero nonzero equal unique _unique2 masked_select item'.split()

class Waits(TorchDispatchMode):
    "Count the operations that need a value on the host"
    def __init__(self): super().__init__(); self.n = Counter()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WAITS: self.n[name] += 1
        return func(*args, **(kwargs or {}))

class Quiet(Callback):
    "Count during training batches only: what fastai logs at an epoch's end is not ours"
    order = -300
    def before_train(self): self.mode = Waits(); self.mode.__enter__()
    def after_train(self): self.mode.__exit__(None, None, None)

@pytest.mark.parametrize('n', (64,73))
@pytest.mark.parametrize('normalize', ('auto','samples','none'))
@pytest.mark.parametrize('rec', (False,True))
def test_no_waits(n, normalize, rec):
    "As many waits as the large batch has, whatever the number of micro-batches; on the CPU, where there is no device to wait for, a step looks at its scale"
    def waits(bs, acc=None, fit=lambda l: l.fit(1, 0.01)):
        learn = learner(n, bs, acc, dtype=torch.float32 if rec else torch.float64, cbs=Quiet())
        steps = []
        learn.add_cb(Callback(after_step=lambda self: steps.append(1)))
        learn.remove_cb(Trace)
        run(learn, fit)
        looks = len(steps) if acc and normalize=='auto' else 0
        return learn.quiet.mode.n - Counter(_local_scalar_dense=looks)
    large = waits(16)
    assert rec or large.total()==1 # the loader's, as it starts
    for bs in (8,4,2,1): assert waits(bs, AccumulateStep(16//bs, normalize=normalize))==large
    cycle = lambda l: l.fit_one_cycle(1, 0.01) # fastai's schedule reads tensors itself, before every batch
    assert waits(4, AccumulateStep(4, normalize=normalize), cycle)==waits(4, fit=cycle)

def test_waits_are_seen():
    "The count does see a wait"
    learn = learner(64, 4, AccumulateStep(4, normalize=lambda learn: learn.y.sum()+1), cbs=Quiet())
    learn.remove_cb(Trace)
    run(learn, lambda l: l.fit(1, 0.01))
    assert learn.quiet.mode.n['_local_scalar_dense']==1+16

def test_bar_of_a_window_waits_for_nothing(monkeypatch):
    "What it shows while the window runs is counted by the host"
    monkeypatch.setattr(WindowBar, 'wait', 0.)
    def waits(acc, bs, cb):
        learn = learner(61, bs, acc, dtype=torch.float32, cbs=Quiet()).add_cb(cb)
        learn.remove_cb(Trace)
        run(learn, lambda l: l.fit(1, 0.01))
        return learn.quiet.mode.n.total()
    for acc,bs in ((AccumulateStep(4),4),(MicroBatch(4),16)):
        class Reads(Callback):
            order = 60
            def after_batch(self): self.smooth_loss.item() # as the bar does once a window
        def once(cb): return waits(deepcopy(acc), bs, cb)
        assert once(ProgressCallback())==once(Reads())

def test_targets_are_waited_for():
    "The host waits once for each micro-batch with targets that are classes, for floats never"
    def waits(acc, **kwargs):
        learn = learner(64, 4, acc, cbs=Quiet(), **kwargs)
        learn.remove_cb(Trace)
        run(learn, lambda l: l.fit(1, 0.01))
        return learn.quiet.mode.n.total()
    assert waits(AccumulateStep(n_targets=16))==waits(AccumulateStep(n_samples=16))+16
    x,_ = problem(80)
    kw = dict(data=(x, x[:,:3]), loss_func=nn.MSELoss())
    assert waits(AccumulateStep(n_targets=48), **kw)==waits(AccumulateStep(n_samples=16), **kw)

@pytest.mark.parametrize('n,epochs,off', ((64,1,False), (62,1,True), (72,1,True), (73,1,True), (72,2,True)))
def test_what_fastai_gets_wrong(n, epochs, off):
    "fastai's `GradientAccumulation` is the large batch only if batches and windows are even; should this fail, it has been mended: tell our users"
    large,theirs,ours = learner(n, 16),learner(n, 4, GradientAccumulation(16)),learner(n, 4, AccumulateStep(4))
    for l in (large,theirs,ours): run(l, lambda l: l.fit(epochs, 0.1))
    def weights(l): return flat(l.model.parameters())
    assert (rel(weights(large), weights(theirs)) > 1e-4)==off
    assert rel(weights(large), weights(ours)) <= 1e-12

def test_what_fastai_gets_wrong_elsewhere(tmp_path):
    "Its records, schedule and `lr_find` count micro-batches"
    large,theirs = learner(203, 16, dtype=torch.float32, path=tmp_path),learner(203, 4, GradientAccumulation(16), dtype=torch.float32, path=tmp_path)
    for l in (large,theirs): run(l, lambda l: l.fit_one_cycle(1, 0.1))
    assert (len(large.recorder.losses),len(theirs.recorder.losses))==(13,51)
    assert large.lr_find(show_plot=False)!=theirs.lr_find(show_plot=False)
