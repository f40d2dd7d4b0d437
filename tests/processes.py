"Two processes with gloo on the CPU, for the cases of a test file, which is also what they run"
import os,subprocess,sys,time
from datetime import timedelta
import pytest
from common import *

pytest.importorskip('accelerate', reason='`distrib_ctx` needs accelerate: pip install accelerate')
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()): pytest.skip('torch without gloo', allow_module_level=True)
from accelerate.utils import DistributedDataParallelKwargs
from fastai.distributed import DistributedDL

WORLD,LIMIT = 2,120

def work_on(cases, work):
    "In each of the processes: save what `work(case)` returns for each of `cases`"
    rank,path = int(sys.argv[1]),Path(sys.argv[2])
    def _broadcast(self, t, rank):
        t = LongTensor(t)
        torch.distributed.broadcast(t, rank)
        return t.tolist()
    DistributedDL._broadcast = _broadcast # fastai's own goes through `.cuda()`
    default_device(False)
    torch.distributed.init_process_group('gloo', init_method=f'file://{path}/store', rank=rank, world_size=WORLD, timeout=timedelta(seconds=20))
    for i,(name,c) in enumerate(cases.items()):
        print(name, flush=True)
        torch.save(work(c), path/f'{i}.{rank}.part')
        (path/f'{i}.{rank}.part').rename(path/f'{i}.{rank}')
    torch.distributed.destroy_process_group()

def in_two(file, path, cases):
    "Run `file` in two processes that meet in `path`; a function of a case's name that returns what each of them saved"
    env,ps = {**os.environ, 'WORLD_SIZE':str(WORLD), 'LOCAL_WORLD_SIZE':str(WORLD), 'OMP_NUM_THREADS':'1', 'PYTHONPATH':os.pathsep.join(sys.path), 'CUDA_VISIBLE_DEVICES':''},[]
    logs = [path/f'log{r}' for r in range(WORLD)]
    try:
        for r in range(WORLD):
            with open(logs[r], 'w') as f: ps.append(subprocess.Popen([sys.executable, '-W', 'ignore', file, str(r), str(path)], stdout=f, stderr=f, env={**env, 'RANK':str(r), 'LOCAL_RANK':str(r)}))
        end = time.time()+LIMIT
        while time.time()<end and all(p.poll() is None for p in ps): time.sleep(0.1)
        for p in ps:
            try: p.wait(max(0, min(5, end-time.time())))
            except subprocess.TimeoutExpired: pass
    finally:
        for p in ps: p.kill(); p.wait()
    def load(name):
        i = list(cases).index(name)
        if not all((path/f'{i}.{r}').exists() for r in range(WORLD)): pytest.fail(f'rank 0 and 1 ended with {[p.returncode for p in ps]}\n' + '\n'.join(f.read_text()[-2500:] for f in logs))
        return [torch.load(path/f'{i}.{r}', weights_only=False) for r in range(WORLD)]
    return load
