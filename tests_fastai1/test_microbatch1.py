"fastai 1: a run with `MicroBatch` against the same learner without it; beside other callbacks it is tested in test_callbacks1.py and test_fp16.py"
import pytest
from common1 import *
from fastai.callbacks.rnn import RNNTrainer
from fastai.text.learner import get_language_model,get_text_classifier
from fastai.text.models.awd_lstm import AWD_LSTM,awd_lstm_clas_config,awd_lstm_lm_config

mb = partial(MicroBatch, bs=5)

@pytest.mark.parametrize('loss', (dict(), dict(reduction='sum'), dict(ignore_index=1), dict(weight=torch.tensor([1.,3.,0.3]).double())), ids=('mean','sum','ignored','weighted'))
def test_same_run(loss):
    "A loss that sums stays one"
    large,small = learner(73, 16, loss=CE(**loss)),learner(73, 16, mb, loss=CE(**loss))
    run_both(lambda l: (l.fit(1, 0.02), l.fit_one_cycle(1, 0.02), l.fit_fc(1, 0.02)), large, small)
    assert_same_run(large, small)

def test_sizes():
    "Any number of samples, nearly even; a batch that fits is one part"
    seen = []
    class See(Callback):
        def __init__(self, learn): pass
        def on_loss_begin(self, last_output, train, **kw):
            if train: seen.append(len(last_output))
    run(learner(73, 16, mb, fns=[See], shuffle=False), lambda l: l.fit(1, 0.1))
    assert seen==[4]*16+[4,5]
    for bs in (16,100):
        large,small = learner(73, 16),learner(73, 16, partial(MicroBatch, bs=bs))
        run_both(lambda l: l.fit(2, 0.1), large, small)
        assert all(torch.equal(a[0], b[0]) for a,b in zip(large.steps.log, small.steps.log))

def test_lr_find(tmp_path):
    large,small = learner(73, 16, path=tmp_path/'a'),learner(73, 16, mb, path=tmp_path/'b')
    run_both(lambda l: l.lr_find(num_it=8, stop_div=False), large, small)
    assert_same_run(large, small, losses=1e-4)

class Two(nn.Module):
    "Two inputs, a list of two outputs"
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(3, 3),nn.Linear(3, 3)
    def forward(self, x, z): return [self.a(x), self.b(z)]

def test_lists():
    "Of inputs, targets and outputs"
    seen = []
    class Last(Callback):
        def __init__(self, learn): pass
        def on_batch_end(self, last_output, train, **kw):
            if train: seen.append([o.detach() for o in last_output])
    def collate(b):
        x,y = (torch.stack(o) for o in zip(*b))
        return [x[:,:3],x[:,3:]],[y,y]
    def make(acc):
        l = learner(32, 16, acc, model=lambda: Two().double(), loss=lambda o,y,z: nn.functional.cross_entropy(o[0], y)+nn.functional.cross_entropy(o[1], z), fns=[Last])
        l.data = DataBunch(*(DataLoader(d.dataset, 16) for d in (l.data.train_dl,l.data.valid_dl)), device=torch.device('cpu'), collate_fn=collate)
        return l
    large,small = make(None),make(mb)
    run_both(lambda l: l.fit(2, 0.1), large, small)
    assert_same_run(large, small)
    assert all(torch.allclose(a, b, rtol=1e-10) for s,t in zip(seen[:4], seen[4:]) for a,b in zip(s, t))

def test_split():
    "Batches that slicing can't split"
    def split(xb, yb, bs): return [([xb[0][i:i+bs]],[yb[0][i:i+bs]]) for i in range(0, len(yb[0]), bs)]
    large,small = learner(73, 16),learner(73, 16, partial(MicroBatch, bs=6, split=split))
    run_both(lambda l: l.fit(2, 0.1), large, small)
    assert_same_run(large, small)
    with pytest.raises(ValueError, match='`split` returned parts of'): learner(73, 16, partial(MicroBatch, bs=6, split=lambda xb,yb,bs: split(xb, yb, bs)[:-1])).fit(1)
    with pytest.raises(ValueError, match='in another order'): learner(73, 16, partial(MicroBatch, bs=6, split=lambda xb,yb,bs: split(xb, yb, bs)[::-1])).fit(1)
    assert clean(small)

