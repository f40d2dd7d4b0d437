"Windows by the targets that count: texts of uneven length"
import pytest,warnings
from common import *
from fastai.callback.schedule import *
from fastai_accum.losses import n_targets

class Batches(list): "A loader of given batches"
class Swap(nn.Module):
    def forward(self, x): return x.transpose(1, 2)
def text_net(): return nn.Sequential(*net(), Swap())
W = torch.tensor([0.1,1,7], dtype=torch.float64)
def shows(pred, targ): return F.cross_entropy(pred, targ, weight=W)
LOSSES = dict(plain=nn.CrossEntropyLoss(), weights=nn.CrossEntropyLoss(W), ignored=nn.CrossEntropyLoss(ignore_index=1), shown=shows)

def texts(pad=-100, n=22, longest=9, seed=0):
    "Texts of 1 to `longest` tokens, padded; the targets of padding, and of some tokens, are ignored"
    g = torch.Generator().manual_seed(seed)
    x,y = problem(n*longest, seed=seed)
    x,y,lens = x.view(n, longest, -1),y.view(n, longest).clone(),torch.randint(1, longest+1, (n,), generator=g)
    y[torch.arange(longest)>=lens[:,None]] = pad
    y[4:6] = pad # a micro-batch in which nothing counts
    return x,y

def cut(x, y, sizes): return Batches(zip(x.split(sizes), y.split(sizes)))
def windows(counts, n):
    "How many of `counts` each window takes, as soon as it has `n`"
    res,seen,k = [],0,0
    for c in counts:
        seen,k = seen+c,k+1
        if seen>=n: res.append(k); seen = k = 0
    return res+[k]*(k>0)

def made(dl, acc=None, loss=LOSSES['plain'], **kwargs):
    learn = learner(64, 16, acc, model=text_net, loss_func=loss, **kwargs)
    learn.dls.loaders = [dl,Batches()]
    return learn

def pair(n, loss='plain', fit=Self.fit(3, 0.05), leftover='step', **kwargs):
    "Large batches of exactly the samples of each window, and micro-batches of 2 texts"
    pad = 1 if loss=='ignored' else -100
    x,y = texts(pad)
    ks = windows([(o!=pad).sum().item() for o in y.split(2)], n)
    assert len(set(ks))>1 and len(ks)>2
    if leftover=='drop': ks,x,y = ks[:-1],x[:2*sum(ks[:-1])],y[:2*sum(ks[:-1])]
    large = made(cut(x, y, [2*k for k in ks]), loss=LOSSES[loss], **kwargs)
    x,y = texts(pad)
    small = made(cut(x, y, 2), AccumulateStep(n_targets=n, leftover=leftover), LOSSES[loss], **kwargs)
    for l in (large,small): run(l, fit)
    return large,small

@pytest.mark.parametrize('loss', ('plain','weights','ignored','shown'))
@pytest.mark.parametrize('n', (13,22))
def test_same_run(n, loss): assert_same_run(*pair(n, loss), 1e-12, batches=False)

def test_leftover():
    assert_same_run(*pair(30, leftover='drop'), 1e-12, batches=False)
    x,y = texts()
    counts = [(o>=0).sum().item() for o in y.split(2)]
    ks = windows(counts*3, 30)
    assert len(ks)!=3*len(windows(counts, 30))
    xs,ys = x.repeat(3, 1, 1),y.repeat(3, 1)
    large,small = made(cut(xs, ys, [2*k for k in ks])),made(cut(x, y, 2), AccumulateStep(n_targets=30, leftover='carry'))
    run(large, Self.fit(1, 0.05)),run(small, Self.fit(3, 0.05))
    assert_same_run(large, small, 1e-12, batches=False)

