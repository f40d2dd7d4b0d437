"Make browsable pages in `_docs` from the notebooks as nbdev processes them for Quarto, where there is no Quarto"
import json,re,shutil,yaml
from bs4 import BeautifulSoup,Comment,NavigableString
from configparser import ConfigParser
from html import escape
from nbconvert import HTMLExporter
from nbconvert.filters.markdown import markdown2html
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from pathlib import Path
from pygments.formatters import HtmlFormatter
import nbformat
from links import pages,root,slug

def front(s):
    "The front matter of a page and what follows it"
    m = re.match(r'---\n(.*?)\n---\s*', s, re.S)
    return (yaml.safe_load(m[1]),s[m.end():]) if m else ({},s)

def read(f):
    "Front matter and HTML of a processed page"
    if f.suffix!='.ipynb':
        d,s = front(f.read_text(encoding='utf-8'))
        return d,markdown2html(s)
    nb = nbformat.read(f, 4)
    d = front(nb.cells.pop(0).source)[0] if nb.cells[0].cell_type=='raw' else {}
    for c in nb.cells:
        c.metadata.clear() # and the mark: nbdev's own, that notebooks may not have
        c.pop('has_sd', None)
        if c.cell_type=='code' and re.search(r'^#\|\s*echo:\s*false', c.source, re.M): c.metadata['transient'] = {'remove_source':True}
        c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
    conv = HTMLExporter(template_name='basic', exclude_input_prompt=True, exclude_output_prompt=True)
    return d,conv.from_notebook_node(nb)[0]

def coloured(soup):
    "Mark what is exact and what is wrong in the tables of differences that tools/tables.py wrote"
    for c in soup.find_all(string=lambda s: isinstance(s, Comment) and s.strip() in ('summary','exactness','few_learners','learners','contrastive')):
        table = c.find_next('table')
        for td in table.select('td'):
            if m := re.fullmatch(r'([\d.]+(?:e-?\d+)?)(×?)', td.get_text().strip()): td['class'] = 'exact' if m[0]=='1×' or not m[2] and float(m[1])<1e-7 else 'wrong'
        table.insert_after(BeautifulSoup('<p class=key><span class=exact>the same</span>, but for rounding <span class=wrong>another run</span></p>', 'html.parser'))

def sections(soup):
    "The text of a page by its headings, for the search: lists of an anchor, its heading and what follows it"
    res = [['', '', []]]
    for o in soup.descendants:
        if o.name in ('h2','h3','h4'): res.append([o['id'], o.get_text(), []])
        elif type(o) is NavigableString and not o.find_parent(('h1','h2','h3','h4','script','style')): res[-1][2].append(o)
    return [(i, t, re.sub(r'\s+', ' ', ''.join(s)).strip()) for i,t,s in res]

def body(html, names):
    "`html` with pandoc's anchors, links to pages in place of notebooks, and what is wide in a box that scrolls; its headings; its text for the search"
    soup,seen,heads = BeautifulSoup(html, 'html.parser'),{},[]
    coloured(soup)
    for a in soup.select('a.anchor-link'): a.decompose()
    for h in soup.select('h1,h2,h3,h4'):
        n = seen[s] = seen.get(s := slug(h.get_text()), -1)+1
        h['id'] = f'{s}-{n}' if n else s
        if h.name in ('h2','h3'): heads.append((h.name, h['id'], h.get_text()))
    text = sections(soup)
    for h in soup.select('h1,h2,h3,h4'):
        a = soup.new_tag('a', href=f"#{h['id']}", attrs={'class':'anchor','aria-label':'link to this heading'})
        a.string = '#'
        h.append(a)
    for a in soup.select('a[href]'):
        to,hash,at = a['href'].partition('#')
        a['href'] = names.get(to, to)+hash+at
    for t in soup.select('table'): t.wrap(soup.new_tag('div', attrs={'class':'wide','tabindex':'0'}))
    for i in soup.select('img'): i['loading'] = 'lazy'; i['alt'] = i.get('alt') if i.get('alt') not in (None,'','No description has been provided for this image') else 'picture'
    return str(soup),heads,text

