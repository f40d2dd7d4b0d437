"`MicroBatch('auto')` where memory is so scarce that batches take long, though nothing fails; and `margin`: on a CPU that is taken for a GPU, of which the figures are made up"
import pytest
import test_oom as oom
from fastai_accum import microbatch
from fastai_accum.scarce import Figures,figures
from test_oom import little_garbage
from common import *

class Event:
    "The device has passed it when there are `late` later ones"
    made = 0
    def __init__(self, t): Event.made += 1; self.t,self.i = t,Event.made
    def query(self): return Event.made-self.i>=Device.late
    def elapsed_time(self, end): return end.t-self.t

class Device:
    "`ms` and `again` are functions of the samples in a micro-batch: how long a batch takes, and how often the allocator tries again in one"
    late,now,n,share = 0,0.,0,1.
    def __init__(self, ms=lambda bs: 10., again=lambda bs: 0, free=0.5, kept=0.2): self.ms,self.again,self.left,self.has,self.sizes,self.limits = ms,again,free,kept,[],[]
    def __call__(self, device): return self
    def retries(self): return self.n
    def free(self): return self.left
    def kept(self): return self.has
    def mark(self): return Event(self.now)
    def limit(self): return self.share
    def set_limit(self, share): self.share = share

class Batches(Callback):
    "What a batch costs on `device`, added when its micro-batches are through"
    def __init__(self, device): self.d = device
    def after_backward(self):
        win = self.micro_batch.win
        if not win.last: return
        bs = math.ceil(16/win.begun)
        self.d.now += self.d.ms(bs)
        self.d.n += self.d.again(bs)
        self.d.sizes.append(bs)
        self.d.limits.append(self.d.share)

def trained(monkeypatch, device, mb=None, n=160, epochs=1, mem=None, cbs=()):
    "A run of ten batches of 16 an epoch; what was printed is in capsys"
    monkeypatch.setattr(microbatch, 'figures', device)
    l = oom.make(mb or MicroBatch('auto'), mem, 'backward', **({} if mem else {'model':net}), norm=oom.Running, sizes=[16]*(n//16), cbs=[Batches(device), *cbs])
    return run(l, lambda l: l.fit(epochs, 0.05))

def test_retries(monkeypatch, capsys):
    "Two batches in a row are one too many, and it goes down until there are none; the run is that of somebody who had foreseen it"
    d = Device(again=lambda bs: int(bs>6))
    auto = trained(monkeypatch, d)
    assert d.sizes==[16,16,8,8]+[6]*6 and auto.micro_batch.bs==6
    line = 'MicroBatch: {} samples at once leave so little memory free that it takes time in training, going on with {}'
    assert capsys.readouterr().out.splitlines()==[line.format(16, 8), line.format(8, 6)]
    oom.same(run(oom.make(MicroBatch(oom.MAX, valid=True), model=net, sizes=[16]*10, cbs=[oom.Switch([*d.sizes, 16])]), lambda l: l.fit(1, 0.05)), auto)

def test_retries_now_and_then(monkeypatch, capsys):
    "One batch alone is none, nor is the first one after validation"
    times = iter([1,0,1,0,1,0,0,1,0,0]+[0,1]*5)
    d = Device(again=lambda bs: next(times))
    busy = Callback(after_validate=lambda self: setattr(d, 'n', d.n+5))
    trained(monkeypatch, d, epochs=2, cbs=[busy])
    assert set(d.sizes)=={16} and not capsys.readouterr().out

@pytest.mark.parametrize('late', (0,4))
@pytest.mark.parametrize('left,sizes', ((0.01,[16]*6+[8]*4), (0.5,[16]*10)), ids=('full','not full'))
def test_slow(left, sizes, late, monkeypatch, capsys):
    "A batch that takes more than three times the fastest, where memory is full; times may be known later"
    monkeypatch.setattr(Device, 'late', late)
    times = iter([10,12,10,29,31,40,50,60,70,80])
    d = Device(ms=lambda bs: next(times), free=left)
    trained(monkeypatch, d)
    assert d.sizes==([16]*8+[8]*2 if late and left<0.1 else sizes) # two events a batch

def test_slow_for_another_reason(monkeypatch):
    "It goes down once, and no further if that does not help"
    times = iter([10]*3+[100]*40)
    d = Device(ms=lambda bs: next(times), free=0.)
    trained(monkeypatch, d, epochs=3)
    assert d.sizes==[16]*5+[8]*25

def test_attempts_that_fail(monkeypatch):
    "What the allocator tries in an attempt that fails is nothing that the next one does"
    times = iter([0,1]+[0]*8)
    d = Device(again=lambda bs: next(times))
    class Mem(oom.Memory):
        def lacks(self, i, n): d.n += (res := super().lacks(i, n)); return res
    auto = trained(monkeypatch, d, mem=Mem(5))
    assert d.sizes==[4]*10 and d.n==1+3

def test_one_sample(monkeypatch):
    "There is nothing smaller than one"
    d = Device(again=lambda bs: 1)
    mb = trained(monkeypatch, d, epochs=3).micro_batch
    assert mb.bs==1 and d.sizes[-1]==1 and not mb.sizes.away

def test_only_auto(monkeypatch):
    def no(device): raise AssertionError
    monkeypatch.setattr(microbatch, 'figures', no)
    run(learner(16, 16, MicroBatch(4, valid=True)), lambda l: l.fit(1, 0.1))
    assert figures(torch.device('cpu')) is None and figures(torch.device('mps')) is None and isinstance(figures(torch.device('cuda', 1)), Figures)

# ---- memory that stays free

def test_margin(monkeypatch):
    "Within the micro-batches only, by what others have taken too; put back after an error"
    d = Device()
    trained(monkeypatch, d, MicroBatch('auto', margin=0.1))
    assert {round(o, 6) for o in d.limits}=={0.6} and d.share==1.
    d = Device()
    trained(monkeypatch, d)
    assert {*d.limits}=={1.}
    d,seen = Device(),[]
    step = Callback(before_step=lambda self: seen.append(d.share))
    with pytest.raises(torch.OutOfMemoryError): trained(monkeypatch, d, MicroBatch('auto', margin=0.1), mem=oom.Memory(0), cbs=[step])
    assert d.share==1.
    trained(monkeypatch, d, MicroBatch('auto', margin=0.1), cbs=[step])
    assert {*seen}=={1.}

@pytest.mark.parametrize('margin', (-0.1,1,1.5,True,'0.1',None,math.nan))
def test_margin_is_a_share(margin):
    with pytest.raises(ValueError, match=f"`margin`={margin!r}: pass a share of memory from 0 to below 1"): MicroBatch('auto', margin=margin)
def test_margin_of_a_number():
    with pytest.raises(ValueError, match="`margin`=0.1 beside `bs`=8: only 'auto' and 'fast' look at memory"): MicroBatch(8, margin=0.1)
