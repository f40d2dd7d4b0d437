from problem import *
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from accelerate.state import AcceleratorState,GradientState,PartialState

def prepared(p):
    "As its guide, `Performing gradient accumulation`, has it; the schedule is made for steps already"
    for o in (AcceleratorState,GradientState,PartialState): o._reset_state()
    acc = Accelerator(cpu=True, mixed_precision='fp16' if p.scaled else 'no', gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=p.n_acc, adjust_scheduler=not p.one_cycle))
    if p.scaled and acc.scaler is None: no('it makes no GradScaler on the CPU')
    opt = p.optimizer()
    return acc,*acc.prepare(p.model, opt, p.dl, p.schedule(opt))

def accumulate(p):
    acc,model,opt,dl,sched = prepared(p)
    model.train()
    for _ in range(p.epochs):
        for x,y in dl:
            with acc.accumulate(model):
                acc.backward(p.loss(model(x), y))
                if p.clip and acc.sync_gradients: acc.clip_grad_norm_(model.parameters(), p.clip)
                opt.step()
                if sched: sched.step()
                opt.zero_grad()

def variable(p):
    "The guide's loop for `training samples of variable size`, which counts what the loss of a window divides by before it begins"
    acc,model,opt,dl,sched = prepared(p)
    loss_func = nn.CrossEntropyLoss(weight=p.weight, reduction='sum')
    model.train()
    for _ in range(p.epochs):
        it = iter(dl)
        for batches in iter(lambda: list(itertools.islice(it, p.n_acc)), []):
            num_items = sum(p.count(y) for _,y in batches)
            for x,y in batches: acc.backward(loss_func(model(x), y)*p.n_acc/num_items)
            if p.clip: acc.clip_grad_norm_(model.parameters(), p.clip)
            opt.step()
            if sched: sched.step()
            opt.zero_grad()

find = lambda p: no('it has none')
serve('accelerate', accumulate=dict(train=accumulate, how='micro', find=find), variable=dict(train=variable, how='micro', find=find))
