"Out of memory under `MicroBatch('auto')`: from there on the run is, bit for bit, that of the size that fits"
import gc,re,threading,weakref
import pytest
from collections import Counter
from hypothesis import given,example,settings,strategies as st
from fastai.text.models.awdlstm import EmbeddingDropout,RNNDropout,WeightDropout
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from test_companions import Mixed,lm_maker,y_int
from fastai_accum.retry import _oom_texts,is_oom
from common import *

N,BS = 73,32 # two batches of 32 samples and one of 9; 16 are for validation
EPOCH = [(32,True)]*2 + [(9,True),(16,False)]
MAX = 10**6
f32,f64 = torch.float32,torch.float64
CE = nn.CrossEntropyLoss

# ---- memory that is not enough

def fails(exc, text):
    def _f(): raise exc(text)
    return _f
def tangled():
    "An error that keeps itself alive, and all that its frames know, until the garbage collector comes"
    try: cuda()
    except RuntimeError as e: err = e
    raise err
cuda = fails(torch.OutOfMemoryError, 'CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB of which 1.19 GiB is free.')
ERRORS = {'cpu': lambda: torch.empty(2**60), 'cuda': cuda, 'tangled': tangled,
          'type alone': fails(torch.OutOfMemoryError, 'Allocation failed'),
          'cuda of old': fails(RuntimeError, 'CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; 15.77 GiB total capacity)'),
          'cuda of others': fails(RuntimeError, 'CUDA error: out of memory'),
          'mps': fails(RuntimeError, 'MPS backend out of memory (MPS allocated: 17.90 GB, other allocations: 1.02 MB, max allowed: 18.13 GB)'),
          'cudnn alloc': fails(RuntimeError, 'cuDNN error: CUDNN_STATUS_ALLOC_FAILED'),
          'cudnn': fails(RuntimeError, 'cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.'),
          'cublas': fails(RuntimeError, 'CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`'),
          'cublas init': fails(RuntimeError, 'CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`'),
          'cudnn engines': fails(RuntimeError, 'GET was unable to find an engine to execute this computation'), 'host': fails(MemoryError, 'Unable to allocate 8. GiB')}

class Memory:
    "Not enough for more than `k` samples at once, nor for the calls in `at`"
    def __init__(self, k=MAX, at=(), error=cuda): self.k,self.at,self.error,self.asked,self.failed = k,at,error,[],False
    def lacks(self, i, n): return n>self.k or i in self.at
    def __call__(self, n):
        self.asked.append(n)
        self.failed = self.lacks(len(self.asked)-1, n)
        if self.failed: self.error()

class Ask(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mem): ctx.mem = mem; return x.view_as(x)
    @staticmethod
    def backward(ctx, g): ctx.mem(len(g)); return g,None

class Place(nn.Module):
    "Asks `mem` on the way: in 'forward', in 'backward', or in a 'hook' of a tensor"
    def __init__(self, mem, where): super().__init__(); self.mem,self.where = mem,where
    def forward(self, x):
        if self.where=='forward': self.mem(len(x))
        if not x.requires_grad: return x
        if self.where=='backward': return Ask.apply(x, self.mem)
        if self.where=='hook': x.register_hook(lambda g: self.mem(len(g)))
        return x

class AskLoss:
    "Asks `mem` once `func`, a loss, is computed"
    def __init__(self, func, mem): self.func,self.mem = func,mem
    def __call__(self, pred, *y):
        res = self.func(pred, *y)
        self.mem(len(y[0]))
        return res

class AskAt(Callback):
    "Asks `mem` in `event`"
    def __init__(self, mem, event, order=0): self.mem,self.order = mem,order; setattr(self, event, self.ask)
    def ask(self): self.mem(len(self.y))

EVENTS = {'after_pred':0, 'after_loss':0, 'late after_loss':20, 'before_backward':0, 'after_backward':0} # `MixedPrecision` is at 10
TRAIN_ONLY = 'backward','hook','before_backward','after_backward'
PLACES = 'forward','loss',*EVENTS,'backward','hook'

# ---- models with all that a step draws and changes

class Noise(nn.Module):
    "Stochastic depth by Python's random numbers, noise by numpy's"
    def forward(self, x): return x if not self.training or random.random()<0.3 else x*float(1+0.1*np.random.randn())

class Running(nn.Module):
    "Running statistics as in BatchNorm, but one sample is enough and training uses them; one buffer changes in place, one is replaced, one is none"
    def __init__(self):
        super().__init__()
        for k,v in dict(mean=torch.zeros(8), n=torch.zeros(()), none=None).items(): self.register_buffer(k, v)
    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean(0).to(self.mean.dtype), 0.2)
            self.n = self.n+1
        return x-self.mean*(1+0.1*self.n.cos())

bn = partial(nn.BatchNorm1d, 8)
def deep(mem, where, norm=bn):
    return nn.Sequential(nn.Sequential(nn.Linear(6, 8), norm()), nn.Sequential(nn.Tanh(), nn.Dropout(0.3), Noise(), Place(mem, where)), nn.Linear(8, 3))

# ---- runs

def draws(): return [random.getstate(), np.random.get_state()[1].tobytes(), np.random.get_state()[2:], torch.get_rng_state()]
def clones(ts): return [None if t is None else torch.as_tensor(t).detach().clone() for t in ts]
def trained(l): return l.opt.all_params().itemgot(0)

class Exact(Callback):
    "All there is after every batch, and the gradients of every step"
    order = 200
    def __init__(self): self.seen,self.grads = [],[]
    def before_step(self): self.grads = clones([p.grad for p in trained(self.learn)])
    def after_batch(self):
        self.seen.append(dict(grads=self.grads, weights=clones(trained(self.learn)), buffers=clones(self.model.buffers()), state=clones(tensors(self.opt.state_dict())),
                              loss=clones([self.loss]), pred=clones([self.pred]), draws=draws()))

class Switch(Callback):
    "Somebody who knows what will fit, and says so before each batch"
    order = -200
    def __init__(self, sizes): self.sizes = iter(sizes)
    def before_batch(self): self.learn.micro_batch.bs = next(self.sizes)

def make(mb, mem=None, where='forward', sizes=None, cbs=(), setup=noop, norm=bn, loss_func=None, **kwargs):
    "A learner that asks `mem`; in batches of `sizes` if these are given"
    mem = mem or Memory()
    asks = [AskAt(mem, where.split()[-1], EVENTS[where])] if where in EVENTS else []
    loss_func = AskLoss(CE(), mem) if where=='loss' else loss_func or CE()
    l = learner(sum(sizes) if sizes else N, BS, mb, **{'model':partial(deep, mem, where, norm), **kwargs}, loss_func=loss_func, cbs=[*asks, *cbs, Exact()])
    if sizes: resize(l, sizes)
    setup(l)
    return l
