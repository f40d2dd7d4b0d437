"Bad input is named with its argument, its value and what to do, before anything has trained"
import pytest
from fastai.callback.training import GradientAccumulation
from common import *

@pytest.mark.parametrize('arg', ('n_step','n_samples'))
@pytest.mark.parametrize('v', (0, -3, 2., 0.5, True, False, '4', [4], float('nan'), lambda p: 0, lambda p: None, lambda p: float('inf'), SchedLin(4,-4)), ids=lambda v: 'function' if callable(v) else str(v))
def test_window_size(arg, v):
    with pytest.raises(ValueError, match=f'`{arg}`=.*pass a positive integer'): AccumulateStep(**{arg:v})

def test_n_step_none():
    "It is as if it was left out"
    with pytest.warns(UserWarning, match='neither `n_step` nor `n_samples` is given'): run(learner(64, 16, AccumulateStep(None)), lambda l: l.fit(1))

def test_both_sizes():
    with pytest.raises(ValueError, match='`n_step`=4 and `n_samples`=32: pass only one'): AccumulateStep(4, n_samples=32)

@pytest.mark.parametrize('v', ('sample', 'mean', None, 1, True, ['auto']), ids=str)
def test_normalize(v):
    with pytest.raises(ValueError, match="`normalize`=.*'auto', 'samples', 'none' or a function"): AccumulateStep(4, normalize=v)

@pytest.mark.parametrize('v', ('flush', None, 0, True), ids=str)
def test_leftover(v):
    with pytest.raises(ValueError, match="`leftover`=.*'step', 'drop', 'carry'"): AccumulateStep(4, leftover=v)

@pytest.mark.parametrize('v', (0, -1, float('nan'), float('inf'), None, 'many', torch.tensor(0), torch.tensor([1,2]), torch.tensor(float('nan'))), ids=str)
@pytest.mark.parametrize('i', (0,5))
def test_normalize_function(v, i):
    "At the micro-batch where it happens, with the learner left whole"
    learn = learner(73, 4, AccumulateStep(4, normalize=lambda learn: v if learn.iter*4+learn.accumulate_step.win.count==i else len(learn.y)))
    with pytest.raises(ValueError, match='`normalize` returned .*: return one positive finite number'): run(learn, lambda l: l.fit(1, 0.1))
    assert type(learn.opt) is Optimizer and len(learn.cbs)==3 and not any(p.grad.any() for p in learn.model.parameters() if p.grad is not None)
    assert len(learn.trace.steps)==i//4

def fails(learn, match, **kwargs):
    before = deepcopy(learn.model.state_dict())
    with pytest.raises(ValueError, match=match): learn.fit(1, **kwargs)
    assert type(learn.opt) is Optimizer and str(before)==str(learn.model.state_dict())

def test_two_of_them():
    fails(learner(40, 4, AccumulateStep(2)), r'AccumulateStep beside AccumulateStep.*remove_cb\(AccumulateStep\)', cbs=AccumulateStep(4))
    fails(learner(40, 4, AccumulateStep(2)), r'GradientAccumulation beside AccumulateStep.*remove_cb\(GradientAccumulation\)', cbs=GradientAccumulation(8))

def test_said_before_the_fit_and_cured():
    "What the error says to do works"
    learn = learner(40, 4, L(AccumulateStep(2), GradientAccumulation(8)))
    fails(learn, 'remove_cb')
    learn.remove_cb(GradientAccumulation)
    run(learn, lambda l: l.fit(1))
    assert len(learn.trace.steps)==5

def test_to_accum_keeps_what_works():
    "A mistake in `to_accum` leaves the callback that was there"
    learn = learner(40, 4).to_accum(2)
    with pytest.raises(ValueError, match='`n_step`=0'): learn.to_accum(0)
    assert learn.accumulate_step.n_step==2
    run(learn, lambda l: l.fit(1))
    assert len(learn.trace.steps)==5

def test_drop_that_fills_no_window():
    "Sizes that only training shows: said after the first epoch"
    learn = learner(40, 4, AccumulateStep(SchedLin(100,100), leftover='drop'))
    with pytest.warns(UserWarning, match='nothing has been trained'): run(learn, lambda l: l.fit(1))
