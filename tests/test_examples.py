"The examples run and come to what they say; `make demo` runs the digits"
import importlib.util,os,re,subprocess,sys
import pytest
from pathlib import Path

examples = Path(__file__).parent.parent/'examples'
def output(*args, **env): return subprocess.run([sys.executable,'-W','ignore',*map(str, args)], env={**os.environ, 'OMP_NUM_THREADS':'1', **env}, capture_output=True, text=True, check=True).stdout

@pytest.fixture(scope='module')
def digits():
    spec = importlib.util.spec_from_file_location('digits', examples/'digits.py')
    mod = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mod)
    return mod

def test_digits(digits, tmp_path, monkeypatch, capsys):
    "On fewer digits: the demo's `AccumulateStep` is the real large batch in weights, steps and `lr_find`, the others are not"
    monkeypatch.setattr(digits, 'n_train', 157)
    digits.main(out=tmp_path/'digits.png', epochs=1, n_find=20)
    out = capsys.readouterr().out
    rows = {m[1].strip():[float(o) for o in m[2].split()] for m in re.finditer(r'^((?:real|bs=|plain) ?.{20,27}?)  +([\d.e+-]+(?: +[\d.e+-]+){7})$', out, re.M)}
    real,ours,ga,plain,own = rows.values()
    steps,off,sugg = 1,5,6
    assert list(rows)==['real bs=64', 'bs=4, AccumulateStep(16)', 'bs=4, GradientAccumulation(64)', 'plain bs=4', 'plain bs=4, lr/16'], out
    assert ours[off]<1e-4<1e-3<min(ga[off], plain[off], own[off]), out
    assert (ours[steps],ours[sugg])==(real[steps],real[sugg]) and ga[steps]!=real[steps], out
    assert (tmp_path/'digits.png').stat().st_size>10_000

def test_digits_plain(digits, tmp_path):
    "At the recipe's rate, a plain small batch is far worse"
    real,plain = (digits.train('', bs, None, bs, digits.lr, epochs=2, n_find=20, seed=42, path=tmp_path) for bs in (digits.bs_recipe,digits.micro))
    assert real.acc>0.8 and plain.valid>2*real.valid

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
