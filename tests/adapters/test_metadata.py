"""What is stored beside an adapter's tensors comes back as it was, and what is damaged is told of."""

import base64
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from spectune import SpectuneError
from spectune.adapters import fingerprint
from spectune.adapters.folder import WEIGHTS, Unwritten
from spectune.adapters.labels import NUMBER, ONE, SEVERAL, Labels
from spectune.adapters.metadata import More, as_metadata, read_more

SKETCH = torch.linspace(-1, 1, 3 * fingerprint.PROBES**2).reshape(fingerprint.WEIGHT_SHAPE)


def written(folder, metadata):
    save_file({"a": torch.zeros(1)}, folder / WEIGHTS, metadata)
    return read_more(folder)


def same(found, labels, architecture, base, quantize):
    assert (found.labels, found.architecture, found.quantize) == (labels, architecture, quantize)
    assert found.base.keys() == base.keys()
    return all(torch.equal(found.base[name], sketch) for name, sketch in base.items())


def test_everything_comes_back(tmp_path):
    said = Labels(["a", "ü", "c"]), ("BertModel", "transformers"), {"x.0": SKETCH, "y": -SKETCH}, "nf4"
    metadata = as_metadata(*said)
    assert same(written(tmp_path, metadata), *said)
    assert same(read_more(Unwritten(tmp_path, {}, {}, metadata)), *said)  # of what is yet to be written


def test_nothing_is_stored_of_nothing(tmp_path):
    assert as_metadata(None, None, {}) == {}
    assert written(tmp_path, {"format": "pt"}) == More()
    assert written(tmp_path, None) == More()
    assert read_more(tmp_path / "nowhere") == More()
    assert read_more(Unwritten(tmp_path, {}, {}, None)) == More()


@pytest.mark.parametrize(("names", "problem"), [(["a", "b"], ONE), (["a", "b"], SEVERAL), (["score"], NUMBER)])
def test_labels_are_read_as_they_were(tmp_path, names, problem):
    found = written(tmp_path, as_metadata(Labels(names, problem), None, {})).labels
    assert (tuple(found), found.problem) == (tuple(names), problem)


def test_plain_names_are_labels_of_which_one_is_right(tmp_path):
    found = written(tmp_path, as_metadata(["a", "b"], None, {})).labels
    assert (found, found.problem) == (Labels(["a", "b"]), ONE)


def test_a_problem_that_a_later_version_knows_is_left_out(tmp_path):
    metadata = {"labels": '["a", "b"]', "problem_type": '["ranking"]'}
    assert written(tmp_path, metadata).labels.problem == ONE


def test_sketches_are_little_endian_floats():
    (code,) = json.loads(as_metadata(None, None, {"x": SKETCH})["base"]).values()
    assert np.array_equal(np.frombuffer(base64.b64decode(code), "<f4"), SKETCH.numpy().ravel())
    (code,) = json.loads(as_metadata(None, None, {"x": SKETCH.to("meta")})["base"]).values()
    assert not any(base64.b64decode(code))  # of a base whose weights were not at hand


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"labels": "[1"}, "'labels' in .* is not valid JSON"),
        ({"labels": "5"}, "labels"),
        ({"architecture": '["one"]'}, "architecture"),
        ({"base": '{"x": "AAAA"}'}, "base"),
        ({"base": '{"x": "?"}'}, "base"),
        ({"quantize": '"nf4"'}, "quantize"),
    ],
)
def test_what_is_damaged_is_told_of(tmp_path, metadata, message):
    with pytest.raises(SpectuneError, match=message):
        written(tmp_path, metadata)
