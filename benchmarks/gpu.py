"""What only a GPU can show, in about eight minutes on one: the kernels of exact BatchNorm, waits of the host, peak memory, `'auto'` in a memory that is capped,
mixed precision, times, exact BatchNorm over many batches, throughput. Each part is by itself: if one fails, that is noted and the next one goes on. What is
wanted is printed beside what was measured. The exit status is 1 if a part failed or missed a bound.

`--tiny` takes tiny sizes, to see that all of it runs; on the CPU, where memory and waits are not measured. Numbers go to a JSON file, from which
`tools/tables.py` makes the page, and to a picture."""
import gc,json,resource,sys,threading,traceback
from common import *
from fastai_accum import AccumulateStep,MicroBatch,NoiseScale,batchnorm
from fastcore.script import call_parse

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent/'tools'))
from tables import gpu_part

f16,bf16,f32,f64 = torch.float16,torch.bfloat16,torch.float32,torch.float64
def tiny_body(ni=3, nf=8): return nn.Sequential(nn.Conv2d(ni, nf, 3, 2, 1, bias=False), nn.BatchNorm2d(nf), nn.ReLU(),
    nn.Conv2d(nf, 2*nf, 3, 2, 1, bias=False), nn.BatchNorm2d(2*nf), nn.ReLU())
def tiny_resnet(num_classes): return nn.Sequential(*tiny_body(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))

# Models and sizes: `bs` samples are a micro-batch, and `n_acc` of them a batch; `repeats` epochs are timed after `warm` ones; GB that `'auto'` may have, and the batch
# that it begins with; samples of a micro-batch of exact BatchNorm; batches in one fit, and pixels there; the batch whose micro-batches grow
FULL = dict(resnet=models.resnet50, small_resnet=models.resnet18, body=lambda: nn.Sequential(*list(models.resnet34().children())[:-2]), pixels=224, mask=128,
    vocab=32000, width=512, heads=8, layers=6, length=256,
            bs=8, n_acc=8, batches=4, repeats=9, warm=3, caps=(2,3.3), most=128, norm_bs=32, norm_n=16, long=200, small=64, through=256)
TINY = dict(resnet=tiny_resnet, small_resnet=tiny_resnet, body=tiny_body, pixels=32, mask=16, vocab=50, width=16, heads=2, layers=1, length=8,
            bs=2, n_acc=2, batches=1, repeats=1, warm=0, caps=(2,), most=4, norm_bs=2, norm_n=2, long=20, small=32, through=4)

# ---- models and data, which are on the device before anything is measured

class Text(nn.Module):
    "A transformer with an output for each word of the vocabulary"
    def __init__(self, s):
        super().__init__()
        layer = nn.TransformerEncoderLayer(s.width, s.heads, 4*s.width, 0., batch_first=True)
        self.emb,self.enc,self.head = nn.Embedding(s.vocab, s.width),nn.TransformerEncoder(layer, s.layers, enable_nested_tensor=False),nn.Linear(s.width,
            s.vocab)
    def forward(self, x): return self.head(self.enc(self.emb(x)))

def resnet(s): return s.resnet(num_classes=10)
def unet(s): return models.unet.DynamicUnet(s.body(), 21, (s.mask,s.mask))

class Batches(list): "Batches that are on the device already"
def batches(x, y, bs): return Batches(zip(x.split(bs), y.split(bs)))
def pictures(s, n, bs, pixels=None): return batches(torch.randn(n, 3, *[pixels or s.pixels]*2, device=DEVICE), torch.arange(n, device=DEVICE)%10, bs)
def masks(s, n, bs): return batches(torch.randn(n, 3, s.mask, s.mask, device=DEVICE), torch.randint(21, (n,s.mask,s.mask), device=DEVICE), bs)
def tokens(s, n, bs): return batches(x := torch.randint(s.vocab, (n,s.length), device=DEVICE), x, bs)
PROBLEMS = {'ResNet-50':(resnet, pictures, CrossEntropyLossFlat()), 'U-Net':(unet, masks, CrossEntropyLossFlat(axis=1)),
    'language model':(Text, tokens, CrossEntropyLossFlat())}

