import logging
from problem import *
from composer import ComposerModel,DataSpec,Trainer
from composer.algorithms import GradientClipping

logging.disable(logging.WARNING)

class Module(ComposerModel):
    def __init__(self, p):
        super().__init__()
        self.p,self.module = [p],p.model
    def forward(self, batch): return self.module(batch[0])
    def loss(self, out, batch): return self.p[0].loss(out, batch[1])

def train(p):
    if p.scaled: no('its amp_fp16 is not supported for CPU training')
    opt = p.optimizer()
    ignores = bool((p.y<0).any()) # then it is told to weigh by the targets that count
    Trainer(model=Module(p), train_dataloader=DataSpec(p.dl, get_num_tokens_in_batch=lambda b: int((b[1]!=-100).sum())) if ignores else p.dl, optimizers=opt, max_duration=f'{p.epochs}ep', device='cpu',
            precision='fp32', device_train_microbatch_size=p.micro or p.bs, accumulate_train_batch_on_tokens=ignores,
            algorithms=[GradientClipping('norm', p.clip)] if p.clip else None, schedulers=p.schedule(opt), step_schedulers_every_batch=True if p.one_cycle else None, progress_bar=False).fit()

serve('mosaicml', composer=dict(train=train, how='split', find=lambda p: no('it has none')))
