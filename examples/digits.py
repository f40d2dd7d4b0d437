"""Handwritten digits and a recipe for them: batches of 64, SGD with momentum, three epochs of `fit_one_cycle` at a learning rate of 0.3. It is trained as it stands, and as if only 4 digits fitted on
the device: with `AccumulateStep`, with fastai's own `GradientAccumulation`, with a plain `bs=4`, and with a plain `bs=4` at a learning rate of its own. Prints what each run did, and
draws their losses and `lr_find` curves.

In your own code it is one callback: `Learner(dls, model, cbs=AccumulateStep(n_step=16))`."""
import tempfile,time,warnings,matplotlib
matplotlib.use('Agg')
warnings.filterwarnings('ignore', message='`torch.jit.script` is deprecated') # fastai's imports call it
import matplotlib.pyplot as plt
from fastai.basics import *
from fastai.callback.all import *
from fastai_accum import AccumulateStep
from fastcore.script import call_parse
from sklearn.datasets import load_digits

bs_recipe,micro,lr = 64,4,0.3 # of 0.1, 0.2, ... 0.5 and 0.7, 0.3 and 0.4 are the best for `bs=64`
n_train = 1453 # of 1797: with `bs=4` the last micro-batch is smaller than the others, with 16 to a step the last window is shorter
assert n_train%micro and math.ceil(n_train/micro)%(bs_recipe//micro)
torch.set_num_threads(1) # quicker than more for so small a net

def loaders(bs):
    x,y = load_digits(return_X_y=True)
    x,y = tensor(x).float().view(-1,1,8,8)/16,tensor(y)
    idxs = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train,valid = [[(x[i],y[i]) for i in o] for o in (idxs[:n_train],idxs[n_train:])]
    # fastai would leave out the last, smaller batch of every epoch: `drop_last=False` keeps it
    return DataLoaders.from_dsets(train, valid, bs=bs, drop_last=False, num_workers=0, device=torch.device('cpu'))

def net():
    "A small convnet; no BatchNorm and no dropout, so what it makes of a sample doesn't depend on the others in the batch"
    conv = partial(ConvLayer, stride=2, norm_type=None, act_cls=nn.GELU) # smooth: the kink of a ReLU can magnify float32's rounding
    return nn.Sequential(conv(1, 16), conv(16, 32), Flatten(), nn.Linear(128, 10))

def weights(learn): return nn.utils.parameters_to_vector(learn.model.parameters()).detach().clone()

class StepCount(Callback):
    "Count the optimizer's steps in a fit"
    def before_fit(self): self.n = 0
    def after_step(self): self.n += 1

def train(
    name:str, # What the table calls the run
    bs:int, # Samples that the model sees at once
    cbs, # What accumulates, if anything does
    every:int, # Samples in each loss that it records
    lr:float, # The learning rate to fit with
    epochs:int, # How long to fit
    n_find:int, # Steps of `lr_find`
    seed:int, # Of the weights and of the order of samples
    path:str # Where `lr_find` may put its temporary files
):
    "`lr_find`, then `fit_one_cycle`, from the same weights and with the samples in the same order whatever `bs` is"
    set_seed(seed, reproducible=True)
    learn = Learner(loaders(bs), net(), loss_func=CrossEntropyLossFlat(), opt_func=partial(SGD, mom=0.9), metrics=accuracy, cbs=cbs, path=path).add_cb(StepCount())
    rec,w = learn.recorder,weights(learn)
    with learn.no_bar(), learn.no_logging():
        lr_sugg = learn.lr_find(num_it=n_find, show_plot=False).valley
        lrs,find = tensor(rec.lrs[:-5]),tensor(rec.losses[:-5]) # now, as the fit starts a new record; fastai's plot omits the last 5 too
        learn.dls.train.rng.seed(seed) # `lr_find` has shuffled once an epoch, so more often with large batches
        rec.smooth_loss.beta **= every/bs_recipe # a running mean over as many samples, whatever a record is of
        start = time.time()
        learn.fit_one_cycle(epochs, lr)
    secs,(loss,valid,acc) = time.time()-start,rec.values[-1]
    return SimpleNamespace(name=name, steps=learn.step_count.n, lr_sugg=lr_sugg, loss=loss, valid=valid, acc=acc, secs=secs, lr=lr, lrs=lrs,
                           find=find, losses=tensor(rec.losses), w=weights(learn), moved=(weights(learn)-w).abs().max())

def apart(a, b):
    "Largest difference of two records, as far as both go"
    n = min(len(a), len(b))
    return float((a[:n]-b[:n]).abs().max())

def report(runs):
    real,acc,ga,*_ = runs
    print(f"{'run':<30}{'lr':>8}{'steps':>7}{'train loss':>12}{'valid loss':>12}{'accuracy':>10}{'weights off by':>16}{'lr_find':>10}{'seconds':>9}")
    for r in runs: print(f'{r.name:<30}{r.lr:>8.2g}{r.steps:>7}{r.loss:>12.5f}{r.valid:>12.5f}{r.acc:>10.4f}{apart(r.w, real.w):>16.1e}{r.lr_sugg:>10.1e}{r.secs:>9.1f}')
    print(f"""
'weights off by' is the largest difference of any weight from the {real.name}, whose own weights moved by up to {real.moved:.2f}.
'lr_find' is the learning rate that it suggests. 'seconds' is the fit alone.

{acc.name} made {acc.steps} steps to the {real.steps} of the {real.name}: its recorded losses are at most
{apart(acc.losses, real.losses):.0e} from the real ones in the fit, and {apart(acc.find, real.find):.0e} in lr_find.
{ga.name} made {ga.steps} steps, with schedules that count micro-batches, and was suggested {ga.lr_sugg/real.lr_sugg:.1f} times the real learning rate.
The last row is another recipe: a small batch with a learning rate of its own can do as well or better.""")

def draw(runs, epochs, out):
    plt.rc('axes.spines', top=False, right=False), plt.rc('legend', frameon=False)
    styles = [dict(c='#56b4e9', lw=7), dict(c='black', lw=1.5, ls=(0,(3,2)), zorder=5), dict(c='#d55e00', lw=1.5), dict(c='#009e73', lw=1.5, ls='-.')]
    fig,(a,b) = plt.subplots(1, 2, figsize=(11,4.4), layout='constrained')
    for r,s in zip(runs, styles):
        a.plot(torch.arange(1, len(r.losses)+1)*n_train*epochs/len(r.losses), r.losses, label=r.name, **s)
        b.plot(r.lrs, r.find, label=f'{r.name}: {r.lr_sugg:.1e}', **s)
        b.plot(r.lr_sugg, np.interp(r.lr_sugg, r.lrs, r.find), 'o', c=s['c'], ms=s['lw']+6, mec='white', zorder=6)
    a.set(title=f'fit_one_cycle({epochs}, {runs[0].lr})', xlabel='samples seen', ylabel='recorded loss, a running mean', ylim=(0,3))
    b.set(title='lr_find and the learning rate it suggests (dots)', xlabel='learning rate', ylabel='recorded loss', xscale='log', ylim=(2.15,2.45))
    a.legend(), b.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out, dpi=90)
    print(f'\n{out}')

@call_parse
def main(
    out:Path=Path(__file__).resolve().parents[1]/'out'/'digits.png', # Where to put the picture
    epochs:int=3, # How long to fit each run
    n_find:int=100, # Steps of `lr_find`
    seed:int=42 # Of the weights and of the order of samples
):
    "Train five times, print a table, draw a picture"
    n_step = bs_recipe//micro
    with tempfile.TemporaryDirectory() as path:
        runs = [train(name, b, cbs, every, rate, epochs, n_find, seed, path) for name,b,cbs,every,rate in (
            (f'real bs={bs_recipe}', bs_recipe, None, bs_recipe, lr), (f'bs={micro}, AccumulateStep({n_step})', micro, AccumulateStep(n_step), bs_recipe, lr),
            (f'bs={micro}, GradientAccumulation({bs_recipe})', micro, GradientAccumulation(bs_recipe), micro, lr), (f'plain bs={micro}', micro, None, micro, lr),
            (f'plain bs={micro}, lr/{n_step}', micro, None, micro, lr/n_step))]
    report(runs)
    draw(runs, epochs, out)
