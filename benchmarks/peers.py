"""How exact `AccumulateStep`, `MicroBatch` and their peers are, how long they take and how much memory they need: the same model, data, seed and optimizer for all.
Each peer runs in a process of its own (`peers/with_*.py`), and in an environment of its own where `peers/install.sh` had to make one. They take turns: only one computes at a time.
Numbers go to a JSON file and a picture, tables are made from the numbers by `tools/tables.py`."""
import json,os,platform,random,re,subprocess,sys,tempfile,time
from pathlib import Path
from statistics import median
from fastcore.script import call_parse

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent/'tools'))
from tables import exactness,failed,options,times

# The module's name after `with_`: its distribution, and its rows: key, what the table calls it, and how it is told to accumulate
PEERS = dict(
    fastai=('fastai', [('fastai', 'fastai {} `GradientAccumulation`', '`n_acc`, in samples')]),
    fastxtend=('fastxtend', [('fastxtend', 'fastxtend {} `GradientAccumulation`', '`drop_last=False`, as the default drops the last full window too; `lr_find` with `log_accum_batch=False`, as it fails with the default')]),
    loop=('torch', [('loop', 'a loop that divides the loss by N', '`GradScaler`, `clip_grad_norm_`, `OneCycleLR` of torch {}')]),
    lightning=('lightning', [('lightning', 'Lightning {}', '`accumulate_grad_batches`, `gradient_clip_val`; `MixedPrecision` with a scaler of the CPU')]),
    accelerate=('accelerate', [('accumulate', 'accelerate {} `accumulate`', '`adjust_scheduler=False` for one-cycle, as that is made for steps'),
                               ('variable', "accelerate {}, its guide's loop for variable size", 'a loop that counts beforehand what the loss of a window divides by')]),
    transformers=('transformers', [('trainer', 'HF Trainer {}', '`gradient_accumulation_steps`, `max_grad_norm`; the model returns the mean loss'),
                                   ('loss_func', 'HF Trainer {} `compute_loss_func`', 'a sum divided by `num_items_in_batch`; that does not count class weights, so for these as in the row above')]),
    ignite=('pytorch-ignite', [('ignite', 'Ignite {}', '`create_supervised_trainer(gradient_accumulation_steps=...)`')]),
    composer=('mosaicml', [('composer', 'Composer {}', '`device_train_microbatch_size`; `accumulate_train_batch_on_tokens` for ignored targets')]),
    keras=('keras', [('keras', 'Keras {} on torch', "the optimizer's `gradient_accumulation_steps` and `global_clipnorm`, `LossScaleOptimizer`; the schedule is in micro-batches, as documented")]),
    fastai_accum=('fastai_accum', [('AccumulateStep', '**fastai_accum `AccumulateStep`**', '`n_step`'), ('MicroBatch', '**fastai_accum `MicroBatch`**', '`bs`; `sync_bn=True` in the column for BatchNorm')]),
    accumulator=('fastai_accum', [('Accumulator', '**fastai_accum `Accumulator`**', 'a loop of its own, `n_step`')]))
CASES = ('even', 'short last window', 'uneven micro-batches', 'both', 'windows of several sizes', 'ignored targets', 'class weights', 'clipped', 'two epochs', 'fp16-scaled', 'BatchNorm', 'one-cycle', 'lr_find')
TIMED = 'tiny MLP','small ResNet','small transformer'
OUTPUTS = 'small language model','small U-Net' # of these, whose outputs are large, only memory is measured
GROW,WINDOWS = [2**i for i in range(7)],dict(zip(TIMED, (8,2))) # micro-batches of a batch of 64 in the picture; batches in an epoch, after a first one that is not timed

