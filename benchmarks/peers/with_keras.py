import os
os.environ['KERAS_BACKEND'] = 'torch'
from problem import *
import keras
from keras.layers import TorchModuleWrapper
from keras.optimizers import SGD,LossScaleOptimizer

class Model(keras.Model):
    def __init__(self, module):
        super().__init__()
        self.wrapped = TorchModuleWrapper(module)
    def call(self, x, training=None): return self.wrapped(x, training=training)

class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    "Torch's one-cycle schedule, as it has none of its own; by its documentation it is asked for micro-batches"
    def __init__(self, p):
        opt = torch.optim.SGD(p.model.parameters(), lr=p.lr)
        n = p.n_steps*p.n_acc
        sched,self.lrs = p.schedule(opt, n),[]
        for i in range(n):
            self.lrs.append(sched.get_last_lr()[0])
            opt.step()
            if i+1<n: sched.step()
    def __call__(self, step): return self.lrs[min(int(step), len(self.lrs)-1)]

class Log(keras.callbacks.Callback):
    "Keep the learning rate and time of each step"
    def __init__(self, p, opt):
        super().__init__()
        self.p,self.opt,self.i = p,opt,0
    def on_train_batch_begin(self, batch, logs=None):
        if self.p.one_cycle: self.lr = float(self.opt.learning_rate)
    def on_train_batch_end(self, batch, logs=None):
        self.i += 1
        if self.i%self.p.n_acc==0: self.p.done(self.lr if self.p.one_cycle else self.p.lr)

def train(p):
    dtype = str(next(p.model.parameters()).dtype).split('.')[1]
    keras.config.set_floatx(dtype), keras.config.set_dtype_policy(dtype)
    model = Model(p.model)
    opt = SGD(Schedule(p) if p.one_cycle else p.lr, momentum=0.9, global_clipnorm=p.clip, gradient_accumulation_steps=p.n_acc if p.n_acc>1 else None)
    model.compile(optimizer=LossScaleOptimizer(opt) if p.scaled else opt, loss=lambda y,pred: p.loss(pred, y.reshape(len(pred), *pred.shape[2:]).long()))
    model.fit(p.dl, epochs=p.epochs, shuffle=False, verbose=0, callbacks=[Log(p, opt)])

serve('keras', keras=dict(train=train, how='micro', find=lambda p: no('it has none')))
