"""The files of a checkpoint: whole, half written, damaged."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectune.errors import SpectuneError
from spectune.training.trainer import checkpoint_files
from spectune.training.trainer.checkpoint_files import checkpoints
from training.test_faults import run


@pytest.fixture
def settings(settings, tmp_path):
    return [*settings, f"output={tmp_path / 'out'}"]


def test_half_written_checkpoints_are_left_out_with_a_notice(settings, tmp_path, capsys):
    whole = run(settings, "max_steps=10")
    out = tmp_path / "out"
    (out / "checkpoint-10" / "scheduler.pt").unlink()
    (out / ".checkpoint-15.partial").mkdir()
    resumed = run(settings, "max_steps=10", "resume=true")
    told = capsys.readouterr().err
    assert "checkpoint-10 was not written to its end and is left out" in told
    assert ".checkpoint-15.partial was not written to its end" in told
    assert not list(out.glob(".checkpoint-*"))
    for name, layer in whole.adapter.layers.items():
        assert torch.equal(layer.terms[0].trained["z"], resumed.adapter.layers[name].terms[0].trained["z"])
    assert [line["step"] for line in resumed.history] == [0, *range(1, 11), 10]
    lines = (out / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, *range(1, 11), 10]
    assert resumed.before == whole.before


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", "rng_state.pth"])
def test_a_damaged_checkpoint_is_named(settings, tmp_path, name):
    run(settings, "max_steps=5")
    path = tmp_path / "out" / "checkpoint-5" / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SpectuneError, match=r"checkpoint-5 is damaged .*delete it to go on from the one before"):
        run(settings, "max_steps=10", "resume=true")


def change(path, change_one):
    """Write a file anew with a change, as safetensors or by torch."""
    if path.suffix == ".safetensors":
        held = load_file(path)
        change_one(held)
        save_file(held, path)
    else:
        held = torch.load(path, weights_only=True)
        change_one(held)
        torch.save(held, path)


def broadcast(held):
    key = min(key for key in held if held[key].numel() > 1)
    held[key] = held[key].reshape(-1)[:1].reshape(1, *(1,) * (held[key].dim() - 1))


def shifted(held):
    held[min(held)] = held[min(held)] + 1


def halved(held):
    held[min(held)] = held[min(held)].double()


def moments(held):
    held["state"][0]["exp_avg"] = torch.ones(1)


def slower(held):
    held["last_epoch"] = 1


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize(
    ("name", "change_one"),
    [
        ("adapter_state.safetensors", broadcast),
        ("adapter_state.safetensors", shifted),
        ("adapter_state.safetensors", halved),
        ("optimizer.pt", moments),
        ("scheduler.pt", slower),
    ],
)
def test_a_checkpoint_that_is_not_what_was_written_is_refused(settings, tmp_path, name, change_one, told):
    run(settings, "max_steps=5")
    place = tmp_path / "out" / "checkpoint-5"
    change(place / name, change_one)
    if told:  # by a manifest of its own, a tensor of another shape or dtype is refused all the same
        if change_one in (shifted, slower):
            return
        (place / "checkpoint.json").write_text(json.dumps({"sha256": checkpoint_files.digests(place)}))
    with pytest.raises(SpectuneError, match="made with other settings" if told else rf"is damaged \({name} is not"):
        run(settings, "max_steps=10", "resume=true")


@pytest.mark.parametrize(
    ("rngs", "whole"),
    [("", False), ("rng_state.pth", True), ("rng_state_0.pth rng_state_1.pth", True), ("rng_state_1.pth", False)],
)
def test_a_checkpoint_has_the_random_states_of_each_process(tmp_path, rngs, whole):
    (tmp_path / "checkpoint-5").mkdir()
    for name in [
        "adapter_state.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "trainer_state.json",
        "checkpoint.json",
        *rngs.split(),
    ]:
        (tmp_path / "checkpoint-5" / name).touch()
    assert len(checkpoints(tmp_path)) == whole
