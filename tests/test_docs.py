"The pages lead where they say, and say what the package says"
import ast,re,shutil,sys
import pytest,yaml
from collections import Counter
from configparser import ConfigParser
from fastcore.nbio import read_nb
from pathlib import Path

root = Path(__file__).parent.parent
sys.path.insert(0, str(root/'tools'))
from links import broken,broken_site,slug

def test_links(): assert broken(root)==[]

@pytest.mark.parametrize('file,old,new,why', [
    ('nbs/09_accumulate.ipynb', '](10_microbatch.ipynb)', '](06_microbatches.ipynb)', 'nbs/09_accumulate.ipynb: 06_microbatches.ipynb is not there'),
    ('nbs/limits.ipynb', '#what-each-way-costs', '#what-it-costs', 'nbs/limits.ipynb: why_different.ipynb#what-it-costs: no such heading'),
    ('nbs/09_accumulate.ipynb', '## What cannot be equal', '## What can not be equal', 'nbs/limits.ipynb: 09_accumulate.ipynb#what-cannot-be-equal: no such heading'),
    ('README.md', '](nbs/images/digits.png)', '](images/digits.png)', 'README.md: images/digits.png is not there'),
    ('nbs/_quarto.yml', '- errors.ipynb', '- error.ipynb', 'nbs/_quarto.yml: error.ipynb is not there')])
def test_broken_links(tmp_path, file, old, new, why):
    for d in ('nbs','.github'): shutil.copytree(root/d, tmp_path/d)
    for f in root.glob('*.md'): shutil.copy(f, tmp_path)
    text = (tmp_path/file).read_text(encoding='utf-8')
    assert old in text
    (tmp_path/file).write_text(text.replace(old, new), encoding='utf-8')
    assert why in broken(tmp_path)

def test_broken_site(tmp_path):
    assert broken_site(tmp_path)==[f'{tmp_path}: no pages']
    (tmp_path/'a.html').write_text('<h2 id="here">a</h2><a href="#here"></a><a href="b.html#there"></a><a href="https://x.org/c#d"></a>')
    (tmp_path/'b.html').write_text('<h2 id="there">b</h2><a href="a.html#there"></a><img src="c.png">')
    assert sorted(broken_site(tmp_path))==['b.html: a.html#there: no such anchor', 'b.html: c.png is not there']

def test_slug():
    for s,o in {'How to choose':'how-to-choose', 'This or `AccumulateStep`?':'this-or-accumulatestep', "An epoch's [end](a.ipynb)":'an-epochs-end', '2. Twice':'twice', '4×8':'section'}.items(): assert slug(s)==o

