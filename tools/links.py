"Check links: those of notebooks, README and other pages as they stand, or with a folder those of the site that is in it"
import re,sys,yaml
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote,urlsplit
from fastcore.nbio import read_nb

root = Path(__file__).resolve().parent.parent

def slug(s):
    "The anchor that pandoc, and so Quarto, gives a heading"
    s = re.sub(r'\[([^\]]*)\]\([^)]*\)|<[^>]*>', r'\1', s).replace('*', '').lower()
    return re.sub(r'^[\W\d_]+', '', re.sub(r'\s+', '-', re.sub(r'[^\w\s.-]', '', s).strip())) or 'section'

def github_slug(s):
    "The anchor that GitHub gives a heading"
    return re.sub(r'[^\w\s-]', '', re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', s).lower().strip()).replace(' ', '-')

def texts(f):
    "Markdown of file `f`, without its code"
    s = '\n\n'.join(c.source for c in read_nb(f).cells if c.cell_type=='markdown') if f.suffix=='.ipynb' else f.read_text(encoding='utf-8')
    return re.sub(r'^(`{3,}).*?^\1`*$|<!--.*?-->', '', s, flags=re.M|re.S)

@cache
def anchors(f):
    "Anchors of file `f`: its headings, and in a notebook what it exports"
    res,to_slug = {},slug if f.suffix in ('.ipynb','.qmd') else github_slug
    for h in re.findall(r'^#{1,6}\s+(.+?)\s*#*$', texts(f), re.M):
        n = res[s] = res.get(s := to_slug(h), -1)+1
        if n: res[f'{s}-{n}'] = 0
    if f.suffix!='.ipynb': return set(res)
    exported = (c.source for c in read_nb(f).cells if re.search(r'^#\|\s*exports?\b', c.source, re.M))
    return {*res, *(m.lower() for s in exported for m in re.findall(r'^(?:class|def) ([A-Za-z]\w*)', s, re.M))}

def links(f):
    "Where links and images of file `f` lead"
    s = re.sub(r'(`+)(?!`).*?(?<!`)\1(?!`)', lambda m: '`'*len(m[0]), texts(f), flags=re.S)
    return re.findall(r'\]\(\s*<?([^)\s>]+)', s) + re.findall(r'^\[[^\]]+\]:\s*(\S+)', s, re.M) + re.findall(r'<(?:a|img)\b[^>]*?(?:href|src)="([^"]+)"', s)

def pages(o):
    "The files in (a part of) the sidebar, in its order"
    return [o] if isinstance(o, str) else pages(o['contents']) if isinstance(o, dict) else [p for c in o for p in pages(c)]

def broken(root=root):
    "What is wrong with the links of the repository in `root`"
    nbs,res = root/'nbs',[]
    for f in [*sorted(nbs.glob('*.ipynb')), *sorted(nbs.glob('*.qmd')), *sorted(root.glob('*.md')), *sorted((root/'.github').rglob('*.md'))]:
        for link in links(f):
            u = urlsplit(link)
            if u.scheme or u.netloc: continue
            to = (f.parent/unquote(u.path)).resolve() if u.path else f
            if not to.exists(): res.append(f'{f.relative_to(root)}: {link} is not there')
            elif u.fragment and unquote(u.fragment) not in anchors(to): res.append(f'{f.relative_to(root)}: {link}: no such heading')
    bar = pages(yaml.safe_load((nbs/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents'])
    there = {f.name for e in ('ipynb','qmd') for f in nbs.glob(f'*.{e}')}
    return res + [f'nbs/_quarto.yml: {p} is not there' for p in bar if p not in there] + [f'nbs/_quarto.yml: {p} is not in the sidebar' for p in sorted(there-{*bar})]

class _Page(HTMLParser):
    def __init__(self, f):
        super().__init__()
        self.ids,self.links = set(),[]
        self.feed(f.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        for k,v in attrs:
            if k in ('id','name') and v: self.ids.add(v)
            if k in ('href','src') and v: self.links.append(v)

def broken_site(site):
    "What is wrong with the links of the pages in folder `site`"
    site = Path(site).resolve()
    files,res = {f:_Page(f) for f in site.glob('*.html')},[]
    for f,page in files.items():
        for link in page.links:
            u = urlsplit(link)
            if u.scheme or u.netloc or link=='#': continue
            path = unquote(u.path)
            to = ((site/path[1:] if path[0]=='/' else f.parent/path) if path else f).resolve()
            if not to.exists(): res.append(f'{f.name}: {link} is not there')
            elif u.fragment and to in files and unquote(u.fragment) not in files[to].ids: res.append(f'{f.name}: {link}: no such anchor')
    return res if files else [f'{site}: no pages']

if __name__=='__main__': sys.exit('\n'.join(broken_site(sys.argv[1]) if len(sys.argv)>1 else broken()) or None)
