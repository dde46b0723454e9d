"""The site's own part of mkdocs: formulas become MathML, and what lies beside docs is shown or named."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("latex2mathml")
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def formulas(text):
    """Return the formulas of a page, without its code."""
    text = re.sub(r"```.*?```|`[^`]*`|^    .*$", "", text, flags=re.DOTALL | re.MULTILINE)
    shown = re.findall(r"\$\$(.+?)\$\$", text, re.DOTALL)
    return [*shown, *re.findall(r"\$([^$\s][^$]*)\$", re.sub(r"\$\$.+?\$\$", "", text, flags=re.DOTALL))]


def test_every_formula_is_typeset(hooks):
    found = [formula for page in PAGES for formula in formulas(page.read_text(encoding="utf-8"))]
    assert len(found) > 20
    for formula in found:
        made = hooks.on_page_content(rf'<span class="arithmatex">\({formula}\)</span>')
        assert made.startswith("<math")


def test_a_formula_that_is_not_understood_is_an_error(hooks):
    with pytest.raises(ValueError, match="not understood"):
        hooks.on_page_content(r'<div class="arithmatex">\[\nosuchcommand x\]</div>')
    shown = hooks.on_page_content(r'<div class="arithmatex">\[a &lt; b\]</div>')
    assert shown.startswith('<div class="formula"><math')
    assert "&lt;" in shown or "&#x0003C;" in shown


def test_what_lies_beside_docs_is_shown_or_named(hooks):
    page = SimpleNamespace(file=SimpleNamespace(src_uri="methods/svf.md"))
    text = "![a](../../benchmarks/study/results/study.png) [results](../../benchmarks/results) "
    text += "[`tests/x.py`](../../tests/x.py)"
    made = hooks.on_page_markdown(text, page=page)
    assert made == "![a](../images/study.png) results (`benchmarks/results`) `tests/x.py`"


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not link.startswith(("https:", "http:")):
                assert (page.parent / link).exists(), f"{page.name}: {link}"
