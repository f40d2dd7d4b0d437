"""Does the forecast of time hold? Digits trained to the same loss with steps of 4 samples up to 1024, each with the best of some learning rates: the time that this takes, beside what `micro_find` and the noise
scale, each measured once on a learner with other batches, say before. A perceptron, of whose steps most is not in the passes, and a convolutional net, of whose steps most is. One thread; all runs are
those of `MicroBatch` with the fastest size. Seconds are those of the process on its one thread, so that other programs beside it count little. The numbers go to a JSON file, which the page on the batch
size shows."""
import json,warnings
from common import *
from fastai_accum import AccumulateStep,MicroBatch
from fastai_accum import pace as pace_module
from fastai_accum.pace import *
from fastai_accum.patching import stand_in
from fastcore.script import call_parse
from sklearn.datasets import load_digits

X,Y = (tensor(o) for o in load_digits(return_X_y=True))
X,Y = X[:1453].float().view(-1,1,8,8)/16,Y[:1453]
SIZES,THAN = (4,16,64,256,1024),64
LRS = [2**(k/2) for k in range(-5, 1)]

def perceptron(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))
def conv(): return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 16, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(1024, 10))
PROBLEMS = dict(perceptron=perceptron, convolutional=conv)

class Digits:
    "Batches of `bs` digits in random order; an epoch is all of them 50 times, so that its end counts little and nearly all batches are full"
    def __init__(self, bs): self.bs = bs
    def __len__(self): return math.ceil(50*len(X)/self.bs)
    def __iter__(self): return ((X[i],Y[i]) for i in torch.cat([torch.randperm(len(X)) for _ in range(50)]).split(self.bs))

class Stop(Callback):
    "End the fit when the loss over each sixth digit is `loss` or less, or after `most` steps"
    order,run_valid = 100,False
    def __init__(self, loss, most): store_attr()
    def before_fit(self): self.steps = math.inf
    def after_batch(self):
        if self.loss is not None:
            with torch.no_grad():
                if F.cross_entropy(self.model(X[::6]), Y[::6])<=self.loss: self.steps = self.train_iter
        if self.steps<math.inf or self.train_iter>=self.most: raise CancelFitException

def learner(model, bs, *cbs, seed=0):
    set_seed(seed)
    return Learner(DataLoaders(Digits(bs), []), model(), loss_func=nn.CrossEntropyLoss(), opt_func=SGD, default_cbs=False, cbs=[TrainEvalCallback(),*cbs])

def steps(model, bs, lr, seed, loss, most):
    "Steps to the loss"
    learn = learner(model, bs, Stop(loss, most), seed=seed)
    learn.fit(1000, lr)
    return learn.stop.steps

def best(model, bs, loss, seeds):
    "The fewest steps with any learning rate, of each seed, and which rate it is"
    res = ([3000]*seeds,None)
    for lr in LRS:
        ns = []
        for s in range(seeds):
            ns.append(steps(model, bs, lr, s, loss, math.ceil(1.5*max(res[0]))))
            if sum(ns)>=sum(res[0]): break
        else: res = min(res, (ns,lr), key=lambda o: sum(o[0]))
    return res

def seconds(model, bs, lr, n, seed, micro):
    "Seconds of `n` steps in micro-batches of `micro`"
    learn = learner(model, bs, MicroBatch(micro), Stop(None, n), seed=seed)
    start = time.process_time()
    learn.fit(1000, lr)
    return time.process_time()-start

def problem(model, loss, seeds, turns):
    "The race of all sizes, and the forecast"
    with stand_in(pace_module, 'perf_counter', time.process_time): pace = learner(model, 256).micro_find(show_plot=False)
    race = {B:best(model, B, loss, seeds) for B in SIZES}
    n,lr = best(model, 32, loss, 1)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        found = learner(model, 4, AccumulateStep(8)).bs_find(n_it=n[0], lr=lr, tol=0, show_plot=False, pace=False)
    forecast = TimeToLoss(pace, found.noise_scale, found.interval, THAN, len(X))
    runs = {(B,s):partial(seconds, model, B, lr, ns[s], s, pace.fastest) for B,(ns,lr) in race.items() for s in range(seeds)}
    secs = {k:median(v) for k,v in interleaved(runs, turns, 1).items()}
    total = {B:sum(secs[B,s] for s in range(seeds))/seeds for B in SIZES}
    mean = {B:sum(race[B][0])/seeds for B in SIZES}
    t,lo,hi = forecast(np.array(SIZES))
    rows = [dict(batch_size=B, lr=race[B][1], steps=race[B][0], seconds=total[B], step_seconds=total[B]/mean[B], step_forecast=float(pace.step_time(B)),
                 measured=total[B]/total[THAN], forecast=float(t[i]), lower=float(lo[i]), upper=float(hi[i])) for i,B in enumerate(SIZES)]
    return dict(noise_scale=found.noise_scale, interval=found.interval, fastest_micro=pace.fastest, overhead=pace.overhead, throughput=pace.throughput, fastest=forecast.fastest, advice=forecast.advice(found.batch_size), rows=rows)

@call_parse
def main(
    loss:float=0.2, # The loss to come to
    seeds:int=3, # Runs of each size, from different weights
    turns:int=5, # How often each is timed, in turns of random order; medians count
    out:str='benchmarks/pace.json' # The numbers
):
    at,res = where(),{}
    for name,model in PROBLEMS.items():
        r = res[name] = problem(model, loss, seeds, turns)
        print(f"\n{name}: noise scale {r['noise_scale']:.1f}, between {r['interval'][0]:.1f} and {r['interval'][1]:.1f}; micro-batches of {r['fastest_micro']}; {r['advice']}")
        print(pd.DataFrame(r['rows']).drop(columns='steps').round(5).to_string(), flush=True)
    Path(out).write_text(json.dumps(dict(at=at, date=time.strftime('%Y-%m-%d'), loss=loss, than=THAN, problems=res), indent=1)+'\n')
