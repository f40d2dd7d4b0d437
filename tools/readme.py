"Write README.md from nbs/index.ipynb: its text, its code and what the code printed, but no hidden cells; and nbs/changelog.qmd from CHANGELOG.md"
import re
from pathlib import Path
from fastcore.nbio import read_nb

root = Path(__file__).resolve().parent.parent

def block(s, lang=''): return f'```{lang}\n{s.strip()}\n```'

def cell(c):
    "Markdown of cell `c`, '' for one that is hidden"
    src = ''.join(l for l in c.source.splitlines(True) if not l.startswith('#|'))
    if 'hide' in c.directives or not src.strip(): return ''
    if c.cell_type=='markdown': return re.sub(r'\]\((?!\w+:|#)', '](nbs/', src).strip() # links are relative to the notebook
    outs = [''.join(o.get('text', o.get('data', {}).get('text/plain', ''))) for o in c.get('outputs', []) if o['output_type']!='display_data']
    return '\n\n'.join([block(src, 'python')] + [block(o) for o in outs if o.strip()])

md = '\n\n'.join(filter(None, map(cell, read_nb(root/'nbs/index.ipynb').cells)))
note = '<!-- Made from nbs/index.ipynb by `make sync`: edit that. -->'
(root/'README.md').write_text(f'{note}\n\n{md}\n', encoding='utf-8')

log = (root/'CHANGELOG.md').read_text(encoding='utf-8').removeprefix('# Changelog').strip()
(root/'nbs/changelog.qmd').write_text(f'---\ntitle: Changelog\n---\n\n<!-- Made from CHANGELOG.md by `make sync`: edit that. -->\n\n{log}\n', encoding='utf-8')
