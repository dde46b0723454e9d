"""docs/engines.md says what is exported today."""

from engines_page import METHODS, ROOT, page


def test_the_page_says_what_is_exported():
    there = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8").splitlines()
    assert set(page(["lora:rank=4", "svf", "dora:inner=lora,rank=4"]).splitlines()) <= set(there)
    assert all(sum(line.startswith(f"|{title}|") for line in there) == 1 for title in METHODS.values())
