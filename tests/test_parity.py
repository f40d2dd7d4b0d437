"Every observable of the design, against a real large-batch `Learner`"
import pytest
from common import *

BS,N_STEP = 4,4
SIZES = {'even':64, 'uneven last micro-batch':62, 'short last window':72, 'both':73, 'one sample over':65, 'n_step larger than the epoch':11}
OPTS = {'sgd':partial(SGD, mom=0.9), 'adam':Adam, 'adamw':partial(OptimWrapper, opt=torch.optim.AdamW)}
FITS = {'fit':lambda l: l.fit(2, 0.05), 'fit_one_cycle':lambda l: l.fit_one_cycle(3, 0.02), 'fit_flat_cos':lambda l: l.fit_flat_cos(2, 0.02),
        'fit_sgdr':lambda l: l.fit_sgdr(2, 1, 0.02), 'fine_tune':lambda l: l.fine_tune(2, 0.02, freeze_epochs=1),
        'discriminative':lambda l: l.fit_one_cycle(2, slice(1e-3,2e-2)), 'start_epoch':lambda l: l.fit_one_cycle(3, 0.02, start_epoch=1),
        'two fits':lambda l: (l.fit(1, 0.05), l.fit_one_cycle(1, 0.02)), 'reset_opt':lambda l: (l.fit(1, 0.05), l.fit(1, 0.05, reset_opt=True))}
TOL = {torch.float64:1e-12, torch.float32:1e-5}

def both(n, fit, acc=None, dtype=torch.float64, **kwargs):
    large,small = learner(n, BS*N_STEP, dtype=dtype, **kwargs),learner(n, BS, acc or AccumulateStep(N_STEP), dtype=dtype, **kwargs)
    run(large, fit); run(small, fit)
    assert type(small.opt) is type(large.opt) and small.cbs.map(type)[-1] is Trace
    return large,small

@pytest.mark.parametrize('dtype', TOL, ids=str)
@pytest.mark.parametrize('opt', OPTS)
@pytest.mark.parametrize('size', SIZES)
def test_sizes(size, opt, dtype):
    "Uneven batches and windows, over epochs"
    assert_same_run(*both(SIZES[size], lambda l: l.fit(3, 0.05 if opt=='sgd' else 0.01), dtype=dtype, opt_func=OPTS[opt]), TOL[dtype])

@pytest.mark.parametrize('dtype', TOL, ids=str)
@pytest.mark.parametrize('opt', OPTS)
@pytest.mark.parametrize('fit', FITS)
def test_fits(fit, opt, dtype):
    "Every way to train, with both kinds of unevenness"
    assert_same_run(*both(SIZES['both'], FITS[fit], dtype=dtype, opt_func=OPTS[opt]), TOL[dtype])
