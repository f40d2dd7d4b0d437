"`make gpu` without a GPU: its benchmark runs in tiny sizes, and its numbers make the page"
import copy,json,os,subprocess,sys
import pytest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
from tables import gpu,main

def run(*args): return subprocess.run([sys.executable,'-W','ignore',*map(str, args)], cwd=ROOT, capture_output=True, text=True,
                                      env={**os.environ, 'OMP_NUM_THREADS':'1', 'MPLBACKEND':'agg', 'PYTHONPATH':str(ROOT), 'CUDA_VISIBLE_DEVICES':''})

@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    d = tmp_path_factory.mktemp('gpu')
    done = run('benchmarks/gpu.py', '--tiny', '--out', d/'gpu.json', '--picture', d/'gpu.png')
    assert not done.returncode, done.stdout+done.stderr
    assert 'nothing failed' in done.stdout and (d/'gpu.png').stat().st_size>1000
    return json.loads((d/'gpu.json').read_text())

@pytest.fixture
def full(tiny): return {**copy.deepcopy(tiny), 'tiny':False, 'gpu':True}

def test_tiny(tiny):
    "All parts run, and what can't be measured on the CPU is not said to be"
    assert list(tiny['parts'])=='kernels waits memory auto parity times exact long throughput'.split()
    assert all(p['rows'] and all(len(r)==len(p['head']) for r in p['rows']) and 'error' not in p for p in tiny['parts'].values())
    ok = {k:{w['ok'] for w in p['wanted']} for k,p in tiny['parts'].items()}
    assert ok.pop('kernels')=={True} and ok.pop('long')=={True,None} and ok.pop('throughput')==set() and all(v=={None} for v in ok.values())
    assert gpu(tiny).startswith('Tiny sizes') and '**missed**' not in gpu(tiny)

def test_refused(tiny, tmp_path):
    "Tiny sizes do not get to the page, nor does a CPU pass for a GPU"
    for k in (dict(tiny=False),dict(gpu=True)):
        (tmp_path/'gpu.json').write_text(json.dumps({**tiny, **k}))
        with pytest.raises(SystemExit, match='has tiny sizes, or was made without a GPU'): main(check=True, gpu_numbers=tmp_path/'gpu.json')

def test_page(full, tmp_path):
    "The page has what the numbers say: bounds that are held and missed, parts that failed, and nothing where there are none"
    full['parts']['memory']['wanted'][0].update(value=1.04, ok=False)
    full['parts']['times'] = dict(title='Time', error='RuntimeError: made up')
    page = gpu(full)
    assert '| 1.04 | 1.03 | **missed** |' in page and 'It failed: RuntimeError: made up' in page and 'these parts failed: times.' in page
    n = [w['ok'] for k,p in full['parts'].items() for w in p.get('wanted', ())]
    assert f"{n.count(True)} of {len(n)} bounds held" in page
    (tmp_path/'gpu.json').write_text(json.dumps(full))
    with pytest.raises(SystemExit, match=r'are not those of .*gpu\.json'): main(check=True, gpu_numbers=tmp_path/'gpu.json')
    assert 'None of this is measured yet' in gpu(None)
    main(check=True)

FAILS = """
import sys
sys.path.insert(0, 'benchmarks')
import gpu
out = sys.argv[1]
def ends(**kwargs):
    try: gpu.main(out=f'{out}/gpu.json', picture=f'{out}/gpu.png', **kwargs)
    except SystemExit as e: print('ended:', e.code)
ends()
ends(tiny=True, only='wait')
gpu.PARTS = dict(a=lambda s: 1/0, b=gpu.throughput)
ends(tiny=True)
gpu.PARTS['a'] = lambda s: (['x'], [[1]], [gpu.want('x', 2, 1), gpu.want('y', float('inf'), 1), gpu.want('z', None, 1)])
ends(tiny=True, only='a')
"""
def test_fails(tmp_path):
    "Without a GPU nothing is measured; a part that fails is noted and does not end the others, and the command fails, as it does for a bound that is missed"
    said = run('-c', FAILS, tmp_path).stdout
    ends = [l for l in said.splitlines() if l.startswith('ended:')]
    assert ends[0].startswith('ended: There is no GPU here') and "there is no part 'wait'" in ends[1] and ends[2:]==['ended: True']*2
    assert 'It failed: ZeroDivisionError' in said and "failed or not as wanted: ['a']" in said
    parts = json.loads((tmp_path/'gpu.json').read_text())['parts']
    assert [w['ok'] for w in parts['a']['wanted']]==[False,False,None] and parts['b']['rows'] # which was not measured again
