"Whatever the sizes, weights and optimizer state are the large batch's"
from hypothesis import given,example,strategies as st
from common import *

OPTS = (partial(SGD, mom=0.), partial(SGD, mom=0.9), Adam, partial(RMSProp, mom=0.9), partial(OptimWrapper, opt=torch.optim.AdamW, eps=1e-5))

@given(n=st.integers(1, 60), bs=st.integers(1, 9), n_step=st.integers(1, 7), epochs=st.integers(1, 3), opt=st.sampled_from(OPTS),
       red=st.sampled_from(('mean','sum')), by_samples=st.booleans(), one_cycle=st.booleans())
@example(n=1, bs=1, n_step=7, epochs=3, opt=OPTS[1], red='sum', by_samples=True, one_cycle=True)
def test_any_sizes(n, bs, n_step, epochs, opt, red, by_samples, one_cycle):
    acc = AccumulateStep(n_samples=bs*n_step) if by_samples else AccumulateStep(n_step)
    large,small = learner(n, bs*n_step, opt_func=opt),learner(n, bs, acc, opt_func=opt, loss_func=nn.CrossEntropyLoss(reduction=red))
    for l in (large,small): run(l, lambda l: (l.fit_one_cycle if one_cycle else l.fit)(epochs, 0.02))
    assert_same_run(large, small, 1e-12)

@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12), n_step=st.integers(1, 5), drop=st.booleans())
def test_any_batches(sizes, n_step, drop):
    "Batches of any sizes in one window"
    wins = [sum(sizes[i:i+n_step]) for i in range(0, len(sizes), n_step)]
    if drop and len(sizes)%n_step: wins = wins[:-1]
    if not wins: return
    n = sum(sizes)
    large = resize(learner(n, 4), wins)
    small = resize(learner(n, 4, AccumulateStep(n_step, leftover='drop' if drop else 'step')), sizes)
    for l in (large,small): run(l, lambda l: l.fit_one_cycle(2, 0.05))
    assert_same_run(large, small, 1e-12)
