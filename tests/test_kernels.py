"The CUDA kernels of synchronized BatchNorm, written in Python with their rules about dtypes: what exact BatchNorm does with them is right, without a GPU"
import itertools
import pytest
from fastai_accum import batchnorm
from fastai_accum.batchnorm import joint_batch_norm
from common import *

f16,bf16,f32,f64 = torch.float16,torch.bfloat16,torch.float32,torch.float64
LOW = f16,bf16

# ---- as in PyTorch's aten/src/ATen/native/cuda/Normalization.cu and .cuh

def acc(dtype): return f64 if dtype is f64 else f32
def need(dtype, **ts):
    for k,t in ts.items():
        if t is not None and t.dtype!=dtype: raise RuntimeError(f'expected {k} to have type {dtype} but got {t.dtype}')
def dims(x): return [0,*range(2, x.ndim)]
def wide(t, x): return t.view(1, -1, *[1]*(x.ndim-2))

def batch_norm_stats(x, eps):
    v,m = torch.var_mean(x.to(acc(x.dtype)), dims(x), correction=0)
    return m,(v+eps).rsqrt()

def batch_norm_gather_stats_with_counts(like, means, invstds, running_mean, running_var, momentum, eps, counts):
    dtype = (like if running_mean is None else running_mean).dtype # `scalar_t`
    need(acc(dtype), mean=means, invstd=invstds)
    need(dtype, running_mean=running_mean, running_var=running_var, counts=counts)
    mean,var,n = torch.zeros_like(means[0]),torch.zeros_like(means[0]),0
    for m,i,c in zip(means, invstds, counts):
        total = n+c # in `scalar_t`, though `n` is an integer
        factor,k = 1/total.to(m.dtype),c.to(m.dtype)
        var = var + (i**-2-eps)*k + (mean-m)**2*n*k*factor
        mean = n*factor*mean + k*factor*m
        n = int(total) if total.isfinite() else 2**31-1
    if running_mean is not None:
        running_mean.copy_((1-momentum)*running_mean + momentum*mean)
        running_var.copy_((1-momentum)*running_var + momentum*var/(n-1))
    return mean,(var/n+eps).rsqrt()

def batch_norm_elemt(x, w, b, mean, invstd, eps):
    p = next((o.dtype for o in (w,b) if o is not None), x.dtype)
    dtype = x.dtype if p==x.dtype else acc(x.dtype)
    need(dtype, weight=w, bias=b)
    need(acc(dtype), mean=mean, invstd=invstd)
    y = (x.to(acc(x.dtype))-wide(mean, x))*wide(invstd, x)
    if w is not None: y = y*wide(w.to(y.dtype), x)
    return (y if b is None else y+wide(b.to(y.dtype), x)).to(x.dtype)

def batch_norm_backward_reduce(dy, x, mean, invstd, w, *_):
    need(dy.dtype, input=x)
    need(acc(x.dtype), mean=mean, invstd=invstd)
    d = dy.to(mean.dtype)
    return d.sum(dims(x)),(d*(x.to(mean.dtype)-wide(mean, x))).sum(dims(x)),None,None

def batch_norm_backward_elemt(dy, x, mean, invstd, w, dy_sum, dy_xmu_sum, count):
    need(dy.dtype, input=x)
    dtype = f32 if dy.dtype in LOW and mean.dtype==f32 else dy.dtype
    need(dtype, weight=w)
    need(acc(dtype), mean=mean, sum_dy=dy_sum, sum_dy_xmu=dy_xmu_sum)
    need(torch.int32, count=count)
    n,scale = int(count.sum()),invstd if w is None else invstd*w
    dx = dy.to(mean.dtype) - wide(dy_sum/n, x) - (x.to(mean.dtype)-wide(mean, x))*wide(invstd**2*dy_xmu_sum/n, x)
    return (dx*wide(scale, x)).to(x.dtype)

