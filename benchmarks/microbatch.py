"""Time per micro-batch: `MicroBatch`, `AccumulateStep`, fastai's `GradientAccumulation`, a plain `Learner` and a hand-written loop, side by side in one run;
then how time and peak memory of one batch grow with the number of its micro-batches, as a picture and as numbers in a JSON file beside it.

Peak memory is that of a fit from the making of the model on: weights, gradients, the batch, activations. On a GPU it is `torch.cuda.max_memory_allocated`. On the CPU it is the
largest sum of what torch's allocator had given out and not got back, from each single allocation that `torch.profiler` reports, in a run that is not timed; scratch memory
that oneDNN allocates by itself is not in it."""
import os
os.environ.setdefault('KINETO_LOG_LEVEL', '99') # the profiler has nothing to say
import gc,json
from common import *
from fastai_accum import AccumulateStep,MicroBatch
from fastcore.script import call_parse
from torch.profiler import ProfilerActivity,profile

def loop(model, dl, opt, bs):
    "What one writes without a framework: load a batch, split it, step"
    model.train()
    sync()
    start = time.perf_counter()
    for b in dl:
        x,y = to_device(b, DEVICE)
        for xi,yi in zip(x.split(bs), y.split(bs)): (F.cross_entropy(model(xi), yi)*(len(yi)/len(y))).backward()
        opt.step(); opt.zero_grad()
    sync()
    return time.perf_counter()-start

# name, model, a sample's shape, batches in an epoch; what `MicroBatch` is to be compared with, and how much of its time it may take
PROBLEMS = (('tiny MLP', mlp, (1,8,8), 25, "fastai's GradientAccumulation", 0.55), ('ResNet-18 on 64x64 pixels', resnet, (3,64,64), 1, 'hand-written loop', 1.02))

def data(shape, n): return [(torch.randn(shape), torch.tensor(i%10)) for i in range(n)]

def learner(model, items, bs):
    dls = DataLoaders(DataLoader(items, bs=bs), DataLoader(items[:1], bs=1), device=DEVICE)
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), opt_func=SGD, cbs=Timer())
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def micro_times(mk, shape, n, n_acc, bs, repeats):
    "Seconds for the samples of a micro-batch, of each way to train on `n` batches of `n_acc*bs` samples"
    items,model = data(shape, n*n_acc*bs),mk().to(DEVICE)
    small,large,opt = learner(model, items, bs),learner(model, items, n_acc*bs),SGD(list(model.parameters()), lr=1e-3)
    runs = {'MicroBatch':lambda: fit(large, MicroBatch(bs)), 'hand-written loop':lambda: loop(model, large.dls.train, opt, bs),
            'AccumulateStep':lambda: fit(small, AccumulateStep(n_acc)), "fastai's GradientAccumulation":lambda: fit(small, GradientAccumulation(n_acc*bs)),
            "MicroBatch('auto'), all fits":lambda: fit(large, MicroBatch('auto')), 'plain Learner, whole batches':lambda: fit(large)}
    return {k:[s/(n*n_acc) for s in v] for k,v in interleaved(runs, repeats).items()}

def peak(f):
    "Bytes at the peak of `f()`, above what there was before"
    gc.collect()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        was = torch.cuda.memory_allocated()
        f()
        return torch.cuda.max_memory_allocated()-was
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof: f()
    with tempfile.TemporaryDirectory() as d:
        prof.export_chrome_trace(f'{d}/trace.json')
        events = [o for o in json.loads(Path(f'{d}/trace.json').read_text())['traceEvents'] if o.get('name')=='[memory]']
    return max(itertools.accumulate(o['args']['Bytes'] for o in sorted(events, key=itemgetter('ts'))))

