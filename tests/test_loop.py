"`Accumulator` in a plain PyTorch loop against the real large batch; this file is also what two processes run"
import itertools,subprocess,warnings
from collections import Counter,namedtuple
from types import SimpleNamespace
import pytest
from hypothesis import given,strategies as st
from torch.nn.parallel import DistributedDataParallel
from common import *
from processes import *
from test_host import Waits
from test_package import NO_FASTAI
from test_losses import EXACT,W,X,N,MaskedMean,MaskedMSE,CountsOnHost,OwnForward,Net,values
from fastai_accum.loop import Accumulator

ROOT = Path(__file__).resolve().parent.parent
BS,N_STEP,EPOCHS = 4,4,2
OPTS = {'sgd':partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01), 'adam':partial(torch.optim.AdamW, lr=0.01, eps=1e-5), 'rmsprop':partial(torch.optim.RMSprop, lr=0.01, eps=1e-5)}
CE = nn.CrossEntropyLoss()

def start(opt='sgd', model=net, loss=None, dtype=torch.float64):
    seed()
    model = model().to(dtype)
    return model,OPTS[opt](itertools.chain(model.parameters(), loss.parameters() if loss else ()))

def state(opt): return flat(tensors(opt.state_dict()['state']))
def result(model, opt, steps, losses, **kwargs): return dict(steps=steps, state=state(opt), losses=flat(losses), **kwargs)

def large(batches, loss_func, opt='sgd', epochs=EPOCHS, before=noop, dtype=torch.float64, model=net, loss=None):
    "A loop without accumulation"
    m,o = start(opt, model, loss, dtype)
    steps,losses = [],[]
    for _ in range(epochs):
        for x,y in batches:
            l = loss_func(m(x), y)
            l.backward()
            before(m)
            o.step()
            o.zero_grad()
            losses.append(l.detach())
            steps.append(flat(m.parameters()))
    return result(m, o, steps, losses)

def small(epoch, loss_func, opt='sgd', epochs=EPOCHS, before=noop, dtype=torch.float64, model=net, loss=None, flush=True, **kwargs):
    "`epoch` has the micro-batches of an epoch"
    m,o = start(opt, model, loss, dtype)
    steps = []
    acc = Accumulator(m, o, loss_func, before_step=lambda: before(m), after_step=lambda: steps.append(flat(m.parameters())), **kwargs)
    for _ in range(epochs):
        for x,y in epoch: acc.backward(m(x), y)
        if flush: acc.flush()
    return result(m, o, steps, acc.losses, acc=acc)

def assert_same(a, b, tol=1e-12, losses=True):
    assert len(a['steps'])==len(b['steps'])>0
    for s,t in zip(a['steps'], b['steps']): assert rel(s, t)<=tol
    assert rel(a['state'], b['state'])<=tol
    if losses: assert rel(a['losses'], b['losses'])<=tol

