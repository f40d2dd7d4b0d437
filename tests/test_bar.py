"The progress bar says how far a window is that takes longer than a second"
import pytest
from common import *
from fastai_accum.hosts import WindowBar

class Texts(Callback):
    "What the bar of training shows"
    order = 61 # after `ProgressCallback`
    def before_fit(self): self.all,self.bars = [],[]
    def before_train(self):
        self.bars.append(self.progress.pbar)
        self.progress.pbar.on_update = lambda v, text: self.all.append((v, self.progress.pbar.total, self.progress.pbar.comment))

def shown(bs, acc, step, monkeypatch, sizes=None, n=64, **kwargs):
    "A fit with a clock that goes on by `step` seconds at each look"
    now = [0.]
    def clock():
        now[0] += step
        return now[0]
    monkeypatch.setattr(WindowBar, 'clock', staticmethod(clock))
    learn = learner(n, bs, acc, dtype=torch.float32, cbs=Texts()).add_cb(ProgressCallback())
    if sizes: resize(learn, sizes)
    return run(learn, lambda l: l.fit(2, 0.05))

WAYS = {'n_step':(2, partial(AccumulateStep, 8)), 'n_samples':(2, partial(AccumulateStep, n_samples=16)), 'carry':(2, partial(AccumulateStep, 8, leftover='carry')),
        'parts':(16, partial(MicroBatch, 2)), 'sync':(16, partial(MicroBatch, 2, sync_bn=True))}

@pytest.mark.parametrize('way', WAYS)
def test_comment(way, monkeypatch):
    "Once a second, until the window ends; the bar goes on in windows, and records are as without"
    bs,acc = WAYS[way]
    slow,quick = shown(bs, acc(), 0.4, monkeypatch),shown(bs, acc(), 0.01, monkeypatch)
    comments = [c for _,_,c in slow.texts.all if '/' in c]
    assert comments and [c.split(' ')[0] for c in comments]==['3/8','6/8']*(len(comments)//2) and len(comments)>=8
    assert all(len(c.split(' '))==2 and float(c.split(' ')[1])>0 for c in comments[2:8]) # the loss of the window before
    assert not any('/' in c for _,_,c in quick.texts.all)
    assert {v for v,*_ in slow.texts.all}<=set(range(5)) if way!='carry' else True
    assert all('/' not in b.comment for b in slow.texts.bars)
    assert_same_run(quick, slow, 0)

def test_uneven_batches(monkeypatch):
    "Of a window that counts samples it is a guess, by the batches so far"
    learn = shown(2, AccumulateStep(n_samples=16), 1.1, monkeypatch, sizes=[1,1,2,4,4,4,16,16,16])
    assert [c.split(' ')[0] for _,_,c in learn.texts.all if '/' in c][:5]==['1/9','2/9','3/7','4/5','5/6']

def test_quiet_without_a_bar(monkeypatch):
    "Nothing is shown where there is none"
    monkeypatch.setattr(WindowBar, 'wait', 0.)
    a,b = (run(learner(64, bs, acc), lambda l: l.fit(1, 0.05)) for bs,acc in ((4,AccumulateStep(4)),(16,MicroBatch(4))))
    assert rel(flat(a.model.parameters()), flat(b.model.parameters()))<1e-12

def test_cancelled(monkeypatch):
    "A window that is cut short, and one that dies, leave no comment for the next"
    class Ends(Callback):
        order = 30
        def before_fit(self): self.n = 0
        def after_backward(self):
            self.n += 1
            if self.n==7: raise CancelTrainException
    monkeypatch.setattr(WindowBar, 'wait', 0.)
    learn = learner(64, 2, AccumulateStep(8), dtype=torch.float32, cbs=[Texts(),Ends()]).add_cb(ProgressCallback())
    run(learn, lambda l: l.fit(2, 0.05))
    assert '6/8' in [c.split(' ')[0] for *_,c in learn.texts.all] and all('/' not in b.comment for b in learn.texts.bars)

@pytest.mark.filterwarnings('ignore:the dataloader gave more')
def test_a_bar_that_is_done(monkeypatch):
    "A loader that is longer than its `len` goes on where the bar has ended"
    class Long(DataLoader):
        def __len__(self): return 8
    monkeypatch.setattr(WindowBar, 'wait', 0.)
    learn = learner(64, 2, AccumulateStep(8), dtype=torch.float32, cbs=Texts()).add_cb(ProgressCallback())
    learn.dls.loaders[0] = Long(learn.dls.train.dataset, bs=2)
    run(learn, lambda l: l.fit(1, 0.05))
    assert len(learn.recorder.losses)==4 and [c.split(' ')[0] for *_,c in learn.texts.all if '/' in c]==[f'{i}/8' for i in range(1, 8)]