def nav(contents, here, names, titles, heads):
    "The sidebar, with the headings of the page that is open"
    def item(o):
        if not isinstance(o, str): return f"<li class=section>{escape(o['section'])}<ul>{''.join(map(item, o['contents']))}</ul></li>"
        if o!=here: return f'<li><a href="{names[o]}">{escape(titles[o])}</a></li>'
        on = ''.join(f'<li><a href="#{i}">{escape(t)}</a></li>' for h,i,t in heads if h=='h2')
        return f'<li><a href="{names[o]}" aria-current=page>{escape(titles[o])}</a>{f"<ul class=toc>{on}</ul>" if on else ""}</li>'
    return f"<ul>{''.join(map(item, contents))}</ul>"

_mathjax = '<script defer src="https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-mml-chtml.js"></script><script>MathJax={tex:{inlineMath:[["$","$"],["\\\\(","\\\\)"]]}}</script>'
_page = '''<!doctype html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1"><meta name=color-scheme content="light dark">
<title>{title}</title><meta name=description content="{desc}"><link rel=stylesheet href=docs.css>{math}<script defer src=docs.js></script></head>
<body><nav><form role=search><input type=search placeholder="Search (press /)" aria-label="Search all pages" autocomplete=off></form><ul class=hits aria-live=polite hidden></ul><details><summary>{site}</summary>{nav}</details></nav><main><h1>{head}</h1>{lead}<p class=source>{source}</p>{body}<footer>{before}{after}</footer></main></body></html>
'''

def source(f, out, repo):
    "Links to what page `f` was made from: in `repo`, or where none is known as copies in `out`"
    nb,res = root/'nbs'/f,[]
    mod = nb.suffix=='.ipynb' and re.search(r'^#\|\s*default_exp\s+(\w+)', '\n'.join(c.source for c in nbformat.read(nb, 4).cells), re.M)
    for p,name in [(nb,'this page as a notebook' if nb.suffix=='.ipynb' else 'this page as text')] + ([(root/'fastai_accum'/f'{mod[1]}.py','the module')] if mod else []):
        to = p.relative_to(root).as_posix()
        if repo: to = f'{repo}/blob/main/{to}'
        else: (out/to).parent.mkdir(exist_ok=True); shutil.copy(p, out/to)
        res.append(f'<a href="{to}">{name}</a>')
    return ' · '.join(res + ([f'<a href="{repo}">repository</a>'] if repo else []))

def main():
    cfg,own = get_config(),ConfigParser()
    own.read(root/'settings.ini')
    repo = own['DEFAULT'].get('repository', '').rstrip('/')
    refresh_quarto_yml()
    proc,out = proc_nbs(cfg.nbs_path),cfg.doc_path
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(proc/'images', out/'images')
    light,dark = (HtmlFormatter(style=o).get_style_defs('.highlight') for o in ('default','github-dark'))
    (out/'docs.css').write_text(f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n{(root/'tools/docs.css').read_text(encoding='utf-8')}", encoding='utf-8')
    shutil.copy(root/'tools/docs.js', out)
    bar = yaml.safe_load((proc/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    docs = {f:read(proc/f) for f in pages(bar)}
    names = {f:d.get('output-file', Path(f).with_suffix('.html').name) for f,(d,_) in docs.items()}
    index,titles,order = [],{f:d.get('title', Path(f).stem) for f,(d,_) in docs.items()},list(docs)
    for i,(f,(d,html)) in enumerate(docs.items()):
        text,heads,parts = body(html, names)
        index += [(titles[f], f'{names[f]}#{at}' if at else names[f], head, s) for at,head,s in parts if s or at]
        def link(j, s): return f'<a href="{names[order[j]]}">{s.format(escape(titles[order[j]]))}</a>' if 0<=j<len(order) else '<span></span>'
        desc = d.get('description', '')
        lead = f"<p class=lead>{BeautifulSoup(markdown2html(desc), 'html.parser').p.decode_contents()}</p>" if desc else ''
        title = titles[f] if f=='index.ipynb' else f'{titles[f]} – {cfg.title}'
        (out/names[f]).write_text(_page.format(title=escape(title), desc=escape(desc), site=escape(cfg.title), nav=nav(bar, f, names, titles, heads), head=escape(titles[f]), lead=lead,
            source=source(f, out, repo), body=text, before=link(i-1, '← {}'), after=link(i+1, '{} →'), math=_mathjax if re.search(r'\$[^$\n]+\$', text) and '$$' in text else ''), encoding='utf-8')
    (out/'search.js').write_text(f'window.INDEX = {json.dumps(index, ensure_ascii=False, separators=(",", ":"))}\n', encoding='utf-8')
    print(f'{len(docs)} pages in {out}')

if __name__=='__main__': main()
