"""A report as one HTML page that asks nothing of the network: text, tables that sort, pictures, light and dark."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

INK = "#0a0b0c"  # what pictures draw text and axes with; it becomes the page's own colour of text


class Column(NamedTuple):
    """A column of a table.

    Args:
        label: its heading.
        form: format of its numbers, as for `format`; None for text.
        note: what it means, shown on hovering and read out.
    """

    label: str
    form: str | None = None
    note: str = ""


class Shown(NamedTuple):
    """A number of a table that is written otherwise than by its column's format.

    Args:
        value: which it is sorted by.
        text: what is read.
    """

    value: float
    text: str


def page(title: str, lead: str, sections: Iterable[tuple[str, str]]) -> str:
    """Return a whole page.

    Args:
        title: plain text.
        lead: HTML under the title: the answer.
        sections: heading (plain text) and HTML of each.
    """
    body = "\n".join(f"<section>\n<h2>{escape(heading)}</h2>\n{html}\n</section>" for heading, html in sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<header><h1>{escape(title)}</h1><button id="theme" type="button">dark</button></header>\n'
        f'<main>\n<div class="lead">{lead}</div>\n{body}\n</main>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n'
    )


def paragraphs(texts: Iterable[str]) -> str:
    """Return plain sentences as paragraphs."""
    return "\n".join(f"<p>{escape(text)}</p>" for text in texts)


def tiles(pairs: Iterable[tuple[str, str]]) -> str:
    """Return key figures, each with what it is."""
    inner = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for value, label in pairs)
    return f'<dl class="tiles">{inner}</dl>'


def figures(pictures: Iterable[tuple[str, str, str]], *, wide: bool = False, size: str = "") -> str:
    """Return pictures beside each other, as many as fit.

    Args:
        pictures: an inline SVG, what it shows for those who do not see it, and a caption (may be empty) for each.
        wide: each takes the page's whole width, and scrolls on a narrow one.
        size: "large", of which two fit beside each other, or "small", of which two do on a phone.
    """
    inner = []
    for i, (svg, alt, caption) in enumerate(pictures):
        kept = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" ', 1)
        under = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        box = f'<div class="scroll" tabindex="0" role="region" aria-label="picture {i + 1}">' if wide else "<div>"
        inner.append(f"<figure>{box}{kept}</div>{under}</figure>")
    return f'<div class="{"wide" if wide else f"grid {size}".rstrip()}">{"".join(inner)}</div>'


def table(caption: str, columns: Sequence[Column], rows: Iterable[Sequence[object]]) -> str:
    """Return a table that sorts by the column whose heading is pressed.

    Args:
        caption: plain text.
        columns: the columns.
        rows: values, a number may be a `Shown`; None is a dash.  The first of each row is its heading.
    """
    heads = "".join(
        f'<th scope="col"{" class=n" if c.form else ""}><button type="button" title="{escape(c.note)}">'
        f"{escape(c.label)}</button></th>"
        for c in columns
    )
    lines = "\n".join(
        f"<tr>{''.join(_cell(c, v, i == 0) for i, (c, v) in enumerate(zip(columns, row, strict=True)))}</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>"
    )


def details(summary: str, html: str) -> str:
    """Return HTML that is folded until asked for."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def inline_svg(text: str, prefix: str) -> str:
    """Return matplotlib's SVG for use in a page: no header, ids of its own, and the page's colours and type.

    Args:
        text: what `savefig` wrote.
        prefix: that no other picture on the page has.
    """
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\b(id=")', rf"\g<1>{prefix}-", text)
    text = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r'<svg ([^>]*?)\bwidth="[^"]*"', r"<svg \1", text.replace("\n", " "), count=1)
    text = re.sub(r'<svg ([^>]*?)\bheight="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r"(font: [^;\"']*?px )[^;\"]*", r"\1system-ui, sans-serif", text)
    return text.replace(INK, "currentColor")


def code(text: str) -> str:
    """Return a command or a file to be copied."""
    return f"<pre>{escape(text)}</pre>"


def runs(pieces: Iterable[tuple[str, bool]]) -> str:
    """Return a text as it stands, some of its pieces marked."""
    return "<pre>" + "".join(f"<mark>{escape(t)}</mark>" if marked else escape(t) for t, marked in pieces) + "</pre>"


def _cell(column: Column, value: object, first: bool) -> str:
    tag, scope = ("th", ' scope="row"') if first else ("td", "")
    if column.form is None and len(str(value)) > 40:
        scope += " class=t"
    if column.form is None:
        return f"<{tag}{scope}>{escape('' if value is None else str(value))}</{tag}>"
    if value is None:
        return f'<{tag}{scope} class=n data-v=""><span aria-label="none">-</span></{tag}>'
    number, text = value if isinstance(value, Shown) else (value, format(value, column.form))
    return f'<{tag}{scope} class=n data-v="{number:.6g}">{escape(text)}</{tag}>'


