// What the pages that tools/docs.py makes do by themselves: search, and a hint at tables that scroll
const nav = document.querySelector('nav'), box = nav.querySelector('input'), hits = nav.querySelector('.hits')

if (matchMedia('(min-width: 60rem)').matches) nav.querySelector('details').open = true

function load(then) { // the index, when it is asked for; as a script, since a page that was opened as a file may not fetch
  if (window.INDEX || load.on) return window.INDEX && then()
  load.on = document.head.appendChild(Object.assign(document.createElement('script'), {src: 'search.js', onload: then}))
}

function score([title, , head, text], words) { // 0 if a word is nowhere; words in titles and headings count for more
  let sum = 0
  for (const w of words) {
    const s = 20*title.toLowerCase().includes(w) + 10*head.toLowerCase().includes(w) + Math.min(5, text.toLowerCase().split(w).length-1)
    if (!s) return 0
    sum += s
  }
  const [t, h, all] = [title, head, text].map(s => s.toLowerCase()), phrase = words.join(' ')
  return sum + 30*(h===phrase) + 60*(t===phrase && !h) + 15*(words.length>1 && `${t} ${h} ${all}`.includes(phrase))
}

function marked(text, words) { // what stands around the first word, with all words marked
  const at = Math.max(0, Math.min(...words.map(w => text.toLowerCase().indexOf(w)).filter(i => i>=0), text.length)-60), p = document.createElement('p')
  let s = (at ? '…' : '') + text.slice(at, at+180), i
  while (s) {
    const low = s.toLowerCase(), [from, w] = words.map(w => [low.indexOf(w), w]).filter(o => o[0]>=0).sort((a, b) => a[0]-b[0])[0] ?? [s.length, '']
    p.append(s.slice(0, from), Object.assign(document.createElement('mark'), {textContent: s.slice(from, from+w.length)}))
    s = s.slice(from+w.length)
  }
  return p
}

function search() {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean)
  hits.replaceChildren()
  hits.hidden = !words.length
  if (!words.length || !window.INDEX) return
  const found = INDEX.map(o => [score(o, words), o]).filter(o => o[0]).sort((a, b) => b[0]-a[0]).slice(0, 12)
  for (const [, [title, href, head, text]] of found) {
    const a = Object.assign(document.createElement('a'), {href, textContent: head ? `${title} › ${head}` : title}), li = document.createElement('li')
    a.onclick = () => hits.hidden = true
    li.append(a, marked(text, words))
    hits.append(li)
  }
  if (!found.length) hits.append(Object.assign(document.createElement('li'), {textContent: 'Nothing has all of these words.'}))
}

box.onfocus = () => load(search)
box.oninput = () => load(search)
nav.querySelector('form').onsubmit = e => { e.preventDefault(); hits.querySelector('a')?.click() }
document.onkeydown = e => {
  if (e.key==='Escape') { hits.hidden = true; box.blur() }
  if (e.key==='/' && !/INPUT|TEXTAREA/.test(e.target.tagName)) { e.preventDefault(); box.focus() }
}
document.onclick = e => { if (!nav.contains(e.target)) hits.hidden = true }

function hint() { for (const o of document.querySelectorAll('.wide')) o.classList.toggle('scrolls', o.scrollWidth>o.clientWidth+1) }
addEventListener('resize', hint)
addEventListener('load', hint)
hint()