config = dict(emb_sz=6, n_hid=7, n_layers=2)
def lm(): return get_language_model(AWD_LSTM, 11, config=dict(awd_lstm_lm_config, **config), drop_mult=0.).double()

class Flat(nn.Module):
    def forward(self, pred, y): return nn.functional.cross_entropy(pred.reshape(-1, pred.shape[-1]), y.reshape(-1))

@pytest.mark.parametrize('acc', (mb,partial(MicroBatch, bs=4)), ids=('uneven','even'))
def test_language_model(acc):
    "The hidden state that goes from batch to batch is the whole batch's"
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 11, (48+16,5), generator=g)
    large,small = (learner(48, 16, a, data=(x,x.flip(1)), model=lm, loss=Flat(), fns=[partial(RNNTrainer, alpha=2., beta=1.)], shuffle=False) for a in (None,acc))
    run_both(lambda l: l.fit_one_cycle(2, 0.1), large, small)
    assert_same_run(large, small, 1e-11)
    for a,b in zip(large.model[0].hidden, small.model[0].hidden):
        for h,k in zip(a, b): assert h.shape==k.shape and torch.allclose(h, k)

def test_language_model_and_accumulation():
    "Micro-batches go on from one another, as their dataloader has them: their state is left alone"
    x = torch.randint(0, 11, (32+16,5), generator=torch.Generator().manual_seed(0))
    states = []
    class See(LearnerCallback):
        def on_batch_begin(self, train, **kw):
            if train: states.append(self.learn.model[0].hidden[0][0].clone())
    run(learner(32, 4, acc4, data=(x,x.flip(1)), model=lm, loss=Flat(), fns=[partial(RNNTrainer, alpha=2., beta=1.),See], shuffle=False), lambda l: l.fit(1, 0.1))
    assert len(states)==8 and not states[0].any() and all(s.any() for s in states[1:])

def test_text_classifier():
    "Whose encoder begins each text anew"
    x,y = torch.randint(2, 11, (48+16,9), generator=torch.Generator().manual_seed(0)),torch.arange(64)%3
    for acc,bs in ((mb,16),(acc4,4)):
        large,small = (learner(48, b, a, data=(x,y), model=no_norm, fns=[partial(RNNTrainer, alpha=2., beta=1.)], shuffle=False) for b,a in ((16,None),(bs,acc)))
        run_both(lambda l: l.fit_one_cycle(2, 0.1), large, small)
        assert_same_run(large, small, 1e-11)

def no_norm():
    "A text classifier without BatchNorm"
    m = get_text_classifier(AWD_LSTM, 11, 3, bptt=4, config=dict(awd_lstm_clas_config, **config), drop_mult=0., ps=[0.]).double()
    for k,o in list(m[1].layers.named_children()):
        if isinstance(o, nn.BatchNorm1d): setattr(m[1].layers, k, nn.Identity())
    return m

def test_states_that_are_not_known():
    class Memory(nn.Module):
        def __init__(self): super().__init__(); self.l = nn.Linear(6, 3).double()
        def reset(self): pass
        def forward(self, x): return self.l(x),[x],[x]
    with pytest.raises(ValueError, match='RNNTrainer beside MicroBatch: Memory may carry a state'): learner(32, 16, mb, model=Memory, fns=[RNNTrainer]).fit(1)

def test_to_microbatch():
    learn = learner(64, 16)
    assert learn.to_microbatch(4).to_microbatch(8) is learn and len(learn.callback_fns)==2
    other = learner(64, 16)
    run_both(lambda l: l.fit(1, 0.1), other, learn)
    assert_same_run(other, learn)
    assert learn.detach_microbatch().to_accum(2).detach_accum() is learn and len(learn.callback_fns)==1
    learn.to_microbatch(4).to_accum(4) # takes its place
    assert [f.func for f in learn.callback_fns[1:]]==[AccumulateStep]
    assert [f.func for f in learn.to_microbatch(4).callback_fns[1:]]==[MicroBatch]
    learn.callback_fns.append(acc4)
    with pytest.raises(ValueError, match='AccumulateStep beside MicroBatch: one of them is enough|MicroBatch beside AccumulateStep'): learn.fit(1)

