"""Every key of a run changes what the run says or makes, or is refused: none is taken and does nothing."""

import hashlib
import io
import json

import pytest
import torch
from rich.console import Console

from spectune.errors import SpectuneError
from spectune.training.config import TrainConfig, load_config
from spectune.training.progress import is_measure
from spectune.training.registry import options_of
from spectune.training.run import train
from training.folder import make_model, save_folder

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
ROWS = [{"prompt": f"say {n} and hello", "completion": f"{n} and ahoy and hello"} for n in NUMBERS]
# a value other than the run's own for each key; with others that it needs
CHANGES = {
    "model": ["model=OTHER"],
    "data": ["data=MORE"],
    "data_config": ["data_config=x"],
    "data_split": ["data_split=x"],
    "streaming": ["streaming=true"],
    "output": ["output=ELSEWHERE"],
    "task": ["task=dpo"],
    "method": ["method=lora:rank=1"],
    "targets": ["targets=[q_proj]"],
    "exclude": ["exclude=[q_proj]"],
    "overrides": ["overrides={q_proj: null}"],
    "layers_to_transform": ["layers_to_transform=0"],
    "layers_pattern": ["layers_to_transform=0", "layers_pattern=h"],
    "rank_pattern": ["rank_pattern={q_proj: 1}"],
    "alpha_pattern": ["alpha_pattern={q_proj: 1}"],
    "modules_to_save": ["modules_to_save=[norm]"],
    "adapter": ["adapter=NOWHERE"],
    "lr": ["lr=1e-3"],
    "group_lr": ["group_lr={A: 1}"],
    "epochs": ["epochs=2", "max_steps=null"],
    "max_steps": ["max_steps=4"],
    "batch_size": ["batch_size=3"],
    "gradient_accumulation_steps": ["gradient_accumulation_steps=2"],
    "max_length": ["max_length=8"],
    "schedule": ["schedule=constant"],
    "warmup": ["warmup=0.9"],
    "weight_decay": ["weight_decay=0.9"],
    "max_grad_norm": ["max_grad_norm=1e-3"],
    "completion_only": ["completion_only=false"],
    "columns": ["columns={prompt: completion, completion: prompt}"],
    "held_out": ["held_out=0.5"],
    "eval_data": ["eval_data=MORE"],
    "eval_split": ["eval_split=x"],
    "max_eval_samples": ["max_eval_samples=1"],
    "eval_steps": ["eval_steps=1"],
    "patience": ["eval_steps=1", "patience=1", "lr=5", "max_steps=6", "warmup=0"],
    "best": ["eval_steps=1", "best=true", "lr=5", "warmup=0"],
    "save_steps": ["save_steps=1"],
    "log_steps": ["log_steps=3"],
    "dtype": ["dtype=bf16"],
    "quantize": ["quantize=nf4"],
    "device": ["device=nothing"],
    "fsdp": ["fsdp=true"],
    "report_to": ["report_to=nothing"],
    "seed": ["seed=1"],
    "resume": ["resume=true"],
    "replies": ["replies=0"],
}
# these say how something is computed, where, or from what, and not what: their own tests look at that
PACE = ("seconds", "tokens_per_second", "peak_memory")
OTHERS = {"split"}  # of layers that this model has none of
WAYS = {"factored", "fused", "gradient_checkpointing", "trust_remote_code", "overwrite"}


def test_every_key_is_looked_at():
    keys = {*TrainConfig.model_fields, *options_of("sft").model_fields}
    assert keys == {*CHANGES, *WAYS, *OTHERS}
    for key in WAYS:
        value = not TrainConfig.model_fields[key].default
        given = load_config(None, ["model=m", "data=d", "output=o", f"{key}={str(value).lower()}"])
        assert getattr(given, key) is value


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("settings")
    save_folder(path / "model")
    save_folder(path / "other")
    other = make_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    other.save_pretrained(path / "other")
    (path / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (path / "more.jsonl").write_text("\n".join(map(json.dumps, ROWS[::-1][:5])))
    return path


def came_of(folder, out, more):
    """Return all that a run says and makes, but for times; or what it refuses with."""
    given = {"model": folder / "model", "data": folder / "data.jsonl", "output": out, "method": "lora:rank=2"}
    given |= {"dtype": "fp32", "device": "cpu", "max_steps": 3, "batch_size": 2, "lr": "1e-2", "held_out": 0.25}
    given |= {"max_length": 64}
    for pair in more:
        key, _, value = pair.partition("=")
        given[key] = value
    names = {"OTHER": "other", "MORE": "more.jsonl", "NOWHERE": "nowhere"}
    pairs = [f"{key}={folder / names[str(v)] if str(v) in names else v}" for key, v in given.items()]
    pairs = [pair.replace("ELSEWHERE", str(out / "elsewhere")) for pair in pairs]
    text = io.StringIO()
    try:
        result = train(load_config(None, pairs), Console(file=text, width=200))
    except SpectuneError as error:
        return str(error)
    history = [{k: v for k, v in line.items() if is_measure(k) and k not in PACE} for line in result.history]
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.suffix != ".pt")
    weights = {
        name: [hashlib.sha256(t.float().numpy()).hexdigest() for term in layer.terms for t in term.trained.values()]
        for name, layer in result.adapter.layers.items()
    }
    said = [line for line in text.getvalue().replace(str(folder), "").splitlines() if "tokens/s" not in line]
    return json.dumps([history, files, weights, list(result.adapter.modules), said])


@pytest.fixture(scope="module")
def usual(folder, tmp_path_factory):
    return came_of(folder, tmp_path_factory.mktemp("usual") / "out", [])


@pytest.mark.slow
def test_the_same_settings_make_the_same(folder, tmp_path, usual):
    assert came_of(folder, tmp_path / "out", []) == usual


@pytest.mark.slow
@pytest.mark.parametrize("key", CHANGES)
def test_a_setting_changes_what_comes_of_a_run(key, folder, tmp_path, usual):
    found = came_of(folder, tmp_path / "out", CHANGES[key])
    assert found != usual
    others = [pair for pair in CHANGES[key] if not pair.startswith(f"{key}=")]
    if others:  # not for the other settings that it needs
        assert found != came_of(folder, tmp_path / "others", others)