def learner(dl, model, loss, *cbs, to=noop):
    learn = Learner(DataLoaders(dl, Batches()), model.to(DEVICE), loss_func=loss, opt_func=partial(SGD, mom=0.9), default_cbs=False,
        cbs=[TrainEvalCallback(), Timer(), *cbs])
    learn.logger = noop
    if CUDA: to(learn) # autocast is for a GPU
    return learn

def clean():
    gc.collect()
    if not CUDA: return
    sync()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()

# ---- a part returns the head of its table, the rows, and what is wanted: what, the value, the most that it may be

def want(what, value, most):
    "A bound; `ok` is None if there is no value as nothing was measured, and False if the value is no number as something failed"
    if value is not None and not math.isfinite(value): return dict(what=what, value=None, most=most, ok=False)
    return dict(what=what, value=value, most=most, ok=None if value is None else value<=most)
def over(a, b): return None if a is None or not b else a/b

KINDS = {'float32':(f32,f32,1e-6), 'float64':(f64,f64,1e-13), 'fp16 autocast':(f16,f32,1e-3), 'bf16 autocast':(bf16,f32,1e-2), 'model.half()':(f16,f16,1e-3),
    'model.bfloat16()':(bf16,bf16,1e-2)}

def norm_inputs(n, dtype, param_dtype, tracked, affine, last):
    "Inputs and gradients of five micro-batches of `n` samples, with 16 more values a channel than float16 can count; running statistics; weight and bias"
    torch.manual_seed(0)
    def draw(scale, shift): return (torch.randn(n, 4, 32, 32, device=DEVICE, dtype=f64)*scale+shift).to(dtype)
    xs,dys = [draw(2, 1) for _ in range(5)],[draw(1, 0) for _ in range(5)]
    if last: xs = [x.contiguous(memory_format=torch.channels_last) for x in xs] # gradients stay as they are: both formats meet
    running = [f(4, device=DEVICE, dtype=param_dtype) for f in (torch.zeros,torch.ones)] if tracked else [None]*2
    return xs,dys,running,[(torch.rand(4, device=DEVICE)+0.5).to(param_dtype) if affine else None for _ in range(2)]

def norm_results(f, xs, dys, running, params, dtype=None):
    "Outputs, gradients and running statistics of `f`, for copies of the inputs, in `dtype` if that is given"
    def own(t): return None if t is None else t.detach().clone().to(dtype or t.dtype)
    xs,running,params = [own(x).requires_grad_() for x in xs],[own(t) for t in running],[own(t) if t is None else own(t).requires_grad_() for t in params]
    ys,leaves = f(xs, *running, *params),[*xs,*(p for p in params if p is not None)]
    gs = torch.autograd.grad(torch.cat(ys), leaves, torch.cat([own(d) for d in dys]))
    return [torch.cat(ys), torch.cat(gs[:len(xs)]), *gs[len(xs):], *(t for t in running if t is not None)]

def whole_norm(xs, *args): return F.batch_norm(torch.cat(xs), *args, training=True).split([len(x) for x in xs])
def distance(a, b): return float((a.double()-b).norm()/b.norm())

def kernels(s):
    "Kernels of exact BatchNorm: relative errors against float64"
    rows,bounds = [],[]
    for kind,(dtype,param_dtype,most) in KINDS.items():
        ours,theirs,where = [],[],''
        for case in itertools.product((True,False), (True,False), (False,True)):
            ins = norm_inputs(s.norm_n, dtype, param_dtype, *case)
            exact = norm_results(whole_norm, *ins, dtype=f64)
            for f,to in ((batchnorm.joint_batch_norm,ours),(whole_norm,theirs)):
                try: to.append(max(map(distance, norm_results(f, *ins), exact)))
                except RuntimeError as e: to.append(math.inf); where = f'{type(e).__name__}: {e}'.splitlines()[0][:80] if to is ours else where
        rows.append([kind, *(v if math.isfinite(v := max(o)) else None for o in (ours,theirs)), where])
        bounds.append(want(f'error of exact BatchNorm, {kind}', max(ours), most))
    return ['inputs','worst error in micro-batches','worst error of `F.batch_norm` at once','what failed'],rows,bounds

