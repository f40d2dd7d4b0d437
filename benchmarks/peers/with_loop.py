from problem import *

serve('torch', loop=dict(train=loop, how='micro', find=lambda p: no('a loop has none')))
