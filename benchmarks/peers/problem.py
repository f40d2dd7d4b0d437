"""What all peers train: problems, the loop that is the measure of them, and the answers to `peers.py`, which runs each peer in a process of its own. It needs torch only,
as a peer's environment may have nothing else."""
import os
os.environ.setdefault('KINETO_LOG_LEVEL', '99') # the profiler has nothing to say
os.environ.setdefault('CUDA_VISIBLE_DEVICES', '')
import gc,itertools,json,random,sys,tempfile,time,warnings
from importlib.metadata import version
from pathlib import Path
import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader,TensorDataset

def net(): return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
def bn_net(): return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
def mlp(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

class Block(nn.Module):
    def __init__(self, ni, nf, stride):
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(ni, nf, 3, stride, 1, bias=False), nn.BatchNorm2d(nf), nn.ReLU(), nn.Conv2d(nf, nf, 3, 1, 1, bias=False), nn.BatchNorm2d(nf))
        self.skip = nn.Sequential() if ni==nf and stride==1 else nn.Sequential(nn.Conv2d(ni, nf, 1, stride, bias=False), nn.BatchNorm2d(nf))
    def forward(self, x): return (self.convs(x) + self.skip(x)).relu()

def resnet():
    "ResNet-8"
    return nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb,self.head = nn.Embedding(100, 64),nn.Linear(64, 10)
        self.enc = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, dropout=0., batch_first=True), 2, enable_nested_tensor=False)
    def forward(self, x): return self.head(self.enc(self.emb(x)).mean(1))

class LanguageModel(nn.Module):
    "With an output for each of 2000 words at each of 32 places"
    def __init__(self):
        super().__init__()
        self.emb,self.conv,self.head = nn.Embedding(2000, 32),nn.Conv1d(32, 32, 3),nn.Conv1d(32, 2000, 1)
    def forward(self, x): return self.head(self.conv(nn.functional.pad(self.emb(x).transpose(1, 2), (2,0))).relu()) # a word sees those before it

class UNet(nn.Module):
    "With an output for each of 21 classes at each pixel"
    def __init__(self):
        super().__init__()
        def block(ni, nf, stride=1): return nn.Sequential(nn.Conv2d(ni, nf, 3, stride, 1, bias=False), nn.BatchNorm2d(nf), nn.ReLU())
        self.top,self.down,self.low,self.up,self.head = block(3, 8),block(8, 16, 2),block(16, 16),nn.ConvTranspose2d(16, 8, 2, 2),nn.Conv2d(16, 21, 1)
    def forward(self, x):
        x = self.top(x)
        return self.head(torch.cat([x, self.up(self.low(self.down(x)))], 1))

def targets(x, n_out=3): return (x@torch.randn(x.shape[1], n_out, dtype=x.dtype)).argmax(1)

def some_ignored(y):
    "Leave out two thirds of the targets, never the first of a micro-batch"
    drop = torch.rand(len(y))<2/3
    drop[::4] = False
    return y.masked_fill(drop, -100)

N_ACC,EVEN,UNEVEN,SEVERAL = 4,[4]*4,[5,5,5,1],[4,4,4,2, 4,4,4,4, 4,4,4,3, 4,4,4,1]
# What differs from 64 samples in even windows: n, sizes of the micro-batches of a window (or of several, which come in turn), ...
CASES = {'even':{}, 'short last window':dict(n=72), 'uneven micro-batches':dict(sizes=UNEVEN), 'both':dict(n=72, sizes=UNEVEN), 'windows of several sizes':dict(n=58, sizes=SEVERAL), 'ignored targets':dict(ignore=True),
         'class weights':dict(weight=[1.,5.,20.]), 'clipped':dict(clip=0.1), 'two epochs':dict(n=72, epochs=2), 'fp16-scaled':dict(scaled=True),
         'BatchNorm':dict(model=bn_net), 'one-cycle':dict(n=256, epochs=2, one_cycle=True), 'lr_find':dict(repeat=100, sizes=[16]*4, dtype=torch.float32)} # one batch over and over, so that noise plays no part
