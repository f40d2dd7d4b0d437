import logging
from problem import *
import lightning as L
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.tuner import Tuner

logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)

class Module(L.LightningModule):
    def __init__(self, p):
        super().__init__()
        self.p,self.model,self.lr = [p],p.model,p.lr
    def training_step(self, batch, i): return self.p[0].loss(self.model(batch[0]), batch[1])
    def configure_optimizers(self):
        opt = self.p[0].optimizer(lr=self.lr)
        if not self.p[0].one_cycle: return opt
        return dict(optimizer=opt, lr_scheduler=dict(scheduler=self.p[0].schedule(opt, self.trainer.estimated_stepping_batches), interval='step'))

def trainer(p):
    return L.Trainer(accelerator='cpu', devices=1, max_epochs=p.epochs, accumulate_grad_batches=p.n_acc, gradient_clip_val=p.clip,
                     plugins=[MixedPrecision('16-mixed', 'cpu', GradScaler('cpu'))] if p.scaled else None,
                     logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)

def find(p):
    with tempfile.TemporaryDirectory() as d:
        t = trainer(p)
        t._default_root_dir = d
        return Tuner(t).lr_find(Module(p), p.dl, max_lr=10.).suggestion()

serve('lightning', lightning=dict(train=lambda p: trainer(p).fit(Module(p), p.dl), how='micro', find=find))
