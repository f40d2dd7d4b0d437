"`MicroBatch` and exact BatchNorm in brief, against a real plain `Learner` with the same loader"
import threading
import pytest
from fastai.vision.all import models
from common import *
from fastai_accum.batchnorm import Lane

f32,f64 = torch.float32,torch.float64
TOL = {f64:1e-12, f32:1e-5}
FITS = {'fit_one_cycle':lambda l: l.fit_one_cycle(2, 0.02), 'fine_tune':lambda l: l.fine_tune(1, 0.02, freeze_epochs=1)}
def bufs(l): return flat(l.model.buffers())

def pair(cb, n=73, fit=FITS['fit_one_cycle'], tol=1e-12, cbs=list, **kwargs):
    "A plain run and one with `cb`, found to be the same"
    large,small = learner(n, 16, cbs=cbs(), **kwargs),learner(n, 16, cb, cbs=cbs(), **kwargs)
    for l in (large,small): run(l, fit)
    assert_same_run(large, small, tol)
    assert not {'all_batches','_do_one_batch','_do_grad_opt'} & set(vars(small))
    return large,small

@pytest.mark.parametrize('dtype', TOL, ids=str)
@pytest.mark.parametrize('fit', FITS)
@pytest.mark.parametrize('opt', (partial(SGD, mom=0.9), Adam), ids=('sgd','adam'))
@pytest.mark.parametrize('bs', (1,4,5,16,100,'auto'))
def test_same_run(bs, opt, fit, dtype):
    "Whatever the size of a micro-batch, of the last batch and its last part"
    pair(MicroBatch(bs), fit=FITS[fit], tol=TOL[dtype], dtype=dtype, opt_func=opt)

@pytest.mark.parametrize('loss', (nn.CrossEntropyLoss(ignore_index=1), nn.CrossEntropyLoss(weight=torch.tensor([0.1,1.,7.], dtype=f64)),
                                  nn.CrossEntropyLoss(reduction='sum'), nn.MultiMarginLoss()), ids=('ignore_index','class weights','sum','unknown'))
def test_losses(loss):
    "Micro-batches are weighed by what the loss divides by; a sum stays a sum"
    pair(MicroBatch(5), loss_func=loss, fit=lambda l: l.fit(2, 0.005))

def y_int():
    res = nn.CrossEntropyLoss()
    res.y_int = True
    return res
@pytest.mark.parametrize('cbs', (lambda: [MixUp()], lambda: [GradientClip(0.05)]), ids=('MixUp','GradientClip'))
def test_whole_batch(cbs):
    "Partners are found in the whole batch, and its gradient is clipped"
    pair(MicroBatch(5), cbs=cbs, loss_func=y_int(), n=75, dtype=f32, tol=1e-5)

class Full(nn.Module):
    "Runs out of memory above `n` samples in training: on the way forward or back"
    def __init__(self, n, back): super().__init__(); self.n,self.back = n,back
    def forward(self, x):
        if not self.training or self.n is None or len(x)<=self.n: return x
        if not self.back: torch.empty(2**60)
        res = x*1
        res.register_hook(lambda g: torch.empty(2**60))
        return res
def tight(n, back): return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), Full(n, back), nn.Tanh(), nn.Linear(8, 3))

@pytest.mark.parametrize('sync_bn', (False,'stats',True))
@pytest.mark.parametrize('back', (False,True))
def test_auto(back, sync_bn, capsys):
    "A batch that does not fit is repeated as if nothing had been: bit for bit the run that began with the size found"
    a,b = learner(80, 16, MicroBatch(4, sync_bn=sync_bn), model=lambda: tight(None, back)),learner(80, 16, MicroBatch(sync_bn=sync_bn), model=lambda: tight(4, back))
    for l in (a,b): run(l, FITS['fit_one_cycle'])
    assert_same_run(a, b, 0)
    assert torch.equal(bufs(a), bufs(b)) and b.micro_batch.bs==4 and len(capsys.readouterr().out.splitlines())==2

def test_one_sample_does_not_fit():
    "The error is the original one, with advice, and the learner is clean"
    l = learner(80, 16, MicroBatch(), model=lambda: nn.Sequential(nn.Linear(6, 8), Full(0, False), nn.Linear(8, 3)))
    with pytest.raises(RuntimeError, match="(?s)DefaultCPUAllocator.*1 of a batch's 16 samples.*smaller inputs"): l.fit(1)
    assert not {'all_batches','_do_one_batch','_do_grad_opt'} & set(vars(l)) and not any(p.grad is not None and p.grad.any() for p in l.model.parameters())

def mlp(): return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=None), nn.Tanh(), nn.Linear(8, 3))
@pytest.mark.parametrize('bs', (1,4,5,15))
def test_exact_batchnorm(bs):
    "BatchNorm sees the whole batch: weights and running statistics are its, down to micro-batches of one sample"
    large,small = pair(MicroBatch(bs, sync_bn=True), model=mlp)
    assert rel(bufs(large), bufs(small))<=1e-12
    assert not any(isinstance(t, Lane) for t in threading.enumerate())
    other = run(learner(73, 16, MicroBatch(4), model=mlp), FITS['fit_one_cycle'])
    assert rel(bufs(large), bufs(other))>1e-2

def test_exact_batchnorm_of_a_resnet():
    g = torch.Generator().manual_seed(0)
    data = torch.randn(41, 3, 32, 32, generator=g, dtype=f64),torch.arange(41)%3
    large,small = pair(MicroBatch(5, sync_bn=True), n=25, data=data, model=lambda: models.resnet18(num_classes=3), fit=lambda l: l.fit(1, 0.01))
    assert rel(bufs(large), bufs(small))<=1e-12

def test_stats():
    "Both callbacks move running statistics once a step, by the same moments, and the first layer's are the large batch's"
    large,a,b = learner(66, 16, model=mlp),learner(66, 4, AccumulateStep(4, sync_bn='stats'), model=mlp),learner(66, 16, MicroBatch(4, sync_bn='stats'), model=mlp)
    for l in (large,a,b): run(l, lambda l: l.fit(1, 0.))
    assert rel(bufs(a), bufs(b))<=1e-12 and int(a.model[1].num_batches_tracked)==5
    for k in ('running_mean','running_var'): assert rel(getattr(large.model[1], k), getattr(a.model[1], k))<=1e-12

@pytest.mark.parametrize('args', (dict(bs=0), dict(bs=True), dict(bs='big'), dict(normalize='mean'), dict(split=3), dict(sync_bn='yes'), dict(offload='disk')), ids=str)
def test_bad_arguments(args):
    with pytest.raises(ValueError, match=f'`{first(args)}`='): MicroBatch(**args)
