"Write the tables of the JSON files in `benchmarks/` into the pages, between the comments that name them; with `--check`, fail if a page and the numbers differ"
import json,re,sys
from pathlib import Path
from statistics import mean,median

root = Path(__file__).resolve().parent.parent
COLS = {'even':'even windows', 'short last window':'short last window', 'uneven micro-batches':'uneven micro-batches', 'both':'both', 'windows of several sizes':'windows of several sizes', 'ignored targets':'ignored targets', 'class weights':'class weights',
        'clipped':'clipped', 'two epochs':'two epochs', 'fp16-scaled':'scaled, as for fp16', 'BatchNorm':'BatchNorm', 'one-cycle':'one-cycle: weights', 'lr':'one-cycle: lr', 'lr_find':'`lr_find`'}

FEW = 'even','short last window','uneven micro-batches','ignored targets','class weights','BatchNorm','lr','lr_find'
ROWS = 'fastai','lightning','trainer','AccumulateStep','MicroBatch' # in the summary
PAGES = {'index.ipynb':['summary','few_learners'], 'benchmarks.ipynb':['where','exactness','options','failed','times','where_learners','learners','where_contrastive','contrastive'], 'gpu.ipynb':['gpu'], 'tutorial_volumes.ipynb':['where_volumes','volumes']} # and the tables that each has

def table(head, rows): return '\n'.join('| '+' | '.join(r)+' |' for r in (head, ['---']*len(head), *rows)).replace('|  |', '| |')
def num(v): return '0' if v==0 else f'{v:.0e}'.replace('e-0', 'e-') if v<1e-3 else f'{v:.2g}'

def cell(row, col):
    if not row['exact']: return 'not run'
    o = row['exact']['one-cycle' if col=='lr' else col]
    if 'error' in o: return 'fails'
    if 'none' in o: return '-'
    if col=='lr_find': return f"{o['res']['ratio']:.2g}×"
    return num(o['res']['lr' if col=='lr' else 'err'])

def exactness(res, cols=tuple(COLS), rows=None):
    "Relative differences from the large batch"
    return table(['', *(COLS[c] for c in cols)], [[r['label'], *(cell(r, c) for c in cols)] for k,r in res['rows'].items() if rows is None or k in rows])

def summary(res): return exactness(res, FEW, ROWS)

def where(res):
    "When, where and with what"
    return f"{res['date']}, {res['machine']}, torch {res['rows']['loop']['torch'].split('+')[0]} where a row does not say another. Times are medians of {res['repeats']} epochs of each in random turn." + (
        f" Peak memory of the models with large outputs was measured on {o['date']}, for the libraries that were there." if (o := res.get('outputs')) else '')

def options(res):
    "How each was told to accumulate"
    return '\n'.join(f"- {r['label']}: {r['note']}" for r in res['rows'].values())

def failed(res):
    "What could not be installed, or does not run"
    rows = res['rows'].values()
    return '\n'.join([f"- {r['label']}: {r['error']}" for r in rows if 'error' in r] + [f"- {r['label']}, {c}: {o['error']}" for r in rows for c,o in r['exact'].items() if 'error' in o]) or 'None.'

def times(res):
    "Time of a micro-batch and peak memory, and how often that of the loop it is"
    rows,loop = res['rows'],res['rows']['loop']
    probs = list(loop['secs'])
    def secs(r, p):
        ss = r.get('secs', {}).get(p)
        if not ss or any(isinstance(s, dict) for s in ss): return 'not run'
        return f"{1e3*median(ss):.3g} ms ({median(a/b for a,b in zip(ss, loop['secs'][p])):.2f})"
    def peak(r, p):
        o = r.get('peak_bytes', {}).get(p, {})
        return f"{o['res']/2**20:.3g} MiB" if 'res' in o else 'not run'
    return table(['', *probs, *(f'{p}: peak' for p in loop['peak_bytes'])], [[r['label'], *(secs(r, p) for p in probs), *(peak(r, p) for p in loop['peak_bytes'])] for r in rows.values()])