def cut(xs, sizes): return list(zip(*(o[:sum(sizes)].split(sizes) for o in xs)))
def sums(sizes, n): return [sum(sizes[i:i+n]) for i in range(0, len(sizes), n)]
def even(n, bs): return [bs]*(n//bs) + ([n%bs] if n%bs else [])
SIZES = {'even':even(64, BS), 'short last window':even(72, BS), 'uneven':[5,5,5,1]*3+[7,2], 'uneven last batch':even(61, BS)}

@pytest.mark.parametrize('opt', OPTS)
@pytest.mark.parametrize('sizes', SIZES)
@pytest.mark.parametrize('dtype,tol', ((torch.float64,1e-12), (torch.float32,1e-5)), ids=('float64','float32'))
def test_large_batch(sizes, opt, dtype, tol):
    sizes,(x,y) = SIZES[sizes],problem(96)
    data = x.to(dtype),y.masked_fill(torch.rand(96, generator=torch.Generator().manual_seed(0))<0.5, -100)
    assert_same(large(cut(data, sums(sizes, N_STEP)), CE, opt, dtype=dtype), small(cut(data, sizes), CE, opt, dtype=dtype, n_step=N_STEP), tol)

@pytest.mark.parametrize('opt', ('sgd','adam'))
@pytest.mark.parametrize('case', EXACT)
def test_losses(case, opt):
    "As the callback does, whatever the loss: 52 samples in micro-batches of 3"
    loss,y,*rest = EXACT[case]
    model = partial(Net, *(rest+[(3,),noop][len(rest):]))
    assert_same(large(cut((X,y), even(N, 12)), loss, opt, model=model), small(cut((X,y), even(N, 3)), loss, opt, model=model, n_step=4))

@pytest.mark.parametrize('nothing', ((6,9), (9,12), (0,12), (24,36)), ids=str)
@pytest.mark.parametrize('count', (noop,int), ids=('tensor','int'))
@pytest.mark.parametrize('by', ('denominator','normalize'))
@pytest.mark.parametrize('opt', ('sgd','adam'))
def test_nothing_counts(nothing, count, by, opt):
    "Micro-batches, or windows, in which nothing counts; the loss says so, or `normalize` does"
    y = values.masked_fill(torch.rand(values.shape, generator=torch.Generator().manual_seed(3))<0.5, float('nan'))
    y[slice(*nothing)] = float('nan')
    loss = MaskedMean(count)
    kw = dict(normalize=loss.denominator) if by=='normalize' else {}
    b = small(cut((X,y), even(N, 3)), (lambda p,t: loss(p, t)) if kw else loss, opt, n_step=4, **kw)
    assert b['state'].isfinite().all()
    assert_same(large(cut((X,y), even(N, 12)), MaskedMean(noop, safe=True), opt), b)

def test_nothing_is_differentiated():
    "A micro-batch that counts the number 0 has no backward pass"
    y,seen = values.clone(),[]
    y[3:6] = float('nan')
    class Seen(CountsOnHost):
        def forward(self, pred, targ):
            pred.register_hook(lambda g: seen.append(len(targ)))
            return super().forward(pred, targ)
    small(cut((X[:12],y[:12]), [3,3,3,3]), Seen(), n_step=4, epochs=1)
    assert seen==[3,3,3]

def test_leftover_that_counts_nothing():
    y = torch.full_like(values, float('nan'))
    b = small(cut((X,y), [3,3]), CountsOnHost(), n_step=4, epochs=1)
    assert b['steps']==[] and len(b['losses'])==0 and b['acc'].win is None

@pytest.mark.parametrize('normalize', ('auto','none','samples',lambda pred,targ: len(targ)))
def test_sum(normalize):
    "The mean, or by request the sum"
    sizes,data,total = SIZES['uneven'],problem(64),nn.CrossEntropyLoss(reduction='sum')
    assert_same(large(cut(data, sums(sizes, 4)), (lambda p,t: total(p, t)*1e-2) if normalize=='none' else CE),
                small(cut(data, sizes), (lambda p,t: total(p, t)*1e-2) if normalize=='none' else total, n_step=4, normalize=normalize))

def test_normalize():
    "'samples' does not look at targets, a function says itself what counts"
    y = problem(len(X))[1]
    data = X,y.masked_fill(torch.rand(len(y), generator=torch.Generator().manual_seed(0))<0.6, -100)
    assert all((b>=0).any() for _,b in cut(data, even(N, 12))) # else plain training has nan
    def known(pred, targ): return F.cross_entropy(pred, targ, reduction='none', ignore_index=-100).sum()/(targ>=0).sum().clamp(min=1)
    a = large(cut(data, even(N, 12)), CE)
    assert_same(a, small(cut(data, even(N, 3)), known, n_step=4))
    assert_same(a, small(cut(data, even(N, 3)), known, n_step=4, normalize=lambda p,t: (t>=0).sum()))
    assert rel(a['steps'][-1], small(cut(data, even(N, 3)), known, n_step=4, normalize='samples')['steps'][-1])>1e-3

@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12), n=st.integers(1, 30), unit=st.sampled_from(('n_step','n_samples','flush')), opt=st.sampled_from([*OPTS]),
       loss=st.sampled_from((CE, nn.CrossEntropyLoss(W), nn.CrossEntropyLoss(reduction='sum'))), ignore=st.floats(0, 0.9))
def test_any_sizes(sizes, n, unit, opt, loss, ignore):
    x,y = problem(sum(sizes))
    ignored = torch.rand(len(y), generator=torch.Generator().manual_seed(sum(sizes)))<ignore
    if loss.reduction=='mean': y = y.masked_fill(ignored, -100)
    wins,seen = [],[]
    for i,k in enumerate(sizes):
        seen.append(k)
        if i==len(sizes)-1 or unit=='n_step' and len(seen)==n or unit=='n_samples' and sum(seen)>=n: wins.append(sum(seen)); seen = []
    def safe(pred, targ): return pred.sum()*0 if (targ<0).all() else nn.CrossEntropyLoss(loss.weight)(pred, targ)
    a,b = large(cut((x,y), wins), safe, opt),small(cut((x,y), sizes), loss, opt, **({} if unit=='flush' else {unit:n}))
    assert_same(a, b)

