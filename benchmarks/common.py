"What the benchmarks share: where they run, how they time, and that they do so side by side"
import ctypes,platform,random,time
from statistics import median
from fastai.vision.all import *

CUDA = torch.cuda.is_available()
DEVICE = torch.device('cuda' if CUDA else 'cpu')

def where():
    "Machine and torch, on one thread, with memory that stays with the process: else some runs get pages from the system, others not, by chance"
    torch.set_num_threads(1)
    if platform.system()=='Linux':
        for option in (-1,-3): ctypes.CDLL(None).mallopt(option, 2**30) # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    return f"{torch.cuda.get_device_name() if CUDA else f'{platform.machine()} on one thread'}, torch {torch.__version__}"

def sync():
    if CUDA: torch.cuda.synchronize()

class Timer(Callback):
    "Seconds of the training part of an epoch"
    order = -1000
    def before_train(self):
        sync()
        self.start = time.perf_counter()
    def after_train(self):
        sync()
        self.secs = time.perf_counter()-self.start

def fit(learn, *cbs):
    "Seconds of an epoch of a `learn` that has a `Timer`"
    learn.fit(1, 1e-3, cbs=cbs)
    return learn.timer.secs

def interleaved(
    runs:dict, # Functions that return seconds
    repeats:int, # How often each is called, in turns of random order
    warm:int=2 # Turns before these, to warm up
)->dict: # Seconds of each call
    secs = {k:[] for k in runs}
    for i in range(repeats+warm):
        for k in random.sample(list(runs), len(runs)):
            s = runs[k]()
            if i>=warm: secs[k].append(s)
    return secs

def ratio(a, b):
    "The median of what `a` took over what `b` took in the same turn"
    return median(x/y for x,y in zip(a, b))

def mlp(): return nn.Sequential(nn.Flatten(), nn.Linear(64,64), nn.ReLU(), nn.Linear(64,10))
def resnet(): return models.resnet18(num_classes=10)
