"What users install is what is here"
import json,subprocess,sys,tarfile,zipfile
import pytest
from configparser import ConfigParser
from email import message_from_string
from pathlib import Path
from fastai_accum import __version__

root = Path(__file__).parent.parent

@pytest.fixture(scope='module')
def dists(tmp_path_factory):
    "A wheel and an sdist, from a copy of what git has so that nothing else gets in"
    src,out = tmp_path_factory.mktemp('src'),tmp_path_factory.mktemp('dist')
    for f in subprocess.check_output(['git','ls-files','-z','--cached','--others','--exclude-standard'], cwd=root, text=True).split('\0'):
        if f and (root/f).is_file(): (src/f).parent.mkdir(parents=True, exist_ok=True); (src/f).write_bytes((root/f).read_bytes())
    subprocess.run([sys.executable,'-m','build','--no-isolation','-o',out,src], check=True, capture_output=True, text=True)
    return {f.name.split('.')[-1]:f for f in out.iterdir()}

def modules(): return {f'fastai_accum/{f.name}' for f in (root/'fastai_accum').glob('*.py')}

def test_wheel(dists):
    z = zipfile.ZipFile(dists['whl'])
    names = {n for n in z.namelist() if 'dist-info' not in n}
    assert names==modules()
    info = {n.split('/')[-1]:z.read(n).decode() for n in z.namelist() if 'dist-info' in n}
    meta,cfg = message_from_string(info['METADATA']),ConfigParser()
    cfg.read(root/'settings.ini')
    cfg = cfg['DEFAULT']
    assert meta['Version']==__version__ and meta['Name']==cfg['lib_name'] and meta['Summary']==cfg['description']
    assert [r for r in meta.get_all('Requires-Dist') if 'extra' not in r]==cfg['requirements'].split()
    assert meta['Requires-Python']==f">={cfg['min_python']}" and meta['License-Expression']==cfg['license']
    assert (root/'README.md').read_text().strip() in info['METADATA'] and 'fastai_accum._modidx:d' in info['entry_points.txt']

def test_sdist_builds_the_same(dists, tmp_path):
    tarfile.open(dists['gz']).extractall(tmp_path, filter='data')
    src, = tmp_path.iterdir()
    assert all((src/f).is_file() for f in modules()|{'settings.ini','setup.py','pyproject.toml','LICENSE','README.md','CHANGELOG.md','CONTRIBUTING.md'})
    subprocess.run([sys.executable,'-m','build','--no-isolation','--wheel','-o',tmp_path/'again',src], check=True, capture_output=True)
    again, = (tmp_path/'again').iterdir()
    assert zipfile.ZipFile(again).namelist()==zipfile.ZipFile(dists['whl']).namelist()

NO_FASTAI = """
import importlib.metadata as meta,sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0]=='fastai': raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Block())
_version = meta.version
def version(name):
    if name=='fastai': raise meta.PackageNotFoundError(name)
    return _version(name)
meta.version = version
"""
FORKS = """
import json,os,sys,tempfile,traceback
def forked(code):
    "What `code` ends with, and what it writes to stderr, in a fork that has torch imported and nothing of this package"
    with tempfile.TemporaryFile('w+') as f:
        if not (pid := os.fork()):
            os.dup2(f.fileno(), 2)
            try: exec(code, {})
            except BaseException: traceback.print_exc(); os._exit(1)
            os._exit(0)
        end = os.waitpid(pid, 0)[1]
        f.seek(0)
        return end,f.read()
import torch
assert not any(m.split('.')[0] in ('fastai','fastai_accum') for m in sys.modules)
print('\\n'+json.dumps([forked(c) for c in json.loads(sys.argv[1])]))
"""
def python(*codes, first=''):
    "Run each of `codes` in a process of its own: how it ended, and its stderr"
    res = subprocess.run([sys.executable,'-W','ignore','-c',first+FORKS,json.dumps(codes)], capture_output=True, text=True, cwd=root)
    assert not res.returncode, res.stderr
    return dict(zip(codes, json.loads(res.stdout.split('\n')[-2])))

WITHOUT = """
import fastai_accum,sys
from fastai_accum import loop,losses,window,AccumulateOptimizer
import fastai_accum.split
assert not hasattr(fastai_accum, 'nonsense') and fastai_accum.__version__
assert not any(m.split('.')[0]=='fastai' for m in sys.modules)
"""
NEEDS = ('from fastai_accum import AccumulateStep', 'import fastai_accum; fastai_accum.MicroBatch', 'from fastai_accum import NoiseScale', 'from fastai_accum import AccumulationCheck',
         'from fastai_accum import counts_elements', 'from fastai_accum import *')

@pytest.fixture(scope='module')
def without_fastai(): return python(WITHOUT, *NEEDS, first=NO_FASTAI)

def test_without_fastai(without_fastai):
    "The package and what is for loops without fastai can be imported, and bring nothing of it"
    end,err = without_fastai[WITHOUT]
    assert not end, err

@pytest.mark.parametrize('code', NEEDS)
def test_needs_fastai(code, without_fastai):
    "Without fastai, what needs it says what to install when it is asked for"
    end,err = without_fastai[code]
    assert end and 'ImportError: fastai_accum extends fastai, which is not installed' in err and '`pip install fastai`' in err

OLD = {'2.7.18':'2.7.19', '2.6.3':'2.7.19', '2.0.0':'2.7.19', '1.0.60':'1.0.61'}
FASTAI_IS = """
import importlib.metadata as meta
_version = meta.version
meta.version = lambda name: '{}' if name=='fastai' else _version(name)
import fastai_accum
"""

@pytest.fixture(scope='module')
def versions(): return python(*(FASTAI_IS.format(v) for v in (*OLD,'2.7.19','2.10.0')))

@pytest.mark.parametrize('old', OLD)
def test_old_fastai(old, versions):
    "A fastai older than those that are tested is refused as the package is imported"
    end,err = versions[FASTAI_IS.format(old)]
    assert end and f"ImportError: fastai_accum needs fastai {OLD[old]} or later, and fastai {old} is installed: `pip install 'fastai>={OLD[old]}'`" in err

@pytest.mark.parametrize('v', ('2.7.19','2.10.0'))
def test_fastai_is_recent(v, versions):
    "The oldest that is tested is not refused, nor is one with a number of two digits"
    end,err = versions[FASTAI_IS.format(v)]
    assert not end, err

NAMES = 'AccumulateOptimizer AccumulateStep MicroBatch NoiseScale SkipNaN AccumulationCheck counts_elements'.split()
SAME = f"import fastai_accum as f; assert f.__all__=={NAMES} and all(k in vars(f) for k in f.__all__) and '__getattr__' not in vars(f)"
ROOMS = "import fastai_accum,sys; assert 'fastai_accum.fastai1' not in sys.modules and 'fastai_accum.accumulate' in sys.modules"

def test_with_fastai():
    "All names are there as soon as the package is imported, and with fastai 2 the room of fastai 1 is not entered"
    for end,err in python(f'{SAME}\n{ROOMS}').values(): assert not end, err