@given(n=st.integers(1, 70), bs=st.integers(1, 20))
def test_any_split(n, bs):
    x,y = problem(n)
    parts = Accumulator.split((x,{'y':[y, None, [str(i) for i in range(n)]]}), bs)
    sizes = [len(o[0]) for o in parts]
    assert len(sizes)==math.ceil(n/bs) and max(sizes)<=bs and max(sizes)-min(sizes)<=1
    assert (torch.cat([o[0] for o in parts])==x).all() and (torch.cat([o[1]['y'][0] for o in parts])==y).all()
    assert sum((o[1]['y'][2] for o in parts), [])==[str(i) for i in range(n)] and all(o[1]['y'][1] is None for o in parts)

def test_split():
    "The parts of a large batch are it; structures stay what they are"
    x,y = problem(61)
    m,o = start()
    acc,steps = Accumulator(m, o, CE),[]
    for _ in range(EPOCHS):
        for b in cut((x,y), even(61, 20)):
            for xb,yb in acc.split(b, 6): acc.backward(m(xb), yb)
            assert float(acc.flush())==acc.losses[-1]
            steps.append(flat(m.parameters()))
    assert_same(large(cut((x,y), even(61, 20)), CE), result(m, o, steps, acc.losses))
    Pair = namedtuple('Pair', 'x y')
    one,two = acc.split(Pair(x[:4], np.arange(4)), 2)
    assert isinstance(one, Pair) and list(two.y)==[2,3]
    assert [len(o) for o in acc.split(x, 60)]==[30,31] and [len(o['a']) for o in acc.split({'a':x[:5]}, 3)]==[2,3]
    assert [len(o[0]['a']) for o in acc.split(({'a':x[:2]},{'b':y[:2]}), 1)]==[1,1] # two entries are not two samples

@pytest.mark.parametrize('batch,bs,why', [((torch.ones(8,2),{1,2}), 4, r'`batch\[1\]` is a set of length 2 in a batch of 8 samples'), ((torch.ones(7),torch.ones(8)), 4, r'`batch\[0\]` is a Tensor of shape \(7,\)'),
    ({'a':torch.ones(8), 'b':torch.ones(3,8)}, 4, r"`batch\['b'\]` is a Tensor of shape \(3, 8\)"), ('abc', 2, 'nothing has a first dimension'), (torch.ones(8), 0, '`bs`=0: pass a positive integer')])
def test_split_errors(batch, bs, why):
    with pytest.raises(ValueError, match=why) as e: Accumulator.split(batch, bs)
    assert 'MicroBatch' not in str(e.value)

# scaler, clipping, schedules

def clip(m): nn.utils.clip_grad_norm_(m.parameters(), 0.1)

@pytest.mark.parametrize('n_step', (1,4))
def test_clipping_and_scaler(n_step):
    "Clipped is the gradient of the large batch, unscaled"
    sizes,data = SIZES['uneven'],problem(64)
    a,b = large(cut(data, sums(sizes, n_step)), CE, before=clip),small(cut(data, sizes), CE, before=clip, n_step=n_step, scaler=torch.amp.GradScaler('cpu', init_scale=2.**10))
    plain = large(cut(data, sums(sizes, n_step)), CE)
    assert rel(a['steps'][-1], plain['steps'][-1])>1e-2
    assert_same(a, b)
    assert_same(a, small(cut(data, sizes), CE, before=clip, n_step=n_step))

@pytest.mark.parametrize('at', (0,2,3), ids=lambda o: f'micro-batch {o}')
def test_overflow(at):
    "An overflow in any micro-batch skips the window's step, halves the scale, and is gone with it"
    x,y = problem(64)
    x[16+4*at] = 1e300
    class Steep(nn.Sequential):
        def __init__(self): super().__init__(*net())
        def forward(self, x):
            out = super().forward(x.clamp(-9, 9))
            if x.max()>1e9: out.register_hook(lambda g: g*float('inf'))
            return out
    scaler,(m,o) = torch.amp.GradScaler('cpu', init_scale=1024.),start(model=Steep)
    acc,seen = Accumulator(m, o, CE, n_step=4, scaler=scaler),[]
    for xb,yb in cut((x,y), [4]*16):
        acc.backward(m(xb), yb)
        if acc.win is None: seen.append((flat(m.parameters()), scaler.get_scale()))
    assert [s for _,s in seen]==[1024,512,512,512] and (seen[0][0]==seen[1][0]).all() and (seen[1][0]!=seen[2][0]).any() and seen[-1][0].isfinite().all()
    keep = [b for i,b in enumerate(cut((x,y), [16]*4)) if i!=1]
    assert rel(large(keep, CE, model=Steep, epochs=1)['steps'][-1], seen[-1][0])<=1e-12