def gpu_cell(v): return 'not measured' if v is None else num(v) if isinstance(v, float) and abs(v)<1 else f'{v:.4g}' if isinstance(v, float) else str(v)

def bounds(wanted):
    "What was wanted, beside what it is"
    said = {True:'held', False:'**missed**', None:'not measured'}
    return table(['wanted','measured','at most',''], [[w['what'], '-' if w['value'] is None else gpu_cell(w['value']), gpu_cell(w['most']), said[w['ok']]] for w in wanted])

def gpu_part(part):
    "The tables of one part of `benchmarks/gpu.py`"
    if 'error' in part: return f"### {part['title']}\n\nIt failed: {part['error']}"
    return '\n\n'.join([f"### {part['title']}", table(part['head'], [map(gpu_cell, r) for r in part['rows']]), *([bounds(part['wanted'])] if part['wanted'] else [])])

def gpu(
    res:dict|None # What is in `benchmarks/gpu.json`, None if there is no such file
)->str:
    "What was measured on a GPU, part by part"
    if res is None: return "**None of this is measured yet.** `make gpu` has not been run on a machine with a GPU; when it has, tables and a picture stand here."
    if not res['gpu'] or res['tiny']: return '\n\n'.join(['Tiny sizes, to see that it runs: these are no measurements.', *map(gpu_part, res['parts'].values())])
    held = [w['ok'] for p in res['parts'].values() for w in p.get('wanted', ())]
    broke = [k for k,p in res['parts'].items() if 'error' in p]
    head = f"{res['date']}, {res['where']}. {held.count(True)} of {len(held)} bounds held" + (f"; these parts failed: {', '.join(broke)}." if broke else '.')
    return '\n\n'.join([head, *map(gpu_part, res['parts'].values())])

def contrastive(res):
    "Distance, time and peak memory of each way to train on contrastive batches"
    rows = res['contrastive']['rows']
    def times(r): return f"{1e3*median(r['secs']):.3g} ms ({median(a/b for a,b in zip(r['secs'], rows['loop']['secs'])):.2f})"
    return table(['', 'weights off', 'time of a batch', 'peak memory'], [[r['label'], num(r['err']), times(r), f"{r['peak_bytes']/2**20:.3g} MiB"] for r in rows.values()])

def where_contrastive(res):
    "When, where and how often"
    r = res['contrastive']
    return f"{r['date']}, {r['where'].split('+')[0]}. Times are medians of {r['repeats']} epochs of {r['n']} batches in random turn."

def volumes(res):
    "Accuracy on volumes, distance from the whole batch, time of a fit and peak memory"
    rows = res['volumes']['rows']
    def accuracies(r): return f"{100*mean(r['accuracy']):.1f} ({100*min(r['accuracy']):.1f} to {100*max(r['accuracy']):.1f})"
    def times(r): return f"{median(r['secs']):.1f} s ({median(a/b for a,b in zip(r['secs'], rows['large']['secs'])):.1f})"
    return table(['', 'accuracy, %', 'weights off', 'time of a fit', 'peak memory'], [[r['label'], accuracies(r), num(max(r['err'])), times(r), f"{r['peak_bytes']/2**20:.2f} MiB"] for r in rows.values()])

def where_volumes(res):
    "When, where and how often"
    r = res['volumes']
    return (f"{r['date']}, {r['where'].split('+')[0]}; {r['n_epoch']} epochs of {r['n_train']} volumes, {r['n_valid']} to validate, {r['n_seeds']} seeds. Accuracy is the mean over seeds, with the lowest and the highest; "
            "the distance is the largest of a seed; the time is the median of CPU seconds, and how often that of the first row it is. "
            f"`MicroBatch(2, sync_bn=True)` and GroupNorm with `AccumulateStep(16)` are {num(max(r['err64'].values()))} off or less if the same is computed in float64.")

