"""Train at the batch size that your method wants, on the memory that you have, and get *the same run* as if the large batch had fitted.
`AccumulateStep` makes one optimizer step from the gradients of several small batches.
`MicroBatch` keeps the dataloader's large batch, and splits it inside the step into pieces small enough to fit.
Weights, optimizer state, learning rates, recorded losses and `lr_find` are those of the large batch, to the last digits of floating point.
This also holds where batches are uneven, where windows do not divide the epoch, and where targets are ignored or weighted.
The page *Limits* lists the exceptions.
On newer NVIDIA GPUs, PyTorch computes convolutions in TF32 by default. Two runs then agree to the precision of TF32, about three digits."""

__version__ = "0.0.1"

from importlib.metadata import PackageNotFoundError,version as _version

try: _fastai = _version('fastai')
except PackageNotFoundError: _fastai = None

if _fastai is not None:
    from packaging.version import Version as _Version # which fastai brings
    _oldest = '1.0.61' if _fastai.startswith('1.') else '2.7.19'
    if _Version(_fastai)<_Version(_oldest):
        raise ImportError(f"fastai_accum needs fastai {_oldest} or later, and fastai {_fastai} is installed: `pip install 'fastai>={_oldest}'`")

from .optimizer import AccumulateOptimizer
__all__ = ['AccumulateOptimizer','AccumulateStep','MicroBatch']
if _fastai is None or not _fastai.startswith('1.'): __all__ += ['NoiseScale','SkipNaN','AccumulationCheck','counts_elements']

if _fastai is None: # for a loop of one's own, torch and fastcore are enough
    def __getattr__(name):
        if name not in __all__: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        raise ImportError(f"fastai_accum extends fastai, which is not installed, and `{name}` needs it: `pip install fastai`; "
                          "for a PyTorch loop without it there is `fastai_accum.loop`")
elif _fastai.startswith('1.'): from .fastai1 import AccumulateStep,MicroBatch
else:
    from .accumulate import AccumulateStep,counts_elements
    from .microbatch import MicroBatch
    from . import pace # `learn.micro_find()`, `MicroBatch('fast')`
    from .noise import NoiseScale
    from . import grow
    from .skipnan import SkipNaN
    from .check import AccumulationCheck