def test_schedule():
    "`after_step` is called once a step"
    data,lrs = problem(64),[]
    m,o = start()
    sched = torch.optim.lr_scheduler.StepLR(o, 1, 0.5)
    acc = Accumulator(m, o, CE, n_step=4, after_step=lambda: (sched.step(), lrs.append(o.param_groups[0]['lr'])))
    with acc:
        for x,y in cut(data, [6]*9+[10]): acc.backward(m(x), y)
    assert lrs==[0.05,0.025,0.0125]

def test_autocast():
    "Backward pass and step are made without autocast, which holds for the loss"
    m,o = start(dtype=torch.float32)
    seen = []
    def loss(pred, targ):
        seen.append(torch.is_autocast_enabled('cpu'))
        pred.register_hook(lambda g: seen.append(torch.is_autocast_enabled('cpu')))
        return CE(pred.float(), targ)
    acc = Accumulator(m, o, loss, n_step=1, before_step=lambda: seen.append(torch.is_autocast_enabled('cpu')))
    x,y = problem(4)
    with torch.autocast('cpu', torch.bfloat16): acc.backward(m(x.float()), y)
    assert seen==[True,False,False]

# windows

def test_resize():
    "A window keeps the size that it opened with"
    m,o = start()
    acc,n = Accumulator(m, o, CE, n_step=2),[]
    for i,b in enumerate(cut(problem(32), [4]*8)):
        acc.backward(m(b[0]), b[1])
        n.append(len(acc.losses))
        if i==2: acc.resize(4)
    assert n==[0,1,1,2,2,2,2,3]
    with pytest.raises(ValueError, match='`n`=0: pass a positive integer'): acc.resize(0)

def test_flush():
    "It says what it stepped, and does nothing with an empty window"
    m,o = start()
    acc = Accumulator(m, o, CE, n_step=4)
    before = flat(m.parameters())
    assert acc.flush() is None and (flat(m.parameters())==before).all() and acc.losses==[]
    x,y = problem(7)
    one = acc.backward(m(x), y)
    assert not one.requires_grad and acc.losses==[]
    assert rel(one, acc.flush())<=1e-15 and len(acc.losses)==1 and (flat(m.parameters())!=before).any() and acc.flush() is None

def test_several_inputs_and_targets():
    "Dicts, tuples and several targets are counted by samples; what the model returned counts if targets do not tell"
    x,y = problem(64)
    def two(pred, a, b): return F.cross_entropy(pred['out'], a)+F.mse_loss(pred['out'][:,0], b)
    class Dict(nn.Module):
        def __init__(self): super().__init__(); self.net = net()
        def forward(self, x): return {'none':x.new_zeros(()), 'out':self.net(x)}
    def one(bs, n_step, call):
        m,o = start(model=Dict)
        acc = Accumulator(m, o, two if call=='two' else lambda pred,*_: pred['out'].square().mean(), n_step)
        with acc:
            for a,b in cut((x,y), bs): acc.backward(m(a), *((b,a[:,0]) if call=='two' else ()))
        return flat(m.parameters())
    for call in ('two','none'): assert rel(one([20,20,24], 1, call), one([7,13,8,12,4,20], 2, call))<=1e-12

def test_loss_with_parameters():
    "They are trained if the optimizer has them"
    class Scaled(nn.Module):
        def __init__(self): super().__init__(); self.s = nn.Parameter(torch.ones(3, dtype=torch.float64))
        def forward(self, pred, targ): return F.cross_entropy(pred*self.s, targ)
    sizes,data = SIZES['uneven'],problem(64)
    a,b = Scaled(),Scaled()
    assert_same(large(cut(data, sums(sizes, 4)), a, loss=a), small(cut(data, sizes), b, loss=b, n_step=4))
    assert (a.s!=1).all() and rel(a.s.detach(), b.s.detach())<=1e-12

