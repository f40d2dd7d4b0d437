"Two processes with gloo on the CPU, for the cases of a test file, which is also what they run"
import multiprocessing,os,runpy,sys,time
from datetime import timedelta
import pytest
from common import *

pytest.importorskip('accelerate', reason='`distrib_ctx` needs accelerate: pip install accelerate')
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()): pytest.skip('torch without gloo', allow_module_level=True)
from accelerate.utils import DistributedDataParallelKwargs
from fastai.distributed import DistributedDL

WORLD,LIMIT = 2,120
forks = multiprocessing.get_context('forkserver') # of a process that has only imported what takes long: without threads, and without what tests leave behind
forks.set_forkserver_preload(['fastai.vision.all','fastai.distributed','accelerate'])

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

def start(file, rank, path):
    "What `python file rank path` does, in a fork"
    log = os.open(path/f'log{rank}', os.O_CREAT|os.O_WRONLY)
    for out in (1,2): os.dup2(log, out)
    os.environ.update(WORLD_SIZE=str(WORLD), LOCAL_WORLD_SIZE=str(WORLD), RANK=str(rank), LOCAL_RANK=str(rank), CUDA_VISIBLE_DEVICES='')
    sys.argv = [file,str(rank),str(path)]
    runpy.run_path(file, run_name='__main__')

def in_two(file, path, cases):
    "Run `file` in two processes that meet in `path`; a function of a case's name that returns what each of them saved"
    ps = [forks.Process(target=start, args=(file, r, path)) for r in range(WORLD)]
    try:
        for p in ps: p.start()
        end = time.time()+LIMIT
        while time.time()<end and all(p.exitcode is None for p in ps): time.sleep(0.1)
        for p in ps: p.join(max(0, min(5, end-time.time())))
    finally:
        for p in ps: p.kill(); p.join()
    def load(name):
        i = list(cases).index(name)
        if not all((path/f'{i}.{r}').exists() for r in range(WORLD)): pytest.fail(f'rank 0 and 1 ended with {[p.exitcode for p in ps]}\n' + '\n'.join((path/f'log{r}').read_text()[-2500:] for r in range(WORLD)))
        return [torch.load(path/f'{i}.{r}', weights_only=False) for r in range(WORLD)]
    return load
