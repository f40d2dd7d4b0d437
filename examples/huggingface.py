"""A Hugging Face model in a fastai `Learner`, at a batch of 32 that is never computed at once: which module of Python's standard library is a documentation string from?

    pip install transformers
    python examples/huggingface.py

The model is a small BERT with random weights, as there is nothing to download. Texts of a batch are padded to the longest, and the inputs of the model are a dict, which `MicroBatch` splits as it is.
Prints what a plain batch of 32 and 32 in micro-batches of 8 come to, and how far their weights are apart."""
import importlib,inspect,warnings
warnings.filterwarnings('ignore', message='`torch.jit.script` is deprecated') # fastai's imports call it
from fastai.basics import *
from fastai_accum import MicroBatch
from fastcore.script import call_parse
from transformers import BertConfig,BertForSequenceClassification

MODULES = 'statistics','os','unittest.mock','tkinter','decimal','inspect'

def docs(name):
    "The documentation strings in a module"
    mod = importlib.import_module(name)
    objs = [o for _,o in inspect.getmembers(mod) if inspect.isroutine(o) or inspect.isclass(o)]
    objs += [m for o in objs if inspect.isclass(o) for _,m in inspect.getmembers(o)]
    return sorted({d for o in objs if isinstance(d := getattr(o, '__doc__', None), str) and len(d)>40})

def batch(samples):
    "Bytes of the texts, from 1 on, padded with 0 to the longest, as a dict, and the classes"
    xs,ys = zip(*samples)
    ids = nn.utils.rnn.pad_sequence(xs, batch_first=True)
    return dict(input_ids=ids, attention_mask=(ids>0).long()),torch.stack(ys)

class Logits(nn.Module):
    "Call a Hugging Face model with a dict, and return its logits alone"
    def __init__(self, model): super().__init__(); self.model = model
    def forward(self, x): return self.model(**x).logits

@call_parse
def main(
    bs:int=32, # Samples in a batch
    micro:int=8, # Samples in a micro-batch
    n_epoch:int=3,
    lr:float=2e-3 # Highest learning rate of one cycle
):
    torch.set_num_threads(1)
    names = [o for o in MODULES if importlib.util.find_spec(o.split('.')[0])]
    items = [(tensor(list(d.encode()[:96]))+1,tensor(i)) for i,name in enumerate(names) for d in docs(name)]
    set_seed(42)
    order = torch.randperm(len(items)).tolist()
    cut = len(items)*4//5
    train,valid = [[items[i] for i in o] for o in (order[:cut],order[cut:])]
    def fit(*cbs):
        set_seed(42)
        config = BertConfig(vocab_size=257, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=96, num_labels=len(names),
                            hidden_dropout_prob=0., attention_probs_dropout_prob=0.) # dropout would draw other masks
        dls = DataLoaders(DataLoader(train, bs=bs, shuffle=True, create_batch=batch), DataLoader(valid, bs=64, create_batch=batch))
        learn = Learner(dls, Logits(BertForSequenceClassification(config)), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=cbs, path=Path(tempfile.mkdtemp()))
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n_epoch, lr)
        return learn
    whole,parts = fit(),fit(MicroBatch(micro))
    a,b = (nn.utils.parameters_to_vector(l.model.parameters()).detach() for l in (whole,parts))
    print(f'{len(train)} texts of {len(names)} modules, {len(whole.recorder.losses)} steps')
    for name,l in ((f'bs={bs}',whole), (f'bs={bs}, MicroBatch({micro})',parts)): print(f'{name:24} accuracy {l.recorder.values[-1][-1]:.3f}   last loss {float(l.recorder.losses[-1]):.6f}')
    print(f'relative distance of the weights {((a-b).norm()/a.norm()).item():.0e}')
