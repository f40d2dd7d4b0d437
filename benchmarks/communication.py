"All-reduces of two processes on the CPU for one epoch: `AccumulateStep` against fastai's `GradientAccumulation`, under `learn.distrib_ctx`"
import json,os,subprocess,sys,tempfile,time
from datetime import timedelta
from fastai.basics import *
from fastai.callback.all import *
from fastai.distributed import DistributedDL
from fastai_accum import AccumulateStep
from fastcore.script import call_parse
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

WORLD,LIMIT = 2,120 # processes, seconds

class Comm(Callback):
    "Bytes of every all-reduce: with this hook DDP's own go through `torch.distributed.all_reduce` too"
    order = 12
    def before_fit(self):
        self.log,self.steps,self.all_reduce = [],0,torch.distributed.all_reduce
        self.model.register_comm_hook(None, allreduce_hook)
        torch.distributed.all_reduce = self._count
    def before_train(self): self.n = len(self.dl)
    def after_step(self): self.steps += 1
    def after_fit(self): torch.distributed.all_reduce = self.all_reduce
    def _count(self, t, *args, **kwargs):
        self.log.append(t.nbytes)
        return self.all_reduce(t, *args, **kwargs)

def callbacks(n_acc, bs): return {'AccumulateStep':AccumulateStep(n_acc), "fastai's GradientAccumulation":GradientAccumulation(n_acc*bs)}

def work(rank, n_acc, bs, windows, path):
    "What each of the processes does"
    def _broadcast(self, t, rank):
        t = LongTensor(t)
        torch.distributed.broadcast(t, rank)
        return t.tolist()
    DistributedDL._broadcast = _broadcast # fastai's own goes through `.cuda()`
    default_device(False)
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{path}/store', rank=rank, world_size=WORLD, timeout=timedelta(seconds=30))
    items,rows = [(torch.randn(128), torch.tensor(i%10)) for i in range(WORLD*windows*n_acc*bs)],{}
    for name,cb in callbacks(n_acc, bs).items():
        model = nn.Sequential(nn.Linear(128,256), nn.ReLU(), nn.Linear(256,256), nn.ReLU(), nn.Linear(256,10))
        learn = Learner(DataLoaders(DataLoader(items, bs=bs), DataLoader(items[:bs*WORLD], bs=bs)), model, loss_func=CrossEntropyLossFlat(), opt_func=SGD, cbs=[cb, Comm()])
        learn.remove_cb(ProgressCallback)
        learn.logger = noop
        with learn.distrib_ctx(cpu=True): learn.fit(1, 1e-3)
        rows[name] = learn.comm.n,learn.comm.steps,len(learn.comm.log),sum(learn.comm.log)
    Path(f'{path}/{rank}.json').write_text(json.dumps(rows))
    torch.distributed.destroy_process_group()

@call_parse
def main(
    n_acc:int=4, # Micro-batches in a window
    bs:int=8, # Samples in a micro-batch of a process
    windows:int=25, # Windows in an epoch
    path:str='' # Where the two processes meet; they are the only ones to be told
):
    if path: return work(int(os.environ['RANK']), n_acc, bs, windows, path)
    env = {**os.environ, 'WORLD_SIZE':str(WORLD), 'LOCAL_WORLD_SIZE':str(WORLD), 'OMP_NUM_THREADS':'1', 'CUDA_VISIBLE_DEVICES':''}
    with tempfile.TemporaryDirectory() as path:
        cmd = [sys.executable, '-W', 'ignore', __file__, '--n-acc', str(n_acc), '--bs', str(bs), '--windows', str(windows), '--path', path]
        ps,end = [subprocess.Popen(cmd, env={**env, 'RANK':str(r), 'LOCAL_RANK':str(r)}) for r in range(WORLD)],time.time()+LIMIT
        try: codes = [p.wait(max(0, end-time.time())) for p in ps]
        finally: [p.kill() for p in ps]
        if any(codes): sys.exit(f'the processes ended with {codes}')
        ranks = [json.loads(Path(f'{path}/{r}.json').read_text()) for r in range(WORLD)]
    print(f'{WORLD} processes, windows of {n_acc}x{bs} samples in each; all-reduces of each process in one epoch\n'
          f'{"":30}{"micro-batches":>15}{"steps":>8}{"calls":>8}{"bytes":>12}')
    for k,v in ranks[0].items(): print(f'{k:30}{v[0]:15}{v[1]:8}{v[2]:8}{v[3]:12}' + ('' if ranks[1][k]==v else f' (rank 1: {ranks[1][k]})'))
    print(f'{"fastai over AccumulateStep":30}' + ''.join(f'{b/a:{w}.2f}' for w,a,b in zip((15,8,8,12), *ranks[0].values())))
