"The tables of the pages are those of the measured numbers"
import json,re,sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
from tables import PAGES,main

NUMBERS,OWN = ROOT/'benchmarks/peers.json',ROOT/'benchmarks/learners.json'

def test_pages(): main(check=True)

def test_digit(tmp_path):
    "A digit of any error, or of a version, and the check fails"
    text,other = NUMBERS.read_text(),tmp_path/'peers.json'
    found = [*re.finditer(r'"(?:err|lr|ratio)": (\d)', text), *re.finditer(r'"label": "[^"\d]*(\d)', text)]
    assert len(found)>100
    for m in found:
        other.write_text(text[:m.start(1)] + str((int(m[1])+1)%10) + text[m.end(1):])
        with pytest.raises(SystemExit, match='are not those of'): main(check=True, numbers=other)

def test_learners(tmp_path):
    "So it does for a digit of fastai's own learners"
    text,other = OWN.read_text(),tmp_path/'learners.json'
    found = [*re.finditer(r'"(?:GradientAccumulation|AccumulateStep|MicroBatch|sync_bn)": (\d)', text)]
    assert len(found)==4*len(json.loads(text)['rows'])
    for m in found:
        other.write_text(text[:m.start(1)] + str((int(m[1])+1)%10) + text[m.end(1):])
        with pytest.raises(SystemExit, match='are not those of'): main(check=True, own=other)

def test_time(tmp_path):
    "So it does for the times of any row"
    other = tmp_path/'peers.json'
    for k,row in json.loads(NUMBERS.read_text())['rows'].items():
        if 'secs' not in row: continue # its times are not measured yet
        res = json.loads(NUMBERS.read_text())
        res['rows'][k]['secs']['tiny MLP'] = [2*s for s in res['rows'][k]['secs']['tiny MLP']]
        other.write_text(json.dumps(res))
        with pytest.raises(SystemExit, match='are not those of'): main(check=True, numbers=other)

def test_contrastive(tmp_path):
    "So it does for each number of the table of contrastive losses"
    text,other = (ROOT/'benchmarks/contrastive.json').read_text(),tmp_path/'contrastive.json'
    for k in json.loads(text)['rows']:
        for what,change in dict(err=lambda v: 2*v+1e-3, peak_bytes=lambda v: 2*v, secs=lambda v: [2*s for s in v]).items():
            res = json.loads(text)
            res['rows'][k][what] = change(res['rows'][k][what])
            other.write_text(json.dumps(res))
            with pytest.raises(SystemExit, match='are not those of'): main(check=True, contrastive_numbers=other)

def test_volumes(tmp_path):
    "So it does for each number of the table of volumes"
    text,other = (ROOT/'benchmarks/volumes.json').read_text(),tmp_path/'volumes.json'
    for k in json.loads(text)['rows']:
        for what,change in dict(err=lambda v: [2*e+1e-3 for e in v], peak_bytes=lambda v: 2*v, secs=lambda v: [2*s+1 for s in v], accuracy=lambda v: [a-0.1 for a in v]).items():
            res = json.loads(text)
            res['rows'][k][what] = change(res['rows'][k][what])
            other.write_text(json.dumps(res))
            with pytest.raises(SystemExit, match='are not those of'): main(check=True, volume_numbers=other)
    res = json.loads(text)
    res['err64']['exact'] = 1e-3
    other.write_text(json.dumps(res))
    with pytest.raises(SystemExit, match='are not those of'): main(check=True, volume_numbers=other)

def test_volumes_are_those_of_the_page():
    "What the script trains on, and what it trains, is what the page shows"
    page = '\n'.join(''.join(c['source']) for c in json.loads((ROOT/'nbs/tutorial_volumes.ipynb').read_text())['cells'])+'\n'
    script = (ROOT/'benchmarks/volumes.py').read_text()
    for name in ('volume','label','conv','net'):
        body, = re.findall(rf'^def {name}\(.*\n(?:    .*\n)*', script, re.M)
        assert body in page, name
    numbers, = re.findall(r'^n_train,.*', script, re.M)
    assert numbers in page

@pytest.mark.parametrize('page', PAGES)
def test_no_table(tmp_path, page):
    for p in PAGES: (tmp_path/p).write_text((ROOT/'nbs'/p).read_text() if p!=page else '{"cells": []}')
    with pytest.raises(SystemExit, match=f'{page} has no table'): main(check=True, pages=tmp_path)
