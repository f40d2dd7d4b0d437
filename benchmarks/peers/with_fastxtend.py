from fastai_learner import *
from fastxtend.callback.gradaccum import GradientAccumulation

def accumulate(p, **kwargs):
    "With `drop_last=True`, its default, it would leave out an epoch's last window also where that is full"
    p.dl.bs = 4 # it asks the loader, and that of batches of several sizes does not say
    return GradientAccumulation(p.bs, drop_last=False, **kwargs)

# `lr_find` fails with `log_accum_batch=True`, the default
serve('fastxtend', fastxtend=dict(row(accumulate), find=row(partial(accumulate, log_accum_batch=False))['find']))
