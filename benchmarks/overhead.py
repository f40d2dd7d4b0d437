"Time per micro-batch: `AccumulateStep`, fastai's `GradientAccumulation`, a plain `Learner` and a hand-written loop, side by side in one run"
from common import *
from fastai_accum import AccumulateStep
from fastcore.script import call_parse

def loop(model, dl, opt, n_acc):
    "What one writes without a framework"
    model.train()
    sync()
    start = time.perf_counter()
    for i,b in enumerate(dl):
        x,y = to_device(b, DEVICE)
        (F.cross_entropy(model(x), y)/n_acc).backward()
        if (i+1)%n_acc==0: opt.step(); opt.zero_grad()
    sync()
    return time.perf_counter()-start

@call_parse
def main(
    repeats:int=40, # Epochs timed for each, in turn; medians are shown
    n_acc:int=4, # Micro-batches in a window
    bs:int=8 # Samples in a micro-batch
):
    print(f'{where()}, windows of {n_acc}x{bs} samples, medians of {repeats} epochs of each in random turn')
    for name,mk,shape,n in (('tiny MLP', mlp, (1,8,8), 25*n_acc), ('ResNet-18 on 64x64 pixels', resnet, (3,64,64), n_acc)):
        items = [(torch.randn(shape), torch.tensor(i%10)) for i in range(n*bs)]
        dls = DataLoaders(DataLoader(items, bs=bs), DataLoader(items[:bs], bs=bs), device=DEVICE)
        def runner(*cbs):
            learn = Learner(dls, mk().to(DEVICE), loss_func=CrossEntropyLossFlat(), opt_func=SGD, cbs=[Timer(), *cbs])
            learn.remove_cb(ProgressCallback)
            learn.logger = noop
            return partial(fit, learn)
        hand = mk().to(DEVICE)
        opt = SGD(list(hand.parameters()), lr=1e-3)
        runs = {'AccumulateStep':runner(AccumulateStep(n_acc)), "fastai's GradientAccumulation":runner(GradientAccumulation(n_acc*bs)),
                'plain Learner, a step each':runner(), 'hand-written loop':lambda: loop(hand, dls.train, opt, n_acc)}
        secs = {k:[o/n for o in v] for k,v in interleaved(runs, repeats).items()}
        print(f'\n{name}, {n} micro-batches an epoch\n{"":34}{"us each":>10}{"AccumulateStep takes":>24}')
        for k,v in secs.items(): print(f'{k:34}{1e6*median(v):10.0f}{ratio(secs["AccumulateStep"], v):18.3f} times')
