"""The ledger of a measurement: bounded, bound to its header, and exact."""

import json

import numpy as np

from spectune.spectrum.ledger import Ledger, packed, unpacked


def test_a_ledger_of_holes_is_not_held_in_memory(tmp_path, monkeypatch):
    path = tmp_path / "ledger.jsonl"
    book = Ledger(path, {"format": 1})
    book.add("a", {"values": [1]})
    sound = path.stat().st_size
    with path.open("ab") as file:
        file.truncate(3 << 30)
    monkeypatch.setattr("pathlib.Path.read_bytes", None)
    assert list(Ledger(path, {"format": 1}).done) == ["a"]
    assert path.stat().st_size == sound


def test_a_file_under_another_header_is_begun_anew(tmp_path):
    path = tmp_path / "x.jsonl"
    Ledger(path, {"format": 1}).add("a", {"values": 1})
    assert list(Ledger(path, {"format": 1}).done) == ["a"]
    assert Ledger(path, {"format": 2}).done == {}
    assert path.read_text() == json.dumps({"format": 2}) + "\n"


def test_numbers_survive_packing():
    values = np.array([1e-7, 3.25, 1e9])
    np.testing.assert_allclose(unpacked(packed(values)), values, rtol=1e-7)