# ---- waits

class Watch(Callback):
    "Let PyTorch warn of waits from a batch's start to its step"
    order,run_valid = -101,False
    def before_batch(self):
        if CUDA: torch.cuda.set_sync_debug_mode('warn')
class Unwatch(Callback):
    order,run_valid = -99,False
    def before_step(self):
        if CUDA: torch.cuda.set_sync_debug_mode('default')

def by_us():
    "Is the innermost function one of this package, but for PyTorch's and those of fastai's tensor types?"
    f,ours = sys._getframe(2),str(Path(batchnorm.__file__).parent)
    others = str(Path(torch.__file__).parent),warnings.__file__,sys.modules['fastai.torch_core'].__file__
    while f and f.f_code.co_filename.startswith(others): f = f.f_back
    return f is not None and f.f_code.co_filename.startswith(ours)

def count_waits(learn):
    "Waits that this package causes in an epoch, and all of them; None without a GPU"
    seen = []
    def show(message, *args, **kwargs):
        if 'called a synchronizing' in str(message): seen.append(by_us())
    with warnings.catch_warnings():
        warnings.simplefilter('always')
        warnings.showwarning = show
        try: learn.fit(1, 1e-3, cbs=[Watch(), Unwatch()])
        finally:
            if CUDA: torch.cuda.set_sync_debug_mode('default')
    return (sum(seen),len(seen)) if CUDA else (None,None)

