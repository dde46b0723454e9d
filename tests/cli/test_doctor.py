"""`spectune doctor`."""

import json

from cli.typed import run
from spectune.methods import METHODS
from spectune.training import doctor


def test_every_method_works_here():
    document = json.loads(run("doctor", "--json").stdout)
    assert [test["method"] for test in document["tests"]] == list(METHODS)
    assert document["works"], [test for test in document["tests"] if not test["works"]]
    assert document["versions"]["torch"]
    text = doctor.text_of(document)
    assert all(f"{name} " in text for name in METHODS)


def test_what_fails_is_named(monkeypatch):
    def broken(*args):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(doctor, "adapt", broken)
    document = doctor.examine()
    assert not document["works"]
    assert document["tests"][0]["why"] == "RuntimeError: no such kernel"
