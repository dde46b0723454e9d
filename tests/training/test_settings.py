"""Settings that are taken as they are given, or refused before anything is loaded."""

import json
import shutil

import pytest
import torch

from spectune.bases.classifiers import context
from spectune.bases.devices import checked_device
from spectune.errors import SpectuneError
from spectune.training.config import load_config
from spectune.training.run import train
from spectune.training.trainer.checkpoint_files import checkpoints
from tiny import ARCHITECTURES
from training.folder import make_tokenizer, save_folder

ROWS = [{"text": f"one plus {n} is two"} for n in ("one", "two", "three", "four", "five", "six", "seven", "eight")]


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    model = save_folder(tmp_path / "model")
    given = [f"model={model}", f"data={tmp_path / 'data.jsonl'}", f"output={tmp_path / 'out'}", "method=lora:rank=2"]
    return [*given, "dtype=fp32", "device=cpu", "held_out=0", "batch_size=8"]


def rates(result):
    return [line["learning_rate"] / 1e-3 for line in result.history if "loss" in line]


def test_the_first_step_learns_and_warm_up_rises_to_the_rate(settings, capsys):
    result = train(load_config(None, [*settings, "lr=1e-3", "epochs=1"]))
    assert rates(result) == [0.5]
    assert max(float(result.adapter.delta(name).abs().max()) for name in result.adapter.layers) > 0
    assert "all 1 steps are warm-up" in " ".join(capsys.readouterr().err.split())
    more = ["overwrite=true", "lr=1e-3", "epochs=8", "warmup=0.4", "schedule=constant"]
    assert rates(train(load_config(None, [*settings, *more]))) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])


def test_a_path_of_the_home_folder_is_one_place(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    more = ["output=~/runs/x", "epochs=2", "save_steps=1"]
    config = load_config(None, [*settings, *more])
    assert config.output == str(tmp_path / "home" / "runs" / "x")
    train(config)
    assert not (tmp_path / "~").exists()
    assert checkpoints(tmp_path / "home" / "runs" / "x")


def test_a_moved_run_keeps_its_best_checkpoint(settings, tmp_path):
    more = ["held_out=0.25", "batch_size=2", "eval_steps=1", "best=true", "lr=1e-3"]
    more = [pair for pair in settings if not pair.startswith(("held_out", "batch_size"))] + more
    train(load_config(None, [*more, "max_steps=2"]))
    shutil.move(tmp_path / "out", tmp_path / "moved")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "moved" / name).unlink()
    train(load_config(None, [*more, "max_steps=4", f"output={tmp_path / 'moved'}", "resume=true"]))
    state = json.loads((checkpoints(tmp_path / "moved")[-1] / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"].startswith(str(tmp_path / "moved"))


def test_seeds_and_norms(settings):
    with pytest.raises(SpectuneError, match="seed"):
        load_config(None, [*settings, "seed=4294967296"])
    assert train(load_config(None, [*settings, "seed=4294967295", "max_grad_norm=0", "epochs=1"])).steps == 1


def test_a_device_is_checked_before_anything_is_loaded(settings):
    with pytest.raises(SpectuneError, match="device=gpu cannot be used here"):
        train(load_config(None, [*settings, "device=gpu", "data=none.jsonl"]))
    if not torch.cuda.is_available():
        with pytest.raises(SpectuneError, match=r"device=cuda cannot be used here .*; give"):
            train(load_config(None, [*settings, "device=cuda", "data=none.jsonl"]))
    assert checked_device("cpu").type == "cpu"


def test_evaluations_of_nothing_are_told(settings, capsys):
    train(load_config(None, [*settings, "eval_steps=1"]))
    assert "eval_steps is given, but nothing is held out" in " ".join(capsys.readouterr().err.split())


def test_a_key_of_a_file_that_is_there_twice(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: a\noutput: b\nepochs: 1\nmodel: c\n")
    with pytest.raises(SpectuneError, match="the key 'model' is given twice"):
        load_config(path, [])


def test_positions_that_begin_behind_the_pad_token_are_not_all_for_tokens():
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 10**6
    assert context(ARCHITECTURES["roberta"](), tokenizer) == 63  # of 64, with a pad token of 0
    assert context(ARCHITECTURES["bert"](), tokenizer) == 64
