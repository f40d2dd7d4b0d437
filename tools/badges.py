"""Give each tutorial a badge that opens it in Colab and a hidden cell that installs the package there, from the `repository` in settings.ini; take both out where it names none

The cells keep their ids from run to run, so that a second one changes nothing.
"""
import json,sys
from configparser import ConfigParser
from hashlib import sha1
from pathlib import Path

root = Path(__file__).resolve().parent.parent
BADGE,INSTALL = '[![Open in Colab](','! [ -e /content ] && pip install'

def cell(kind, name, src):
    res = dict(cell_type=kind, id=sha1(f'{kind} {name}'.encode()).hexdigest()[:8], metadata={}, source=src.splitlines(True))
    return res if kind=='markdown' else {**res, 'execution_count':None, 'outputs':[]}

def badged(cells, name, repo):
    "`cells` of the notebook `name`, its title first, with the badge and the installation after it, if there is a `repo` on GitHub"
    cells = [c for c in cells if not (s := ''.join(c['source'])).startswith(BADGE) and INSTALL not in s]
    if not repo: return cells
    at = repo.removeprefix('https://github.com/')
    return [cells[0],
        cell('markdown', name, f'{BADGE}https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{at}/blob/main/nbs/{name})'),
        cell('code', name, f'#| hide\n#| eval: false\n{INSTALL} -Uqq git+{repo}'), *cells[1:]]

def main(root=root):
    cfg = ConfigParser()
    cfg.read(root/'settings.ini', encoding='utf-8')
    repo = cfg['DEFAULT'].get('repository', '').rstrip('/')
    if repo and not repo.startswith('https://github.com/'): sys.exit(f'settings.ini: `repository`={repo}: Colab opens https://github.com/OWNER/NAME only')
    for f in sorted((root/'nbs').glob('tutorial_*.ipynb')):
        nb = json.loads(f.read_text(encoding='utf-8'))
        cells = badged(nb['cells'], f.name, repo)
        if cells!=nb['cells']: f.write_text(json.dumps({**nb, 'cells':cells}, indent=1, ensure_ascii=False)+'\n', encoding='utf-8')

if __name__=='__main__': main()