# what must not go wrong

class Boom(Exception): pass

def test_error_in_the_loop():
    "An error of the user's leaves the window as it was: go on, and it is the large batch"
    data = problem(16)
    m,o = start()
    acc,n = Accumulator(m, o, CE, n_step=4),0
    for x,y in cut(data, [4]*4):
        try:
            pred = m(x)
            if (n := n+1)==3: raise Boom
        except Boom: pred = m(x)
        acc.backward(pred, y)
    assert rel(large([data], CE, epochs=1)['steps'][0], flat(m.parameters()))<=1e-12

@pytest.mark.parametrize('where', ('loop','loss','gradient','before_step','step','after_step','denominator'))
def test_no_poison(where):
    "After an error, wherever it is, and `drop`, what follows is what a new one would do"
    data = problem(48)
    m,o = start()
    on = []
    def boom(at):
        if on and at==where: raise Boom
    def loss(pred, targ):
        boom('loss')
        if on and where=='gradient': pred.register_hook(lambda g: boom('gradient'))
        return CE(pred, targ)
    class Opt(torch.optim.SGD):
        def step(self): boom('step'); return super().step()
    o = Opt(m.parameters(), 0.1, momentum=0.9)
    acc = Accumulator(m, o, loss, 4, before_step=lambda: boom('before_step'), after_step=lambda: boom('after_step'),
                      normalize=lambda pred,targ: -1 if on and where=='denominator' else len(targ))
    for x,y in cut(data, [4]*3): acc.backward(m(x), y)
    on.append(1)
    with pytest.raises(ValueError if where=='denominator' else Boom):
        acc.backward(m(data[0][:4]), data[1][:4])
        boom('loop')
        acc.backward(m(data[0][:4]), data[1][:4])
        boom('loop')
    on.clear()
    if where not in ('loop','loss'): assert acc.win is None and all(p.grad is None for p in m.parameters()) # it has dropped what may be half done
    acc.drop()
    assert acc.win is None and all(p.grad is None for p in m.parameters())
    m2 = deepcopy(m)
    o2 = Opt(m2.parameters(), 0.1, momentum=0.9)
    o2.load_state_dict(deepcopy(o.state_dict()))
    other = Accumulator(m2, o2, loss, 4)
    for mm,a in ((m,acc),(m2,other)):
        for x,y in cut(data, [4]*6): a.backward(mm(x), y)
        a.flush()
    assert (flat(m.parameters())==flat(m2.parameters())).all()

def test_with():
    "The end of `with` steps what is left, an error drops it"
    x,y = problem(8)
    m,o = start()
    acc = Accumulator(m, o, CE, n_step=4)
    with acc: acc.backward(m(x), y)
    assert len(acc.losses)==1 and acc.win is None
    with pytest.raises(Boom):
        with acc: acc.backward(m(x), y); raise Boom
    assert len(acc.losses)==1 and acc.win is None and all(p.grad is None for p in m.parameters())

def test_stale_gradients():
    "What was left in the gradients before, also in those that the optimizer does not have, counts nothing"
    data = problem(16)
    m,_ = start()
    o = torch.optim.SGD(m[2].parameters(), 0.1)
    for p in m.parameters(): p.grad = torch.full_like(p, 1e6)
    norms = []
    acc = Accumulator(m, o, CE, n_step=4, before_step=lambda: norms.append(float(nn.utils.get_total_norm([p.grad for p in m.parameters()]))))
    for _ in range(2):
        for x,y in cut(data, [4]*4): acc.backward(m(x), y)
    assert len(norms)==2 and max(norms)<10

def test_loss_parameters_after_drop():
    "A dropped micro-batch that counts nothing leaves no mask on a loss's parameters"
    class Centers(nn.Module):
        def __init__(self): super().__init__(); self.c = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        def forward(self, pred, targ): return ((pred-self.c)**2).mean()
        def denominator(self, pred, targ): return (targ>=0).sum()
    loss = Centers()
    m,o = start(loss=loss)
    x,y = problem(4)
    acc = Accumulator(m, o, loss, n_step=2)
    acc.backward(m(x), torch.full_like(y, -100))
    acc.drop()
    loss(m(x), y).backward()
    assert loss.c.grad.abs().sum()>0

