from problem import *
from fastai_accum.loop import Accumulator

def train(p):
    "As `loop` of problem.py, without its division, and with what an epoch leaves over"
    opt = p.optimizer()
    sched = p.schedule(opt)
    acc = Accumulator(p.model, opt, p.loss, n_step=p.n_acc, scaler=GradScaler('cpu') if p.scaled else None, after_step=sched and sched.step,
                      before_step=(lambda: nn.utils.clip_grad_norm_(p.model.parameters(), p.clip)) if p.clip else None)
    p.model.train()
    for _ in range(p.epochs):
        with acc:
            for x,y in p.dl: acc.backward(p.model(x), y)

serve('fastai_accum', Accumulator=dict(train=train, how='micro', find=lambda p: no('a loop has none')))
