from fastai_learner import *

serve('fastai', fastai=row(lambda p: GradientAccumulation(p.bs)))
