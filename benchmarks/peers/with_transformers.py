from problem import *
from torch.nn import functional as F
from transformers import PrinterCallback,Trainer,TrainingArguments

class Module(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p,self.model = [p],p.model
    def forward(self, x, labels=None):
        out = self.model(x)
        return dict(logits=out) if labels is None else dict(loss=self.p[0].loss(out, labels), logits=out)

class Peer(Trainer):
    def __init__(self, p, **kwargs):
        self.p,self.dir,opt = p,tempfile.TemporaryDirectory(),p.optimizer()
        args = TrainingArguments(self.dir.name, use_cpu=True, num_train_epochs=p.epochs, gradient_accumulation_steps=p.n_acc, max_grad_norm=p.clip or 0., fp16=p.scaled, lr_scheduler_type='constant',
                                 disable_tqdm=True, report_to='none', save_strategy='no', logging_strategy='no', remove_unused_columns=False)
        super().__init__(Module(p), args, train_dataset=p.data, optimizers=(opt, p.schedule(opt)), **kwargs)
        self.remove_callback(PrinterCallback)
    def get_train_dataloader(self):
        return self.accelerator.prepare(self.p.loader(self.p.data, collate_fn=lambda items: dict(zip(('x','labels'), map(torch.stack, zip(*items))))))

def by_items(outputs, labels, num_items_in_batch): return F.cross_entropy(outputs['logits'], labels, reduction='sum')/num_items_in_batch

def train(p, **kwargs):
    peer = Peer(p, **kwargs)
    if p.scaled and peer.accelerator.scaler is None: no('it makes no GradScaler on the CPU')
    peer.train()

def train_items(p): # it counts labels, which is not what a loss with class weights divides by
    train(p, **dict(compute_loss_func=by_items) if p.weight is None else {})

find = lambda p: no('it has none')
serve('transformers', trainer=dict(train=train, how='micro', find=find), loss_func=dict(train=train_items, how='micro', find=find))
