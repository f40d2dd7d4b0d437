"""Contrastive learning with large batches: a model of two towers learns to find the summary of a docstring by the name of what it documents, and all other summaries of the batch are
negatives. Batches of 128 by micro-batches of 8: how far weights are from the real large batch, time and peak memory. `MicroBatch`, with and without `sync_loss=True`, beside gradient
caching (Gao et al., 2021) as one writes it by hand, and beside sentence-transformers' `CachedMultipleNegativesRankingLoss` where that is installed."""
import importlib,inspect,json
from common import *
from microbatch import peak
from fastai_accum import MicroBatch
from fastcore.script import call_parse

MODULES = """argparse ast asyncio base64 bisect calendar cmath collections configparser contextlib csv ctypes datetime decimal difflib dis email.message
    email.policy enum fractions ftplib functools gzip heapq html http.client http.cookiejar inspect io ipaddress itertools json logging lzma
    mailbox math multiprocessing numbers operator os pathlib pickle platform plistlib pprint random re sched shutil smtplib socket sqlite3 ssl
    statistics string struct subprocess symtable tarfile tempfile textwrap threading timeit tokenize traceback types typing unittest
    unittest.mock urllib.parse urllib.request uuid weakref xml.dom.minidom xml.etree.ElementTree zipfile zoneinfo""".split()

def pairs():
    "Names of what the standard library's modules have, and the first sentences of their docstrings"
    res = {}
    for m in map(importlib.import_module, MODULES):
        things = [(m.__name__,k,o) for k,o in inspect.getmembers(m)]
        things += [(f'{m.__name__} {k}',n,f) for _,k,o in things if inspect.isclass(o) for n,f in inspect.getmembers(o)]
        for where,k,o in things:
            doc = inspect.getdoc(o) if not k.startswith('_') and callable(o) else None
            if doc and (s := doc.split('\n\n')[0].split('. ')[0]).count(' ')>3: res.setdefault(s, f'{where} {k}') # a docstring is inherited by many
    return [(n,s) for s,n in res.items()]

def words(s): return re.findall(r'[a-z]+|\d', re.sub('([a-z])([A-Z])', r'\1 \2', s).lower())

def numericalized(texts, vocab, n):
    "Word numbers of each text in `n` columns; 0 pads"
    rows = [[vocab.get(w, 1) for w in words(t)][:n] for t in texts]
    return tensor([r+[0]*(n-len(r)) for r in rows])

def data(n, bs):
    "`n` batches of `bs` names, summaries and numbers"
    ps = random.Random(42).sample(sorted(pairs()), n*bs)
    vocab = {w:i+2 for i,(w,_) in enumerate(Counter(w for p in ps for s in p for w in words(s)).most_common(2000))}
    a,b = (numericalized(ts, vocab, l) for ts,l in zip(zip(*ps), (8,24)))
    return [tuple(o.to(DEVICE) for o in b) for b in zip(a.split(bs), b.split(bs), torch.arange(n*bs).split(bs))]

class Tower(Module):
    "A transformer, and the mean over the words"
    def __init__(self, d=64, vocab=2002):
        self.emb,self.pos = Embedding(vocab, d),nn.Parameter(0.01*torch.randn(32, d))
        self.layers = nn.Sequential(*[nn.TransformerEncoderLayer(d, 4, 2*d, dropout=0., batch_first=True, norm_first=True) for _ in range(2)])
        self.out = nn.Linear(d, d)
    def forward(self, ids):
        there = (ids!=0)[...,None]
        return self.out((self.layers(self.emb(ids)+self.pos[:ids.shape[1]])*there).sum(1)/there.sum(1).clamp(min=1))

class TwoTowers(Module):
    def __init__(self): self.name,self.summary = Tower(),Tower()
    def forward(self, a, b): return self.name(a),self.summary(b)

def ranking(z, *yb, scale=20.):
    "Multiple negatives ranking: of all summaries of the batch, which is that of a name?"
    a,b = (F.normalize(o, dim=-1) for o in z)
    return F.cross_entropy(scale*a@b.T, torch.arange(len(a), device=a.device))

# ---- ways to have the gradient of a batch

def by_parts(model, a, b, bs):
    "The plain loop: each micro-batch by itself"
    for x in zip(a.split(bs), b.split(bs)): (ranking(model(*x))*(len(x[0])/len(a))).backward()

def by_cache(model, a, b, bs):
    "Gradient caching: outputs without a graph, the loss of all of them, then each micro-batch again, with its share of the outputs' gradient"
    outs,states = [],[]
    for x in zip(a.split(bs), b.split(bs)):
        states.append(torch.get_rng_state()) # for dropout
        with torch.no_grad(): outs.append(model(*x))
    outs = [torch.cat(o).requires_grad_() for o in zip(*outs)]
    ranking(outs).backward()
    after = torch.get_rng_state()
    for x,state,gs in zip(zip(a.split(bs), b.split(bs)), states, zip(*(o.grad.split(bs) for o in outs))):
        torch.set_rng_state(state)
        torch.autograd.backward(model(*x), gs)
    torch.set_rng_state(after)

