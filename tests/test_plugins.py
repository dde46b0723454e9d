"""Users' own modules: how they are named, and what is said where they are not there or fail."""

import re
import sys
from importlib import metadata

import pytest

from spectune import SpectuneError
from spectune.plugins import imported, load, offered

EXAMPLE = "name, in module.py"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != ""])
    names = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - names:
        if name.startswith("house_"):
            del sys.modules[name]


@pytest.mark.parametrize("reference", ["module", "module:", ":name", ""])
def test_a_reference_has_a_module_and_a_name(reference):
    with pytest.raises(SpectuneError, match=re.escape(f"reward {reference!r} is not module:{EXAMPLE}")):
        imported(reference, "reward", EXAMPLE)


def test_a_name_may_lie_within_another(folder):
    (folder / "house_a.py").write_text("class Outer:\n    class Inner:\n        value = 3\n")
    assert imported("house_a:Outer.Inner.value", "reward", EXAMPLE) == 3
    with pytest.raises(SpectuneError, match=r"house_a has no 'Iner'.*Inner"):
        imported("house_a:Outer.Iner", "reward", EXAMPLE)


def test_a_module_that_is_not_there_is_told_from_one_that_it_needs(folder):
    with pytest.raises(SpectuneError, match="there is no module 'house_b' in"):
        imported("house_b:x", "reward", EXAMPLE)
    with pytest.raises(SpectuneError, match="there is no module 'house_b' in"):
        imported("house_b.inner:x", "reward", EXAMPLE)  # the package that is missing, and not what is in it
    (folder / "house_c.py").write_text("import house_missing\n")
    with pytest.raises(SpectuneError, match="house_c needs the module 'house_missing'"):
        imported("house_c:x", "reward", EXAMPLE)


def test_what_a_module_raises_is_told_with_its_line(folder):
    (folder / "house_d.py").write_text("x = 1\n\nraise OSError('no disk')\n")
    with pytest.raises(SpectuneError, match=re.escape("raised OSError: no disk (house_d.py, line 3)")) as caught:
        imported("house_d:x", "reward", EXAMPLE)
    assert isinstance(caught.value.__cause__, OSError)


def test_a_file_that_is_written_after_the_first_look_is_found(folder):
    with pytest.raises(SpectuneError):
        imported("house_e:x", "reward", EXAMPLE)
    (folder / "house_e.py").write_text("x = 5\n")
    assert imported("house_e:x", "reward", EXAMPLE) == 5


def test_an_entry_point_that_fails_is_named_with_what_it_stands_for(folder):
    (folder / "house_f.py").write_text("raise ValueError('broken')\n")
    sys.path.insert(0, str(folder))
    point = metadata.EntryPoint("mine", "house_f:Method", "spectune.methods")
    said = "'mine' of spectune.methods cannot be loaded from house_f:Method: ValueError: broken"
    with pytest.raises(SpectuneError, match=re.escape(said)):
        load(point)
    assert offered("spectune.no_such_group") == {}