# model, a batch of its inputs, windows in an epoch
TIMED = {'tiny MLP':(mlp, lambda n: torch.randn(n, 1, 8, 8), 26), 'small ResNet':(resnet, lambda n: torch.randn(n, 3, 32, 32), 6),
         'small transformer':(Transformer, lambda n: torch.randint(100, (n, 32)), 8),
         'small language model':(LanguageModel, lambda n: torch.randint(2000, (n, 32)), 2), 'small U-Net':(UNet, lambda n: torch.randn(n, 3, 32, 32), 2)}
LABELS = {'small language model':lambda n: torch.randint(2000, (n, 32)), 'small U-Net':lambda n: torch.randint(21, (n, 32, 32))} # of the others there is one a sample

class Sizes:
    "Indices in order, in batches of `sizes`"
    def __init__(self, sizes): self.sizes = sizes
    def __len__(self): return len(self.sizes)
    def __iter__(self):
        i = iter(range(sum(self.sizes)))
        for k in self.sizes: yield list(itertools.islice(i, k))

class Problem:
    """Model, loss, data and options of a run, and what its optimizer did. `how`: the loader gives the 'whole' batch, or 'micro'-batches of which `n_acc` make a step, or the whole batch
    that is to be 'split' into micro-batches of at most `micro` samples"""
    def __init__(self, how, x, y, model, sizes=EVEN, n_acc=N_ACC, epochs=1, lr=0.1, weight=None, clip=None, scaled=False, one_cycle=False):
        self.how,self.x,self.y,self.model,self.sizes,self.epochs,self.lr,self.clip,self.scaled,self.one_cycle = how,x,y,model,sizes,epochs,lr,clip,scaled,one_cycle
        self.n_acc,self.micro,self.lrs,self.times = n_acc if how=='micro' else 1,max(sizes) if how=='split' else None,[],[]
        self.wholes = [sum(sizes[i:i+n_acc]) for i in range(0, len(sizes), n_acc)]
        self.bs = max(self.wholes)
        self.weight = None if weight is None else torch.tensor(weight, dtype=x.dtype)
        self.loss = nn.CrossEntropyLoss(weight=self.weight)
        self.n_steps = -(-len(x)//self.bs)*epochs
        self.data = TensorDataset(x, y)
        self.dl,self.valid = self.loader(self.data),DataLoader(self.data, sampler=[0]) # fastai wants to validate

    def loader(self, data, **kwargs):
        these = self.sizes if self.how=='micro' else self.wholes
        if len(set(these))==1: return DataLoader(data, batch_size=these[0], **kwargs)
        n,sizes = len(data),[]
        while n: sizes,n = sizes+[k := min(n, these[len(sizes)%len(these)])],n-k
        return DataLoader(data, batch_sampler=Sizes(sizes), **kwargs)

    def done(self, lr):
        "To be called at each step"
        self.lrs.append(float(lr))
        self.times.append(time.perf_counter())

    def optimizer(self, params=None, lr=None):
        opt = torch.optim.SGD(params or self.model.parameters(), lr=lr or self.lr, momentum=0.9)
        opt.register_step_post_hook(lambda o,*_: self.done(o.param_groups[0]['lr']))
        return opt
    def schedule(self, opt, n=None): return OneCycleLR(opt, self.lr, total_steps=n or self.n_steps, cycle_momentum=False) if self.one_cycle else None
    def count(self, y): return y.numel() if self.weight is None and (y>=0).all() else self.weight[y].sum() if self.weight is not None else (y!=-100).sum()
    @property
    def weights(self): return torch.cat([p.detach().double().flatten() for p in self.model.parameters()])

def exact(case, how):
    "The problem of a column of the table"
    kw = dict(CASES[case])
    n,repeat,dtype,mk,ignore = kw.pop('n', 64),kw.pop('repeat', 1),kw.pop('dtype', torch.float64),kw.pop('model', net),kw.pop('ignore', False)
    torch.manual_seed(0)
    x = torch.randn(n, 6, dtype=dtype).repeat(repeat, 1)
    y = targets(x)
    return Problem(how, x, some_ignored(y) if ignore else y, mk().to(dtype), **kw)

def timed(name, how, windows=None, n_acc=N_ACC, bs=8):
    "A problem of the tables of time and memory, or of the picture of growth: windows of `n_acc` micro-batches of `bs` samples"
    mk,xs,n = TIMED[name]
    torch.manual_seed(0)
    n = (windows or n)*n_acc*bs
    return Problem(how, xs(n), LABELS[name](n) if name in LABELS else torch.arange(n)%10, mk(), sizes=[bs]*n_acc, n_acc=n_acc, lr=1e-3)

def loop(p):
    "Divide the loss by N, step every N micro-batches"
    opt = p.optimizer()
    sched,scaler = p.schedule(opt),GradScaler('cpu', enabled=p.scaled)
    p.model.train()
    for _ in range(p.epochs):
        for i,(x,y) in enumerate(p.dl):
            scaler.scale(p.loss(p.model(x), y)/p.n_acc).backward()
            if (i+1)%p.n_acc: continue
            if p.clip:
                scaler.unscale_(opt)
                nn.utils.clip_grad_norm_(p.model.parameters(), p.clip)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            if sched: sched.step()

def rel(a, b): return float((a-b).norm()/a.norm())

def measure_exact(row, case):
    "Relative differences of the row's run from its own large batch, and of that from the loop's"
    if case=='lr_find':
        whole,micro = row['find'](exact(case, 'whole')),row['find'](exact(case, row['how']))
        return dict(whole=whole, micro=micro, ratio=micro/whole)
    base,whole,micro = exact(case, 'whole'),exact(case, 'whole'),exact(case, row['how'])
    loop(base)
    row['train'](whole), row['train'](micro)
    res = dict(err=rel(whole.weights, micro.weights), own=rel(base.weights, whole.weights), steps=len(micro.times), steps_whole=len(whole.times))
    if base.one_cycle and res['steps']==res['steps_whole']: res['lr'] = max(abs(a-b) for a,b in zip(whole.lrs, micro.lrs))/max(whole.lrs)
    return res

def measure_time(row, name, *args):
    "Seconds per micro-batch, between the first step of an epoch and its last"
    p = timed(name, row['how'], *args)
    gc.collect()
    row['train'](p)
    return (p.times[-1]-p.times[0])/(len(p.sizes)*(len(p.times)-1))

def measure_memory(row, name, windows=2, *args):
    "Bytes at the peak of two windows, from the making of the model on: the largest sum of what torch's allocator had given out and not got back"
    from torch.profiler import ProfilerActivity,profile
    gc.collect() # what is freed meanwhile is to be the run's own
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof: row['train'](timed(name, row['how'], windows, *args))
    with tempfile.TemporaryDirectory() as d:
        prof.export_chrome_trace(f'{d}/trace.json')
        events = [o for o in json.loads(Path(f'{d}/trace.json').read_text())['traceEvents'] if o.get('name')=='[memory]']
    return max(itertools.accumulate(o['args']['Bytes'] for o in sorted(events, key=lambda o: o['ts'])))

def serve(dist, **rows):
    "Answer the requests on stdin, a line of JSON each: `rows` are dicts of `train`, a function of a `Problem`, `how` that gets its batches, and `find`, which returns a learning rate"
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    out = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1) # what the peer prints is no answer
    say = lambda **kw: print(json.dumps(kw), file=out, flush=True)
    say(version=version(dist), torch=torch.__version__)
    do = dict(exact=measure_exact, time=measure_time, memory=measure_memory)
    for line in sys.stdin:
        what,key,*args = json.loads(line)
        try:
            random.seed(0)
            say(res=do[what](rows[key], *args))
        except NotImplementedError as e: say(none=str(e))
        except BaseException as e: say(error=f'{type(e).__name__}: {" ".join(str(e).split())}'[:200])

def no(why):
    "A peer that has no such thing"
    raise NotImplementedError(why)
