from problem import *
from ignite.engine import Events,create_supervised_trainer
from ignite.handlers import FastaiLRFinder

def trainer(p, opt):
    if p.clip: no('its supervised trainer has no clipping')
    t = create_supervised_trainer(p.model, opt, p.loss, 'cpu', gradient_accumulation_steps=p.n_acc, **dict(amp_mode='amp', scaler=GradScaler('cpu')) if p.scaled else {})
    if sched := p.schedule(opt): t.add_event_handler(Events.ITERATION_COMPLETED(every=p.n_acc), lambda: sched.step())
    return t

def train(p): trainer(p, p.optimizer()).run(p.dl, p.epochs)

def find(p):
    finder,opt = FastaiLRFinder(),p.optimizer()
    with finder.attach(trainer(p, opt), dict(model=p.model, optimizer=opt), num_iter=100, start_lr=1e-7) as t: t.run(p.dl)
    return finder.lr_suggestion()

serve('pytorch-ignite', ignite=dict(train=train, how='micro', find=find))
