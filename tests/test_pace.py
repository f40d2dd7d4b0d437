"Time and memory of micro-batches, against a model that takes a known time, and a learner that is as it was"
import pickle,time,warnings
from copy import deepcopy
import pytest
from fastai.callback.training import ShortEpochCallback
from fastai_accum import pace
from fastai_accum.pace import *
from common import *
from test_noise import Ends,leaves_unchanged,made

def find(learn, **kwargs): return learn.micro_find(**{**dict(secs=0, show_plot=False), **kwargs})

class Clock:
    "A clock that goes on only when told"
    now = 0.
    def __call__(self): return Clock.now

@pytest.fixture(autouse=True)
def clock(monkeypatch, request):
    if 'real' not in request.keywords: monkeypatch.setattr(pace, 'perf_counter', Clock())

class Slow(nn.Module):
    "Takes `fixed` seconds a micro-batch and `each` a sample, and ten times that for the samples beyond `cache`; runs out of memory beyond `fits`"
    def __init__(self, fixed=4., each=1., cache=8, fits=10**6): super().__init__(); self.fixed,self.each,self.cache,self.fits,self.sizes = fixed,each,cache,fits,[]
    def time(self, n): return self.fixed + self.each*(n + 9*max(0, n-self.cache))
    def forward(self, x):
        if not self.training: return x
        if len(x)>self.fits: raise torch.OutOfMemoryError('out of memory, as told')
        seen.append(len(x))
        Clock.now += self.time(len(x))
        return x
seen = [] # sizes of micro-batches; not of the model, as what it keeps is undone

def slow(n=64, bs=16, acc=None, **kwargs):
    seen.clear()
    layers = {k:kwargs.pop(k) for k in ('fixed','each','cache','fits') if k in kwargs}
    return learner(n, bs, acc, model=lambda: nn.Sequential(*net(), Slow(**layers)), **kwargs)

class Sleeps(Callback):
    "A step that takes its time"
    run_valid = False
    def before_batch(self): Clock.now += 3.
    def after_step(self): Clock.now += 20.
    def after_batch(self): Clock.now += 1.

# ---- time

def test_time():
    "What a sample takes in micro-batches of each size, and a step besides; and from that, what a step of any size takes"
    learn = slow(cbs=Sleeps())
    r = find(learn)
    model = learn.model[-1]
    assert [*r.throughput]==[*r.memory]==[1,2,4,8,16] and r.fastest==8 and r.largest==16
    for k,v in r.throughput.items(): assert rel(k/model.time(k), v) <= 1e-9, k
    assert rel(24., r.overhead) <= 1e-9
    for B in (3,8,20,48):
        learn = slow(B, B, MicroBatch(r.fastest), cbs=Sleeps())
        start = Clock.now
        learn.fit(3, 0.)
        assert rel((Clock.now-start)/3, float(r.step_time(B))) <= 1e-9
    assert rel(r.step_time(np.array([3,8])), [float(r.step_time(3)),float(r.step_time(8))]) == 0

@pytest.mark.parametrize('secs,rounds', ((0,3), (260,5), (1e9,20)))
def test_rounds(secs, rounds):
    "3 at least, 20 at most, and none begins when time is up; half of them go up, half down"
    sizes = []
    learn = slow(fixed=0., cache=100, cbs=Callback(before_batch=lambda cb: sizes.append(cb.learn.micro_batch.bs)))
    find(learn, secs=secs)
    turns = [sizes[10:][i:i+6] for i in range(0, len(sizes)-10, 6)]
    assert len(turns)==rounds and sizes[:10]==[1,1,2,2,4,4,8,8,16,16] and turns[0]==[1,2,4,8,16,2] and turns[1]==turns[0][::-1]

@pytest.mark.parametrize('each,n', ((1.,{1:4,2:8,4:16,8:32,16:32,32:32}), (1e-3,{1:32,2:32,4:32,8:32,16:32,32:32})))
def test_few_of_many(each, n):
    "Where a batch takes long, small sizes are timed on four micro-batches; the result is the same"
    got = []
    r = find(slow(fixed=0., each=each, cache=100, bs=32, cbs=Callback(before_batch=lambda cb: got.append((cb.learn.micro_batch.bs,len(cb.x))))))
    assert all(rel(1/each, v)<=1e-9 for v in r.throughput.values()) and dict(got[12:18])==n and got[18]==(2,2)

@pytest.mark.real
def test_real_time():
    "By a clock that goes"
    class Sleep(nn.Module):
        def forward(self, x): time.sleep(5e-3); return x
    r = find(learner(64, 4, model=lambda: nn.Sequential(Sleep(), *net())), secs=0.5)
    assert all(0 < v*5e-3/k < 1.1 for k,v in r.throughput.items()) and r.throughput[4]>r.throughput[1] and math.isfinite(r.overhead) # whatever else the machine does

