"Time per micro-batch: `AccumulateStep`, fastai's `GradientAccumulation`, a plain `Learner` and a hand-written loop, side by side in one run"
import platform,time
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

def tasks(small):
    "name, model maker, input shape, micro-batches in an epoch"
    mlp = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64,64), nn.ReLU(), nn.Linear(64,10))
    return [('tiny MLP', mlp, (1,8,8), 40 if small else 400), ('ResNet-18, 64x64', lambda: models.resnet18(num_classes=10), (3,64,64), 4 if small else 24)]

@call_parse
def main(
    repeats:int=9, # Interleaved repeats, of which the median is taken
    n_acc:int=4, # Micro-batches in a window
    bs:int=8, # Samples in a micro-batch
    small:bool=False # A few micro-batches only, to see that it runs
):
    torch.set_num_threads(1)
    print(f'{platform.processor() or platform.machine()}, torch {torch.__version__} on 1 thread, {n_acc}x{bs} samples; medians of {repeats} interleaved repeats')
    for name,mk,shape,n in tasks(small):
        torch.manual_seed(0)
        items = [(torch.randn(shape), torch.tensor(i%10)) for i in range(n*bs)]
        dls = DataLoaders(DataLoader(items, bs=bs), DataLoader(items[:bs], bs=bs))
        def learner(*cbs):
            learn = Learner(dls, mk(), loss_func=CrossEntropyLossFlat(), opt_func=SGD, cbs=[Timer(), *cbs])
            learn.remove_cb(ProgressCallback)
            learn.logger = noop
            learn.fit(1, 1e-3)
            return learn
        learns = {'AccumulateStep':learner(AccumulateStep(n_acc)), "fastai's GradientAccumulation":learner(GradientAccumulation(n_acc*bs)), 'plain Learner':learner()}
        hand = mk()
        opt = SGD(list(hand.parameters()), lr=1e-3)
        secs = {k:[] for k in [*learns, 'hand-written loop']}
        for _ in range(repeats):
            for k,learn in learns.items():
                learn.fit(1, 1e-3)
                secs[k].append(learn.timer.secs/n)
            secs['hand-written loop'].append(loop(hand, dls.train, opt, n_acc)/n)
        print(f'\n{name}, {n} micro-batches\n{"":32}{"us each":>10}{"AccumulateStep takes":>24}')
        for k,v in secs.items(): print(f'{k:32}{1e6*median(v):10.0f}{median(a/b for a,b in zip(secs["AccumulateStep"], v)):19.3f} times')