@pytest.mark.parametrize('size', (30, SchedLin(10, 60)), ids=('number','function'))
def test_schedule(size):
    "Progress is that of the loader, as for windows that grow"
    x,y = texts()
    counts,at = [(o>=0).sum().item() for o in y.split(2)],[]
    for epoch in range(3):
        i = 0
        while i<len(counts):
            p = (epoch+i/len(counts))/3
            at.append(p)
            i += windows(counts[i:], size(p) if callable(size) else size)[0]
    small = run(made(cut(x, y, 2), AccumulateStep(n_targets=size)), lambda l: l.fit_one_cycle(3, 0.05))
    want = combined_cos(0.25, 0.05/25, 0.05, 0.05/1e5)
    assert rel([want(p) for p in at], [s['hypers'][-1]['lr'] for s in small.trace.steps])<1e-12 and len(set(at))==len(at)

def test_lr_find(tmp_path):
    "As many steps as told, over epochs whose windows are not known beforehand"
    x,y = texts()
    small = made(cut(x.float(), y, 2), AccumulateStep(n_targets=30), nn.CrossEntropyLoss(), dtype=torch.float32, path=tmp_path)
    small.lr_find(num_it=20, show_plot=False, stop_div=False)
    assert len(small.recorder.losses)==20

class Loss(nn.Module):
    ignore_index = 2
    def forward(self, pred, targ): return F.cross_entropy(pred, targ, ignore_index=2)

@pytest.mark.parametrize('loss,targ,n', ((nn.CrossEntropyLoss(), tensor([0,1,-100]), 2), (nn.CrossEntropyLoss(W), tensor([[0,1],[2,-100]]), 3), (CrossEntropyLossFlat(ignore_index=1), tensor([0,1,1]), 1), (Loss(), tensor([2,1]), 1),
    (shows, tensor([0,-100]), 1), (nn.MSELoss(), torch.zeros(3, 2), 6), (nn.BCEWithLogitsLoss(), torch.zeros(3, 2), 6), (nn.CrossEntropyLoss(), torch.zeros(3, 2, 5), 15), (nn.KLDivLoss(), torch.zeros(3, 2), 6), (F.l1_loss, tensor([0,-100]), 2), (shows, None, None), (shows, [1,2], None)))
def test_counts(loss, targ, n): assert n_targets(loss, *([] if targ is None else [targ]))==n

def test_no_hint_where_nothing_is_known():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn = run(learner(64, 4, AccumulateStep(n_targets=500)), lambda l: l.fit(1, 0.01))
    assert len(learn.trace.steps)==1 and learn.accumulate_step.effective_bs is None

def test_changes_between_fits():
    "The other arguments give way"
    acc = AccumulateStep(4)
    acc.n_targets = 16
    assert (acc.unit,acc.n_step,acc.n_targets)==('n_targets',1,16)
    acc.n_step = 2
    assert (acc.unit,acc.n_step,acc.n_targets)==('n_step',2,None)

def test_refused(monkeypatch):
    for kw,match in ((dict(n_step=4, n_targets=9), '`n_step`=4 and `n_targets`=9: pass only one'), (dict(n_samples=4, n_targets=9), '`n_samples`=4 and `n_targets`=9'), (dict(n_targets=0), '`n_targets`=0'),
                     (dict(n_targets=True), '`n_targets`=True'), (dict(n_targets='many'), "`n_targets`='many'"), (dict(n_targets=lambda p: 8*p), '`n_targets`=0.0 at 0%')):
        with pytest.raises(ValueError, match=match): AccumulateStep(**kw)
    learn = learner(64, 4, AccumulateStep(n_targets=9))
    with pytest.raises(ValueError, match='a batch to compare with has so many samples or micro-batches'): learn.check_accumulation(cb=AccumulateStep(n_targets=9))
    learn.dls.loaders[0] = Batches([(torch.zeros(4, 6).double(),[1,2])])
    with pytest.raises(ValueError, match='the first target of a micro-batch is list, and targets are counted in tensors only'): run(learn, lambda l: l.fit(1))
    assert type(learn.opt).__name__=='Optimizer'
    monkeypatch.setattr('fastai_accum.accumulate.several_processes', lambda: True)
    monkeypatch.setattr('fastai_accum.accumulate.check_reducer', noop)
    with pytest.raises(ValueError, match='their windows would end at different micro-batches'): learner(64, 4, AccumulateStep(n_targets=9)).fit(1)
