"""What works without the packages that not every machine has, and what is said where one is needed."""

import subprocess
import sys

import pytest

from spectune.errors import SpectuneError, need

# where a GPU is there is often little else: no data sets, no trainer of others, no configuration
ABSENT = ["datasets", "trl", "gguf", "peft", "ray", "sklearn", "matplotlib", "typer"]


def run(code, absent):
    """Run code in a process where importing some packages fails, as it does where they are not installed."""
    lines = ["import sys", f"sys.modules.update(dict.fromkeys({absent!r}))", code]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_adapters_need_none_of_them():
    code = """
import tempfile
import torch
import spectune
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
model = LlamaForCausalLM(config)
ids = torch.arange(12).reshape(2, 6)
for name, method in {"a": "pissa:rank=4", "b": "dora:inner=svft,pattern=random,width=2"}.items():
    spectune.adapt(model, method, name=name)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
with tempfile.TemporaryDirectory() as folder:
    spectune.extract(model, "a").save(folder)
    spectune.attach(model, spectune.Adapter.load(folder), name="c")
with spectune.route(model, ["a", {"b": 0.5, "c": 0.5}]), torch.no_grad():
    model(ids)
spectune.activate(model, "b")
spectune.merge(model)
from spectune.speed.loss import cross_entropy_sum
from spectune.speed.parts import training_parts
spectune.Trainer
print("worked")
"""
    assert run(code, ABSENT).strip() == "worked"


def test_the_command_line_and_training_need_no_other_trainer():
    code = """
import spectune.cli, spectune.cli.train, spectune.cli.compare, spectune.cli.demo, spectune.cli.generate
import spectune.training.run
from spectune.training.config import load_config
load_config(None, ["model=m", "data=d", "output=o"])
print("worked")
"""
    assert run(code, ["datasets", "trl", "gguf", "peft", "ray", "sklearn"]).strip() == "worked"


def test_what_is_missing_is_named_in_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SpectuneError, match=r"^reading it needs gguf: pip install gguf$"):
        need("gguf", "reading it")
    with pytest.raises(SpectuneError, match=r"^it needs gguf: pip install 'spectune\[more\]'$"):
        need("gguf", "it", "'spectune[more]'")
    assert need("sys", "everything") is sys


@pytest.mark.parametrize("name", ["glue", "table.parquet", "table.arrow", "saved"])
def test_a_data_set_without_datasets(monkeypatch, tmp_path, name):
    from spectune.training.data.files import rows

    (tmp_path / "saved").mkdir()
    for file in ("table.parquet", "table.arrow", "saved/state.json"):
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SpectuneError, match=rf"^reading '{name}' needs datasets: pip install datasets$"):
        next(rows(name, None, None, print))


def test_a_gguf_file_without_gguf(monkeypatch, tmp_path):
    from spectune.spectrum.listing import READERS

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SpectuneError, match=r"model.gguf' needs gguf: pip install gguf$"):
        next(READERS["gguf"](tmp_path / "model.gguf"))
