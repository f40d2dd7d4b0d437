"Time per micro-batch: `AccumulateStep`, fastai's `GradientAccumulation`, a plain `Learner` and a hand-written loop, side by side in one run"
import platform,random,time
from statistics import median
from fastai.vision.all import *
from fastai_accum import AccumulateStep
from fastcore.script import call_parse

class Timer(Callback):
    "Seconds of the training part of an epoch"
    order = -1000
    def before_train(self): self.start = time.perf_counter()
    def after_train(self): self.secs = time.perf_counter()-self.start

def loop(model, dl, opt, n_acc):
    "What one writes without a framework"
    model.train()
    start = time.perf_counter()
    for i,(x,y) in enumerate(dl):
        (F.cross_entropy(model(x), y)/n_acc).backward()
        if (i+1)%n_acc==0: opt.step(); opt.zero_grad()
    return time.perf_counter()-start

def mlp(): return nn.Sequential(nn.Flatten(), nn.Linear(64,64), nn.ReLU(), nn.Linear(64,10))
def resnet(): return models.resnet18(num_classes=10)

@call_parse
def main(
    repeats:int=40, # Epochs timed for each, in turn; medians are shown
    n_acc:int=4, # Micro-batches in a window
    bs:int=8 # Samples in a micro-batch
):
    torch.set_num_threads(1)
    print(f'{platform.machine()}, torch {torch.__version__} on one thread, windows of {n_acc}x{bs} samples, medians of {repeats} epochs of each in random turn')
    for name,mk,shape,n in (('tiny MLP', mlp, (1,8,8), 25*n_acc), ('ResNet-18 on 64x64 pixels', resnet, (3,64,64), n_acc)):
        items = [(torch.randn(shape), torch.tensor(i%10)) for i in range(n*bs)]
        dls = DataLoaders(DataLoader(items, bs=bs), DataLoader(items[:bs], bs=bs))
        def runner(*cbs):
            learn = Learner(dls, mk(), loss_func=CrossEntropyLossFlat(), opt_func=SGD, cbs=[Timer(), *cbs])
            learn.remove_cb(ProgressCallback)
            learn.logger = noop
            def run(): learn.fit(1, 1e-3); return learn.timer.secs
            return run
        hand = mk()
        opt = SGD(list(hand.parameters()), lr=1e-3)
        runs = {'AccumulateStep':runner(AccumulateStep(n_acc)), "fastai's GradientAccumulation":runner(GradientAccumulation(n_acc*bs)),
                'plain Learner, a step each':runner(), 'hand-written loop':lambda: loop(hand, dls.train, opt, n_acc)}
        secs = {k:[] for k in runs}
        for i in range(repeats+2):
            for k in random.sample(list(runs), len(runs)):
                s = runs[k]()/n
                if i>1: secs[k].append(s) # the first two warm up
        print(f'\n{name}, {n} micro-batches an epoch\n{"":34}{"us each":>10}{"AccumulateStep takes":>24}')
        for k,v in secs.items(): print(f'{k:34}{1e6*median(v):10.0f}{median(a/b for a,b in zip(secs["AccumulateStep"], v)):18.3f} times')
