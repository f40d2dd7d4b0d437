"Windows that follow the noise scale: the run is that of a plain loader with batches of those sizes, and learning rates are those of the rule"
import pytest
from common import *
from fastai_accum.grow import *

class Looks(Callback):
    "Sizes of windows in samples, what their size was taken from, and the learning rate of each step"
    order = 150
    def before_fit(self): self.samples,self.scales,self.lrs = [[] for _ in range(self.n_epoch)],[],[]
    def before_step(self):
        self.samples[self.epoch].append(int(self.accumulate_step.win.denom))
        self.lrs.append(self.opt.hypers[-1]['lr'])
    def after_batch(self):
        if not self.training: return
        self.scales.append(self.accumulate_step.follow.scale if self.accumulate_step.follow else math.nan)

def grown(rule=None, n=190, fit=Self.fit(3, 0.02), most=24, **kwargs):
    return run(learner(n, 2, AccumulateStep('noise', max_n_step=most, lr_rule=rule), cbs=[NoiseScale(beta=0.9),Looks()], **kwargs), fit)

class Lrs(Callback):
    "Make each step with its learning rate"
    def __init__(self, lrs): self.lrs,self.n = lrs,0
    def before_step(self):
        self.opt.set_hyper('lr', self.lrs[self.n])
        self.n += 1

@pytest.mark.parametrize('rule', (None,'sqrt','linear'))
def test_same_run(rule):
    "Weights and optimizer at every step"
    small = resize(learner(190, 2, AccumulateStep('noise', max_n_step=24, lr_rule=rule), cbs=[NoiseScale(beta=0.9),Looks()]), [2]*95)
    run(small, lambda l: l.fit(3, 0.02))
    looks = small.looks
    large = resize(learner(190, 2, cbs=Lrs(looks.lrs)), looks.samples)
    run(large, lambda l: l.fit(3, 0.02))
    assert len(set(sum(looks.samples, [])))>4
    for s,t in zip(large.trace.steps, small.trace.steps, strict=True): assert rel(s['weights'], t['weights'])<1e-12 and rel(s['state'], t['state'])<1e-12
    k = np.array(small.accumulate_step.sizes)/2
    assert rel(small.looks.lrs, 0.02*{None:k**0, 'sqrt':k**0.5, 'linear':k}[rule])<1e-12
    assert {h['lr'] for h in small.opt.hypers}=={0.02}

@pytest.mark.parametrize('loss', (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(tensor([0.1,1,7]).double())), ids=('plain','weights'))
def test_sizes(loss):
    "They are the noise scale as of the step before, from 2 micro-batches on to `max_n_step`"
    learn = grown(most=12, loss_func=loss)
    sizes,looks,noise = learn.accumulate_step.sizes,learn.looks,learn.noise_scale
    for got,want in zip(looks.scales[1:], noise.values): assert math.isnan(got) and math.isnan(want) or got==want or abs(got-want)<=1e-9*want
    assert sizes[:10]==[2]*10 and min(sizes)==2 and max(sizes)==12 and len(sizes)==len(noise.values)
    now = 2
    for n,scale in zip(sizes[10:], noise.values[9:]):
        if math.isfinite(scale): now = min(max(round(scale/2), 2), 12)
        assert n==now

def test_schedule():
    "The rule multiplies what the schedule says, and records have the product"
    learn = grown('sqrt', dtype=torch.float32, fit=lambda l: l.fit_one_cycle(3, 0.02))
    plain = combined_cos(0.25, 0.02/25, 0.02, 0.02/1e5)
    assert rel(learn.recorder.lrs, learn.looks.lrs)<1e-12 and rel(learn.recorder.hps['lr'], learn.recorder.lrs)<1e-12
    base = np.array(learn.looks.lrs)/(np.array(learn.accumulate_step.sizes)/2)**0.5
    assert rel(base, [plain(p) for p in progress(learn)])<1e-6 and max(base)<=0.02*(1+1e-9)

def progress(learn):
    "As each window opened"
    n,res = 95,[]
    for epoch,ss in enumerate(learn.looks.samples):
        i = 0
        for s in ss:
            res.append((epoch+i/n)/3)
            i += s//2
    return res

