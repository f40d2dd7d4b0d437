__version__ = "0.0.1"

from importlib.metadata import PackageNotFoundError,version

try: _fastai = version('fastai')
except PackageNotFoundError: raise ImportError("fastai_accum extends fastai, which is not installed: `pip install fastai`") from None
if _fastai.startswith('1.'): raise ImportError(f"fastai_accum needs fastai 2, and {_fastai} is installed: `pip install -U fastai`")

from .core import *
from .optimizer import *
from .callback import *
