"The examples run and come to what they say; `make demo` runs the digits"
import importlib.util,os,re,subprocess,sys
import pytest
from pathlib import Path

examples = Path(__file__).parent.parent/'examples'
def output(*args, **env): return subprocess.run([sys.executable,'-W','ignore',*map(str, args)], env={**os.environ, 'OMP_NUM_THREADS':'1', **env}, capture_output=True, text=True, check=True).stdout

def test_launch():
    "Two processes make steps of twice the samples"
    out = output('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2, examples/'launch.py', '--n-epoch', 2, ACCELERATE_USE_CPU='1')
    steps,n,acc = re.search(r'(\d+) steps of 8x4x2 = (\d+) samples, accuracy (\S+)', out).groups()
    assert (int(steps),int(n))==(2*23,64) and float(acc)>0.5

def test_fsdp(tmp_path):
    "Two processes, each with half of the weights, make steps of twice the samples, and go on from what they saved"
    pytest.importorskip('torch.distributed.fsdp', reason='needs `fully_shard`').fully_shard
    out = output('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2, examples/'fsdp.py', '--path', tmp_path/'saved')
    n,part,whole,acc,off = re.search(r'= (\d+) samples a step, (\d+) of (\d+) weights in a process, accuracy (\S+); .* is (\S+) off', out).groups()
    assert int(n)==64 and int(part)==int(whole)/2 and float(acc)>0.8 and float(off)==0

@pytest.mark.skipif(not importlib.util.find_spec('transformers'), reason='needs transformers')
def test_huggingface():
    out = output(examples/'huggingface.py', '--n-epoch', 1)
    assert float(re.search(r'distance of the weights (\S+)', out)[1])<1e-5
