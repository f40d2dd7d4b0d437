from fastai_learner import *
from fastai_accum import AccumulateStep,MicroBatch

def exact_bn(p): return any(isinstance(m, nn.BatchNorm1d) for m in p.model.children()) # in the column of that name; elsewhere it leaves BatchNorm alone, as the others do

serve('fastai_accum', AccumulateStep=row(lambda p: AccumulateStep(p.n_acc)), MicroBatch=row(lambda p: MicroBatch(p.micro, sync_bn=exact_bn(p)), 'split'))
