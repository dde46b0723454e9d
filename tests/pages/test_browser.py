"""The reports in a browser, narrow and wide: drawn, no wider than the screen, named, legible, and sortable."""

import json
import re
import shutil
import subprocess
from itertools import pairwise
from urllib.parse import unquote

import pytest
from matplotlib import image

from compare.comparison import whole
from spectrum.test_spectrum_run import trained
from spectune.compare.report.document import document
from spectune.compare.report.files import write_report
from spectune.spectrum.run import report
from training.folder import make_model, save_folder

pytestmark = pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium here")

LISTEN = """<script>var errors=[],said=console.error;
addEventListener('error',function(e){errors.push(e.message)});
console.error=function(){errors.push([].join.call(arguments,' '));said.apply(console,arguments)}</script>"""

AUDIT = """<script>(function(){
function all(what){return [].slice.call(document.querySelectorAll(what))}
function shown(e){return e.outerHTML.slice(0,120)}
function text(e){return e.textContent.trim()}
function channels(color){return color.match(/[\\d.]+/g).map(Number)}
function paper(e){for(;e;e=e.parentElement){var c=channels(getComputedStyle(e).backgroundColor);
if(c.length===3||c[3]>0)return c}return [255,255,255]}
function light(c){var l=c.slice(0,3).map(function(v){v/=255;return v<=.03928?v/12.92:Math.pow((v+.055)/1.055,2.4)});
return .2126*l[0]+.7152*l[1]+.0722*l[2]}
function faint(){return all('body *').filter(function(e){return !e.closest('svg,script')&&e.getClientRects().length
&&[].some.call(e.childNodes,function(n){return n.nodeType===3&&n.data.trim()})}).filter(function(e){
var a=light(channels(getComputedStyle(e).color)),b=light(paper(e));
return (Math.max(a,b)+.05)/(Math.min(a,b)+.05)<4.5}).map(shown)}
function order(){return [].map.call(table.tBodies[0].rows,function(r){return r.cells[column].dataset.v})}
all('details').forEach(function(d){d.open=true});
var root=document.documentElement,found={inner:innerWidth,overflow:root.scrollWidth-root.clientWidth,lang:root.lang};
found.levels=all('h1,h2,h3,h4,h5,h6').map(function(h){return +h.tagName[1]});
found.pictures=all('img,svg').length;
found.nameless=all('img,svg').filter(function(e){return !(e.getAttribute('alt')||e.getAttribute('aria-label')
||e.querySelector(':scope>title')||e.closest('[aria-hidden=true]'))}).concat(
all('input,select,textarea,button,summary').filter(function(e){
return !(text(e)||e.getAttribute('aria-label')||e.labels&&e.labels.length)}),
all('h1,h2,h3,th').filter(function(e){return !text(e)})).map(shown);
found.headless=all('table').filter(function(t){return !t.querySelector('thead th[scope=col]')}).map(shown);
found.light=faint();var theme=document.getElementById('theme'),before=paper(document.body);theme.click();
found.dark=faint();found.changed=light(paper(document.body))<light(before);theme.click();
var heading=document.querySelector('thead .n button'),table=heading.closest('table');
var column=[].indexOf.call(heading.parentNode.parentNode.children,heading.parentNode);
found.sorts=text(heading);heading.click();found.down=order();heading.click();found.up=order();
found.errors=errors;
parent.document.getElementById('audit').textContent=encodeURIComponent(JSON.stringify(found))})()</script>"""


# Windows are at least 500 px wide, frames are not.
FRAME = """<body style="margin:0"><pre id="audit" hidden></pre>
<iframe src="page.html" width="{}" height="900" style="border:0"></iframe>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Write both reports, with all that they can show."""
    folder = tmp_path_factory.mktemp("reports")
    write_report(document(*whole()), folder / "compare")
    base = save_folder(folder / "base")
    make_model(num_hidden_layers=3).save_pretrained(folder / "other")
    trained("lora:rank=2", folder / "adapter")
    report(str(base), folder / "spectrum", compare=str(folder / "other"), adapter=folder / "adapter")
    return {"compare": folder / "compare" / "report.html", "spectrum": folder / "spectrum" / "spectrum.html"}


@pytest.fixture(scope="module", params=[("compare", 400), ("compare", 1200), ("spectrum", 400), ("spectrum", 1200)])
def seen(request, pages, tmp_path_factory):
    """Open a report this many pixels wide; return what the page says of itself there, and a picture of it."""
    name, width = request.param
    folder = tmp_path_factory.mktemp("browser")
    text = pages[name].read_text(encoding="utf-8")
    text = text.replace("<head>", f"<head>{LISTEN}", 1).replace("</body>", f"{AUDIT}</body>", 1)
    (folder / "page.html").write_text(text, encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.format(width), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    options += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900"]
    options += [f"--screenshot={folder / 'page.png'}", (folder / "frame.html").as_uri()]
    done = subprocess.run(["chromium", *options], capture_output=True, text=True, timeout=600, check=True)
    found = re.search(r'<pre id="audit" hidden="">([^<]+)</pre>', done.stdout)
    assert found, done.stderr
    return name, width, json.loads(unquote(found[1])), folder / "page.png"


def test_it_is_drawn_and_no_wider_than_the_screen(seen):
    _, width, found, picture = seen
    pixels = image.imread(picture)
    assert pixels.shape[1] == found["inner"] == width
    assert pixels[..., :3].std() > 0.01
    assert found["overflow"] == 0


def test_it_can_be_read_and_heard(seen):
    _, _, found, _ = seen
    assert found["errors"] == []
    assert found["lang"] == "en"
    levels = found["levels"]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert found["pictures"] > 10
    assert found["nameless"] == found["headless"] == []
    assert found["changed"]  # the second theme is darker
    assert found["light"] == found["dark"] == []  # nothing has less than 4.5 to 1


def test_a_heading_that_is_pressed_sorts(seen):
    name, _, found, _ = seen
    assert found["sorts"] == {"compare": "parameters", "spectrum": "matrices"}[name]
    down, up = ([float(value) for value in found[key]] for key in ("down", "up"))
    assert down == sorted(down, reverse=True)
    assert up == sorted(up)
    assert len(up) >= 7