_STYLE = """
:root{--paper:#ffffff;--ink:#1b1f24;--soft:#515a64;--line:#d5dae0;--tint:#f3f5f8;--mark:#0b5cad}
@media (prefers-color-scheme:dark){:root:not([data-theme=light]){--paper:#14171b;--ink:#e6e9ed;--soft:#a8b1bb;
--line:#333a42;--tint:#1d2227;--mark:#7fb8f5;color-scheme:dark}}
:root[data-theme=dark]{--paper:#14171b;--ink:#e6e9ed;--soft:#a8b1bb;--line:#333a42;--tint:#1d2227;--mark:#7fb8f5;
color-scheme:dark}
:root[data-theme=light]{color-scheme:light}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
header,main{max-width:72rem;margin:0 auto;padding:0 1rem}
header{display:flex;gap:1rem;align-items:baseline;justify-content:space-between;padding-top:1.5rem}
h1{font-size:1.6rem;line-height:1.25;margin:0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.6rem 0 .6rem;padding-top:.8rem;border-top:1px solid var(--line)}
p{max-width:46rem;margin:.6rem 0}
.lead p:first-child{font-size:1.15rem}
button{font:inherit;color:inherit;background:var(--tint);border:1px solid var(--line);border-radius:6px;
padding:.15rem .7rem;cursor:pointer;white-space:nowrap}
:focus-visible{outline:2px solid var(--mark);outline-offset:2px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.6rem;margin:1.2rem 0}
.tiles div{background:var(--tint);border-radius:8px;padding:.6rem .8rem;display:flex;flex-direction:column-reverse;
justify-content:flex-end}
.tiles dt{color:var(--soft);font-size:.85rem;line-height:1.3}
.tiles dd{margin:0;font-size:1.35rem;font-variant-numeric:tabular-nums}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr));gap:1.2rem}
.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,15rem),1fr));gap:.4rem 1rem}
.large{grid-template-columns:repeat(auto-fill,minmax(min(100%,28rem),1fr))}
figure{margin:.8rem 0}
figcaption{color:var(--soft);font-size:.9rem;max-width:46rem}
svg{display:block;width:100%;height:auto}
.wide svg{min-width:40rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums;min-width:100%}
caption{text-align:left;color:var(--soft);padding:.3rem 0}
th,td{padding:.3rem .6rem;border-bottom:1px solid var(--line);text-align:left;white-space:nowrap;font-weight:400}
.n{text-align:right}
td.t{white-space:normal;min-width:16rem}
thead th{background:var(--tint);padding:.1rem .2rem}
thead button{background:none;border:0;font-weight:600;padding:.3rem .4rem}
thead th[aria-sort=ascending] button::after{content:" \\2191"}
thead th[aria-sort=descending] button::after{content:" \\2193"}
tbody th{position:sticky;left:0;background:var(--paper)}
tbody tr:hover,tbody tr:hover th{background:var(--tint)}
@media (max-width:40rem){.small{grid-template-columns:1fr 1fr}
tbody th{white-space:normal;min-width:7rem;max-width:9rem;overflow-wrap:anywhere}}
details{margin:.8rem 0}
mark{background:none;color:var(--mark);font-weight:600;text-decoration:underline;text-underline-offset:.2em}
summary{cursor:pointer;color:var(--mark)}
code,pre{font:.88rem/1.5 ui-monospace,monospace;background:var(--tint);border-radius:4px;padding:.1rem .3rem}
pre{padding:.7rem .9rem;white-space:pre-wrap;overflow-wrap:anywhere}
@media print{header button,summary{display:none}}
"""

_SCRIPT = """
(function(){
var root=document.documentElement,button=document.getElementById('theme');
function stored(value){try{if(value===undefined)return localStorage.getItem('theme');
localStorage.setItem('theme',value)}catch(e){return null}}
function dark(){var t=root.dataset.theme;return t?t==='dark':matchMedia('(prefers-color-scheme: dark)').matches}
function label(){var d=dark();button.textContent=d?'\\u2600 light':'\\u263e dark';
button.setAttribute('aria-label',d?'switch to the light theme':'switch to the dark theme')}
var kept=stored();if(kept)root.dataset.theme=kept;label();
button.addEventListener('click',function(){root.dataset.theme=dark()?'light':'dark';stored(root.dataset.theme);label()});
matchMedia('(prefers-color-scheme: dark)').addEventListener('change',label);
document.querySelectorAll('thead button').forEach(function(b){b.addEventListener('click',function(){
var th=b.parentNode,heads=[].slice.call(th.parentNode.children),i=heads.indexOf(th),numeric=th.className==='n';
var down=th.getAttribute('aria-sort')==='descending'||(!th.hasAttribute('aria-sort')&&!numeric);
heads.forEach(function(h){h.removeAttribute('aria-sort')});
th.setAttribute('aria-sort',down?'ascending':'descending');
var body=th.closest('table').tBodies[0],rows=[].slice.call(body.rows);
function key(r){var c=r.cells[i];return numeric?(c.dataset.v===''?null:+c.dataset.v):c.textContent}
rows.sort(function(x,y){var a=key(x),b=key(y);if(a===null||b===null)return(a===null)-(b===null);
var order=numeric?a-b:a.localeCompare(b,undefined,{numeric:true});return down?order:-order});
rows.forEach(function(r){body.appendChild(r)})})});
})();
"""