WAYS = {'GradientAccumulation':"fastai's `GradientAccumulation`", 'AccumulateStep':'`AccumulateStep`', 'MicroBatch':'`MicroBatch`', 'sync_bn':'`MicroBatch(sync_bn=True)`'}
FEW_LEARNERS = 'vision','unet','tabular'

def learners(res, rows=None):
    "The same for fastai's own learners"
    return table(['', *WAYS.values()], [[r['label'], *(num(r['err'][w]) for w in WAYS)] for k,r in res['learners']['rows'].items() if rows is None or k in rows])

def few_learners(res): return learners(res, FEW_LEARNERS)

def where_learners(res):
    "When and with what"
    r = res['learners']
    return f"{r['date']}, Python {r['python']}, torch {r['torch'].split('+')[0]}, fastai {r['fastai']}; one epoch of {r['n']} samples."

def fill(
    src:str, # The notebook's text, with `<!-- exactness -->` before its table and `<!-- /exactness -->` after it; the same for the others
    res:dict, # What is in `benchmarks/peers.json`, and in `learners.json`, `contrastive.json` and `volumes.json` by their names
    on_gpu:dict|None=None # What is in `benchmarks/gpu.json`
)->str: # The same with the tables of all
    for f in (summary,where,exactness,options,failed,times,where_learners,few_learners,learners,where_contrastive,contrastive,where_volumes,volumes,gpu):
        pat = re.compile(rf'(<!-- {f.__name__} -->\n)(?:.*?\n)??(<!-- /{f.__name__} -->)', re.S)
        src = pat.sub(lambda m: f'{m[1]}\n{on_page(on_gpu) if f is gpu else f(res)}\n\n{m[2]}', src)
    return src

def on_page(res): return gpu(res) + ('' if res is None else '\n\n![Peak memory, time and throughput](images/gpu.png)')

def main(check=False, pages=root/'nbs', numbers=root/'benchmarks/peers.json', own=root/'benchmarks/learners.json',
         contrastive_numbers=root/'benchmarks/contrastive.json', volume_numbers=root/'benchmarks/volumes.json', gpu_numbers=root/'benchmarks/gpu.json'):
    res = {**json.loads(numbers.read_text()), 'learners':json.loads(own.read_text()), 'contrastive':json.loads(contrastive_numbers.read_text()), 'volumes':json.loads(volume_numbers.read_text())}
    on_gpu = json.loads(gpu_numbers.read_text()) if gpu_numbers.exists() else None
    if on_gpu and (on_gpu['tiny'] or not on_gpu['gpu']): sys.exit(f'{gpu_numbers} has tiny sizes, or was made without a GPU: `make gpu` on a machine with one measures')
    def source(t): return gpu_numbers if t=='gpu' else own if 'learners' in t else contrastive_numbers if 'contrastive' in t else volume_numbers if 'volumes' in t else numbers
    for name,tables in PAGES.items():
        page = pages/name
        nb = json.loads(page.read_text(encoding='utf-8'))
        old = [''.join(c['source']) for c in nb['cells']]
        new = [fill(s, res, on_gpu) for s in old]
        for t in tables:
            if any(f'<!-- {t} -->\n' in s and f'<!-- /{t} -->' in s for s in old): continue
            sys.exit(f'{page} has no table of {source(t)}: mark its place by `<!-- {t} -->` and `<!-- /{t} -->`')
        if old==new: continue
        sources = ', '.join(dict.fromkeys(str(source(t)) for t in tables))
        if check: sys.exit(f'The tables in {page} are not those of {sources}. `make sync` writes them: look at `git diff` and commit.')
        for c,s in zip(nb['cells'], new): c['source'] = s.splitlines(True)
        page.write_text(json.dumps(nb, indent=1, ensure_ascii=False)+'\n', encoding='utf-8')

if __name__=='__main__': main(check='--check' in sys.argv[1:])
