"""Volumes of which two fit in memory: the data and the net of the tutorial on volumes, in batches of 32, in batches of 2, and in steps of 32 made from 2 at a time, over several seeds. Accuracy on
volumes not seen, how far weights are from the batch of 32 by the same seed, CPU seconds of a fit and peak memory. The numbers go to a JSON file; `tools/tables.py` makes the page's table from it."""
import json
from common import *
from microbatch import peak
from fastai_accum import AccumulateStep,MicroBatch
from fastcore.script import call_parse
from sklearn.datasets import load_digits

digits = tensor(load_digits().images).float()/16
ways = ['right','left','down','up']

def label(i): return ways[i%4]

def volume(i, noise=0.7):
    "Eight slices through which a digit moves in the way `label(i)`, under noise; scanners differ in contrast"
    rng = np.random.default_rng(i)
    digit,start,side = digits[rng.integers(len(digits))],rng.integers(2),rng.integers(9)
    path = range(start, start+8)
    if label(i) in ('left','up'): path = path[::-1]
    vol = tensor(rng.normal(0, noise, (1,8,16,16))).float()
    for d,p in enumerate(path):
        r,c = (side,p) if label(i) in ('right','left') else (p,side)
        vol[0,d,r:r+8,c:c+8] += digit
    return vol*np.exp(rng.normal())

def conv(ni, nf, norm): return nn.Sequential(nn.Conv3d(ni, nf, 3, stride=2, padding=1, bias=False), norm(nf), nn.ReLU())
def net(norm=nn.BatchNorm3d): return nn.Sequential(conv(1, 8, norm), conv(8, 16, norm), conv(16, 32, norm), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(32, 4))

n_train,n_valid,n_epoch,lr = 384,256,6,1e-2
group = partial(nn.GroupNorm, 4)

# label, samples at once, learning rate, callback, norm; which row it is compared with
ROWS = dict(large=('32 at once', 32, lr, None, nn.BatchNorm3d, 'large'), small=('2 at once, a step each', 2, lr, None, nn.BatchNorm3d, 'large'),
            small_lr=('2 at once, a step each, a quarter of the learning rate', 2, lr/4, None, nn.BatchNorm3d, 'large'),
            accumulate=('2 at once, `AccumulateStep(16)`', 2, lr, lambda: AccumulateStep(16), nn.BatchNorm3d, 'large'),
            stats=("2 at once, `AccumulateStep(16, sync_bn='stats')`", 2, lr, lambda: AccumulateStep(16, sync_bn='stats'), nn.BatchNorm3d, 'large'),
            exact=('2 at once, `MicroBatch(2, sync_bn=True)`', 32, lr, lambda: MicroBatch(2, sync_bn=True), nn.BatchNorm3d, 'large'),
            group=('GroupNorm, 32 at once', 32, lr, None, group, 'group'), group_accumulate=('GroupNorm, 2 at once, `AccumulateStep(16)`', 2, lr, lambda: AccumulateStep(16), group, 'group'))

def learner(vols, seed, bs, cb, norm):
    block = DataBlock((TransformBlock,CategoryBlock(vocab=ways)), get_x=lambda i: vols[i], get_y=label, splitter=IndexSplitter(range(len(vols)-n_valid, len(vols))))
    set_seed(seed)
    dls = block.dataloaders(range(len(vols)), bs=bs, val_bs=64, num_workers=0, device=DEVICE)
    learn = Learner(dls, net(norm), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=cb and cb())
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def no_validation(self): raise CancelValidException()
def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

def one(vols, seed, bs, lr, cb, norm):
    "Accuracy, weights and seconds of a fit"
    learn = learner(vols, seed, bs, cb, norm)
    sync()
    clock = time.perf_counter if CUDA else time.process_time # others may be at work on the CPU
    start = clock()
    learn.fit_one_cycle(n_epoch, lr)
    sync()
    return learn.recorder.values[-1][-1],weights(learn),clock()-start

def one64(vols, bs, lr, cb, norm):
    "The weights after the same in float64, which tells rounding from another run"
    learn = learner(vols, 0, bs, cb, norm)
    learn.remove_cb(Recorder) # knows no float64
    learn.loss_func = nn.CrossEntropyLoss()
    learn.model.double().register_forward_pre_hook(lambda _,xs: tuple(x.double() for x in xs))
    learn.fit_one_cycle(n_epoch, lr)
    return weights(learn)

def errs64(vols):
    "How far the rows that are exact are from the whole batch in float64"
    res = {k:(one64(vols, *ROWS[k][1:5]),one64(vols, *ROWS[ROWS[k][5]][1:5])) for k in ('exact','group_accumulate')}
    return {k:((a-b).norm()/b.norm()).item() for k,(a,b) in res.items()}

@call_parse
def main(
    n_seeds:int=5, # Runs of each
    out:str='benchmarks/volumes.json' # The numbers
):
    at,vols,rows = where(),[volume(i) for i in range(n_train+n_valid)],{k:dict(label=o[0], accuracy=[], err=[], secs=[]) for k,o in ROWS.items()}
    for seed in range(n_seeds):
        ran = {}
        for k,(_,*args,than) in ROWS.items():
            acc,ran[k],secs = one(vols, seed, *args)
            rows[k]['accuracy'].append(acc), rows[k]['secs'].append(secs)
            rows[k]['err'].append(((ran[k]-ran[than]).norm()/ran[than].norm()).item())
            print(f'{seed} {rows[k]["label"]:60} {acc:.3f} {rows[k]["err"][-1]:.1e} {secs:.1f} s', flush=True)
    for k,(_,bs,rate,cb,norm,_) in ROWS.items():
        rows[k]['peak_bytes'] = peak(lambda: learner(vols[-n_valid-64:], 0, bs, cb, norm).fit(1, rate, cbs=Callback(before_validate=no_validation)))
        print(f'{rows[k]["label"]:60} {rows[k]["peak_bytes"]/2**20:.3g} MiB')
    Path(out).write_text(json.dumps(dict(date=time.strftime('%Y-%m-%d'), where=at, n_train=n_train, n_valid=n_valid, n_epoch=n_epoch, n_seeds=n_seeds, rows=rows, err64=errs64(vols)), indent=1)+'\n')
