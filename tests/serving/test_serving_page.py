"""The page at / in a browser: drawn, no wider than the screen, named, legible, and driven by the keyboard alone."""

import json
import shutil

import httpx
import pytest
from matplotlib import image

from pages.test_browser import AUDIT
from serving.servers import scripted, served, settled, shelf_of, tiny, words
from spectune.serving.shelf import Shelf

pytest.importorskip("fcntl", reason="the browser is spoken to over pipes that this system has not")
from serving.chromium import Page

pytestmark = pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium here")

# what `AUDIT` finds, but for tables, of which there are none
AUDIT = AUDIT.removeprefix("<script>").removesuffix("</script>")
AUDIT = AUDIT[: AUDIT.index("var heading=")] + "found.errors=[];return found})()"
READY = "document.querySelectorAll('.knob').length==={}"
SAID = "document.getElementById('log-{}').textContent"
IDLE = "!document.getElementById('send').disabled"


@pytest.fixture(scope="module")
def server():
    model = tiny()
    with served(model, words(), shelf_of(model, 3)) as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with Page(tmp_path_factory.mktemp("profile")) as found:
        yield found


def ask(page, text):
    page.run("document.getElementById('ask').focus()")
    page.type(text)
    page.press("Enter", "\r")


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("dark", [False, True])
def test_it_is_drawn_legible_and_named(server, page, tmp_path, width, dark):
    page.said.clear()
    page.open(server.url, width, dark=dark)
    page.until(READY.format(3))
    ask(page, "say ahoy")
    page.until(f"{IDLE}&&document.getElementById('rate-mix').textContent.includes('tokens/s')")
    found = page.run(AUDIT)
    assert found["inner"] == width
    assert found["overflow"] == 0
    assert found["levels"] == [1, 2, 2]
    assert found["nameless"] == []
    assert found["light"] == found["dark"] == []  # nothing has less than 4.5 to 1, in either theme
    assert found["changed"] != dark
    page.picture(tmp_path / "page.png")
    pixels = image.imread(tmp_path / "page.png")[..., :3]
    assert pixels.shape[1] == width
    assert (pixels.mean() < 0.5) == dark
    assert pixels.std() > 0.01
    assert page.said == []
    page.run("localStorage.clear()")  # the theme that was pressed


def test_both_are_asked_and_the_mixture_is_what_the_sliders_say(server, page):
    page.open(server.url)
    page.until(READY.format(3))
    page.run("document.getElementById('tokens').value=9;document.querySelector('[data-name=a1]').focus()")
    page.press("Home")
    for _ in range(30):
        page.press("ArrowRight")
    assert page.run("document.getElementById('head-mix').textContent") == "a0:1+a1:0.5"
    ask(page, "say ahoy")
    page.until(IDLE)
    talk = {"messages": [{"role": "user", "content": "say ahoy"}], "temperature": 0, "max_tokens": 9}
    for which, model in (("base", "base"), ("mix", "a0:1+a1:0.5")):
        reply = httpx.post(f"{server.url}/v1/chat/completions", json={"model": model, **talk}).json()
        assert page.run(SAID.format(which)) == "say ahoy" + reply["choices"][0]["message"]["content"]
    assert page.run("document.getElementById('heat-told').textContent") == "a0 1.00, a1 0.50"
    assert page.run("document.querySelectorAll('#heat i').length") == 2 * 2  # adapters x blocks
    ask(page, "say more")  # what was said is part of what is asked next
    page.until(IDLE)
    (log,) = {page.run(f"document.querySelectorAll('#log-{which} p').length") for which in ("base", "mix")}
    assert log == 4


def test_escape_stops_and_the_rows_are_free(page):
    model, tokenizer = scripted(seconds=0.005)
    with served(model, tokenizer) as found:
        page.open(found.url)
        page.until("!document.getElementById('none').hidden")
        page.run("document.getElementById('tokens').value=3000")
        model.script[-1] = 5  # no end
        ask(page, "say ahoy")
        page.until(f"{SAID.format('base')}.length>10")
        page.press("Escape")
        page.until(IDLE)
        assert page.run("document.getElementById('rate-base').textContent") == "stopped"
        assert settled(found.engine)


def test_everything_is_reached_by_the_tab_key(server, page):
    page.open(server.url)
    page.until(READY.format(3))
    reached = []
    for _ in range(20):
        page.press("Tab")
        reached.append(page.run("document.activeElement.id||document.activeElement.tagName"))
    for wanted in ("theme", "knob-1", "knob-3", "SUMMARY", "reset", "log-base", "log-mix", "ask", "send", "anew"):
        assert wanted in reached


def test_what_a_screen_reader_is_told(server, page):
    page.open(server.url)
    page.until(READY.format(3))
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    told = {(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"]}
    wanted = [("heading", "Spectune · tiny"), ("slider", "a0"), ("slider", "a2"), ("button", "Send")]
    wanted += [("textbox", "Your message"), ("log", "what the base says"), ("log", "what the mixture says")]
    for one in wanted:
        assert one in told, json.dumps(sorted(told))


def test_a_key_is_asked_for_and_errors_are_said(page):
    model = tiny()
    with served(model, words(), shelf_of(model, 1), key="open") as found:
        page.open(found.url)
        page.until("!document.getElementById('key-ask').hidden")
        assert "API key" in page.run("document.getElementById('trouble').textContent")
        page.run("document.getElementById('key').focus()")
        page.type("open")
        page.press("Tab")
        page.until(READY.format(1))
        assert page.run("document.getElementById('trouble').hidden")
        ask(page, "one " * 300)
        page.until(IDLE + f"&&{SAID.format('mix')}.includes('context holds 256')")


def test_many_adapters_can_be_found(page):
    model = tiny()
    shelf = Shelf(model)
    for i, version in enumerate(shelf_of(model, 1).versions * 14):
        shelf._versions[f"voice-{i}"] = type(version)(f"voice-{i}", "made", about=version.about, slot=version.slot)
    with served(model, words(), shelf) as found:
        page.open(found.url)
        page.until(READY.format(14))
        page.run("document.getElementById('filter').focus()")
        page.type("-13")
        shown = "[...document.querySelectorAll('.knob:not([hidden]) input')].map(r=>r.dataset.name).join()"
        assert page.run(shown) == "voice-0,voice-13"  # the first is in the mixture
