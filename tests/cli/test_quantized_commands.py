"""Commands that train and judge over a packed base, of matrices too small for the layout that bitsandbytes prefers."""

import json

import pytest
import torch

import spectune
from cli.typed import run
from compare.tiny_bench import write_data, write_encoder
from spectune.layers.modules import effective_weight, linear_layers
from spectune.training.rate import STEPS
from training.folder import WORDS, save_folder

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed")
    save_folder(path / "model")
    rows = [{"prompt": f"say {WORDS[i % 10]}", "completion": f"ahoy {WORDS[i % 10]}"} for i in range(60)]
    (path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


def settings(folder, output):
    common = ["quantize=nf4", "dtype=fp32", "device=cpu", "method=lora:rank=4", "max_steps=4", "--json"]
    return [f"model={folder / 'model'}", f"data={folder / 'data.jsonl'}", f"output={output}", *common]


def test_eval_loads_the_base_of_a_run_packed_as_it_was(folder, tmp_path):
    trained = json.loads(run("train", *settings(folder, tmp_path / "out"), "lr=5e-2").stdout)
    assert trained["held_out_loss_after"] < trained["held_out_loss_before"]
    measures = json.loads(run("eval", str(tmp_path / "out"), "--examples", "1", "--json").stdout)["measures"]
    assert measures["base"]["loss"] == pytest.approx(trained["held_out_loss_before"], abs=1e-4)
    assert measures["adapter"]["loss"] == pytest.approx(trained["held_out_loss_after"], abs=1e-4)


def test_lr_measures_over_the_packed_base(folder, tmp_path):
    found = json.loads(run("lr", *settings(folder, tmp_path / "out")).stdout)
    assert found["steps"] == STEPS * sum(tried["runs"] for tried in found["tried"])
    assert json.loads(run("lr", *settings(folder, tmp_path / "out")).stdout) == found


def test_compare_runs_every_method_over_the_packed_base(tmp_path):
    write_encoder(tmp_path / "encoder")
    write_data(tmp_path / "data.jsonl")
    asked = [f"model={tmp_path / 'encoder'}", f"data={tmp_path / 'data.jsonl'}", f"output={tmp_path / 'out'}"]
    asked += ["task=classify", "quantize=nf4", "methods=[base,full,lora:rank=4,svf,pissa:rank=4]", "seeds=1", "lrs=1"]
    asked += ["max_steps=4", "batch_size=8", "dtype=fp32", "device=cpu", "--json"]
    document = json.loads(run("compare", *asked).stdout)
    rows = {row["method"]: row for row in document["methods"]}
    assert rows.keys() == {"base", "lora:rank=4", "svf", "pissa:rank=4"}
    assert any(note.startswith("full is left out") for note in document["notes"])
    assert all(row["seeds"] == [0] for row in rows.values())


def test_matrices_of_any_size_answer_as_what_they_stand_for(folder):
    model, _ = spectune.load_base(folder / "model", "fp32", quantize="nf4")
    dense, _ = spectune.load_base(folder / "model", "fp32")
    with torch.no_grad():
        for name, layer in linear_layers(dense).items():
            layer.weight.copy_(effective_weight(linear_layers(model)[name]).to(layer.weight.dtype))
        ids = torch.tensor([[5, 6, 7]])
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(model(ids).logits, model(ids).logits)