def good(**kwargs): return {**dict(zip(('model','opt'), start()), loss_func=CE), **kwargs}
@pytest.mark.parametrize('kw,why', [(dict(model=net().parameters()), '`model`=<generator.*takes a `torch.nn.Module`'), (dict(opt=torch.optim.SGD), "`opt`=<class 'torch.optim.sgd.SGD'>.*an optimizer"),
    (dict(loss_func=nn.CrossEntropyLoss), '`loss_func`=.*takes a loss, such as'), (dict(loss_func='mse'), '`loss_func`=mse'), (dict(scaler=1024.), '`scaler`=1024.0.*GradScaler'),
    (dict(after_step=SimpleNamespace()), '`after_step`=namespace.*no arguments'), (dict(before_step=1), '`before_step`=1'), (dict(n_step=4, n_samples=32), '`n_step`=4 and `n_samples`=32: pass only one'),
    (dict(n_step=0), '`n_step`=0: pass a positive integer.*acc.resize'), (dict(n_step=2.), '`n_step`=2.0'), (dict(n_samples=True), '`n_samples`=True'), (dict(normalize='tokens'), r"`normalize`='tokens'.*\(pred, \*targs\)")])
def test_refused(kw, why):
    with pytest.raises(ValueError, match=why): Accumulator(**good(**kw))

@pytest.mark.parametrize('loss,call,why', [(nn.CrossEntropyLoss(reduction='none'), slice(None), r'`loss_func` returned a tensor of shape \(4,\): let it return one number'), (lambda p,t: 1., slice(None), '`loss_func` returned 1.0'),
    (lambda p: p, None, 'neither targets nor what the model returned tell')])
def test_refused_in_backward(loss, call, why):
    "Before anything was differentiated"
    x,y = problem(4)
    acc = Accumulator(**good(loss_func=loss))
    with pytest.raises(ValueError, match=why): acc.backward(acc.model(x).mean()) if call is None else acc.backward(acc.model(x), y)
    assert acc.win is None and all(p.grad is None for p in acc.model.parameters())

@pytest.mark.parametrize('args', (lambda l,y: (l,), lambda l,y: (l,y)), ids=('alone','with_targets'))
def test_loss_in_place_of_output(args):
    x,y = problem(4)
    acc = Accumulator(**good())
    with pytest.raises(ValueError, match=r"is one number, as a loss is.*`acc.backward\(model\(x\), y\)`"): acc.backward(*args(CE(acc.model(x), y), y))

@pytest.mark.parametrize('n_step,warned', ((2,1), (1,0)))
def test_own_step(n_step, warned):
    "A loop that steps within a window is told, once; where windows are single micro-batches there is nothing to step"
    m,o = start()
    acc = Accumulator(m, o, CE, n_step=n_step)
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        for x,y in cut(problem(16), [4]*4):
            acc.backward(m(x), y)
            o.step()
    assert len([w for w in ws if '`opt.step()` was called within a window' in str(w.message)])==warned
    del acc
    m(x).sum().backward()
    o.step() # the optimizer goes on without it

def test_two_denominators_are_told():
    from fastai.losses import LabelSmoothingCrossEntropy
    with pytest.warns(UserWarning, match='class weights: no one number'): Accumulator(**good(loss_func=LabelSmoothingCrossEntropy(weight=W)))

