"""Handwritten digits with a fully sharded model: each process has a part of the weights, and `bs * n_step * processes` samples make a step.

    torchrun --nproc_per_node 2 examples/fsdp.py

It trains for an epoch, saves, loads what was saved into another learner, and goes on; beside it, one that was not interrupted."""
import warnings
warnings.filterwarnings('ignore', message='`torch.jit.script` is deprecated') # fastai's imports call it
from fastai.vision.all import *
from fastai.distributed import *
from fastai_accum import AccumulateStep
from fastcore.script import call_parse
from sklearn.datasets import load_digits
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict,set_state_dict
from torch.distributed.fsdp import fully_shard

def on_cpu():
    "fastai sends the order of the samples from process to process by way of a GPU: without one, send it as it is"
    def _broadcast(self, t, rank):
        t = LongTensor(t)
        distributed.broadcast(t, rank)
        return t.tolist()
    DistributedDL._broadcast = _broadcast
    default_device(False)

class Block(Module):
    def __init__(self, n): self.norm,self.lin = nn.LayerNorm(n),nn.Linear(n, n)
    def forward(self, x): return x + F.gelu(self.lin(self.norm(x)))

def sharded(n=128, n_blocks=3):
    "A model of which each block is gathered when it is needed, and freed afterwards; the rest is a unit too"
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, n), *(Block(n) for _ in range(n_blocks)), nn.Linear(n, 10)).to(default_device())
    for m in model:
        if isinstance(m, Block): fully_shard(m)
    return fully_shard(model)

def learner(bs, n_step):
    set_seed(42)
    x,y = load_digits(return_X_y=True)
    items = L(zip(tensor(x).float().view(-1,1,8,8)/16, tensor(y)))
    dls = DataLoaders.from_dsets(items[:1408], items[1408:], bs=bs, val_bs=64, num_workers=0, device=default_device())
    dls.loaders = [DistributedDL(dl) for dl in dls.loaders] # to each process its part of the samples
    learn = Learner(dls, sharded(), loss_func=CrossEntropyLossFlat(), opt_func=partial(OptimWrapper, opt=torch.optim.AdamW), metrics=accuracy, cbs=AccumulateStep(n_step))
    if rank_distrib(): learn.remove_cb(ProgressCallback)
    return learn

def save(learn, path):
    "Each process writes its part of weights and optimizer state"
    model,opt = get_state_dict(learn.model, learn.opt.opt)
    checkpoint.save(dict(model=model, opt=opt), checkpoint_id=path)

def load(learn, path):
    "Each process reads its part; also in another number of processes"
    learn.create_opt()
    model,opt = get_state_dict(learn.model, learn.opt.opt)
    checkpoint.load(dict(model=model, opt=opt), checkpoint_id=path)
    set_state_dict(learn.model, learn.opt.opt, model_state_dict=model, optim_state_dict=opt)

def weights(learn):
    learn.model.reshard() # after validation, what is in no block is whole
    return torch.cat([p.full_tensor().flatten() for p in learn.model.parameters()])

@call_parse
def main(
    bs:int=8, # Samples in a micro-batch of one process
    n_step:int=4, # Micro-batches that make a step
    lr:float=1e-2,
    path:str=None # Where to save; a folder that all processes see
):
    torch.set_num_threads(1)
    if not torch.cuda.is_available(): on_cpu()
    distributed.init_process_group('nccl' if torch.cuda.is_available() else 'gloo')
    paths = [path or tempfile.mkdtemp()]
    distributed.broadcast_object_list(paths) # of the first process
    learn = learner(bs, n_step)
    with learn.no_bar(): learn.fit(1, lr)
    save(learn, paths[0])
    other = learner(bs, n_step)
    load(other, paths[0])
    for l in (learn,other):
        l.dls.train.dl.rng = random.Random(7) # the same order of samples
        with l.no_bar(): l.fit(1, lr)
    ws,n = weights(learn),distributed.get_world_size()
    off = (ws-weights(other)).abs().max().item()
    part = sum(p.to_local().numel() for p in learn.model.parameters())
    if not rank_distrib(): print(f'{bs}x{n_step}x{n} = {bs*n_step*n} samples a step, {part} of {ws.numel()} weights in a process, accuracy {other.recorder.values[-1][-1]:.3f}; '
                                 f'going on from what was saved is {off:.0e} off')
    distributed.destroy_process_group()