@pytest.mark.parametrize('kw,match', ((dict(bs=0), '`bs`=0'), (dict(bs='auto'), "`bs`='auto': only `MicroBatch` of fastai 2"), (dict(bs=4, sync_bn='yes'), "`sync_bn`='yes'"), (dict(bs=4, offload='disk'), "`offload`='disk'"),
    (dict(bs=4, normalize='no'), '`normalize`'), (dict(bs=4, split=3), '`split`=3')))
def test_bad_input(kw, match):
    learn = learner(64, 16)
    with pytest.raises(ValueError, match=match): learn.to_microbatch(**kw)
    with pytest.raises(ValueError, match=match): MicroBatch(learn, **kw)
    assert len(learn.callback_fns)==1 and not hasattr(learn, 'micro_batch')

def test_what_cannot_be_split():
    x,y = problem(80)
    learn = learner(64, 16, mb, data=(x,y))
    learn.data = DataBunch(*(DataLoader(d.dataset, 16) for d in (learn.data.train_dl,learn.data.valid_dl)), device=torch.device('cpu'), collate_fn=lambda b: ([torch.stack([o[0] for o in b]), torch.ones(3)], torch.stack([o[1] for o in b])))
    with pytest.raises(ValueError, match=r"can't be split along its first dimension: pass `MicroBatch\(split"): learn.fit(1)
    assert clean(learn)

@pytest.mark.parametrize('k', (0,2,7))
def test_error(k):
    "A fit that dies leaves nothing behind"
    class Boom(Callback):
        n = -1
        def on_backward_begin(self, **kwargs):
            self.n += 1
            if self.n==k: raise ValueError('boom')
    x = torch.randint(0, 11, (48+16,5), generator=torch.Generator().manual_seed(0))
    learn,other = (learner(48, 16, a, data=(x,x.flip(1)), model=lm, loss=Flat(), fns=[RNNTrainer], shuffle=False) for a in (mb,None))
    with pytest.raises(ValueError, match='boom'): learn.fit(1, 0.1, callbacks=[Boom()])
    assert clean(learn) and learn.model[0].bs==16
    other.fit(1, 0.1) # `WeightDropout` takes parameters out of the model with its first batch
    other.model.load_state_dict(learn.model.state_dict())
    for l in (learn,other): l.steps.log.clear(); l.create_opt(0.1, l.wd)
    run_both(lambda l: l.fit(1, 0.1), other, learn)
    assert_same_run(other, learn, 1e-11)

def normed(): return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()

class NanSome(Callback):
    "Leaves out the micro-batch at `i`"
    def __init__(self, i): self.i,self.n = i,-1
    def on_backward_begin(self, **kw):
        self.n += 1
        if self.n==self.i: return {'skip_bwd':True}

@pytest.mark.parametrize('kind', ('plain','clip and one cycle','mixup'))
def test_exact_batch_norm(kind):
    "Weights, statistics and records"
    from fastai.callbacks.mixup import MixUpCallback
    fns = [MixUpCallback] if kind=='mixup' else []
    large,small = (learner(73, 16, acc, model=normed, fns=fns) for acc in (None,partial(MicroBatch, bs=5, sync_bn=True)))
    if 'clip' in kind: large.clip_grad(0.1), small.clip_grad(0.1)
    run_both(lambda l: l.fit_one_cycle(2, 0.1) if 'one' in kind else l.fit(2, 0.1), large, small)
    assert_same_run(large, small, 1e-11)
    assert rel(flat(large.model.buffers()), flat(small.model.buffers()))<1e-12
    for l in (large,small): assert '_call_impl' not in vars(l.model)