class Sentences(Module):
    "The towers as sentence-transformers wants a model"
    def __init__(self, model): self.model = model
    def forward(self, features): return dict(features, sentence_embedding=getattr(self.model, features['tower'])(features['input_ids']))

def by_sentences(model, a, b, bs):
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss
    loss = CachedMultipleNegativesRankingLoss(nn.Sequential(Sentences(model)), scale=20., mini_batch_size=bs)
    loss([dict(input_ids=a, tower='name'),dict(input_ids=b, tower='summary')], None).backward()

# ---- runs

class Batches(list): "Batches that are on the device already"

def by_learner(model, batches, *cbs, lr=0.05):
    dls = DataLoaders(Batches(batches), Batches())
    for dl in dls.loaders: dl.n_inp = 2
    learn = Learner(dls, model, loss_func=ranking, opt_func=SGD, cbs=TrainEvalCallback(), default_cbs=False) # fastai's Recorder knows no float64
    learn.fit(1, lr, cbs=cbs)

def by_loop(grad, model, batches, bs, lr=0.05):
    opt = SGD(list(model.parameters()), lr=lr)
    model.train()
    for a,b,_ in batches:
        grad(model, a, b, bs)
        opt.step(); opt.zero_grad()

def timed(f, *args):
    "Seconds that `f` takes; on the CPU those of this process, as others may be at work there"
    clock = time.perf_counter if CUDA else time.process_time
    sync()
    start = clock()
    f(*args)
    sync()
    return clock()-start

def ways(bs):
    "Functions `(model, batches)` that train for an epoch"
    def learner(**kwargs): return lambda model,batches: by_learner(model, batches, MicroBatch(bs, **kwargs))
    loops = dict(loop=by_parts, cache=by_cache, sentence_transformers=by_sentences)
    res = dict(whole=by_learner, MicroBatch=learner(), sync_loss=learner(sync_loss=True), **{k:partial(by_loop, f, bs=bs) for k,f in loops.items()})
    return {k:res[k] for k in labels(0, bs)}

def labels(n, bs):
    "What the table calls each of them"
    return dict(whole=f'the real batch of {n}, a plain `Learner`', loop=f'a loop, each {bs} by themselves', MicroBatch=f'**`MicroBatch({bs})`**',
                sync_loss=f'**`MicroBatch({bs}, sync_loss=True)`**', cache='gradient caching, a loop written by hand',
                sentence_transformers='sentence-transformers {} `CachedMultipleNegativesRankingLoss`, in the same loop')

def weights(m): return nn.utils.parameters_to_vector(m.parameters()).detach()

@call_parse
def main(
    repeats:int=7, # Epochs timed for each, in turn; medians are shown
    n:int=8, # Batches in an epoch
    n_batch:int=128, # Samples in a batch
    bs:int=8, # Samples in a micro-batch
    out:str='benchmarks/contrastive.json' # The numbers
):
    at = where()
    set_seed(42)
    batches,model,runs,names = data(n, n_batch),TwoTowers().to(DEVICE),ways(bs),labels(n_batch, bs)
    try:
        import sentence_transformers
        names['sentence_transformers'] = names['sentence_transformers'].format(sentence_transformers.__version__)
    except ImportError as e:
        print('without sentence-transformers:', e)
        del runs['sentence_transformers']
    exact,rows = {},{}
    for k,f in runs.items():
        exact[k] = deepcopy(model).double()
        f(exact[k], batches)
    large,few = weights(exact['whole']),batches[:1]
    secs = interleaved({k:partial(timed, f, deepcopy(model), batches) for k,f in runs.items()}, repeats, 1)
    for k,f in runs.items():
        err = ((weights(exact[k])-large).norm()/large.norm()).item()
        r = rows[k] = dict(label=names[k], err=err, peak_bytes=peak(partial(f, deepcopy(model), few)), secs=[s/n for s in secs[k]])
        print(f"{names[k]:90}{err:10.1e}{1e3*median(r['secs']):10.1f} ms{ratio(secs[k], secs['loop']):8.2f} times{r['peak_bytes']/2**20:10.2f} MiB")
    res = dict(date=time.strftime('%Y-%m-%d'), where=at, repeats=repeats, n=n, n_batch=n_batch, bs=bs, rows=rows)
    Path(out).write_text(json.dumps(res, indent=1)+'\n')
    print(f'{at}; numbers in {out}')