class Peer:
    "A process that answers requests, see `serve` in `peers/problem.py`"
    def __init__(self, name, envs):
        own = Path(f'{envs}-{name}')
        self.log = tempfile.TemporaryFile('w+')
        self.proc = subprocess.Popen([str((own if own.exists() else envs)/'bin/python'), '-W', 'ignore', f'peers/with_{name}.py'], cwd=here, text=True, env={**os.environ, 'PYTHONPATH':str(here.parent)},
                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log)
        self.hello = self._read()
        failed = envs/f'{name}.log' # pip's last words
        if 'error' in self.hello and failed.exists(): self.hello['error'] = failed.read_text().strip().splitlines()[-1][:200]

    def _read(self):
        if line := self.proc.stdout.readline(): return json.loads(line)
        self.proc.wait()
        self.log.seek(0)
        return dict(error=(self.log.read().strip().splitlines() or ['it died'])[-1][:200])

    def __call__(self, *request):
        if self.proc.poll() is not None: return dict(error=self.hello.get('error', 'it died'))
        print(json.dumps(request), file=self.proc.stdin, flush=True)
        return self._read()

    def close(self):
        self.proc.stdin.close()
        self.proc.wait()

def machine():
    cpu = [l.split(':')[1].strip() for l in Path('/proc/cpuinfo').read_text().splitlines() if l.startswith('model name')] if Path('/proc/cpuinfo').exists() else []
    return f"{cpu[0] if cpu else platform.processor()} ({platform.machine()}), {os.cpu_count()} cores, one thread; Python {platform.python_version()}"

def draw(res, path):
    "Time and peak memory of a batch of 64, over the number of micro-batches that it is computed in"
    from matplotlib import pyplot as plt
    plt.rc('axes.spines', top=False, right=False)
    fig,axs = plt.subplots(1, 4, figsize=(16,4.2), layout='constrained')
    ours = dict(AccumulateStep=dict(c='k', ls='--', lw=2, zorder=5), MicroBatch=dict(c='k', lw=2, zorder=5), Accumulator=dict(c='k', ls=':', lw=2, zorder=5))
    for i,(k,row) in enumerate((k,r) for k,r in res['rows'].items() if 'growth' in r):
        kw = dict(label=re.sub(r'[*`]', '', row['label']), **ours.get(k, dict(c=plt.cm.tab20(i), lw=1.2, marker='.')))
        for ax,(p,what,unit) in zip(axs, (('tiny MLP','secs',1e-3), ('small ResNet','secs',1e-3), ('small ResNet','peak_bytes',2**20), (OUTPUTS[0],'peak_bytes',2**20))):
            pts = [(o['n'], (median(o[what]) if what=='secs' else o[what])/unit) for o in row['growth'].get(p, ()) if o[what]]
            if pts: ax.plot(*zip(*pts), **kw)
            ax.set(title=f"{p}: {'ms a batch' if what=='secs' else 'peak MiB'}", xlabel='micro-batches of a batch of 64', xscale='log')
            ax.set_xticks(GROW, GROW), ax.xaxis.set_minor_locator(plt.NullLocator())
    for ax,ticks in zip(axs, ([1,2,5,10,20,50,100],[75,100,150,200,300])): ax.set(yscale='log'), ax.set_yticks(ticks, ticks), ax.yaxis.set_minor_locator(plt.NullLocator())
    for ax in axs[2:]: ax.set_ylim(0)
    known = {l:h for ax in axs for h,l in zip(*ax.get_legend_handles_labels())} # some are in some of them only
    fig.legend(known.values(), known.keys(), loc='outside right center', frameon=False, fontsize=8)
    fig.savefig(path, dpi=80)