KERNELS = batch_norm_stats,batch_norm_gather_stats_with_counts,batch_norm_elemt,batch_norm_backward_reduce,batch_norm_backward_elemt
@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    "They stand for PyTorch's, and are used for tensors on the CPU"
    for f in KERNELS: monkeypatch.setattr(torch, f.__name__, f)
    monkeypatch.setattr(batchnorm, '_Plain', batchnorm._Cuda)

# ---- against all samples at once in float64

DTYPES = {'float64':(f64,f64), 'float32':(f32,f32), 'autocast to float16':(f16,f32), 'autocast to bfloat16':(bf16,f32), 'model.half()':(f16,f16), 'model.bfloat16()':(bf16,bf16)}
SIZES = {'small':((5,1,2),(3,17,19)), 'more values than float16 can count':((16,5,16,16,16),(2,33,31)), 'one value each':((1,1,1),(4,))}

def inputs(dtype, p_dtype, tracked, affine, ns, shape):
    g,c = torch.Generator().manual_seed(0),shape[0]
    def rand(*s): return torch.randn(*s, generator=g, dtype=f64)
    xs,dys = [[(rand(n, *shape)*a+b).to(dtype) for n in ns] for a,b in ((2,1),(1,0))]
    running = [o.to(p_dtype) for o in (rand(c),rand(c).abs())] if tracked else [None,None]
    return xs,dys,running,[rand(c).to(p_dtype).requires_grad_() for _ in range(2)] if affine else [None,None]

def run_norm(f, xs, dys, running, affine):
    "Outputs, running statistics and gradients"
    xs,affine = [x.detach().requires_grad_() for x in xs],[o for o in affine if o is not None]
    ys = f(xs, *running, *(affine or (None,None)))
    return torch.cat([*ys]).detach(),running,torch.autograd.grad(ys, [*xs,*affine], dys)

def at_once(xs, *args): return F.batch_norm(torch.cat(xs), *args, training=True).split([len(x) for x in xs])
def to64(o): return None if o is None else o.detach().clone().double().requires_grad_(o.requires_grad)

@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('o', DTYPES)
def test_kernels(o, size):
    "No farther from float64 than a rounding or two of the results"
    dtype,p_dtype = DTYPES[o]
    for tracked,affine in itertools.product((True,False), repeat=2):
        xs,dys,running,wb = inputs(dtype, p_dtype, tracked, affine, *SIZES[size])
        whole,r64,g64 = run_norm(at_once, *([to64(t) for t in ts] for ts in (xs,dys,running,wb)))
        ys,r,gs = run_norm(joint_batch_norm, xs, dys, running, wb)
        eps,p_eps = (2*max(torch.finfo(d).eps, 1e-6 if d is f32 else 1e-13) for d in (dtype,p_dtype))
        n = len(xs)
        assert ys.dtype==dtype and {g.dtype for g in gs[n:]}<={p_dtype}
        assert rel(whole, ys) < eps and rel(flat(g64[:n]), flat(gs[:n])) < (20*eps if size=='one value each' else eps)
        for a,b in zip((*g64[n:],*r64), (*gs[n:],*r)): assert a is b is None or rel(a, b) < max(p_eps, eps if p_dtype!=dtype and size=='one value each' else 0)

@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('o', DTYPES)
def test_statistics(o, size):
    "Mean and standard deviation are those of float32, or float64, whatever running statistics are kept in"
    dtype,p_dtype = DTYPES[o]
    for tracked in (True,False):
        xs,_,running,_ = inputs(dtype, p_dtype, tracked, False, *SIZES[size])
        mean,invstd = batchnorm._Cuda.stats(xs, 1e-5, *running, 0.1)
        x = torch.cat(xs).double()
        assert mean.dtype==invstd.dtype==acc(dtype)
        v,m = torch.var_mean(x, dims(x), correction=0)
        assert rel(m, mean) < (1e-13 if dtype is f64 else 1e-6) and rel((v+1e-5).rsqrt(), invstd) < (1e-13 if dtype is f64 else 1e-6)