@pytest.mark.parametrize('loss', (CE, nn.CrossEntropyLoss(W), MaskedMSE(), nn.CrossEntropyLoss(reduction='sum'), nn.MSELoss()), ids=str)
@pytest.mark.parametrize('unit', ('n_step','n_samples'))
def test_no_waits(loss, unit):
    "Nothing waits for the device; on the CPU, where there is none, a step looks at its scale, and a denominator of one's own is looked into"
    x,y = problem(64)
    y = y.masked_fill(torch.arange(64)%3==0, -100) if isinstance(loss, nn.CrossEntropyLoss) else x[:,:3].masked_fill(x[:,:3]>2, 2.)
    def waits(bs, n_step):
        m,o = start()
        acc = Accumulator(m, o, loss, **{unit:n_step*(1 if unit=='n_step' else bs)})
        with Waits() as mode:
            for a,b in cut((x,y), [bs]*(64//bs)): acc.backward(m(a), b)
            acc.flush()
        looks = 4*(isinstance(loss, MaskedMSE) or loss.reduction=='mean' and isinstance(loss, nn.CrossEntropyLoss)) + (64//bs if isinstance(loss, MaskedMSE) else 0)
        return mode.n - Counter(_local_scalar_dense=looks)
    with Waits() as mode: [loss(net().double()(a), b) for a,b in cut((x,y), [16]*4)]
    own = mode.n # the loss's own
    for bs in (16,4,1): assert {k:v*bs//16 for k,v in waits(bs, 16//bs).items()}=={**own}

# without fastai

def test_without_fastai():
    "Torch and fastcore are enough for a loop, which trains as the large batch does"
    code = NO_FASTAI + """
sys.modules['numpy'] = None # torch does without it, too
import torch
from copy import deepcopy
from fastai_accum.loop import Accumulator
torch.manual_seed(0)
x,y = torch.randn(50, 6).double(),torch.randint(3, (50,)).masked_fill(torch.rand(50)<0.5, -100)
large = torch.nn.Linear(6, 3).double()
small,loss = deepcopy(large),torch.nn.CrossEntropyLoss()
a,b = (torch.optim.Adam(m.parameters(), 0.1) for m in (large,small))
acc = Accumulator(small, b, loss)
for i in range(0, 50, 20):
    loss(large(x[i:i+20]), y[i:i+20]).backward()
    a.step(); a.zero_grad()
    for xb,yb in acc.split((x[i:i+20],y[i:i+20]), 6): acc.backward(small(xb), yb)
    acc.flush()
assert len(acc.losses)==3 and (large.weight-small.weight).abs().max()<1e-12
assert not any(m.split('.')[0]=='fastai' for m in sys.modules)
"""
    res = subprocess.run([sys.executable,'-c',code], capture_output=True, text=True, cwd=ROOT)
    assert res.returncode==0, res.stderr

# two processes: each gets its part of an epoch, in micro-batches of its own

class Buffered(nn.Sequential):
    "A net with a buffer, which DDP takes from rank 0 at the start of each window"
    def __init__(self): super().__init__(*net()); self.register_buffer('n', torch.zeros(3))
    def forward(self, x):
        if self.training: self.n += 1
        return super().forward(x)

class Extra(nn.Sequential):
    "A net with a parameter that it does not use"
    def __init__(self): super().__init__(*net(), nn.Module()); self[3].p = nn.Parameter(torch.ones(2))
    def forward(self, x): return self[2](self[1](self[0](x)))

EVEN = ([4]*8, [4]*8)
def case(sizes=EVEN, loss=CE, opt='sgd', model=net, ddp={}, scaler=False, large_loss=None, clip=False, ignore=0.6, **kwargs): return SimpleNamespace(**{**locals(), 'large_loss':large_loss or loss})
CASES = {
    'ignored':case(n_step=4), 'adam':case(n_step=4, opt='adam'), 'class weights':case(n_step=4, loss=nn.CrossEntropyLoss(W)), 'window of one':case(n_step=1, loss=nn.CrossEntropyLoss(W), ignore=0.3),
    'short last window':case(n_step=4, sizes=([4]*6,[4]*6)), 'uneven micro-batches':case(n_step=4, sizes=([7,1,4,4,2,9,3],[2,3,3,8,6,1,1])), 'nothing counts':case(n_step=4, ignore=0.9),
    'one rank ends early':case(n_step=4, sizes=([4]*10,[4]*8)), 'the other ends early':case(n_step=4, sizes=([4]*8,[4]*9)), 'n_samples':case(n_samples=16, sizes=([4]*8,[6,10,3,3,10])),
    'flush alone':case(sizes=([4]*3,[5]*2)), 'sum':case(n_step=4, loss=nn.CrossEntropyLoss(reduction='sum'), large_loss=CE, ignore=0), 'scaler and clipping':case(n_step=4, scaler=True, clip=True),
    'own denominator':case(n_step=2, loss=lambda p,t: F.cross_entropy(p, t, reduction='sum', ignore_index=-100)/(t>=0).sum().clamp(min=1), large_loss=CE, normalize=lambda p,t: int((t>=0).sum())),
    'buffers':case(n_step=4, model=Buffered, sizes=([4]*10,[4]*10)), 'unused parameters':case(n_step=4, model=Extra, ddp=dict(find_unused_parameters=True), sizes=([4]*10,[4]*9)),
    'bucket views':case(n_step=4, ddp=dict(gradient_as_bucket_view=True), sizes=([4]*6,[4]*6))}

def shards(c):
    "The micro-batches of each rank"
    x,y = problem(200)
    y = y.masked_fill(torch.rand(200, generator=torch.Generator().manual_seed(5))<c.ignore, -100)
    if c.ignore: y[:100:3] = -100 # rank 0 has fewer targets
    if c.ignore==0.9: y[:8] = -100
    return [cut((x[i:],y[i:]), s) for i,s in zip((0,100), c.sizes)]

class Comm:
    "Numbers in every all-reduce, DDP's own included"
    def __init__(self, ddp):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
        ddp.register_comm_hook(None, allreduce_hook)
        self.log,self.f = [],torch.distributed.all_reduce
    def __enter__(self): torch.distributed.all_reduce = self; return self
    def __exit__(self, *_): torch.distributed.all_reduce = self.f
    def __call__(self, t, *args, **kwargs):
        self.log.append(t.numel())
        return self.f(t, *args, **kwargs)

def work(c):
    from fastai_accum import processes
    m,o = start(c.opt, c.model)
    reduce_grads,after = processes.reduce_grads,[]
    processes.reduce_grads = lambda model: after.append(1) or reduce_grads(model)
    ddp,steps = DistributedDataParallel(m, **c.ddp),[]
    with Comm(ddp) as comm:
        acc = Accumulator(ddp, o, c.loss, scaler=torch.amp.GradScaler('cpu', init_scale=1024.) if c.scaler else None, before_step=(lambda: clip(m)) if c.clip else None,
                          after_step=lambda: steps.append(flat(m.parameters())), **c.kwargs)
        for _ in range(EPOCHS):
            with acc:
                for x,y in shards(c)[torch.distributed.get_rank()]: acc.backward(ddp(x), y)
    processes.reduce_grads,refused = reduce_grads,[]
    for kw in (dict(model=m), dict(loss_func=nn.Bilinear(3, 3, 1))):
        try: Accumulator(**{**dict(model=ddp, opt=o, loss_func=CE), **kw})
        except ValueError as e: refused.append(str(e))
    return dict(steps=steps, state=state(o), losses=flat(acc.losses), log=comm.log, after=len(after), synced=ddp.require_backward_grad_sync, refused=refused)

@pytest.fixture(scope='module')
def two(tmp_path_factory): return in_two(__file__, tmp_path_factory.mktemp('loop'), CASES)

def windows(c):
    "The global batches: the micro-batches of both ranks' windows of the same number"
    def wins(mbs):
        res,n = [[]],0
        for b in mbs:
            res[-1].append(b); n += len(b[0]) if 'n_samples' in c.kwargs else 1
            if n>=c.kwargs.get('n_step', c.kwargs.get('n_samples', math.inf)): res.append([]); n = 0
        return res if res[-1] else res[:-1]
    return [tuple(torch.cat(o) for o in zip(*sum(w, []))) for w in itertools.zip_longest(*map(wins, shards(c)), fillvalue=[])]

@pytest.mark.parametrize('name', CASES)
def test_global_batch(name, two):
    "The step is that of one process with the global batch, and processes agree to the bit"
    c,(a,b) = CASES[name],two(name)
    assert all((s==t).all() for s,t in zip(a['steps'], b['steps'])) and (a['state']==b['state']).all() and (a['losses']==b['losses']).all()
    if c.ignore==0.9: assert any((y<0).all() for x,y in shards(c)[0])
    one = large(windows(c), c.large_loss, c.opt, model=c.model, before=clip if c.clip else noop)
    for r in (a,b): assert_same(one, r)

@pytest.mark.parametrize('name', CASES)
def test_one_reduction(name, two):
    "A window has one all-reduce of the gradients and one of two numbers, an epoch's `flush` one of one number"
    c,n = CASES[name],EPOCHS*len(windows(CASES[name]))
    for r in two(name):
        assert Counter(r['log'])=={sum(p.numel() for p in c.model().parameters()):n, 2:n, 1:EPOCHS}
        assert r['synced']

@pytest.mark.parametrize('name,after', (('ignored',0), ('window of one',0), ('short last window',EPOCHS), ('n_samples',2*EPOCHS), ('flush alone',EPOCHS)))
def test_reduced_while_it_goes(name, after, two):
    "Gradients are sent in the backward pass itself if it was known to be a window's last, and after it otherwise"
    for r in two(name): assert r['after']==after

def test_refused_in_two(two):
    for r in two('ignored'): assert 'whose gradients nothing averages: pass a `DistributedDataParallel`' in r['refused'][0] and 'has parameters of its own' in r['refused'][1]

if __name__=='__main__': work_on(CASES, work)
