"""Samples and steps to the same validation loss: windows of one size, and windows that follow the noise scale, each at the best of several learning rates.

    python benchmarks/grow.py          # writes benchmarks/grow.json, which the page on growing windows shows
"""
import argparse,json,statistics,warnings
warnings.filterwarnings('ignore')
from pathlib import Path
from fastai.basics import *
from fastai_accum import *
from sklearn.datasets import load_digits

torch.set_num_threads(1)
BS,TARGET,MOST = 8,0.4,6 # samples in a micro-batch; the validation loss to come to; epochs at most
LRS = 0.2,0.4,0.8,1.6
x,y = load_digits(return_X_y=True)
x,y = tensor(x).float()/16,tensor(y)

class Reaches(Callback):
    "End the fit where the mean of the last four validation losses, one every 64 samples, is `TARGET`"
    order,run_valid = 60,False
    def before_fit(self): self.samples = self.steps = self.at = 0; self.losses,self.done,self.n = [],False,0
    def before_batch(self): self.n += len(self.y)
    def after_batch(self):
        self.samples,self.steps = self.n,self.steps+1
        if not self.learn.loss.isfinite(): raise CancelFitException
        if self.samples<self.at: return
        self.at = self.samples+64
        with torch.no_grad(): self.losses.append(F.cross_entropy(self.model(x[1453:]), y[1453:]).item())
        if len(self.losses)>=4 and statistics.mean(self.losses[-4:])<=TARGET:
            self.done = True
            raise CancelFitException

def run(cbs, lr, seed):
    "Samples and steps of a training, None if it does not come to the target"
    set_seed(seed)
    dls = DataLoaders(DataLoader(L(zip(x, y))[:1453], bs=BS, shuffle=True), [])
    model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=lr, cbs=[Reaches(),*cbs], default_cbs=False)
    learn.add_cb(TrainEvalCallback())
    learn.logger = noop
    learn.fit(MOST)
    r = learn.reaches
    return dict(samples=r.samples, steps=r.steps) if r.done else None

def best(make, seeds):
    "At the learning rates by which most runs arrive: the medians over `seeds`"
    res = []
    for lr in LRS:
        rs = [run(make(), lr, s) for s in seeds]
        if all(rs): res.append(dict(lr=lr, samples=statistics.median(r['samples'] for r in rs), steps=statistics.median(r['steps'] for r in rs)))
    return res

if __name__=='__main__':
    p = argparse.ArgumentParser()
    p.add_argument('--seeds', type=int, default=3)
    seeds = range(p.parse_args().seeds)
    ways = {f'n_step={n}':(lambda n=n: [AccumulateStep(n)]) for n in (2,4,8,32)}
    ways |= {f"'noise', lr_rule={r!r}":(lambda r=r: [AccumulateStep('noise', max_n_step=64, lr_rule=r),NoiseScale()]) for r in (None,'sqrt','linear')}
    out = {}
    for name,make in ways.items():
        out[name] = best(make, seeds)
        few = min(out[name], key=lambda r: r['samples'], default=None)
        print(name, few and {k:few[k] for k in ('lr','samples','steps')}, flush=True)
        (Path(__file__).parent/'grow.json').write_text(json.dumps(dict(bs=BS, target=TARGET, seeds=len(seeds), ways=out), indent=1)+'\n')