def waits(s):
    "Waits of the host for the device, from a batch's start to its step"
    rows,bounds,n = [],[],2*s.bs*s.n_acc
    hosts = {'plain Learner':(n//2, lambda: []), 'AccumulateStep':(s.bs, lambda: [AccumulateStep(s.n_acc)]), 'MicroBatch':(n//2, lambda: [MicroBatch(s.bs)]),
        "MicroBatch('auto')":(n//2, lambda: [MicroBatch('auto')]),
        "MicroBatch, sync_bn='stats'":(n//2, lambda: [MicroBatch(s.bs, sync_bn='stats')]),
        'exact BatchNorm':(n//2, lambda: [MicroBatch(s.bs, sync_bn=True, offload=None)]),
        'exact BatchNorm, offload':(n//2, lambda: [MicroBatch(s.bs, sync_bn=True)]), 'NoiseScale':(s.bs, lambda: [AccumulateStep(s.n_acc), NoiseScale()])}
    losses = {'CrossEntropyLossFlat':CrossEntropyLossFlat(), 'ignore_index':nn.CrossEntropyLoss(ignore_index=1),
        'a function':lambda p,t: F.cross_entropy(p, t, reduction='none').mean()}
    for (name,(bs,cbs)),(kind,loss),(prec,to) in itertools.product(hosts.items(), losses.items(), dict(fp32=noop, fp16=Learner.to_fp16).items()):
        if prec=='fp16' and kind!='ignore_index' or not CUDA and kind!='CrossEntropyLossFlat': continue
        learn = learner(pictures(s, n, bs, s.small), s.small_resnet(num_classes=10), loss, *cbs(), to=to)
        learn.fit(1, 1e-3) # libraries prepare themselves
        ours,total = count_waits(learn)
        rows.append([name, kind, prec, *(over(o, n//s.bs) if CUDA else None for o in (ours,total))])
    bounds = [want('waits by fastai_accum for a micro-batch, the most of all rows', max(r[3] for r in rows) if CUDA else None, 0)]
    return ['trained by','loss','precision','waits by fastai_accum','waits in all'],rows,bounds

# ---- memory

def peak(make, *cbs):
    "MiB at the peak of a second fit, with all that `make()` made, and MiB of gradients; None where it can't be measured, or is not enough"
    clean()
    was = torch.cuda.memory_allocated() if CUDA else 0
    try:
        learn = make()
        for _ in range(2):
            if CUDA: torch.cuda.reset_peak_memory_stats()
            learn.fit(1, 1e-3, cbs=[cb() for cb in cbs])
            sync()
    except torch.OutOfMemoryError: return None,None
    grads = sum(p.grad.nbytes for p in learn.model.parameters() if p.grad is not None)/2**20
    return (torch.cuda.max_memory_allocated()-was)/2**20 if CUDA else None,grads

def memory(s):
    "Peak memory, MiB"
    rows,bounds,n = [],[],s.bs*s.n_acc
    for name,(mk,data,loss) in PROBLEMS.items():
        def small(): return learner(data(s, n, s.bs), mk(s), loss)
        def large(): return learner(data(s, n, n), mk(s), loss)
        peak(small) # libraries take their workspaces
        plain,grads = peak(small)
        res = {f'AccumulateStep({s.n_acc}), bs={s.bs}':peak(small, lambda: AccumulateStep(s.n_acc))[0],
            f'MicroBatch({s.bs}), bs={n}':peak(large, lambda: MicroBatch(s.bs))[0]}
        bounds += [want(f'{name}: {k}, less gradients, over plain bs={s.bs}', over(v and v-(grads or 0), plain), 1.03) for k,v in res.items()]
        if name=='ResNet-50':
            peak(large, lambda: MicroBatch(s.bs, sync_bn=True, offload=None))
            exact = {f'exact BatchNorm, {k}':peak(large, lambda: MicroBatch(s.bs, sync_bn=True, offload=o))[0] for k,o in {'offload':'cpu',
                'no offload':None}.items()}
            bounds.append(want('exact BatchNorm: offload over no offload', over(*exact.values()), 1))
            res.update(exact)
        res = {f'plain Learner, bs={s.bs}':plain, **res, f'plain Learner, bs={n}':peak(large)[0]}
        rows += [[name, k, v, over(v, plain), grads] for k,v in res.items()]
    return ['model','trained by','peak MiB',f'times plain bs={s.bs}','gradients, MiB'],rows,bounds

def largest(s, name, size=None):
    "The size of micro-batches that an epoch was trained with; of 'auto', or else of `size`; what was raised if memory was not enough for it"
    mk,data,loss = PROBLEMS[name]
    clean()
    try:
        cb = MicroBatch(size or 'auto')
        learner(data(s, 2*s.most, s.most), mk(s), loss, cb).fit(1, 1e-3)
        return cb.bs
    except RuntimeError as e: return f'{type(e).__name__}: {e}'.splitlines()[0][:80]

def by_hand(s, name):
    "The largest half of a half... of the batch that fits"
    sizes = [s.most>>i for i in range(s.most.bit_length())]
    return next((b for b in sizes if largest(s, name, b)==b), None)

def auto(s):
    "What `'auto'` finds in a memory that is capped, and the largest size that fits by hand"
    s,rows = AttrDict({**s, 'pixels':s.mask}),[]
    for name,bench,gb in itertools.product(('ResNet-50','U-Net'), (False,True), s.caps):
        torch.backends.cudnn.benchmark = bench
        clean()
        if CUDA: torch.cuda.set_per_process_memory_fraction(min(1., gb*1e9/torch.cuda.get_device_properties(0).total_memory))
        try: rows.append([name, gb, 'on' if bench else 'off', largest(s, name), by_hand(s, name) if CUDA else None])
        finally:
            torch.backends.cudnn.benchmark = False
            if CUDA: torch.cuda.set_per_process_memory_fraction(1.)
    return ['model','GB','cuDNN benchmark',"size by 'auto'",'largest by hand'],rows,[want("caps where 'auto' is not the largest that fits",
        sum(r[3]!=r[4] for r in rows) if CUDA else None, 0)]

# ---- mixed precision

def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()]).double()

def parity(s):
    "Mixed precision: relative distance of trained weights from those of the large batch in float32"
    rows,bounds,n = [],[],s.bs*s.n_acc
    ways = {'large batch':(n, lambda: []), 'AccumulateStep':(s.bs, lambda: [AccumulateStep(s.n_acc)]), 'MicroBatch':(n, lambda: [MicroBatch(s.bs)]),
        'MicroBatch, sync_bn=True':(n, lambda: [MicroBatch(s.bs, sync_bn=True)])}
    for name,(prec,to) in itertools.product(('ResNet-50','language model'), dict(fp16=partial(Learner.to_fp16, init_scale=256.), bf16=Learner.to_bf16).items()):
        mk,data,loss = PROBLEMS[name]
        def trained(bs, cbs, to=noop):
            torch.manual_seed(0)
            learn = learner(data(s, 2*n, bs), mk(s), loss, *cbs(), to=to)
            start = weights(learn)
            with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False): learn.fit(1, 1e-2)
            return weights(learn)-start
        exact = trained(n, list)
        same = [k for k in ways if name!='ResNet-50' or k in ('large batch','MicroBatch, sync_bn=True')] # BatchNorm makes the others another run
        dist = {k:distance(trained(*ways[k], to), exact) for k in same}
        rows += [[name, prec, k, v] for k,v in dist.items()]
        bounds += [want(f'{name}, {prec}: {k} over the large batch', over(v, dist['large batch']) if CUDA else None,
            2) for k,v in dist.items() if k!='large batch']
    return ['model','precision','trained by','distance of the change'],rows,bounds

# ---- times

def loop(model, dl, loss, bs, low):
    "Seconds of what one writes without a framework"
    opt = SGD(list(model.parameters()), lr=1e-3, mom=0.9)
    model.train()
    sync()
    start = time.perf_counter()
    for x,y in dl:
        for a,b in zip(x.split(bs), y.split(bs)):
            with torch.autocast(DEVICE.type, dtype=bf16, enabled=low): pred = model(a)
            (loss(pred.float(), b)*(len(a)/len(x))).backward()
        opt.step()
        opt.zero_grad()
    sync()
    return time.perf_counter()-start

def one_time(s, name, low):
    "Seconds of epochs of each way to train, in turns"
    mk,data,loss = PROBLEMS[name]
    bs,to,n = 2*s.bs,(Learner.to_bf16 if low else noop),2*s.bs*s.n_acc*s.batches//2
    whole,model = bs*max(1, s.n_acc//2),mk(s).to(DEVICE)
    small,large = data(s, n, bs),data(s, n, whole)
    def run(dl, *cbs): return partial(fit, learner(dl, model, loss, *cbs, to=to))
    runs = {'hand-written loop':lambda: loop(model, large, loss, bs, low), 'AccumulateStep':run(small, AccumulateStep(whole//bs)),
        'MicroBatch':run(large, MicroBatch(bs)), "fastai's GradientAccumulation":run(small, GradientAccumulation(whole)),
            "MicroBatch('auto'), all fits":run(large, MicroBatch('auto')), 'plain Learner, whole batches':run(large)}
    return {k:[t*bs/n for t in v] for k,v in interleaved(runs, s.repeats, s.warm).items()}

def times(s):
    "Time for the samples of a micro-batch"
    rows,bounds = [],[]
    for name,low in itertools.product(('ResNet-50','language model'), (False,True) if CUDA else (False,)):
        secs,prec = one_time(s, name, low),'bf16' if low else 'fp32'
        rows += [[name, prec, k, 1e3*median(v), ratio(v, secs['hand-written loop'])] for k,v in secs.items()]
        for a,b in (('MicroBatch','hand-written loop'), ('AccumulateStep','hand-written loop'),
            ("MicroBatch('auto'), all fits",'plain Learner, whole batches')):
            bounds.append(want(f'{name}, {prec}: {a} over {b}', ratio(secs[a], secs[b]) if CUDA else None, 1.02))
    return ['model','precision','trained by','ms','times the loop'],rows,bounds

# ---- exact BatchNorm

def rss():
    "MiB of the host's memory that this process has"
    stat = Path('/proc/self/statm')
    return int(stat.read_text().split()[1])*resource.getpagesize()/2**20 if stat.exists() else math.nan

NORMS = {'plain micro-batches':{}, "sync_bn='stats'":dict(sync_bn='stats'), 'exact, no offload':dict(sync_bn=True, offload=None),
    'exact, offload':dict(sync_bn=True)}

def exact_batch(s, kw, bench):
    "Milliseconds of a batch, and MiB at the peak; None if memory is not enough"
    clean()
    bs,n = s.norm_bs,1 if bench else 2 # batches in an epoch: in benchmark mode one may take many seconds
    torch.backends.cudnn.benchmark = bench
    learn = learner(pictures(s, n*bs*s.n_acc, bs*s.n_acc), resnet(s), CrossEntropyLossFlat())
    try: secs = [fit(learn, MicroBatch(bs, **kw))/n for _ in range(2 if bench else max(2, s.warm+1))][1:] # the first prepares
    except torch.OutOfMemoryError: return None,None
    finally: torch.backends.cudnn.benchmark = False
    return 1e3*median(secs),torch.cuda.max_memory_allocated()/2**20 if CUDA else None

def exact(s):
    "Exact BatchNorm: time of a batch and peak memory"
    cases = [(b,k) for b in ((False,True) if CUDA else (False,)) for k in NORMS if not (b and k=='exact, offload')]
    rows = [[k, 'on' if b else 'off', *exact_batch(s, NORMS[k], b)] for b,k in cases]
    ms = {(name,bench):v if CUDA else None for name,bench,v,_ in rows}
    def times(b): return over(ms.get(('exact, no offload',b)), ms.get(('plain micro-batches',b)))
    bounds = [want(f'exact over plain micro-batches, cuDNN benchmark {b}', times(b), 1.3) for b in ('off','on')]
    return ['trained by','cuDNN benchmark','ms a batch','peak MiB'],rows,bounds

class Growth(Callback):
    "The host's memory after a first tenth of the batches and at the end, and the threads that the model ran in"
    def before_fit(self):
        self.ids,self.start = set(),None
        self.hook = next(self.model.modules()).register_forward_pre_hook(lambda *_: self.ids.add(threading.get_native_id()) and None)
    def after_batch(self):
        if self.iter>=self.n_iter//10 and self.start is None: self.start = rss()
    def after_fit(self):
        self.grown = rss()-self.start
        self.hook.remove()

def long(s):
    "Many batches with exact BatchNorm in one fit: does the host's memory grow?"
    rows,bounds,bs = [],[],s.bs
    for name,kw in NORMS.items():
        data = pictures(s, bs*s.n_acc, bs*s.n_acc, s.small)
        learn = learner(Batches(list(data)*s.long), s.small_resnet(num_classes=10), CrossEntropyLossFlat(), MicroBatch(bs, **kw), growth := Growth())
        fit(learn)
        rows.append([name, s.long, len(growth.ids), growth.grown])
        learn = None
        clean()
    for name,_,n,mib in rows[2:]: bounds += [want(f'{name}: threads', n, s.n_acc),
        want(f'{name}: MiB that the host\'s memory grows in {s.long} batches', mib if CUDA else None, 20)]
    return ['trained by','batches','threads','MiB grown on the host'],rows,bounds

def throughput(s):
    "`MicroBatch` with ResNet-50, bf16: samples a second"
    rows,n = [],s.through
    for b in [2**i for i in range(n.bit_length())]:
        clean()
        learn = learner(pictures(s, n if b<=2 else 2*n, n), resnet(s), CrossEntropyLossFlat(), MicroBatch(b), to=Learner.to_bf16)
        try: fit(learn); rows.append([b, n*len(learn.dls.train)/fit(learn)])
        except torch.OutOfMemoryError: rows.append([b, None])
        learn = None
    return ['samples in a micro-batch','samples a second'],rows,[]

PARTS = dict(kernels=kernels, waits=waits, memory=memory, auto=auto, parity=parity, times=times, exact=exact, long=long, throughput=throughput)

# ---- all of it

def measured(f, s):
    "What part `f` came to, or why it did not"
    start = time.perf_counter()
    res = dict(title=f.__doc__)
    try: res.update(zip(('head','rows','wanted'), f(s)))
    except Exception as e: res['error'],res['trace'] = f'{type(e).__name__}: {e}'[:300],traceback.format_exc()[-2000:]
    res['secs'] = round(time.perf_counter()-start, 1)
    clean()
    return res

def draw(parts, path):
    "Peak memory, times, and throughput"
    from matplotlib import pyplot as plt
    fig,axs = plt.subplots(1, 3, figsize=(13,4), layout='constrained')
    bars = [('memory', lambda r: (f'{r[0]}: {r[1]}',r[3]), 'peak memory, times that of the plain small batch'),
        ('times', lambda r: (f'{r[0]}, {r[1]}: {r[2]}',r[4]), "time, times the loop's")]
    for ax,(part,f,label) in zip(axs, bars):
        pts = [(k,v) for k,v in map(f, parts.get(part, {}).get('rows', ())) if v is not None][::-1]
        if pts: ax.barh(*zip(*pts), color='#56b4e9')
        ax.set(xlabel=label)
        ax.tick_params(axis='y', labelsize=6)
        ax.axvline(1, c='k', lw=0.8)
    pts = [r for r in parts.get('throughput', {}).get('rows', ()) if r[1] is not None]
    if pts: axs[2].plot(*zip(*pts), c='k', marker='.')
    axs[2].set(xscale='log', ylim=(0,None), xlabel='samples in a micro-batch, ResNet-50 in bf16', ylabel='samples a second')
    axs[2].set_xticks([p[0] for p in pts], [p[0] for p in pts])
    axs[2].xaxis.set_minor_locator(plt.NullLocator())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=80)

def held(part, strict):
    "Did a part run, and hold its bounds? If `strict`, what was not measured is not held"
    return 'error' not in part and all(w['ok'] or w['ok'] is None and not strict for w in part['wanted'])

@call_parse
def main(
    only:str='', # Parts to measure, such as 'waits,memory'; the others stay as they are in `out`. Empty: all
    tiny:bool=False, # Tiny sizes, to see that it runs
    out:str='', # The numbers. Empty: benchmarks/gpu.json, or with `tiny` out/gpu.json
    picture:str='' # Empty: nbs/images/gpu.png, or with `tiny` out/gpu.png
):
    if not CUDA and not tiny: sys.exit('There is no GPU here. `--tiny` runs all of it in tiny sizes on the CPU, which measures nothing.')
    s,names = AttrDict(TINY if tiny else FULL),only.split(',') if only else list(PARTS)
    if bad := [k for k in names if k not in PARTS]: sys.exit(f'`only`={only!r}: there is no part {bad[0]!r}. Pass some of {",".join(PARTS)}')
    d,images = ('out','out') if tiny else ('benchmarks','nbs/images')
    out,picture = Path(out or here.parent/d/'gpu.json'),picture or here.parent/images/'gpu.png'
    out.parent.mkdir(parents=True, exist_ok=True)
    gc.freeze() # so that looking for garbage does not go through all modules
    res = dict(where=f'{where()}, cuDNN {torch.backends.cudnn.version()}', date=time.strftime('%Y-%m-%d'), tiny=tiny, gpu=CUDA,
        parts=json.loads(out.read_text())['parts'] if only and out.exists() else {})
    print(f"{res['where']}{', tiny sizes, which measure nothing' if tiny else ''}\n")
    for k in names:
        res['parts'][k] = measured(PARTS[k], s)
        out.write_text(json.dumps(res, indent=1)+'\n') # what comes later may end the process
        print(f"{gpu_part(res['parts'][k])}\n", flush=True)
    draw(res['parts'], picture)
    bad = [k for k in names if not held(res['parts'][k], CUDA and not tiny)]
    print(f"numbers in {out}; {f'failed or not as wanted: {bad}' if bad else 'nothing failed'}")
    sys.exit(bool(bad))