def fit(l): l.fit(2, 0.05)
def go(*args, fit=fit, **kwargs): return run(make(*args, **kwargs), fit)

def equal(a, b):
    if isinstance(a, (list,tuple)): return type(a) is type(b) and len(a)==len(b) and all(map(equal, a, b))
    return torch.equal(a, b) and a.dtype==b.dtype if isinstance(a, Tensor) and isinstance(b, Tensor) else a==b

def same(a, b):
    "Two learners went the same way, bit for bit"
    assert len(a.exact.seen)==len(b.exact.seen)>0
    for i,(s,t) in enumerate(zip(a.exact.seen, b.exact.seen)):
        for k in s: assert equal(s[k], t[k]), f'{k} after batch {i}'
    assert_same_run(a, b, 0.)

def both(mem, where='forward', cbs=list, mb=MicroBatch, **kwargs):
    "'auto' that comes down to 8 on the first batch, found to be the run that starts with 8"
    auto = go(mb('auto'), mem, where, cbs=cbs(), **kwargs)
    fixed = go(mb(8, valid=where not in TRAIN_ONLY), where=where, cbs=cbs(), **kwargs)
    assert auto.micro_batch.bs==8
    same(fixed, auto)
    return fixed,auto

LADDER = sorted({2**i for i in range(1, 9)} | {3*2**i for i in range(8)})
def foretell(batches, mem, where='forward'):
    "For each of `batches`, (samples, training): the size it will end up with, and which call to `mem` is the first at that size; and what will be printed"
    sizes,lines,res,i = {},[],[],0
    for n,train in batches:
        bs,asks = min(sizes.get(train, n), n),train or where not in TRAIN_ONLY
        while asks:
            k = -(-n//bs)
            bad = first(j for j in range(k) if mem.lacks(i+j, n*(j+1)//k-n*j//k))
            if bad is None: break
            if bs==1: return res,lines
            i += bad+1
            sizes[train] = next(size for parts in LADDER if (size := math.ceil(n/parts))<math.ceil(n/k))
            lines.append((bs,'training' if train else 'validation',sizes[train]))
            bs = sizes[train]
        res.append((bs,i))
        if asks: i += -(-n//bs)
    return res,lines

def printed(capsys):
    "Samples, part of training and what is tried next in each line, which is all that was printed"
    out = capsys.readouterr().out
    res = re.findall(r'^MicroBatch: (\d+) samples at once do not fit in memory in (training|validation), going on with (\d+)\n', out, re.M)
    assert len(res)==out.count('\n')
    return [(int(a),b,int(c)) for a,b,c in res]
LINES = [(32,'training',16),(16,'training',11),(11,'training',8)]
DOWN = [32,16,10,11] # what is asked for on the way to 8: all, half, and two of three parts, which are uneven

def depth():
    "How many autocasts are entered"
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()

def clean(l):
    "Nothing stands in for anything in `l`, no gradient is left, and no autocast is entered"
    assert not {'all_batches','one_batch','_do_one_batch','_do_grad_opt','_backward','_step'} & set(vars(l))
    assert depth()==0 and not torch.is_autocast_enabled('cpu') and torch.is_grad_enabled()
    assert all(p.grad is None or not p.grad.any() for p in l.model.parameters())

def goes_on(l, mb):
    "With memory, the fit that follows is that of a new learner with the same weights"
    other = make(mb, model=partial(deepcopy, l.model), dtype=one_param(l.model).dtype)
    l.exact.seen,l.trace.steps,l.trace.batches = [],[],[]
    l.remove_cb(Mixed)
    l.create_opt()
    for o in (other,l):
        o.dls.train.rng = random.Random(3)
        run(o, lambda l: l.fit(1, 0.05))
    same(other, l)

@pytest.fixture(autouse=True, scope='module')
def little_garbage():
    "The collector runs after each failed attempt: it need not look at all of fastai each time"
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()

@pytest.fixture(autouse=True)
def no_autocast():
    "A test that finds autocast entered does not leave it so for others"
    yield
    while depth()>0: torch.autocast_decrement_nesting()
    while depth()<0: torch.autocast_increment_nesting()
    torch.set_autocast_enabled('cpu', False)
    torch.clear_autocast_cache()

# ---- found on the first batch: the run that had started with that size

@pytest.mark.parametrize('dtype', (f64,f32), ids=str)
@pytest.mark.parametrize('where', PLACES)
def test_places(where, dtype, capsys):
    "Wherever memory ends: gradients, weights, buffers, optimizer state, losses, predictions and random numbers are those of `MicroBatch(8)`"
    mem = Memory(10)
    _,auto = both(mem, where, dtype=dtype)
    assert mem.asked[:8]==[*DOWN,8,8,8,8] and printed(capsys)==LINES + ([] if where in TRAIN_ONLY else [(16,'validation',8)])
    clean(auto)

@pytest.mark.parametrize('dtype', (f64,f32), ids=str)
@pytest.mark.parametrize('where', PLACES)
def test_plain(where, dtype):
    "Of layers that do not care for the size, it is the run of a plain `Learner` too"
    def model(mem): return lambda: nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Tanh(), Place(mem, where)), nn.Linear(8, 3))
    mems = Memory(),Memory(10)
    plain,auto = (go(mb, mem, where, dtype=dtype, model=model(mem)) for mb,mem in zip((None,MicroBatch('auto')), mems))
    assert mems[1].asked[:5]==[*DOWN,8]
    assert_same_run(plain, auto, 1e-12 if dtype==f64 else 1e-5)

@pytest.mark.parametrize('where', ('forward','backward'))
@pytest.mark.parametrize('error', ERRORS)
def test_errors(error, where):
    "Whatever says that memory is not enough"
    both(Memory(10, error=ERRORS[error]), where)

NO_MEMORY = ['FIND was unable to find an engine to execute this computation', 'GET was unable to find an engine to execute this computation',
    'Unable to find a valid cuDNN algorithm to run convolution', 'cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED', 'cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED',
    'cuDNN error: CUDNN_STATUS_NOT_INITIALIZED', 'cuDNN error: CUDNN_STATUS_INTERNAL_ERROR', 'cuDNN error: CUDNN_STATUS_INTERNAL_ERROR\nYou can try to repro this exception',
    'CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasCreate(handle)`', 'CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`',
    'cuFFT error: CUFFT_ALLOC_FAILED', 'cuFFT error: CUFFT_INTERNAL_ERROR', 'cuFFT error: HIPFFT_ALLOC_FAILED', 'cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`. ',
    'hipsolver error: HIPSOLVER_STATUS_ALLOC_FAILED, when calling `hipsolverCreate(handle)`. ', 'CUDA error: CUSPARSE_STATUS_ALLOC_FAILED when calling `cusparseCreate(handle)`',
    'CUDA error: insufficient resources when calling `cusparseCreate(handle)`', 'CUDA error: allocation failed when calling `cusparseCreate(handle)`', 'HIP error: out of memory',
    'MIOpen Error: miopenStatusAllocFailed', 'Invalid buffer size: 18.00 GiB', 'Invalid buffer size: 9.75 GB', 'level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)',
    'Native API failed. Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES)', "NCCL error: unhandled cuda error. Last error: Cuda failure 2 'out of memory'", 'CUDA driver error: out of memory',
    'Internal Error (0000000e:kIOGPUCommandBufferCallbackErrorOutOfMemory)', 'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":1016, please report a bug',
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes", 'std::bad_alloc']
OTHERS = ['INTERNAL_ERROR', 'the server said INTERNAL_ERROR', 'NOT_INITIALIZED', 'ALLOC_FAILED', 'MY_CUDNN_STATUS_INTERNAL_ERRORS', 'cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_BAD_LAUNCH_PARAM',
    'cuDNN error: CUDNN_STATUS_NOT_SUPPORTED_LAYOUT', 'cuDNN error: CUDNN_STATUS_EXECUTION_FAILED', 'CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle)`',
    'cusolver error: CUSOLVER_STATUS_INVALID_VALUE', 'CUDA error: device-side assert triggered', 'CUDA error: an illegal memory access was encountered', 'Invalid buffer size: -3',
    'x INTERNAL ASSERT FAILED at "/pytorch/aten/src/ATen/x.cpp":1', 'mat1 and mat2 shapes cannot be multiplied (4x3 and 6x8)', 'unable to find an engine']

def test_texts():
    "Texts of PyTorch and of what it calls, each of a kind of its own; and texts that tell of something else"
    assert [o for o in NO_MEMORY if not is_oom(RuntimeError(o))]==[] and [o for o in OTHERS if is_oom(RuntimeError(o))]==[]
    with pytest.raises(MemoryError) as numpy: np.empty(2**55, dtype=np.uint8)
    assert all(is_oom(e) for e in (MemoryError(), numpy.value, torch.OutOfMemoryError('XPU out of memory. Tried to allocate 2.00 GiB')))
    assert not any(is_oom(ValueError(o)) or is_oom(KeyError(o)) for o in NO_MEMORY)
    used = [[bool(re.search(p, o)) for o in [*NO_MEMORY, 'cuDNN error: CUDNN_STATUS_NOT_SUPPORTED']] for p in _oom_texts]
    assert all(map(any, used)) # no pattern is there for nothing

def test_something_else():
    "An error that may mean too little memory, but does not, comes out at one sample, as it was"
    exc = fails(RuntimeError, 'cuDNN error: CUDNN_STATUS_INTERNAL_ERROR')
    l = make(MicroBatch('auto'), Memory(0, error=exc), norm=nn.Identity)
    with pytest.raises(RuntimeError, match='^cuDNN error: CUDNN_STATUS_INTERNAL_ERROR\n'): run(l, fit)
    clean(l)

OPTS = dict(sgd_l2=partial(SGD, mom=0.9, wd=0.1, decouple_wd=False), adam=partial(Adam, wd=0.1), rmsprop=partial(RMSProp, mom=0.9), lamb=partial(Lamb, wd=0.1),
            lookahead=lambda p, lr: Lookahead(Adam(p, lr), k=3), torch_adamw=partial(OptimWrapper, opt=torch.optim.AdamW))
@pytest.mark.parametrize('fit', (lambda l: l.fit_one_cycle(2, 0.02), lambda l: l.fine_tune(1, 0.02)), ids=('fit_one_cycle','fine_tune'))
@pytest.mark.parametrize('opt', OPTS)
def test_optimizers(opt, fit):
    both(Memory(10), 'after_backward', fit=fit, opt_func=OPTS[opt])

@pytest.mark.parametrize('where', ('forward','backward'))
@pytest.mark.parametrize('k', (1,3,5,11,13,30))
def test_parts(k, where, capsys):
    "2, 3, 4, 6, 8, 12, ... parts, until what is asked for fits; batches of other sizes may have parts that don't"
    mem,sizes = Memory(k),[29,31,32,7]
    def fit(l): l.fit(1, 0.05)
    auto = go(MicroBatch('auto'), mem, where, sizes, norm=Running, fit=fit)
    expect,lines = foretell([*[(n,True) for n in sizes], (16,False)], mem, where)
    assert printed(capsys)==lines and auto.micro_batch.bs==min(o[2] for o in lines if o[1]=='training')
    same(go(MicroBatch(MAX, valid=True), None, where, sizes, norm=Running, fit=fit, cbs=[Switch(bs for bs,_ in expect)]), auto)

class Extra(nn.Module):
    "A layer that only large batches take"
    def __init__(self, mem): super().__init__(); self.a,self.b,self.c,self.place = nn.Linear(6, 8),nn.Linear(8, 8),nn.Linear(8, 3),Place(mem, 'backward')
    def forward(self, x):
        x = self.place(self.a(x))
        return self.c((self.b(x) if len(x)>8 else x).tanh())
def test_no_gradient_before():
    "A parameter without gradient before the first batch, which only the failed attempt used, has none after it: the optimizer passes it over"
    mems = Memory(),Memory(10)
    fixed,auto = (go(mb, model=partial(Extra, mem), opt_func=partial(Adam, wd=0.1)) for mb,mem in zip((MicroBatch(8),MicroBatch('auto')), mems))
    same(fixed, auto)
    assert mems[1].asked[:5]==[*DOWN,8] and auto.model.b.weight.grad is None and 'grad_avg' not in auto.opt.state[auto.model.b.weight]

def test_gradient_before():
    "One that had a gradient, and that only the failed attempt used in this batch, has one of zeros: the optimizer moves it by its momentum"
    mems = Memory(),Memory(10)
    def one(mb, mem, *cbs): return go(mb, model=partial(Extra, mem), opt_func=partial(Adam, wd=0.1), sizes=[10,32], cbs=cbs)
    fixed,auto = one(MicroBatch(MAX), mems[0], Switch([10,8,MAX,8,8,MAX])),one(MicroBatch('auto'), mems[1])
    same(fixed, auto)
    weights = [s['weights'] for s in auto.exact.seen if len(s['pred'][0])!=16]
    assert mems[1].asked[:6]==[10,*DOWN,8] and not torch.equal(weights[0][2], weights[1][2])

class Words(nn.Module):
    def __init__(self): super().__init__(); self.emb,self.lin = nn.Embedding(11, 4, sparse=True),nn.Linear(4, 3)
    def forward(self, x): return self.lin(self.emb(x[:,:3].abs().mul(4).long().clamp(max=10)).mean(1))
def test_sparse_gradients():
    def to_dense(self): [setattr(p, 'grad', p.grad.to_dense()) for p in self.model.parameters() if p.grad.is_sparse]
    both(Memory(10), 'after_backward', model=Words, opt_func=partial(OptimWrapper, opt=torch.optim.SGD), cbs=lambda: [Callback(before_step=to_dense)])

class Checkpointed(nn.Module):
    def __init__(self, mem, reentrant):
        super().__init__()
        self.a,self.b,self.c,self.mem,self.reentrant = nn.Linear(6, 8),nn.Linear(8, 8),nn.Linear(8, 3),mem,reentrant
    def part(self, x):
        if torch._C._current_graph_task_id()>=0: self.mem(len(x)) # within a backward pass
        return F.dropout(self.b(x).tanh(), 0.3, self.training)
    def forward(self, x): return self.c(checkpoint(self.part, self.a(x), use_reentrant=self.reentrant))
@pytest.mark.parametrize('reentrant', (False,True))
def test_checkpoint(reentrant):
    "Memory ends where a part of the model is computed again, in the backward pass"
    mems = Memory(),Memory(10)
    same(*(go(mb, model=partial(Checkpointed, mem, reentrant)) for mb,mem in zip((MicroBatch(8),MicroBatch('auto')), mems)))
    assert mems[1].asked[:5]==[*DOWN,8]

class Metric(nn.Module):
    "A loss with a parameter that is trained, and perhaps statistics"
    def __init__(self, mem, stats):
        super().__init__()
        self.w,self.mem = nn.Parameter(torch.eye(3, dtype=f64)),mem
        self.register_buffer('mean', torch.zeros(3, dtype=f64) if stats else None)
    def forward(self, pred, y):
        if self.mean is not None:
            pred = pred-self.mean
            self.mean.lerp_(pred.detach().mean(0), 0.2)
        res = F.cross_entropy(pred@self.w, y)
        if res.requires_grad: res.register_hook(lambda g: self.mem(len(y)))
        return res
@pytest.mark.parametrize('stats', (False,True), ids=('parameter','parameter and buffer'))
def test_loss_that_learns(stats):
    "Where the optimizer has parameters of the loss, their gradients from the failed attempt are dropped too"
    def setup(l): l.splitter = lambda m: [params(m), params(l.loss_func)]
    mem = Memory(at={0,1,3}) # the second of three micro-batches, when the first has left gradients
    fixed,auto = (go(mb, loss_func=Metric(m, stats), setup=setup) for mb,m in ((MicroBatch(8),Memory()), (MicroBatch('auto'),mem)))
    assert mem.asked[:5]==[*DOWN,8]
    same(fixed, auto)

@pytest.mark.parametrize('where', PLACES)
@pytest.mark.parametrize('sync_bn', (True,'stats'))
def test_sync_bn(sync_bn, where):
    "BatchNorm over micro-batches: no statistics of the failed attempt, and no thread, is left"
    mem,threads = Memory(10),threading.active_count()
    both(mem, where, mb=partial(MicroBatch, sync_bn=sync_bn))
    assert mem.asked[:2]==[32,16] and mem.asked[2] in (10,11) and threading.active_count()==threads

def test_split():
    "Sizes go to a `split` of one's own"
    def split(xb, yb, bs): return [((x,),(y,)) for x,y in zip(xb[0].split(bs), yb[0].split(bs))]
    same(go(MicroBatch(8, split=split, valid=True), norm=Running), go(MicroBatch('auto', split=split), Memory(10), norm=Running))

# ---- beside others

class Casts(Callback):
    "How many autocasts are entered as a forward pass begins, and outside of those"
    def __init__(self): self.on,self.off = set(),set()
    def before_fit(self): self.hook = self.model.register_forward_pre_hook(lambda *o: self.on.add((depth(),torch.is_autocast_enabled('cpu'))))
    def before_backward(self): self.off.add(depth())
    def before_step(self): self.off.add(depth())
    def after_batch(self): self.off.add(depth())
    def after_fit(self): self.hook.remove()

@pytest.mark.parametrize('where', PLACES)
@pytest.mark.parametrize('mode', ('fp16','bf16','full'))
def test_MixedPrecision(mode, where):
    "Autocast is entered once, whether the failed attempt had left it or not, and the scaler knows nothing of that attempt"
    def cbs(): return [Mixed(full=True, init_scale=2.**10, growth_interval=3) if mode=='full' else Mixed(mode), Casts()]
    fixed,auto = both(Memory(10), where, dtype=f32, norm=Running, cbs=cbs)
    assert fixed.mixed.seen==auto.mixed.seen and auto.casts.on=={(1,mode!='full')} and auto.casts.off=={0}
    clean(auto)

x,y = problem(N+16)
def fit_sum(l): l.fit(2, 1e-3)
BESIDE = {'GradientClip': dict(cbs=lambda: [GradientClip(0.05)]), 'MixUp': dict(cbs=lambda: [MixUp()], loss_func=y_int(), dtype=f32),
          'MixUp of targets': dict(cbs=lambda: [MixUp()], data=(x,F.one_hot(y, 3).float()), dtype=f32), 'ActivationStats': dict(cbs=lambda: [ActivationStats()]),
          'MixUp, GradientClip, MixedPrecision': dict(cbs=lambda: [MixUp(), GradientClip(0.05), Mixed()], loss_func=y_int(), dtype=f32),
          'frozen': dict(setup=lambda l: l.freeze()), 'class weights': dict(loss_func=CE(tensor([1.,2.,5.]).to(f64), ignore_index=1)),
          'sum': dict(loss_func=CE(reduction='sum'), fit=fit_sum)}
@pytest.mark.parametrize('where', ('forward','after_backward'))
@pytest.mark.parametrize('o', BESIDE)
def test_beside(o, where):
    "What others do to a batch is done once, and what was drawn for it stands"
    _,auto = both(Memory(10), where, **BESIDE[o])
    assert auto.loss_func is BESIDE[o].get('loss_func', auto.loss_func)

def lm(mb, where, mem, cbs=()):
    "A language model that reads on from batch to batch, with all its dropouts"
    def setup(l):
        for m in l.model.modules():
            for c,name in ((RNNDropout,'p'), (WeightDropout,'weight_p'), (EmbeddingDropout,'embed_p')):
                if isinstance(m, c): setattr(m, name, 0.2)
        place = Place(mem, where)
        l.model[0].register_forward_hook(lambda m,i,o: place(o))
    return lm_maker(n=64, stream=True, alpha=2, beta=1, setup=setup, cbs=lambda: [*cbs, Exact()])(16, mb)

@pytest.mark.parametrize('cbs', (list,lambda: [Mixed('bf16')]), ids=('alone','bf16'))
@pytest.mark.parametrize('where', ('forward','backward'))
def test_language_model(where, cbs):
    "The hidden state goes on from that before the failed attempt"
    fixed,auto = (run(lm(mb, where, Memory(k), cbs()), lambda l: l.fit(2, 0.5)) for mb,k in ((MicroBatch(4, valid=where=='forward'),MAX), (MicroBatch('auto'),5)))
    same(fixed, auto)
    assert len(auto.trace.batches)==2*len(auto.dls.train)>=8 and auto.micro_batch.bs==4

# ---- found later: the run of somebody who changes the size there

@pytest.mark.parametrize('where', ('forward','after_backward'))
@pytest.mark.parametrize('j', ('first','middle','last'))
@pytest.mark.parametrize('batch', (0,1,2,'valid'))
@pytest.mark.parametrize('epoch', (0,1))
def test_positions(epoch, batch, j, where, capsys):
    "In any micro-batch of any batch: what came before in it is undone"
    if batch=='valid' and where in TRAIN_ONLY: return
    batches,i = EPOCH*2,4*epoch+(3 if batch=='valid' else batch)
    bs,at = foretell(batches, Memory(8), where)[0][i]
    parts = -(-batches[i][0]//bs)
    mem = Memory(8, {at+dict(first=0, middle=parts//2, last=parts-1)[j]})
    auto,(sizes,lines) = go(MicroBatch('auto'), mem, where),foretell(batches, mem, where)
    assert bs==8 and sizes[i][0]<8 and (8,'validation' if batch=='valid' else 'training',sizes[i][0]) in lines and printed(capsys)==lines
    same(go(MicroBatch(MAX, valid=True), None, where, cbs=[Switch(bs for bs,_ in sizes)]), auto)

@pytest.mark.parametrize('valid', (None,True))
def test_validation(valid):
    "Validation, in training and outside of it, has a size of its own"
    mem,lens = Memory(),{True:[],False:[]}
    def room(self): mem.k = 5 if self.training else 10
    def setup(l): l.model.register_forward_hook(lambda m,i,o: lens[m.training].append(len(o)))
    auto = go(MicroBatch('auto', valid=valid), mem, cbs=[Callback(before_train=room, before_validate=room)], setup=setup)
    assert auto.micro_batch.bs==4 and lens=={True:([4]*16+[3]*3)*2, False:[8]*4} and mem.asked[:8]==[32,16,10,8,5,5,6,4]
    same(go(MicroBatch(MAX, valid=True), cbs=[Switch(([4]*3+[8])*2)]), auto)
    mem.k = MAX
    auto.validate()
    assert lens[False]==[8]*6 and auto.micro_batch.bs==4

@pytest.mark.parametrize('mb', (lambda: MicroBatch('auto', valid=False), lambda: MicroBatch(8)), ids=('auto','fixed'))
def test_validation_that_is_not_split(mb):
    "Not for want of memory either"
    mem = Memory()
    room = Callback(before_train=lambda self: setattr(mem, 'k', 10), before_validate=lambda self: setattr(mem, 'k', 9))
    with pytest.raises(torch.OutOfMemoryError) as e: go(mb(), mem, cbs=[room])
    assert 'MicroBatch' not in str(e.value) and mem.asked[-2:]==[5,16]

@pytest.mark.parametrize('ds_idx', (0,1))
def test_get_preds(ds_idx, capsys):
    "Predictions and the loss of each sample, without a fit"
    def preds(mb, k=MAX):
        l = make(mb, Memory(k), dtype=f32)
        l.remove_cb(Exact)
        return list(l.get_preds(ds_idx, with_loss=True))
    auto = preds(MicroBatch('auto'), 10)
    assert printed(capsys)==([(n,'validation',m) for n,_,m in LINES] if ds_idx==0 else [(16,'validation',8)]) and len(auto[0])==len(auto[2])==(16 if ds_idx else N)
    assert equal(auto, preds(MicroBatch(8, valid=True)))
    for a,b in zip(auto, preds(None)): assert rel(b, a)<=1e-5

def test_lr_find(tmp_path):
    "What it found fits is there for the fit"
    def fit(l): l.lr_find(num_it=5, show_plot=False); l.fit(1, 0.05)
    both(Memory(10), 'backward', fit=fit, dtype=f32, path=tmp_path)

# ---- what is remembered

def test_second_fit(capsys):
    "A fit starts with what the one before found, and a size never grows back; only a new callback tries again"
    mem = Memory(10)
    auto = go(MicroBatch('auto'), mem, 'backward', fit=lambda l: (fit(l), setattr(mem, 'k', MAX), fit(l)))
    assert mem.asked==DOWN+([8]*8+[4,5])*4 and printed(capsys)==LINES and auto.micro_batch.bs==8
    same(go(MicroBatch(8), None, 'backward', fit=lambda l: (fit(l), fit(l))), auto)
    auto.to_microbatch().fit(1)
    assert mem.asked[-3:]==[32,32,9] and auto.micro_batch.bs==32

def test_everything_fits(capsys):
    "Whole batches, whatever their size, and `bs` is the largest so far"
    mem,mb,seen,sizes = Memory(),MicroBatch('auto'),[],[6,32,9,41,5]
    assert mb.bs=='auto'
    auto = go(mb, mem, sizes=sizes, cbs=[Callback(after_batch=lambda self: seen.append(self.micro_batch.bs))])
    assert mem.asked==[*sizes,16]*2 and seen==[6,32,32,41,41,41]+[41]*6 and not printed(capsys)
    same(go(MicroBatch(MAX, valid=True), sizes=sizes), auto)
    assert_same_run(go(None, sizes=sizes), auto, 1e-12)

def test_batch_sizes(capsys):
    "A smaller batch is computed as it is, a larger one in parts of the size found, and neither changes that"
    mem,seen,sizes = Memory(10),[],[6,32,5,40,9,64,33]
    log = Callback(after_batch=lambda self: seen.append(self.micro_batch.bs) if self.training else None)
    auto = go(MicroBatch('auto'), mem, 'backward', sizes, cbs=[log])
    one = [5]+[8]*5+[4,5]+[8]*8+[6,7,6,7,7]
    assert mem.asked==[6,*DOWN,8,8,8,8,*one,6,8,8,8,8,*one] and seen==[6]+[8]*13 and printed(capsys)==LINES
    same(go(MicroBatch(MAX, valid=True), None, 'backward', sizes, cbs=[Switch([6]+[8]*6+[MAX]+[8]*7+[MAX])]), auto)

def test_smaller_batch_fails():
    "What a small batch can't have, a large one after it does not ask for"
    mem = Memory(at={1})
    auto = go(MicroBatch('auto'), mem, 'backward', [32,7,32])
    assert mem.asked==[32,7,3,4]+[4]*8+[4]*8+[3,4]+[4]*8
    same(go(MicroBatch(MAX, valid=True), None, 'backward', [32,7,32], cbs=[Switch([MAX,4,4,MAX,4,4,4,MAX])]), auto)

class Batches(list): "A loader for `Learner`"
class Texts(nn.Module):
    "Sequences of any length, or of any number of words each, which take memory by the token"
    def __init__(self, mem): super().__init__(); self.emb,self.lin,self.mem = nn.Embedding(11, 4),nn.Linear(4, 3),mem
    def forward(self, x):
        if isinstance(x, dict): x = x['ids']
        if isinstance(x, list): x = tensor([[ord(c)%11 for c in s] for s in x])
        self.mem(x.numel())
        return self.lin(F.dropout(self.emb(x), 0.3, self.training).mean(1))
FORMS = {'tensor': noop, 'dict': lambda x: dict(ids=x, mask=torch.ones_like(x)), 'strings': lambda x: [''.join(map(chr, o+97)) for o in x]}
def texts(shapes, mb, mem, form='tensor', *cbs):
    "A run with a batch of each of `shapes`, (sequences, length)"
    g = torch.Generator().manual_seed(0)
    dl = Batches((FORMS[form](torch.randint(11, o, generator=g)), torch.randint(3, o[:1], generator=g)) for o in shapes)
    seed()
    l = Learner(DataLoaders(dl, Batches()), Texts(mem), loss_func=CE(), opt_func=SGD, default_cbs=False, cbs=[TrainEvalCallback(), mb, *cbs, Exact(), Trace()])
    return run(l, lambda l: l.fit(1, 0.1))

SHAPES = {'long ones first': ([8,32,8,16,32,8], [64, 256,128,64,96,96, 64, 128,64,64, 64,96,96, 64], [8,3,8,4,3,8]),
          'short ones first': ([16,32,8], [128,64,64, 128,64,96,96, 64], [4,3,8]), # what was too much of the shorter is not tried of the longer
          'classes': ([40,48,24], [320,160,80,120,80,80,80,80, 96,96,96,96, 192,96,96], [2,2,4])} # 48 is of the class of 40, 24 of another
@pytest.mark.parametrize('form', ('tensor','dict'))
@pytest.mark.parametrize('o', SHAPES)
def test_shapes(o, form):
    "A size is that of a class of shapes: longer inputs do not lower that of shorter ones, and do not ask for what shorter ones can't have"
    lens,asked,sizes = SHAPES[o]
    mem = Memory(100)
    auto = texts([(8,l) for l in lens], MicroBatch('auto'), mem, form)
    assert mem.asked==asked and auto.micro_batch.bs==sizes[-1]
    same(texts([(8,l) for l in lens], MicroBatch(MAX), Memory(), form, Switch(sizes)), auto)

def test_shorter_shape_fails_later():
    "A size found for a shorter class is for the longer ones too, for which another was known"
    mem = Memory(at={0,3,4}) # long ones come down to 4, then short ones to 3
    texts([(8,32),(8,8),(8,32),(8,4)], MicroBatch('auto'), mem)
    assert mem.asked==[256,128,128, 64,32,16,24,24, 64,96,96, 32]

@pytest.mark.parametrize('form', FORMS)
def test_number_of_samples_is_no_shape(form):
    "Batches of any number of sequences of the same length share a size, even of inputs of which nothing tells how large they are"
    mem = Memory(40)
    texts([(n,8) for n in (8,16,4,32,8)], MicroBatch('auto'), mem, form)
    assert mem.asked==[64,32,32] + [32]*4 + [32] + [32]*8 + [32]*2

# ---- one sample is too many, or it was something else

def state(l): return clones(l.model.parameters())

@pytest.mark.parametrize('mixed', (False,True))
@pytest.mark.parametrize('where', PLACES)
def test_one_does_not_fit(where, mixed, capsys):
    "The error that it was, with advice; weights as they were, and the learner can go on when there is memory"
    mem = Memory(0, error=lambda: raised.append(torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')) or throw(raised[-1]))
    raised,l = [],make(MicroBatch('auto'), mem, where, norm=Running, dtype=f32, cbs=[Mixed()] if mixed else [])
    before = state(l)
    with pytest.raises(torch.OutOfMemoryError) as e: run(l, fit)
    assert e.value is raised[-1] and 'Tried to allocate 2.00 GiB' in str(e.value)
    assert re.search(r"`MicroBatch` ran out of memory with 1 of a batch's 32 samples\. .*smaller inputs.*to_fp16.*checkpointing", str(e.value))
    assert mem.asked==[32,16,10,8,5,4,2,2,1] and printed(capsys)==foretell(EPOCH, mem, where)[1] and len(l.xb[0])==len(l.yb[0])==32
    assert equal(before, state(l))
    clean(l)
    mem.k = MAX
    raised.clear(); del e
    goes_on(l, MicroBatch(1, valid=False))
    assert mem.asked[9]==1

def throw(e): raise e

@pytest.mark.parametrize('error', ('cpu','cudnn','cublas'))
def test_one_does_not_fit_elsewhere(error):
    "The type and the text of other errors are kept too"
    try: ERRORS[error]()
    except RuntimeError as e: expect = e
    with pytest.raises(RuntimeError) as e: go(MicroBatch('auto'), Memory(0, error=ERRORS[error]), norm=Running)
    assert type(e.value) is type(expect) and str(e.value).startswith(str(expect)[:40]) and 'gradient checkpointing' in str(e.value)

def test_one_too_long_text():
    "Of one shape one sample is too many; shorter ones still keep the whole batch"
    mem = Memory(100)
    with pytest.raises(torch.OutOfMemoryError, match="1 of a batch's 8"): texts([(8,8),(8,64),(8,128)], MicroBatch('auto'), mem)
    assert mem.asked==[64, 512,256,128,128]+[64]*8+[128]

@pytest.mark.parametrize('mixed', (False,True))
@pytest.mark.parametrize('k,n', ((1,32), (2,9))) # nine samples in parts of two leave one
def test_too_few(k, n, mixed):
    "Memory for so few samples that BatchNorm, which needs two, gets one: both are said"
    l = make(MicroBatch('auto'), Memory(k), dtype=f32, cbs=[Mixed('bf16')] if mixed else [])
    with pytest.raises(ValueError, match=f"(?s)Expected more than 1 value.*`MicroBatch` had come down to {k} of a batch's {n} samples.*smaller inputs"): run(l, fit)
    clean(l)

@pytest.mark.parametrize('bs,text', ((8,"8 of a batch's 32 samples. Pass a number smaller than `bs`=8, or `bs`='auto'"), (1,"1 of a batch's 32 samples. Take smaller inputs"),
                                     (50,"32 of a batch's 32 samples. Pass a number smaller than `bs`=32, or `bs`='auto'")))
@pytest.mark.parametrize('where', PLACES)
def test_fixed_size(where, bs, text, capsys):
    "A number that does not fit is not changed, but the error tells what to do"
    mem = Memory(0)
    l = make(MicroBatch(bs), mem, where, norm=Running, dtype=f32, cbs=[Mixed()])
    with pytest.raises(torch.OutOfMemoryError) as e: run(l, fit)
    assert text in str(e.value) and 'Tried to allocate' in str(e.value) and mem.asked==[min(bs, 32)] and l.micro_batch.bs==bs and not printed(capsys)
    clean(l)
    mem.k = MAX
    if where=='loss': goes_on(l, MicroBatch(bs))

OTHERS = {'shapes': lambda: RuntimeError('mat1 and mat2 shapes cannot be multiplied (32x8 and 6x3)'), 'cuda': lambda: RuntimeError('CUDA error: device-side assert triggered'),
          'value': lambda: ValueError('Expected more than 1 value per channel when training'), 'value of memory': lambda: ValueError('out of memory'),
          'interrupt': KeyboardInterrupt, 'exit': lambda: SystemExit(1), 'no text': RuntimeError, 'index': lambda: IndexError('index out of range')}
@pytest.mark.parametrize('where,i', (('forward',0), ('backward',0), ('loss',1), ('backward',4)))
@pytest.mark.parametrize('exc', OTHERS)
def test_other_errors(exc, where, i):
    "Nothing is tried again for another error, be it in the first attempt or after one that lacked memory, and it comes as it was raised"
    exc = OTHERS[exc]()
    args = exc.args
    mem = Memory(10, {i})
    mem.error = lambda: throw(exc) if len(mem.asked)==i+1 else cuda()
    l = make(MicroBatch('auto'), mem, where, dtype=f32, norm=Running, cbs=[Mixed()])
    before = state(l)
    with pytest.raises(type(exc)) as e: run(l, fit)
    assert e.value is exc and exc.args==args and len(mem.asked)==i+1 and equal(before, state(l))
    clean(l)
    mem.k,mem.at = MAX,()
    if i: goes_on(l, MicroBatch({1:16, 4:8}[i], valid=False))

def test_error_in_the_step(capsys):
    "The step is no part of what is tried again"
    mem,err = Memory(),torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
    l = make(MicroBatch('auto'), mem)
    l.create_opt()
    l.opt.cbs = l.opt.cbs + (lambda p, **kw: throw(err))
    with pytest.raises(torch.OutOfMemoryError) as e: run(l, fit)
    assert e.value is err and err.args==('CUDA out of memory. Tried to allocate 2.00 GiB',) and mem.asked==[32] and not printed(capsys)
    assert not {'all_batches','_do_one_batch','_do_grad_opt'} & set(vars(l))

@pytest.mark.parametrize('exc', (CancelBatchException,CancelBackwardException,CancelTrainException,CancelFitException))
def test_cancel_after_a_failed_attempt(exc):
    "Somebody cancels in the attempt that has memory: as in a run that had started with the size"
    def cbs():
        def cancel(self):
            if self.training and self.train_iter==2: raise exc
        return [Callback(before_backward=cancel)]
    both(Memory(10), 'forward', cbs=cbs)

# ---- batches that can't be repeated, or not be split

class InPlace(nn.Module):
    def __init__(self, mem): super().__init__(); self.relu,self.a,self.place,self.b = nn.ReLU(inplace=True),nn.Linear(6, 8),Place(mem, 'forward'),nn.Linear(8, 3)
    def forward(self, x): return self.b(self.place(self.a(self.relu(x))))
def shifting(pred, y): return F.cross_entropy(pred, y.add_(1).remainder_(3))
IN_PLACE = {'input': lambda mem: dict(model=partial(InPlace, mem)), 'target': lambda mem: dict(where='after_loss', loss_func=shifting, model=net)}

@pytest.mark.parametrize('mixed', (False,True))
@pytest.mark.parametrize('at', (0,1))
@pytest.mark.parametrize('what', IN_PLACE)
def test_changed_in_place(what, at, mixed):
    "What has changed can't be computed again: an error, no other run"
    mem = Memory(at={at})
    l = make(MicroBatch('auto'), mem, **IN_PLACE[what](mem), dtype=f32, cbs=[Mixed()] if mixed else [])
    with pytest.raises(RuntimeError, match="(?s)in place.*inplace=True.*number that fits"): run(l, fit)
    assert len(mem.asked)==at+1 and len(l.trace.steps)==at
    clean(l)

@pytest.mark.parametrize('what', IN_PLACE)
def test_in_place_with_memory(what):
    "If there is memory, or the number fits, it may do so"
    plain,auto,fixed = (go(mb, **IN_PLACE[what](Memory())) for mb in (None,MicroBatch('auto'),MicroBatch(8)))
    for l in (auto,fixed): assert_same_run(plain, l, 1e-12)

class Both(nn.Module):
    def __init__(self, mem): super().__init__(); self.lin,self.place = nn.Linear(4, 3),Place(mem, 'forward')
    def forward(self, x, table): return self.lin(self.place(table[x].mean(1)))
def test_no_way_to_split():
    "An input that is not by samples is no matter while there is memory; without, the error is about it"
    mem,x,y = Memory(),torch.randint(11, (8,5)),torch.randint(3, (8,))
    l = Learner(DataLoaders(Batches([(x,torch.randn(11, 4),y)]*3), Batches()), Both(mem), loss_func=CE(), opt_func=SGD, default_cbs=False,
                cbs=[TrainEvalCallback(), MicroBatch('auto'), Mixed('bf16')])
    l.fit(1, 0.1)
    mem.k = 5
    with pytest.raises(ValueError, match=r"`xb\[1\]` is a Tensor of shape \(11, 4\).*split="): l.fit(1, 0.1)
    assert mem.asked==[8]*4
    clean(l)

# ---- what is alive, and what is done

class Saved:
    "A tensor that a backward pass will need"
    def __init__(self, t): self.t = t
class Watch:
    "How many tensors were saved for a backward pass of `m`, and how many of these were alive as it was called again after a failure"
    def __init__(self, m, mem, but=()):
        self.alive,self.left,self.saved,self.f,self.mem,self.but = weakref.WeakSet(),[],0,m.forward,mem,but
        m.forward = self.forward
    def forward(self, *args):
        if self.mem.failed: self.left.append(len(self.alive))
        self.mem.failed = False
        with saved_tensors_hooks(self.pack, lambda o: o.t): return self.f(*args)
    def pack(self, t):
        if t.shape in self.but: return Saved(t.detach())
        res = Saved(t.detach()) # an output that is saved as it is would keep itself alive
        self.alive.add(res)
        self.saved += 1
        return res

ALONE = {'alone': dict(), 'tangled': dict(error=tangled), 'bf16': dict(cbs=lambda: [Mixed('bf16'),GradientClip(0.05)]),
         'MixUp': dict(cbs=lambda: [MixUp()]), 'sync_bn': dict(norm=bn, mb=MicroBatch('auto', sync_bn=True)), 'stats': dict(norm=bn, mb=MicroBatch('auto', sync_bn='stats'))}
@pytest.mark.parametrize('o', ALONE)
@pytest.mark.parametrize('where', PLACES)
def test_memory_is_free_again(where, o):
    "Nothing that a failed attempt computed for its backward pass is alive as the next one begins"
    if o=='sync_bn' and where in ('backward','hook'): return # where a graph has branches, PyTorch's engine for the CPU keeps some in its queue until the next backward pass
    kw = {'mb':MicroBatch('auto'), 'norm':Running, 'cbs':list, 'error':cuda, **ALONE[o]}
    mem,watch = Memory(10, error=kw.pop('error')),[]
    mb,cbs = deepcopy(kw.pop('mb')),kw.pop('cbs')()
    l = go(mb, mem, where, dtype=f32, data=(x,F.one_hot(y, 3).float()), cbs=cbs, setup=lambda l: watch.append(Watch(l.model, mem)), fit=lambda l: l.fit(1, 0.05), **kw)
    assert l.micro_batch.bs==8 and watch[0].saved>50 and watch[0].left==[0]*(3 if where in TRAIN_ONLY else 4)

@pytest.mark.parametrize('where', ('forward','backward'))
def test_memory_of_a_language_model(where):
    "Nor is what `RNNCallback` keeps for `RNNRegularizer`"
    mem = Memory(5)
    l = lm(MicroBatch('auto'), where, mem)
    watch = Watch(l.model[0], mem, {p.shape for p in l.model.parameters()}) # the last weights that `WeightDropout` made stay
    run(l, lambda l: l.fit(1, 0.5))
    assert l.micro_batch.bs==4 and watch.saved>100 and watch.left==[0]*(3 if where=='backward' else 6)

class Ops(TorchDispatchMode):
    "Count the operations that make something of the size of the first layer's weights"
    def __init__(self): super().__init__(); self.n = Counter()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        res = func(*args, **(kwargs or {}))
        if getattr(res, 'shape', None)==(8,6): self.n[str(func)] += 1
        return res

@pytest.mark.parametrize('dtype', (f64,f32), ids=str)
def test_no_copy_of_gradients(dtype):
    "Where everything fits, 'auto' makes as many tensors of the size of a weight or its gradient as a plain `Learner`: no copies; and gradients stay where they are"
    def ops(mb):
        mode,at = Ops(),set()
        watch = Callback(before_train=lambda self: mode.__enter__(), after_train=lambda self: mode.__exit__(None, None, None),
                         before_step=lambda self: at.add(self.model[0][0].weight.grad.data_ptr()))
        l = make(mb, cbs=[watch], dtype=dtype)
        l.remove_cbs([Exact,Trace])
        run(l, fit)
        return mode.n,len(at)
    plain,auto = ops(None),ops(MicroBatch('auto'))
    assert plain==auto and plain[0].total()>0 and plain[1]==1

# ---- any sizes, any failures

@settings(max_examples=30)
@given(sizes=st.lists(st.integers(1, 21), min_size=1, max_size=4), k=st.integers(0, 25), at=st.sets(st.integers(0, 30), max_size=3),
       where=st.sampled_from(PLACES), opt=st.sampled_from((partial(SGD, mom=0.9, wd=0.1),Adam)))
@example(sizes=[1], k=1, at=set(), where='forward', opt=Adam)
@example(sizes=[1,21], k=1, at={0}, where='backward', opt=Adam)
def test_any(sizes, k, at, where, opt):
    "The run of somebody who had foreseen it; or the error, where one sample is too many, after the same steps"
    batches,mem,kw = [*[(n,True) for n in sizes], (16,False)]*2,Memory(k, at),dict(norm=Running, opt_func=opt)
    expect,lines = foretell(batches, mem, where)
    auto = make(MicroBatch('auto'), mem, where, sizes, **kw)
    if len(expect)<len(batches):
        with pytest.raises(torch.OutOfMemoryError, match="with 1 of a batch's"): run(auto, fit)
        assert len(auto.exact.seen)==len(expect)
    else:
        run(auto, fit)
        same(go(MicroBatch(MAX, valid=True), None, where, sizes, cbs=[Switch(bs for bs,_ in expect)], **kw), auto)
    assert min([bs for _,part,bs in lines if part=='training'], default=max(sizes))==auto.micro_batch.bs or len(expect)<len(batches)
    clean(auto)
