"""The page: whole, without a network, and fit for those who do not see or do not use a mouse."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from spectune.pages import html as page
from spectune.pages.html import Column, Shown

VOID = {"meta", "link", "img", "br", "hr", "input", "path", "use", "image", "rect", "line", "circle", "stop"}


class Outline(HTMLParser):
    """Tags with their attributes, checked to be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def all(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


def check_page(text):
    """Check what every report must have."""
    outline = Outline(text)
    assert outline.all("html")[0]["lang"] == "en"
    assert len(outline.all("h1")) == 1
    assert outline.all("h2")
    ids = [attrs["id"] for _, attrs in outline.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    assert all(attrs.get("role") == "img" and attrs.get("aria-label") for attrs in outline.all("svg"))
    assert all(attrs.get("scope") for attrs in outline.all("th"))
    assert len(outline.all("caption")) == len(outline.all("table"))
    links = [v for _, attrs in outline.tags for k, v in attrs.items() if k in ("src", "href", "xlink:href") and v]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert {link[1:] for link in links if link[0] == "#"} <= set(ids)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)
    assert not re.search(r"@import|fetch\(|XMLHttpRequest|url\((?!#)", text)
    return outline


TABLE = page.table(
    "numbers", [Column("name"), Column("size", ".1f")], [["b<i>", 2.0], ["a", 10.0], ["c", None], ["d", -1.0]]
)


def test_a_page_is_whole_and_escapes_what_it_is_given():
    text = page.page("<b>", page.paragraphs(["1 < 2 & 3"]), [("A & B", TABLE)])
    check_page(text)
    assert "<title>&lt;b&gt;</title>" in text
    assert "1 &lt; 2 &amp; 3" in text
    assert "b&lt;i&gt;" in text


def test_a_number_may_be_written_otherwise_than_it_sorts():
    text = page.table("numbers", [Column("name"), Column("size", ".1f")], [["a", Shown(0.5, "50% ± 2")], ["b", 1.0]])
    assert 'data-v="0.5">50% ± 2</td>' in text
    assert 'data-v="1">1.0</td>' in text


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_stands_out_from_paper_in_both_themes():
    text = page.page("x", "", [])
    names = ("paper", "ink", "soft", "tint", "mark")
    themes = list(zip(*(re.findall(rf"--{name}:(#\w+)", text) for name in names), strict=True))
    assert len(themes) == 3  # light, dark by the system, dark by the button
    assert themes[1] == themes[2]
    for paper, ink, soft, tint, mark in themes:
        for background in (paper, tint):
            for color in (ink, soft, mark):
                light, dark = sorted((luminance(color), luminance(background)), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5


@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium here")
def test_in_a_browser_the_table_sorts_and_the_theme_changes(tmp_path):
    presses = (
        "<script>var b=document.querySelectorAll('thead button');b[1].click();"
        "document.title=[].map.call(document.querySelectorAll('tbody th'),e=>e.textContent[0]).join('');"
        "b[1].click();document.title+=[].map.call(document.querySelectorAll('tbody th'),e=>e.textContent[0]).join('');"
        "b[0].click();document.title+=[].map.call(document.querySelectorAll('tbody th'),e=>e.textContent[0]).join('');"
        "document.getElementById('theme').click();</script></body>"
    )
    file = tmp_path / "page.html"
    file.write_text(page.page("x", "", [("A", TABLE)]).replace("</body>", presses), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        ["chromium", *options, file.as_uri()], capture_output=True, text=True, timeout=600, check=True
    )
    assert "<title>abdcdbacabcd</title>" in done.stdout
    assert 'data-theme="dark"' in done.stdout
    assert re.search(r'<th scope="col" aria-sort="ascending">', done.stdout)
