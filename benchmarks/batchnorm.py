"""What exact BatchNorm costs: `MicroBatch(sync_bn=True)`, with activations kept on the host and on the device, against plain accumulation and the whole batch at once; time and
peak memory, side by side in one run. On a GPU: ResNet-50 on 224x224 pixels, batches of 8x32. On the CPU: ResNet-18 on 32x32 pixels, batches of 4x8, time alone: there is no
memory to offload to."""
import gc,json
from common import *
from fastai_accum import MicroBatch
from fastcore.script import call_parse

class Batches(list): "Batches that are on the device already"

def learner(arch, size, n, bs):
    x,y = torch.randn(n*bs, 3, size, size, device=DEVICE),torch.arange(n*bs, device=DEVICE)%10
    learn = Learner(DataLoaders(Batches(zip(x.split(bs), y.split(bs))), Batches()), arch(num_classes=10).to(DEVICE), loss_func=CrossEntropyLossFlat(), opt_func=SGD, cbs=Timer(), default_cbs=False)
    learn.add_cb(TrainEvalCallback())
    learn.logger = noop
    return learn

def free():
    gc.collect()
    if CUDA: torch.cuda.empty_cache()

def measure(learn, mb):
    "Seconds and, on a GPU, bytes at the peak of an epoch; None if memory is not enough"
    free()
    if CUDA: torch.cuda.reset_peak_memory_stats()
    cbs = [mb()] if mb else []
    try: secs = fit(learn, *cbs)
    except torch.OutOfMemoryError:
        learn.opt.zero_grad()
        learn.pred = learn.loss = learn.loss_grad = None
        learn.remove_cbs(cbs)
        return None
    return secs, torch.cuda.max_memory_allocated() if CUDA else None

@call_parse
def main(
    repeats:int=0, # Epochs timed for each, in turn; medians are shown. 0: 10 on a GPU, 5 on the CPU
    n:int=0, # Batches in an epoch. 0: 4 on a GPU, 2 on the CPU
    n_acc:int=0, # Micro-batches in a batch. 0: 8 on a GPU, 4 on the CPU
    bs:int=0, # Samples in a micro-batch. 0: 32 on a GPU, 8 on the CPU
    fp16:bool=False, # In mixed precision, on a GPU
    out:str='out/batchnorm.json' # The numbers of each epoch
):
    repeats,n,n_acc,bs = (v or d for v,d in zip((repeats,n,n_acc,bs), (10,4,8,32) if CUDA else (5,2,4,8)))
    arch,size = (models.resnet50,224) if CUDA else (models.resnet18,32)
    learn = learner(arch, size, n, n_acc*bs)
    if fp16 and CUDA: learn.to_fp16()
    runs = {'plain Learner, whole batch':None, f'MicroBatch({bs})':partial(MicroBatch, bs), "the same, sync_bn='stats'":partial(MicroBatch, bs, sync_bn='stats'),
            'the same, sync_bn=True, offload=None':partial(MicroBatch, bs, sync_bn=True, offload=None)}
    if CUDA: runs["the same, sync_bn=True, offload='cpu'"] = partial(MicroBatch, bs, sync_bn=True)
    res,lost = {k:[] for k in runs},[]
    for i in range(repeats+1):
        for k in random.sample(list(runs), len(runs)):
            if k in lost: continue
            r = measure(learn, runs[k])
            if r is None: lost.append(k)
            elif i: res[k].append((r[0]/n, r[1])) # the first warms up
    at = where() + (', mixed precision' if fp16 and CUDA else '')
    print(f'{at}\n{arch.__name__} on {size}x{size} pixels, batches of {n_acc}x{bs}, medians of {repeats} epochs of {n} batches each in random turn')
    base = f'MicroBatch({bs})'
    print(f'{"":40}{"ms a batch":>12}{f"times {base}":>20}{"times whole batch":>20}' + (f'{"peak MiB":>12}' if CUDA else ''))
    def times(k, than): return f'{ratio([s for s,_ in res[k]], [s for s,_ in res[than]]):.3f}' if res[k] and res[than] else '-'
    for k,v in res.items():
        if not v: print(f'{k:40}  does not fit into {torch.cuda.get_device_properties(0).total_memory/2**30:.0f} GiB'); continue
        print(f'{k:40}{1e3*median(s for s,_ in v):12.1f}{times(k, base):>20}{times(k, "plain Learner, whole batch"):>20}' + (f'{max(m for _,m in v)/2**20:12.0f}' if CUDA else ''))
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(where=at, arch=arch.__name__, size=size, n=n, n_acc=n_acc, bs=bs, runs=res, did_not_fit=lost), indent=1))
    print(f'numbers in {path}')
