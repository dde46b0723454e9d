"""Documents of others: values, or one sentence."""

import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from spectune import Adapter, reading
from spectune.errors import SpectuneError

BOMB = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" if i else "a0: &a0 [x]\n" for i in range(9))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 100_000, "not valid JSON"),
        ("[" * 100 + "]" * 100, "too deep"),
        ('{"a": 1, "b": {"a": 1, "a": 2}}', "key 'a' twice"),
        ("1" * 5000, "not valid JSON"),
        (r'["\ud800"]', "half a character"),
        (r'{"\udfff": 1}', "half a character"),
        ("", "not valid JSON"),
        ("[" + "0," * 1_100_000 + "0]", "too often"),
    ],
)
def test_json_that_is_refused(text, told):
    with pytest.raises(SpectuneError, match=f"the file.*{told}"):
        reading.parse_json(text, "the file")


@pytest.mark.parametrize(
    "text",
    [
        "a: &a {x: *a}",
        BOMB,
        "a: 1\na: 2",
        "{? [1] : 2}",
        "!!python/object/apply:os.system [ls]",
        "!!int x",
        "!!timestamp 2020-13-45",
        "a: 2020-13-45",
        "!!binary x",
        "- " * 3000,
        "a: !!float x",
        "\t",
        "1" * 5000,
    ],
)
def test_yaml_that_is_refused(text):
    with pytest.raises(SpectuneError, match="the file"):
        reading.parse_yaml(text, "the file")


def test_yaml_may_repeat_by_name():
    assert reading.parse_yaml("a: &x {lr: 1}\nb: {<<: *x, k: 2}", "f") == {"a": {"lr": 1}, "b": {"lr": 1, "k": 2}}


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.one_of(
        st.text(), st.binary().map(lambda b: b.decode("latin-1")), st.from_regex(r"[\[\]{}:,\"&*!?a-c0-9 \n-]{0,40}")
    )
)
def test_anything_is_a_value_or_a_sentence(text):
    for parse in (reading.parse_json, reading.parse_yaml):
        with suppress(SpectuneError):
            parse(text, "the file")


@pytest.mark.skipif(os.name == "nt", reason="there are no pipes by name")
def test_pipes_devices_and_sparse_giants_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    for path in (tmp_path / "pipe", tmp_path / "sparse", tmp_path, tmp_path / "none", "/dev/zero"):
        with pytest.raises(SpectuneError, match=str(path)):
            reading.read_json(type(tmp_path)(path))
    (tmp_path / "latin").write_bytes(b"\xe9")
    with pytest.raises(SpectuneError, match="not text in UTF-8"):
        reading.read_json(tmp_path / "latin")


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/../../x",
        "/etc/passwd",
        "C:\\x",
        "\\\\host\\x",
        "..\\x",
        "",
        5,
        None,
        "a\0b",
        "a/" + "é" * 128,
        "\ud800x",
    ],
)
def test_a_name_leads_nowhere_else(tmp_path, name):
    with pytest.raises(SpectuneError, match="the index names"):
        reading.inside(tmp_path, name, "the index")
    assert reading.inside(tmp_path, "a/b.safetensors", "the index") == tmp_path / "a" / "b.safetensors"


def test_tensors_are_opened_in_one_place():
    """A pipe in place of a file of tensors is waited for without an end by whoever opens it unasked."""
    source = Path(reading.__file__).parent
    opening = {path.name for path in source.rglob("*.py") if "safe_open(" in path.read_text(encoding="utf-8")}
    assert opening == {"reading.py"}


def test_two_tensors_by_one_name_are_refused(tmp_path):
    one = '"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]}'
    header = "{" + one + "," + one.replace("[2,1]", "[1,2]") + "}"
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    with pytest.raises(SpectuneError, match="has the key 'a' twice"):
        reading.open_tensors(tmp_path / "x")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_tensors_of_more_dimensions_than_pytorch_computes_with_are_refused(tmp_path, file):
    path, key = tmp_path / file, "base_model.model.up.lora_A.weight"
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["up"]}'
    )
    for dims in (64, 65):
        tensors = {key: torch.ones(1).view([1] * dims)}
        save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
        with pytest.raises(SpectuneError) as error:
            Adapter.from_peft(tmp_path, allow_bin=True)
        assert ("64 dimensions" in str(error.value)) == (dims > 64)
