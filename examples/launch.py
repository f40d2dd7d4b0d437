"""Handwritten digits on several GPUs, with accumulation in each: the effective batch is `bs * n_step * processes`.

    accelerate launch --num_processes 2 examples/launch.py
    ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 examples/launch.py   # to try it without a GPU

In your own code it is two lines: the callback, and `with learn.distrib_ctx(): learn.fit(...)`."""
import warnings
warnings.filterwarnings('ignore', message='`torch.jit.script` is deprecated') # fastai's imports call it
from fastai.vision.all import *
from fastai.distributed import *
from fastai_accum import AccumulateStep
from fastcore.script import call_parse
from sklearn.datasets import load_digits

def on_cpu():
    "fastai sends the order of the samples from process to process by way of a GPU: without one, send it as it is"
    def _broadcast(self, t, rank):
        t = LongTensor(t)
        torch.distributed.broadcast(t, rank)
        return t.tolist()
    DistributedDL._broadcast = _broadcast
    default_device(False)

@call_parse
def main(
    bs:int=8, # Samples in a micro-batch of one process
    n_step:int=4, # Micro-batches that make a step
    n_epoch:int=5,
    lr:float=1e-2 # Highest learning rate of one cycle
):
    torch.set_num_threads(1)
    if not torch.cuda.is_available(): on_cpu()
    set_seed(42)
    x,y = load_digits(return_X_y=True)
    x,y = tensor(x).float().view(-1,1,8,8)/16,tensor(y)
    train,valid = [[(x[i],y[i]) for i in o] for o in torch.randperm(len(x)).split([1453, len(x)-1453])]
    dls = DataLoaders.from_dsets(train, valid, bs=bs, drop_last=False, num_workers=0, device=default_device())
    conv = partial(ConvLayer, norm_type=None)
    model = nn.Sequential(conv(1, 16, stride=2), conv(16, 32, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=AccumulateStep(n_step), path=Path(tempfile.mkdtemp()))
    with learn.distrib_ctx(): learn.fit_one_cycle(n_epoch, lr)
    if not rank_distrib():
        n = num_distrib() or 1
        print(f'{len(learn.recorder.losses)} steps of {bs}x{n_step}x{n} = {bs*n_step*n} samples, accuracy {learn.recorder.values[-1][-1]:.3f}')
