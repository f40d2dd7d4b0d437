"Gradient checkpointing beside accumulation: the run is that of the large batch by the same checkpointed model"
import pytest
from torch.utils.checkpoint import checkpoint,checkpoint_sequential
from common import *

N,BS,MICRO = 45,16,4 # the last batch of an epoch is short, and so is its last micro-batch

class Net(nn.Module):
    "The middle is recomputed, with a Dropout that has to draw the same mask again; outside of it there may be a BatchNorm"
    def __init__(self, reentrant=False, norm=False, p=0.4):
        super().__init__()
        self.reentrant,self.calls = reentrant,0
        self.a,self.head = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Identity()),nn.Linear(8, 3)
        self.mid = nn.Sequential(nn.Linear(8, 16), nn.Dropout(p), nn.Tanh(), nn.Linear(16, 8))
        self.mid.register_forward_pre_hook(self.count)
    def count(self, *_): self.calls += 1
    def forward(self, x): return self.head(checkpoint(self.mid, self.a(x), use_reentrant=self.reentrant))

class Stages(Net):
    "A part is recomputed as two segments"
    def forward(self, x): return self.head(checkpoint_sequential(self.mid, 2, self.a(x), use_reentrant=self.reentrant))

class InPlace(Net):
    "The layer that is recomputed has the switch itself"
    def __init__(self, **kwargs): super().__init__(**kwargs); self.mid.forward = partial(checkpoint, self.mid.forward, use_reentrant=self.reentrant)
    def forward(self, x): return self.head(self.mid(self.a(x)))

def batch_spread(pred, y): return F.cross_entropy(pred, y) + (pred.softmax(1)-pred.softmax(1).mean(0)).pow(2).mean().sqrt() # of all samples together
HOSTS = {'AccumulateStep':(MICRO, lambda: AccumulateStep(BS//MICRO), {}), 'MicroBatch':(BS, lambda: MicroBatch(MICRO), {}), 'auto':(BS, lambda: MicroBatch('auto'), {}),
         'sync_loss':(BS, lambda: MicroBatch(MICRO, sync_loss=True), dict(loss_func=batch_spread)), 'sync_bn':(BS, lambda: MicroBatch(MICRO, sync_bn=True), dict(norm=True)),
         'sync_bn and sync_loss':(BS, lambda: MicroBatch(MICRO, sync_bn=True, sync_loss=True), dict(norm=True, loss_func=batch_spread))}

def go(acc, bs, model, loss_func=None, norm=False, **kwargs):
    return run(learner(N, bs, acc, model=partial(model, norm=norm, **kwargs), loss_func=loss_func), lambda l: l.fit_one_cycle(2, 0.05))

@pytest.mark.parametrize('reentrant', (False,True))
@pytest.mark.parametrize('model', (Net,Stages,InPlace))
@pytest.mark.parametrize('host', HOSTS)
def test_same_run(host, model, reentrant):
    "By every host, and both ways of recomputing"
    bs,acc,kw = HOSTS[host]
    large,small = (go(a, b, model, reentrant=reentrant, **kw) for a,b in ((None,BS), (acc(),bs)))
    assert_same_run(large, small, 1e-12)
    assert rel(flat(large.model.buffers()), flat(small.model.buffers()))<=1e-12
    if model is Net: assert large.model.calls==2*6+2 # twice a batch, and once in each validation

def test_masks_of_another_draw():
    "Where a mask is not drawn again as it was, this is seen"
    large,small = (go(AccumulateStep(4), MICRO, model) for model in (Net,Forgets))
    with pytest.raises(AssertionError, match='weights'): assert_same_run(large, small, 1e-12)
class Forgets(Net):
    def forward(self, x): return self.head(checkpoint(self.mid, self.a(x), use_reentrant=False, preserve_rng_state=False))

def vit():
    timm = pytest.importorskip('timm', reason='timm is not installed')
    m = timm.create_model('vit_tiny_patch16_224', num_classes=3, img_size=32, patch_size=8, depth=3, embed_dim=32, num_heads=2, drop_rate=0.2)
    m.set_grad_checkpointing()
    return m

def bert():
    transformers = pytest.importorskip('transformers', reason='transformers is not installed')
    class Logits(transformers.BertForSequenceClassification):
        def forward(self, x): return super().forward(input_ids=x).logits
    m = Logits(transformers.BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, num_labels=3, attention_probs_dropout_prob=0.))
    m.gradient_checkpointing_enable()
    return m

@pytest.mark.parametrize('make', (vit,bert), ids=('timm','transformers'))
def test_their_own_switches(make):
    "Models of timm and transformers that recompute their blocks; as several layers draw masks, in another order than the large batch, none do here"
    torch.manual_seed(0)
    m = make()
    for d in m.modules():
        if isinstance(d, nn.Dropout): d.p = 0.
    x = torch.randint(50, (40,7)) if make is bert else torch.randn(40, 3, 32, 32)
    y = torch.randint(3, (40,))
    def go(acc, bs):
        seed()
        l = Learner(DataLoaders(DataLoader(list(zip(x[:32], y)), bs=bs), DataLoader(list(zip(x[32:], y)), bs=8)), deepcopy(m), loss_func=nn.CrossEntropyLoss(), opt_func=SGD, default_cbs=False,
                    cbs=[TrainEvalCallback(), *L(acc), Trace()])
        l.logger = noop
        l.fit(1, 0.1)
        return l
    large = go(None, 16)
    for acc,bs in ((AccumulateStep(4),4), (MicroBatch(4),16), (MicroBatch(4, sync_loss=True),16)): assert_same_run(large, go(acc, bs), 1e-5)
