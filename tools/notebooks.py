"Test notebooks two at a time, each in a process of its own that has fastai imported already, as that takes longer than most of them"
import gc,os,sys
from pathlib import Path
from nbdev.test import nbdev_test

afresh = 'import sys; from nbdev.test import nbdev_test; nbdev_test(sys.argv[1])'

def test_all(files, n=2):
    "Run `files` in their order, `n` at a time, and print the CPU seconds of each; those that failed"
    todo,running,failed = list(files),{},[]
    while todo or running:
        while todo and len(running)<n:
            f = todo.pop(0)
            if not (pid := os.fork()):
                if 'fastai1' in f.stem: os.execv(sys.executable, [sys.executable,'-W','ignore','-c',afresh,str(f)]) # of another fastai than the one that is imported
                sys.exit(nbdev_test(str(f))) # which ends with 1 if a cell fails
            running[pid] = f
        pid,status,used = os.wait4(-1, 0)
        f = running.pop(pid)
        if status: failed.append(f)
        print(f'{used.ru_utime+used.ru_stime:6.1f} s  {f}', flush=True)
    return failed

if __name__=='__main__':
    if sys.platform=='linux': import fastai.vision.all,fastai.text.all,fastai.tabular.all,sklearn.datasets # a fork of so much is not safe elsewhere
    gc.freeze()
    files = [Path(f) for f in sys.argv[1:]] or sorted(Path('nbs').glob('*.ipynb'), reverse=True) # the longest first
    if failed := test_all(files): sys.exit(f"failed: {' '.join(map(str, failed))}")