def test_step_time():
    "Micro-batches of nearly equal size, no larger than the fastest; between measured sizes time is that of a line"
    r = SuggestedMicro(4, 8, {1:1., 2:1., 4:2., 8:1.}, {}, 0.5) # seconds a micro-batch: 1, 2, 2, 8
    assert [float(r.step_time(B)) for B in (1,2,3,4,5,6,8,9,16)]==[0.5+t for t in (1,2,2,2,4,4,4,6,8)]

def test_bs_of_several_batches():
    "Several batches of the loader make the largest size"
    r = find(slow(bs=4), bs=16)
    assert [*r.throughput]==[1,2,4,8,16] and r.fastest==8 and max(seen)==16
    assert [*find(slow(bs=4), bs=6).throughput]==[1,2,4,6]

def test_no_targets():
    learn = slow()
    learn.dls.loaders[0] = [(torch.randn(4, 6).double(),)]
    with pytest.raises(ValueError, match='no targets'): find(learn)

def test_margin_of_time():
    "The smallest size within 2 % of the best"
    assert find(slow(fixed=0.05, each=1., cache=100)).fastest==4 # 1 takes 5 % more than no time in between, 2 takes 2.5 %, 4 takes 1.25 %
    assert find(slow(fixed=0.01, each=1., cache=100)).fastest==1

@pytest.mark.parametrize('acc', (MicroBatch(4, sync_bn=True), MicroBatch(4, sync_loss=True), MicroBatch(4, split=lambda xb,yb,bs: [((x,),(y,)) for x,y in zip(xb[0].split(bs), yb[0].split(bs))])), ids=('sync_bn','sync_loss','split'))
def test_arguments(acc):
    "The learner's own `MicroBatch` is what is timed, on the whole batch if only that shows what it takes"
    learn,sizes,cbs = slow(bs=8, acc=acc, fixed=1., each=0.),[],[]
    learn.add_cb(Callback(before_batch=lambda cb: (sizes.append(len(cb.x)), cbs.append(cb.learn.micro_batch))))
    r = find(learn)
    assert {*sizes}=={8} and [*r.throughput]==[1,2,4,8] and learn.micro_batch is acc and acc.bs==4
    for cb in cbs: assert cb is not acc and (cb.sync_bn,cb.sync_loss,cb.split)==(acc.sync_bn,acc.sync_loss,acc.split)

def test_mixup():
    "It takes no batch of one sample, and micro-batches of one are timed all the same"
    assert [*find(learner(64, 8, dtype=torch.float32, loss_func=CrossEntropyLossFlat(), cbs=MixUp())).throughput]==[1,2,4,8]

@pytest.mark.parametrize('acc', (None, AccumulateStep(2), GradientAccumulation(32), MicroBatch('auto')), ids=str)
def test_aside(acc):
    "What else accumulates is left out"
    assert [*find(slow(acc=acc, fixed=1., each=0.)).throughput]==[1,2,4,8,16]
    assert {*seen}=={1,2,4,8,16}

# ---- memory

@pytest.mark.parametrize('fits', (1,5,8))
def test_out_of_memory(fits):
    "The first size that does not fit ends the list"
    learn = slow(fits=fits, fixed=1., each=0., cache=100)
    r = find(learn)
    assert [*r.throughput]==[k for k in (1,2,4,8) if k<=fits] and r.largest==max(r.throughput) and max(seen)<=fits
    assert learn.opt is None

def test_nothing_fits():
    with pytest.raises(torch.OutOfMemoryError, match='as told'): find(slow(fits=0))

class Fixed(PeakMemory):
    "As if micro-batches took so much, and copies of the learner 50 more"
    peaks,free,at,asked = (),1000,-1,0
    room,peak = property(lambda self: self.free),property(lambda self: self.peaks[self.at]+50)
    def reset(self): self.at += 1
    @property
    def now(self):
        self.asked += 1
        return 10 if self.asked==1 else 60

@pytest.mark.parametrize('peaks,free,margin,largest,sizes', (
    ((100,200,300,500,900), 1000, 0.1, 16, 5), ((100,200,300,500,901), 1000, 0.1, 8, 5), ((100,200,300,500,901), 1000, 0.5, 8, 5), ((100,200,300,500,901), 1000, 0.6, 4, 5),
    ((600,700,800,900,950), 1000, 0.5, 1, 3), ((math.nan,)*5, math.nan, 0.1, 16, 5), ((100,200,300,500,900), 899, 0., 8, 4)))
