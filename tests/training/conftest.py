"""What runs of these tests are given, where a test has no settings of its own."""

import json

import pytest

from training.folder import save_folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def settings(tmp_path, model_folder):
    data = tmp_path / "data.jsonl"
    numbers = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    asked = ("what is", "say", "what is the", "say the")
    records = [{"prompt": f"{ask} {n}", "completion": f"ahoy {n}"} for ask in asked for n in numbers]
    data.write_text("\n".join(map(json.dumps, records)))
    return [f"model={model_folder}", f"data={data}", "held_out=0.25", "dtype=fp32", "device=cpu", "save_steps=5"]
