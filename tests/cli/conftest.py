"""A tiny model, and adapters that the command line trained on it."""

import json

import pytest

from cli.typed import run
from training.folder import save_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    """Folders of an SVF and a LoRA adapter, trained for two steps by the command line."""
    folder = tmp_path_factory.mktemp("runs")
    data = folder / "data.jsonl"
    data.write_text(
        "\n".join(json.dumps({"prompt": f"say {w}", "completion": f"ahoy {w}"}) for w in ["one", "two"] * 6)
    )
    for name, method in (("pirate", "svf"), ("chef", "lora:rank=2")):
        arguments = ["train", f"model={model}", f"data={data}", f"output={folder / name}", f"method={method}"]
        result = run(*arguments, "--lr", "1e-2", "--max-steps=2", "dtype=fp32", "held_out=0")
        assert "saved Adapter" in result.stderr
    return {name: str(folder / name) for name in ("pirate", "chef")}
