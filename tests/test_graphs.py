"Models that are compiled with CUDA graphs are refused, as these write each micro-batch's outputs and gradients where the last one's were"
import pytest
from fastai_accum.loop import Accumulator
from common import *

GRAPHS,OTHERS = ('reduce-overhead','max-autotune'),(None,'default','max-autotune-no-cudagraphs')
def whole(mode): return torch.compile(net(), mode=mode)
def in_place(mode):
    m = net()
    m[0].compile(mode=mode)
    return m
def loop(m): return Accumulator(m, torch.optim.SGD(m.parameters(), lr=0.1), nn.CrossEntropyLoss(), n_step=2)

@pytest.mark.parametrize('compiled', (whole,in_place))
@pytest.mark.parametrize('mode', GRAPHS)
def test_refused(mode, compiled):
    for acc in (AccumulateStep(2),MicroBatch(4)):
        l = learner(16, 8, acc, model=partial(compiled, mode))
        with pytest.raises(ValueError, match="compiled with CUDA graphs.*leave out `mode='reduce-overhead'`"): l.fit(1)
        assert not l.trace.steps
    with pytest.raises(ValueError, match='compiled with CUDA graphs'): loop(compiled(mode))

@pytest.mark.parametrize('compiled', (whole,in_place))
@pytest.mark.parametrize('mode', OTHERS)
def test_other_modes(mode, compiled): loop(compiled(mode))