def messages():
    "What the package's errors and warnings, and the reasons that go into them, have as fixed text"
    def parts(o): return [c.value for c in ast.walk(o) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
    for f in sorted((root/'fastai_accum').glob('[a-z]*.py')):
        for o in ast.walk(ast.parse(f.read_text(encoding='utf-8'))):
            if isinstance(o, ast.Raise) and isinstance(o.exc, ast.Call): yield f.name,parts(o.exc)
            elif isinstance(o, ast.Call) and getattr(o.func, 'id', '')=='warn': yield f.name,parts(o)
            elif isinstance(o, ast.Assign) and ast.unparse(o.targets[0])=='e.args': yield f.name,parts(o)
            elif isinstance(o, ast.FunctionDef) and (ast.get_docstring(o) or '').startswith('Why'): yield from ((f.name,parts(r.value)) for r in ast.walk(o) if isinstance(r, ast.Return) and r.value)

def test_errors_are_documented():
    "Each error has four words in a row that no other has, or all that it has, on the page of errors"
    def words(s): return re.findall(r'\w+', s.lower())
    def runs(ps): return {' '.join(w[i:i+4]) for w in map(words, ps) for i in range(max(1, len(w)-3)) if len(w)>1}
    cells = read_nb(root/'nbs/errors.ipynb').cells
    page = ' '.join(words(' '.join([c.source for c in cells] + [''.join(o.get('text', '')) for c in cells for o in c.get('outputs', [])])))
    said = [(f,ps,r) for f,ps in messages() if (r := runs(ps))]
    count = Counter(o for *_,r in said for o in r)
    assert len(said)>50
    missing = [f"{f}: {' ... '.join(ps)}" for f,ps,r in said if not any(o in page for o in ({o for o in r if count[o]==1} or r))]
    assert not missing, '\n'.join(missing)

def test_github():
    "Workflows and templates are YAML with what GitHub asks for, and test the Pythons that the package says it runs on"
    cfg = ConfigParser()
    cfg.read(root/'settings.ini')
    flows = {f.stem:yaml.safe_load(f.read_text()) for f in (root/'.github/workflows').iterdir()}
    for o in flows.values():
        assert o['name'] and o[True] and all(j['runs-on'] and all('uses' in s or 'run' in s for s in j['steps']) for j in o['jobs'].values()) # YAML 1.1 reads `on` as True
    assert flows['deploy'][True]['push']=={'branches':['main']} and flows['deploy']['permissions']=={'contents':'write', 'pages':'write'}
    job,oldest = (flows['test']['jobs'][o] for o in ('test','oldest'))
    assert oldest['steps'][-1]['run']=='make test-oldest' and "fastai==2.7.19 " in (root/'Makefile').read_text() and oldest['steps'][1]['with']['python-version']==cfg['DEFAULT']['min_python']
    assert job['steps'][-1]['run']=='make test' and job['strategy']['matrix']['python']==[cfg['DEFAULT']['min_python'],cfg['DEFAULT']['max_python']]
    for f in (root/'.github/ISSUE_TEMPLATE').iterdir():
        o = yaml.safe_load(f.read_text())
        assert o['name'] and o['description'] and len({b['id'] for b in o['body']})==len(o['body'])
        assert all(b['type'] in ('textarea','input','dropdown','checkboxes') and b['attributes']['label'] for b in o['body'])

def test_plain_pages():
    "What tools/docs.py makes of a page where there is no Quarto"
    pytest.importorskip('nbconvert')
    from docs import body,front
    assert front('---\ntitle: a\n---\n\nb')==({'title':'a'}, 'b') and front('b')==({}, 'b')
    html,heads,text = body('<p>before</p><h2>Go on<a class="anchor-link" href="#Go-on">¶</a></h2>what\n<b>comes</b><h2>Go on</h2><a href="a.ipynb#go-on"></a><a href="https://x.org/a.ipynb"></a><table></table>', {'a.ipynb':'b.html'})
    assert heads==[('h2','go-on','Go on'), ('h2','go-on-1','Go on')]
    assert all(o in html for o in ('<h2 id="go-on">', '<h2 id="go-on-1">', '"b.html#go-on"', '"https://x.org/a.ipynb"', '<div class="wide" tabindex="0"><table>')) and '¶' not in html
    assert text==[('', '', 'before'), ('go-on', 'Go on', 'what comes'), ('go-on-1', 'Go on', '')]

def test_coloured():
    "Differences are marked in the tables of tools/tables.py, and numbers in no other"
    pytest.importorskip('nbconvert')
    from docs import body
    def row(*tds): return f"<table>{''.join(f'<td>{o}</td>' for o in tds)}</table>"
    html = body(f"<!-- summary -->{row('4e-17', '0.07', '0', '1×', '48×', '-', '12 ms (1.1)')}<!-- /summary -->{row('0.5')}", {})[0]
    assert [re.search(f'<td( class="(exact|wrong)")?>{re.escape(o)}</td>', html)[2] for o in ('4e-17', '0.07', '0', '1×', '48×', '-', '12 ms (1.1)', '0.5')]==['exact','wrong','exact','exact','wrong',None,None,None]

def test_badges(tmp_path):
    "With a repository each tutorial has a badge and an installation for Colab, once, and without one it has neither"
    from badges import main
    (tmp_path/'nbs').mkdir()
    olds = {f.name:read_nb(f).cells for f in (root/'nbs').glob('tutorial_*.ipynb')}
    assert len(olds)>10
    for f in olds: shutil.copy(root/'nbs'/f, tmp_path/'nbs')
    def cells(repo):
        (tmp_path/'settings.ini').write_text(f'[DEFAULT]\nrepository = {repo}\n')
        main(tmp_path)
        return {f:read_nb(tmp_path/'nbs'/f).cells for f in olds}
    repo = 'https://github.com/someone/accum'
    first,again = cells(repo),cells(repo)
    for f,cs in first.items():
        assert cs[1].source.endswith(f'(https://colab.research.google.com/github/someone/accum/blob/main/nbs/{f})')
        assert cs[2].source=='#| hide\n#| eval: false\n! [ -e /content ] && pip install -Uqq git+'+repo and cs[2].cell_type=='code'
        assert len({c.id for c in cs})==len(cs) and [c.source for c in cs]==[c.source for c in again[f]]
    bare = cells('')
    assert not any('colab' in c.source for cs in bare.values() for c in cs)
    assert all(len(first[f])==len(bare[f])+2 for f in olds)
    with pytest.raises(SystemExit, match='Colab opens https://github.com/OWNER/NAME only'): cells('https://gitlab.com/someone/accum')
