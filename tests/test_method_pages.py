"""The pages of docs/methods say what the code does."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from spectune.methods import METHODS

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures", DOCS / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_page_with_its_options_and_a_picture(name, figures):
    text = (DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8")
    assert figures.options(METHODS[name]) in text
    assert METHODS[name].paper.removeprefix("arXiv:") in text
    assert (DOCS / "images" / "methods" / f"{name}.svg").is_file()
    assert f"methods/{name}.md" in (DOCS / "methods.md").read_text(encoding="utf-8")


def test_every_option_is_described(figures):
    for method in METHODS.values():
        assert "|  |" not in figures.options(method)


def test_what_is_between_the_marks_is_written_anew(figures, monkeypatch):
    monkeypatch.setattr(figures, "figures", lambda method: "new")
    monkeypatch.setattr(figures, "study", lambda method: "")
    page = "a\n<!-- figures -->\nold\n<!-- end -->\n<!-- study -->\n<!-- end -->\nb\n"
    once = figures.filled(page, METHODS["svf"])
    assert once == "a\n<!-- figures -->\n\nnew\n\n<!-- end -->\n<!-- study -->\n<!-- end -->\nb\n"
    assert figures.filled(once, METHODS["svf"]) == once


def test_the_study_is_read(figures, monkeypatch):
    found = {"method": "svf", "ran": True, "lr": 0.02, "metric": {"mean": 0.75, "low": 0.7, "high": 0.8}}
    report = {
        "label": "reviews",
        "metric": "accuracy",
        "percent": True,
        "methods": [found, {**found, "method": "full"}],
    }
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "claims", SimpleNamespace(reports=lambda: {"reviews": report}))
    assert figures.study(METHODS["svf"]).endswith("| reviews | `svf` | 0.02 | accuracy, % | 75 (70 to 80) |")
    assert figures.study(METHODS["lora"]) == ""


def test_the_choice_of_a_method_goes_by_the_study(figures, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    others = {name: sys.modules.pop(name, None) for name in ("claims", "run")}
    try:
        made = figures.choice()
    finally:
        for name, module in others.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
    page = (DOCS / "choosing.md").read_text(encoding="utf-8")
    assert made in page, "python docs/figures.py"
    assert " / 97,920 | " in made
    assert figures.put("<!-- a -->\nold\n<!-- end -->", "a", "new") == "<!-- a -->\n\nnew\n\n<!-- end -->"


def test_what_came_of_the_ten_files_is_a_table(figures, monkeypatch):
    file = {"what": "chats", "model": "tiny", "max_steps": 2, "before": {"loss": 2.0}, "after": {"loss": 1.0}}
    other = {"what": "none", "model": "tiny", "max_steps": 2, "refused": "error: there is nothing"}
    found = {"files": {"short": file, "empty": other}}
    monkeypatch.setattr(figures, "results", lambda: (lambda name: {"cpu": found}, None))
    assert "| short | chats | tiny | 2 | loss 2.000 to 1.000 | cpu |" in figures.first_hour()
    assert "| empty | none | tiny | 2 | error: there is nothing | cpu |" in figures.first_hour()
    monkeypatch.setattr(figures, "results", lambda: (lambda name: {}, None))
    assert figures.first_hour() == ""
