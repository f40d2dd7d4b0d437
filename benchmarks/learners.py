"""Is it the same run for fastai's own learners? One epoch of `fit_one_cycle` with 16 samples as 4x4 by fastai's `GradientAccumulation`, `AccumulateStep` and `MicroBatch`, against a real batch
of 16: the weights' relative difference, in float64. Random weights, scikit-learn's digits, a table, ratings and texts from Python itself: nothing is downloaded. Dropout is off where a row does not
say otherwise. The numbers go to a JSON file; `tools/tables.py` makes the tables of the pages from it."""
import json,platform,time
from importlib.metadata import version
from common import *
from fastai.collab import *
from fastai.tabular.all import *
from fastai.text.all import *
from fastai_accum import AccumulateStep,MicroBatch
from fastcore.script import call_parse
from sklearn.datasets import load_breast_cancer,load_digits

N,BS,MICRO = 64,16,4 # samples to train on, in a batch, in a micro-batch

def digits(bs, masks=False):
    "Digits as color images of 32x32 pixels, in float64; the pixels that have ink are the targets with `masks`"
    x,y = load_digits(return_X_y=True)
    x = F.interpolate(tensor(x[:N+BS]).double().view(-1,1,8,8)/16, size=32, mode='bilinear').expand(-1,3,-1,-1)
    items = L(zip(x, (x[:,0]>0.5).long() if masks else tensor(y[:N+BS])))
    return DataLoaders(DataLoader(items[:N], bs=bs), DataLoader(items[N:], bs=bs), device=torch.device('cpu'))

def vision(bs, arch=models.resnet18, ps=0., **kwargs): return vision_learner(digits(bs), arch, n_out=10, pretrained=False, normalize=False, ps=ps, loss_func=nn.CrossEntropyLoss(), **kwargs)

def unet(bs, **kwargs): return unet_learner(digits(bs, masks=True), models.resnet18, n_out=2, pretrained=False, normalize=False, loss_func=nn.CrossEntropyLoss(), **kwargs)

def in_order(dls, bs): return DataLoaders(dls.train.new(bs=bs, shuffle=False), dls.valid.new(bs=bs), device=torch.device('cpu'))

def tabular(bs, **kwargs):
    df = load_breast_cancer(as_frame=True).frame.iloc[:N+BS]
    df = df.assign(size=pd.qcut(df['mean area'], 3, labels=['small','medium','large']).astype(str))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify,Normalize], cat_names=['size'], cont_names=[c for c in df if c.startswith('mean ')], y_names='target', y_block=CategoryBlock(), valid_idx=range(N, N+BS), bs=bs)
    return tabular_learner(in_order(dls, bs), loss_func=CrossEntropyLossFlat(), n_out=2, **kwargs)

def collab(bs, **kwargs):
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(user=rng.integers(0, 8, N+BS), item=rng.integers(0, 12, N+BS), rating=rng.integers(1, 6, N+BS).astype('float32')))
    dls = CollabDataLoaders.from_df(df, valid_pct=BS/(N+BS), seed=0, bs=bs)
    return collab_learner(in_order(dls, bs), use_nn=True, layers=[32], y_range=(0.5,5.5), loss_func=nn.MSELoss(), **kwargs)

def text(bs, drop_mult=0., **kwargs):
    docs = [' '.join(o.__doc__.split())[:300] for m in (os,str,dict,list,int) for o in map(partial(getattr, m), dir(m)) if isinstance(getattr(o, '__doc__', None), str)]
    docs = sorted(set(docs))[:N+BS]
    df = pd.DataFrame(dict(text=docs, label=[str(len(o)%3) for o in docs]))
    dls = TextDataLoaders.from_df(df, text_col='text', label_col='label', valid_pct=BS/(N+BS), seed=0, bs=bs)
    config = {**awd_lstm_clas_config, 'emb_sz':24, 'n_hid':32, 'n_layers':2}
    config.update({k:max(drop_mult*config[k], 1e-30) for k in config if k.endswith('_p')}) # AWD_LSTM takes no probability of 0
    return text_classifier_learner(in_order(dls, bs), AWD_LSTM, pretrained=False, config=config, drop_mult=1., ps=[0.1 if drop_mult else 0.], loss_func=nn.CrossEntropyLoss(), n_out=3, **kwargs)

# What the tables call each
LEARNERS = dict(vision=('`vision_learner`, resnet18', vision), vision_drop=('`vision_learner`, resnet18, with the dropout of its head', partial(vision, ps=0.5)),
                squeezenet=('`vision_learner`, squeezenet1_1: BatchNorm in the head only', partial(vision, arch=models.squeezenet1_1)), unet=('`unet_learner`, resnet18', unet), tabular=('`tabular_learner`', tabular),
                collab=('`collab_learner`, `use_nn=True`', collab), text=('`text_classifier_learner`, AWD-LSTM without dropout', text), text_drop=('`text_classifier_learner`, AWD-LSTM', partial(text, drop_mult=0.5)))
WAYS = {'large':(BS,None), 'GradientAccumulation':(MICRO,lambda: GradientAccumulation(BS)), 'AccumulateStep':(MICRO,lambda: AccumulateStep(BS//MICRO)),
        'MicroBatch':(BS,lambda: MicroBatch(MICRO)), 'sync_bn':(BS,lambda: MicroBatch(MICRO, sync_bn=True))}

def double(module, args):
    "A forward pre-hook: floating-point inputs in float64"
    return tuple(o.double() if isinstance(o, torch.Tensor) and o.is_floating_point() else o for o in args)

def weights(make, bs, cb):
    "The weights after an epoch"
    set_seed(0, reproducible=True)
    learn = make(bs)
    learn.remove_cbs([Recorder,ProgressCallback]) # `Recorder` knows no float64
    learn.logger = noop
    if cb: learn.add_cb(cb())
    learn.model.double().register_forward_pre_hook(double)
    set_seed(1, reproducible=True) # of dropout
    learn.fit_one_cycle(1, 1e-3)
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

@call_parse
def main(
    out:str='benchmarks/learners.json', # The numbers
    only:str='' # Keys of the learners to try, with commas between them
):
    torch.set_num_threads(1)
    default_device(False)
    rows = {}
    for key,(label,make) in LEARNERS.items():
        if only and key not in only.split(','): continue
        w = {k:weights(make, *o) for k,o in WAYS.items()}
        rows[key] = dict(label=label, err={k:((o-w['large']).norm()/w['large'].norm()).item() for k,o in w.items() if k!='large'})
        print(f'{label:60}', *(f'{v:12.1e}' for v in rows[key]['err'].values()), flush=True)
    res = dict(date=time.strftime('%Y-%m-%d'), python=platform.python_version(), torch=torch.__version__, fastai=version('fastai'), n=N, bs=BS, micro=MICRO, rows=rows)
    Path(out).write_text(json.dumps(res, indent=1)+'\n')