def test_largest(monkeypatch, peaks, free, margin, largest, sizes):
    "The largest size that leaves the margin, and on a CPU none that by what it took so far would be too much"
    monkeypatch.setattr(pace, 'PeakMemory', type('Fixed', (Fixed,), dict(peaks=peaks, free=free)))
    r = find(slow(fixed=1., each=0, cache=100), margin=margin)
    assert r.largest==r.fastest==largest and len(r.memory)==sizes
    if peaks[0]==100: assert [*r.memory.values()]==list(peaks[:sizes])

def takes_memory():
    class Takes(nn.Module):
        def forward(self, x):
            torch.ones(len(x), 2**20) # 4 MiB each
            return x
    r = find(learner(16, 8, model=lambda: nn.Sequential(Takes(), *net())))
    m = {k:v/2**20 for k,v in r.memory.items()}
    assert 100 < m[1] and all(4*(b-1)-6 < m[b]-m[1] < 8*b+8 for b in (4,8)), m # what was freed may not be used again

@pytest.mark.skipif(sys.platform!='linux', reason='reads /proc')
def test_memory_of_the_process():
    "Memory that is taken for a moment is seen, in a process that has no holes in its memory of what other tests had"
    from processes import forks
    p = forks.Process(target=takes_memory)
    p.start()
    p.join(100)
    assert p.exitcode==0

def test_one_sample_is_too_few():
    "For a BatchNorm: sizes begin with two. Another error is raised"
    assert [*find(learner(64, 16, model=lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)))).throughput]==[2,4,8,16]
    class Refuses(Callback):
        def before_batch(self): raise ValueError('as told')
    with pytest.raises(ValueError, match='as told'): find(slow(cbs=Refuses()))

# ---- a learner that is as it was

@pytest.mark.parametrize('name,event,exc,at', (('torch_optimizer',None,None,0), ('accumulating',None,None,0), ('mixed',None,None,0), ('hooked',None,None,0),
    ('trained','before_batch',KeyboardInterrupt,3), ('parts','before_backward',RuntimeError,6)))
def test_unchanged(name, event, exc, at):
    leaves_unchanged(find, name, event, exc, at)

@pytest.mark.parametrize('cb', (ShortEpochCallback(pct=0.01), Ends('after_batch', CancelTrainException, 3), Ends('after_step', CancelFitException, 5)), ids=('short','train','fit'))
def test_cut_short(cb):
    "A callback that ends epochs or fits does not end the timing"
    cb = deepcopy(cb)
    assert [*find(slow(fixed=1., each=0., cbs=cb)).throughput]==[1,2,4,8,16]

def test_cancelled():
    "Where no step is come to, or no batch, an error says so"
    class Cancels(Callback):
        def before_backward(self): raise CancelBatchException
    class Ended(Callback):
        def before_train(self): raise CancelTrainException
    with pytest.raises(ValueError, match='no batch of the mock training came to its step'): find(slow(fixed=1., each=0., cbs=Cancels()))
    with pytest.raises(ValueError, match='ended before its first batch'): find(slow(cbs=Ended()))

@pytest.mark.parametrize('kw,text', ((dict(secs=-1),'`secs`=-1'), (dict(secs='x'),"`secs`='x'"), (dict(margin=1),'`margin`=1'), (dict(bs=0),'`bs`=0: pass a positive integer, or None'), (dict(bs='auto'),"`bs`='auto'")))
def test_bad(kw, text):
    with pytest.raises(ValueError, match=text): find(slow(), **kw)

def test_several_processes(monkeypatch):
    monkeypatch.setattr(pace, 'num_distrib', lambda: 2)
    for f in (find,lambda l: l.fit(1)):
        with pytest.raises(ValueError, match='one of 2 processes.*pass `MicroBatch` the number'): f(slow(acc=MicroBatch('fast')))

# ---- `MicroBatch('fast')`

def test_fast(capsys):
    "The run is that of the fastest size, which is said once"
    learn = run(slow(70, 16, MicroBatch('fast'), cache=4), lambda l: l.fit(1, 0.05))
    said = capsys.readouterr().out
    assert learn.micro_batch.bs==4 and said.count('\n')==1 and said.startswith('MicroBatch: 4 samples at a time, the fastest size: ') and ', where 16 take ' in said
    assert_same_run(run(slow(70, 16, MicroBatch(4), cache=4), lambda l: l.fit(1, 0.05)), learn, 0)

def test_fast_records():
    "What is recorded of the fit that measures is what the large batch records"
    def of(acc): return run(slow(70, 16, acc, dtype=torch.float32, cache=100, metrics=accuracy), lambda l: l.fit(2, 0.05))
    assert_same_run(of(None), of(MicroBatch('fast')), 1e-6)

