"What the fastai peers share"
from problem import *
from fastai.basics import *
from fastai.callback.all import *

class ScaledCPU(MixedPrecision):
    "fastai's own, but its scaler on the CPU, and no autocast, which leaves float64 as it is"
    def before_fit(self): self.autocast,self.learn.scaler,self.scales = torch.autocast('cpu', enabled=False),GradScaler('cpu'),L()

def learner(p, *cbs):
    "A `Learner` of `p`, with no bar and nothing printed; in float64 without `Recorder`, which knows float32 only"
    f32 = next(p.model.parameters()).dtype==torch.float32
    learn = Learner(DataLoaders(p.dl, p.valid), p.model, loss_func=p.loss, opt_func=lambda ps,lr: OptimWrapper(opt=p.optimizer(list(ps), lr)),
                    default_cbs=f32, cbs=[*([] if f32 else [TrainEvalCallback()]), *cbs, *([GradientClip(p.clip)] if p.clip else []), *([ScaledCPU()] if p.scaled else [])])
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def fit(learn, p):
    if p.one_cycle: learn.fit_one_cycle(p.epochs, p.lr)
    else: learn.fit(p.epochs, p.lr)

def row(cb, how='micro'):
    "A row of the table that adds `cb(p)` to the learner"
    make = lambda p: learner(p, *([] if p.how=='whole' else [cb(p)]))
    def find(p):
        with tempfile.TemporaryDirectory() as d:
            learn = make(p)
            learn.path = Path(d)
            return learn.lr_find(show_plot=False).valley
    return dict(train=lambda p: fit(make(p), p), how=how, find=find)