def test_exact_batch_norm_leaves_out():
    for i in (1,3): # of the first batch's micro-batches, one in the middle, the last
        learn = learner(16, 16, partial(MicroBatch, bs=4, sync_bn=True), model=normed)
        run(learn, lambda l: l.fit(1, 0.1, callbacks=[NanSome(i)]))
        assert len(learn.steps.log)==1 and rel(learn.steps.log[0][0], weights(learner(16, 16, model=normed)))>1e-3

@pytest.mark.parametrize('bs,acc', ((16,partial(MicroBatch, bs=4, sync_bn='stats')), (4,partial(AccumulateStep, n_step=4, sync_bn='stats'))), ids=('microbatch','accumulate'))
def test_statistics_of_the_whole(bs, acc):
    "Running statistics move once a window, as the large batch's do where weights are the same"
    large,small = (learner(64, b, a, model=lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)).double(), layer_groups=None) for b,a in ((16,None),(bs,acc)))
    run_both(lambda l: l.fit(2, 0.1), large, small)
    assert rel(flat(large.model.buffers()), flat(small.model.buffers()))<1e-12 and small.model[0].num_batches_tracked==8
    plain = learner(64, 4, acc4, model=lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)).double(), layer_groups=None)
    run(plain, lambda l: l.fit(2, 0.1))
    assert rel(flat(large.model.buffers()), flat(plain.model.buffers()))>1e-2

@pytest.mark.parametrize('kw,n', ((dict(bs=5),5+18), (dict(bs=99),5+5), (dict(bs=5, sync_bn='stats'),5+18), (dict(bs=5, sync_bn=True),5)), ids=str)
def test_offload(kw, n, monkeypatch):
    "On a CPU that is taken for an accelerator: begun for each of five batches, and forgotten before each micro-batch; the same run to the bit"
    from fastai_accum import batchnorm,fastai1,offload
    begun,away = [],[]
    class Away(offload.Away):
        def __init__(self, *args): super().__init__(*args); away.append(1)
    class Elsewhere(offload.Offload):
        def stays(self, t): return isinstance(t if t._base is None else t._base, nn.Parameter)
        def forget(self): super().forget(); begun.append(1)
    for m,k,o in ((batchnorm,'Offload',Elsewhere), (fastai1,'Offload',Elsewhere), (offload,'Away',Away)): monkeypatch.setattr(m, k, o)
    def go(**o):
        begun.clear(), away.clear()
        return run(learner(73, 16, partial(MicroBatch, **kw, **o), model=normed), lambda l: l.fit(1, 0.1)),len(begun),len(away)
    (off,*none),(_,*auto),(on,*cpu) = go(offload=None),go(),go(offload='cpu')
    assert none==[0,0] and auto==(cpu if kw.get('sync_bn') is True else none) and cpu[0]==n and cpu[1]>=n
    assert len(on.steps.log)==5 and all(torch.equal(a[0], b[0]) for a,b in zip(off.steps.log, on.steps.log))

def test_batch_norm_that_cannot_be():
    with pytest.raises(ValueError, match="`sync_bn`=True: micro-batches that come one by one can't be normalized together"): learner(64, 4).to_accum(4, sync_bn=True)
    learn = learner(64, 16, partial(MicroBatch, bs=4, sync_bn=True), model=lambda: nn.Sequential(nn.Linear(6, 8), nn.SyncBatchNorm(8), nn.Linear(8, 3)))
    with pytest.raises(ValueError, match='`sync_bn`=True: `SyncBatchNorm` talks'): learn.fit(1)
    class Boom(Callback):
        def on_backward_begin(self, **kwargs): raise ValueError('boom')
    learn = learner(64, 16, partial(MicroBatch, bs=4, sync_bn=True), model=normed)
    with pytest.raises(ValueError, match='boom'): learn.fit(1, callbacks=[Boom()])
    assert clean(learn) and '_call_impl' not in vars(learn.model) and not any('forward' in vars(m) or '_call_impl' in vars(m) for m in learn.model.modules())
    run(learn, lambda l: l.fit(1, 0.1))