def growth(mk, shape, n, bs, repeats):
    "Seconds and bytes of one batch of `bs` samples in 1, 2, 4... micro-batches, by `MicroBatch` and by hand, and of a plain `Learner`"
    items,model = data(shape, n*bs),mk().to(DEVICE)
    learn,opt,sizes = learner(model, items, bs),SGD(list(model.parameters()), lr=1e-3),[bs>>i for i in range(bs.bit_length()) if bs%(1<<i)==0]
    runs = {('plain Learner',bs):lambda: fit(learn)}
    for k in sizes:
        runs['MicroBatch',k] = partial(fit, learn, MicroBatch(k))
        runs['hand-written loop',k] = partial(loop, model, learn.dls.train, opt, k)
    secs = interleaved(runs, repeats, 1)
    def memory(name, k):
        model = mk().to(DEVICE)
        if name=='hand-written loop': loop(model, learner(model, items[:2*bs], bs).dls.train, SGD(list(model.parameters()), lr=1e-3), k)
        else: fit(learner(model, items[:2*bs], bs), *([MicroBatch(k)] if name=='MicroBatch' else []))
    return [dict(name=name, bs=k, micro_batches=bs//k, secs=[s/n for s in secs[name,k]], peak_bytes=peak(partial(memory, name, k))) for name,k in runs]

def draw(grown, path):
    "Time and memory of each problem, over the number of micro-batches"
    from matplotlib import pyplot as plt
    _,axs = plt.subplots(len(grown), 2, figsize=(9,3*len(grown)), layout='constrained', squeeze=False)
    for (title,rows),(a,b) in zip(grown.items(), axs):
        for name,kw in (('hand-written loop',dict(lw=6, c='#56b4e9')), ('MicroBatch',dict(c='k', ls='--', marker='.'))):
            rs = [r for r in rows if r['name']==name]
            a.plot([r['micro_batches'] for r in rs], [1e3*median(r['secs']) for r in rs], label=name, **kw)
            b.plot([r['micro_batches'] for r in rs], [r['peak_bytes']/2**20 for r in rs], **kw)
        plain = first(r for r in rows if r['name']=='plain Learner')
        a.axhline(1e3*median(plain['secs']), c='#d55e00', lw=1, label='plain Learner, whole batch'), b.axhline(plain['peak_bytes']/2**20, c='#d55e00', lw=1)
        ticks = [r['micro_batches'] for r in rows if r['name']=='MicroBatch']
        for ax,what in ((a,'ms a batch'),(b,'peak memory, MiB')):
            ax.set_xscale('log', base=2)
            ax.set(title=title, xlabel=f"micro-batches of a batch of {plain['bs']}", ylabel=what, ylim=(0,None), xticks=ticks, xticklabels=ticks)
    axs[0,0].legend()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(path, dpi=100)

@call_parse
def main(
    repeats:int=40, # Epochs timed for each, in turn; medians are shown
    n_acc:int=4, # Micro-batches in a batch
    bs:int=8, # Samples in a micro-batch
    grow_repeats:int=10, # The same for each number of micro-batches in the picture; 0 leaves it out
    grow_bs:int=64, # Samples in the batch of the picture
    out:str='out/microbatch.png' # The picture; its numbers go to a JSON file beside it
):
    at = where()
    print(f'{at}, batches of {n_acc}x{bs} samples, medians of {repeats} epochs of each in random turn')
    times,grown = {},{}
    for name,mk,shape,n,than,most in PROBLEMS:
        secs = times[name] = micro_times(mk, shape, n, n_acc, bs, repeats)
        print(f'\n{name}, {n*n_acc} micro-batches an epoch\n{"":34}{"us each":>10}{f"MicroBatch({bs}) takes":>24}')
        for k,v in secs.items(): print(f'{k:34}{1e6*median(v):10.0f}{ratio(secs["MicroBatch"], v):18.3f} times')
        auto,plain = list(secs.values())[-2:]
        print(f"MicroBatch('auto') takes {ratio(auto, plain):.3f} times what the plain Learner does\n"
              f"wanted: MicroBatch({bs}) takes at most {most} times what {than} does; it takes {ratio(secs['MicroBatch'], secs[than]):.3f}")
    if grow_repeats: grown = {name:growth(mk, shape, n, grow_bs, grow_repeats) for name,mk,shape,n,*_ in PROBLEMS}
    for name,rows in grown.items():
        print(f'\n{name}, a batch of {grow_bs}\n{"":20}{"micro-batches":>15}{"ms":>10}{"peak MiB":>12}')
        for r in rows: print(f"{r['name']:20}{r['micro_batches']:15}{1e3*median(r['secs']):10.2f}{r['peak_bytes']/2**20:12.4g}")
    if grown: draw(grown, out)
    path = Path(out).with_suffix('.json')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(where=at, n_acc=n_acc, bs=bs, secs_per_micro_batch=times, growth=grown), indent=1))
    print(f'\n{out if grown else "no picture"}, numbers in {path}')