def test_whatever_ends_it():
    "Learning rates are as they were before the fit"
    class Dies(Callback):
        def before_fit(self): self.n = 0
        def after_step(self):
            self.n += 1
            if self.n==20: raise KeyboardInterrupt
    learn = learner(190, 2, AccumulateStep('noise', lr_rule='linear'), cbs=[NoiseScale(),Looks(),Dies()])
    with pytest.raises(KeyboardInterrupt): run(learn, lambda l: l.fit(3, 0.02))
    assert {h['lr'] for h in learn.opt.hypers}=={0.02} and learn.looks.lrs[-1]>0.02 and learn.accumulate_step.follow is None

def test_lr_find(tmp_path):
    "Goes by the smallest windows, which the learning rate is for"
    a,b = (learner(190, 2, acc, cbs=NoiseScale(), dtype=torch.float32, path=tmp_path) for acc in (AccumulateStep('noise', lr_rule='linear'),AccumulateStep(2)))
    ra,rb = (run(l, lambda l: setattr(l, 'res', l.lr_find(num_it=40, show_plot=False, stop_div=False))).res for l in (a,b))
    assert rel(a.recorder.losses, b.recorder.losses)<1e-5 and a.recorder.lrs==pytest.approx(b.recorder.lrs)

def test_reads(monkeypatch):
    "The host reads one row for each window"
    read,tolist = [],Tensor.tolist
    monkeypatch.setattr(Tensor, 'tolist', lambda t: read.append(t.shape) or tolist(t))
    class Reads(Callback):
        run_valid = False
        def before_fit(self): self.n = []
        def after_batch(self): self.n.append(sum(s==(5,) for s in read))
    learn = run(learner(64, 2, AccumulateStep('noise', max_n_step=8), cbs=[NoiseScale(),Reads()]), lambda l: l.fit(2, 0.01))
    assert learn.reads.n==[*range(len(learn.accumulate_step.sizes))]

def test_no_size_is_known_beforehand():
    acc = AccumulateStep('noise')
    learn = learner(64, 4, acc, cbs=NoiseScale())
    assert acc.effective_bs is None and acc._n_win(learn.dls.train) is None
    with learn.no_bar(): assert learn.bs_find(n_it=3, show_plot=False, tol=math.inf).n_step>=1

def test_another_size_between_epochs():
    "Is for windows of one size"
    class Fixes(Callback):
        def after_epoch(self): self.accumulate_step.n_step = 5
    learn = learner(124, 2, AccumulateStep('noise', lr_rule='sqrt'), cbs=[NoiseScale(beta=0.9),Fixes()])
    with pytest.raises(ValueError, match='`n_step`=5'): run(learn, lambda l: l.fit(2, 0.02))
    assert {h['lr'] for h in learn.opt.hypers}=={0.02} and learn.accumulate_step.n_step=='noise'

@pytest.mark.parametrize('make,match', ((lambda: AccumulateStep('noise', n_samples=8), "`n_step`='noise' and `n_samples`=8"), (lambda: AccumulateStep('noise', max_n_step=0), '`max_n_step`=0'), (lambda: AccumulateStep('noise', max_n_step=1), '`max_n_step`=1'), (lambda: AccumulateStep('noise', lr_rule='cube'), "`lr_rule`='cube'"),
    (lambda: AccumulateStep(4, lr_rule='sqrt'), "`lr_rule`='sqrt' and `n_step`=4"), (lambda: AccumulateStep('loud'), "`n_step`='loud'")))
def test_arguments(make, match):
    with pytest.raises(ValueError, match=match): make()

def test_refused(monkeypatch):
    with pytest.raises(ValueError, match='there is none beside AccumulateStep'): learner(64, 4, AccumulateStep('noise')).fit(1)
    with pytest.raises(ValueError, match="`n_step`='noise' of `cb`: a batch to compare with"): learner(64, 4, AccumulateStep('noise'), cbs=NoiseScale()).check_accumulation()
    monkeypatch.setattr('fastai_accum.grow.several_processes', lambda: True)
    with pytest.raises(ValueError, match='in one of several processes: it is for one'): learner(64, 4, AccumulateStep('noise'), cbs=NoiseScale()).fit(1)