def measure_outputs(rows, peers, keys):
    "Peak memory of models with large outputs, for the rows in `keys`"
    for k in keys:
        def peak(p, *args): return peers[rows[k]['peer']]('memory', k, p, *args)
        rows[k].setdefault('peak_bytes', {}).update({p:peak(p) for p in OUTPUTS})
        rows[k].setdefault('growth', {})[OUTPUTS[0]] = [dict(n=n, secs=[], peak_bytes=peak(OUTPUTS[0], 2, n, GROW[-1]//n).get('res')) for n in GROW]
        print(f'{k}: memory with large outputs measured', flush=True)

def only_outputs(envs, out, picture):
    "Measure these again for the peers that are in `envs` in the versions that `out` has; all else stays as it is"
    res = json.loads(out.read_text())
    peers = {name:Peer(name, envs) for name in PEERS}
    def same(row): return all(peers[row['peer']].hello.get(o)==row.get(o) for o in ('version','torch')) and 'version' in row
    keys = [k for k,row in res['rows'].items() if same(row)]
    measure_outputs(res['rows'], peers, keys)
    for p in peers.values(): p.close()
    res['outputs'] = dict(date=time.strftime('%Y-%m-%d'), machine=machine(), rows=keys)
    out.write_text(json.dumps(res, indent=1)+'\n')
    draw(res, picture)
    print(f"measured: {', '.join(keys)}; not there in the version of {out}: {', '.join(k for k in res['rows'] if k not in keys) or 'none'}")

@call_parse
def main(
    repeats:int=10, # Epochs timed for each, in turns of random order; medians are shown. 0 leaves time and memory as they are in `out`
    grow_repeats:int=3, # The same for each number of micro-batches in the picture
    warm:int=2, # Turns before these
    envs:str='.venv-bench', # Environment of the peers; one of a peer's own is beside it, as `.venv-bench-composer`
    out:str='benchmarks/peers.json', # The numbers
    picture:str='nbs/images/growth.png', # How time and memory grow
    outputs:bool=False # Measure only the memory of models with large outputs, and leave all else in `out` as it is
):
    out,envs,rows,peers = Path(out),Path(envs).absolute(),{},{}
    if outputs: return only_outputs(envs, out, picture)
    for name,(_,labels) in PEERS.items():
        peer = peers[name] = Peer(name, envs)
        hello = peer.hello
        for key,label,note in labels:
            row = rows[key] = dict(peer=name, label=' '.join(label.format(hello.get('version', '')).split()), note=note.format(hello.get('version', '')), **hello)
            row['exact'] = {c:peer('exact', key, c) for c in CASES} if 'error' not in hello else {}
            print(f"{label.format(hello.get('version', ''))}: {hello.get('error', 'measured')}", flush=True)
    for row in rows.values():
        if row.get('torch', rows['loop'].get('torch'))!=rows['loop'].get('torch'): row['label'] += f" (torch {row['torch'].split('+')[0]})"
    res = dict(date=time.strftime('%Y-%m-%d'), machine=machine(), repeats=repeats, rows=rows)
    if not repeats and out.exists():
        old = json.loads(out.read_text())
        for k,row in old['rows'].items(): rows[k].update({o:row[o] for o in ('secs','peak_bytes','growth') if o in row and 'error' not in rows[k]})
        res['repeats'] = old['repeats']
    if repeats:
        alive = [k for k,row in rows.items() if 'error' not in row]
        for k in alive: rows[k].update(secs={}, peak_bytes={p:peers[rows[k]['peer']]('memory', k, p) for p in TIMED[1:]})
        for p in TIMED:
            for i in range(repeats+warm):
                for k in random.sample(alive, len(alive)):
                    s = peers[rows[k]['peer']]('time', k, p)
                    if i>=warm: rows[k]['secs'].setdefault(p, []).append(s.get('res', s))
            print(f'{p}: timed', flush=True)
        measure_outputs(rows, peers, alive)
        for k in alive: rows[k]['growth'] |= {p:[dict(n=n, secs=[], peak_bytes=peers[rows[k]['peer']]('memory', k, p, 2, n, GROW[-1]//n).get('res')) for n in GROW] for p in WINDOWS}
        for p,w in WINDOWS.items():
            for _ in range(grow_repeats):
                for k,i in random.sample([(k,i) for k in alive for i in range(len(GROW))], len(alive)*len(GROW)):
                    s = peers[rows[k]['peer']]('time', k, p, w+1, n := GROW[i], GROW[-1]//n)
                    if 'res' in s: rows[k]['growth'][p][i]['secs'].append(n*s['res'])
            print(f'{p}: growth measured', flush=True)
    for p in peers.values(): p.close()
    out.write_text(json.dumps(res, indent=1)+'\n')
    draw(res, picture)
    print(f"\n{res['machine']}, {res['date']}\n\n{exactness(res)}\n\n{options(res)}\n{failed(res)}\n\n{times(res)}\n\nnumbers in {out}")