def test_fast_measures(monkeypatch):
    "At the beginning of a fit, unless it is known; not in validation, nor in a fit within a fit"
    calls,was = [],Learner.micro_find
    monkeypatch.setattr(Learner, 'micro_find', lambda self, **kwargs: calls.append(1) or was(self, secs=0, **kwargs))
    learn = slow(bs=8, acc=MicroBatch('fast'), fixed=1., each=0.)
    def n():
        k = len(calls)
        calls.clear()
        return k
    learn.validate(); learn.get_preds(); assert n()==0
    learn.fit(1); learn.fit(1); assert n()==1
    learn.model[0].requires_grad_(False); learn.fit(1); learn.fit(1); assert n()==1
    other = pickle.loads(pickle.dumps(learn.micro_batch))
    assert other.fast and other.bs==8
    learn.model.requires_grad_(True)
    class Inner(Callback):
        order,done = 101,False
        def after_batch(self):
            if self.done: return
            self.done = True
            self.learn.model[2].requires_grad_(False)
            self.learn.fit(1)
    learn.fit(1, cbs=Inner()); assert n()==1

def test_fast_halves(capsys):
    "What does not fit after all is halved"
    learn = slow(64, 16, MicroBatch('fast'), fixed=1., each=0.)
    learn.add_cb(Callback(after_epoch=lambda cb: setattr(cb.model[-1], 'fits', 5)))
    learn.fit(2)
    assert learn.micro_batch.bs==4 and '16 samples at once do not fit in memory in training, going on with 8' in capsys.readouterr().out

def test_fast_beside():
    "`lr_find`, `bs_find` and `check_accumulation` with it"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = learner(64, 16, MicroBatch('fast'), dtype=torch.float32)
        assert learn.check_accumulation().ok
        assert learn.bs_find(n_it=3, show_plot=False, pace=False).n_step>=1
        learn.lr_find(num_it=6, show_plot=False)
        assert len(learn.recorder.losses)==6 and not hasattr(learn, 'lr_finder')
    assert learn.micro_batch.bs in (1,2,4,8,16) and learn.micro_batch.fast

# ---- what an effective batch costs

PACE = SuggestedMicro(8, 16, {1:10., 2:20., 4:30., 8:40., 16:39.}, {}, 0.05)

@pytest.mark.parametrize('N', (0.,3.,50.,math.inf))
def test_time_to_loss(N):
    "Steps by the noise scale, seconds by the steps' time, in times of those of another batch"
    t = TimeToLoss(PACE, N, (N/2,2*N), 4, 100)
    def total(B, N): return (1+min(N, 1e12)/B)*float(PACE.step_time(B))
    for B in (1,4,9,100):
        mid,lo,hi = (float(o) for o in t(B))
        ends = sorted(total(B, n)/total(4, n) for n in (N/2,2*N))
        assert rel([total(B, N)/total(4, N),*ends], [mid,lo,hi]) <= 1e-9
    assert t.fastest==min(range(1, 101), key=lambda B: total(B, N)) or rel(total(t.fastest, N), min(total(B, N) for B in range(1, 101))) <= 0.01

@pytest.mark.parametrize('pace,N,ends,than,text', (
    (PACE, 1e-3, (0,2e-3), 8, 'do not accumulate: steps of [12] samples? come'), (PACE, 8, (6,10), 8, 'do not accumulate'),
    (PACE._replace(overhead=1.), 500, (400,600), 8, r'steps of \d+ samples, in micro-batches of 8, come to'), (PACE._replace(overhead=1.), 500, (0,600), 8, 'may come to'),
    (PACE._replace(fastest=16), 500, (400,600), 2, 'computed at once|in micro-batches of 16')))
def test_advice(pace, N, ends, than, text):
    import re
    assert re.search(text, TimeToLoss(pace, N, ends, than, 64).advice(20))

def test_bs_find():
    "The fastest batch, by times that are measured or given, and what it says where there are none"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        def bs_find(learn, **kwargs): return learn.bs_find(n_it=5, show_plot=False, lr=0, **kwargs)
        learn = learner(64, 8)
        a,b,c = (bs_find(learn, pace=p) for p in (False,PACE,True))
        assert a[:4]==b[:4]==c[:4] and a[4:]==(None,None)
        time = TimeToLoss(PACE, a.noise_scale, a.interval, 8, 64)
        assert b[4:]==(time.fastest,time.advice(a.batch_size)) and c.advice.startswith('On one device') and 1<=c.fastest<=64
        class Stateful(nn.Sequential):
            def reset(self): pass
        r = bs_find(learner(64, 8, model=lambda: Stateful(*net()), cbs=ModelResetter()))
        assert r.fastest is None and 'could not be measured' in r.advice and 'ModelResetter' in r.advice
    with pytest.raises(ValueError, match="`pace`='x'"): learn.bs_find(pace='x')
