"""A whole run on a tiny model: it learns, resumes bit for bit, and stops at a loss that is not finite."""

import json

import pytest
import torch

import spectune
from spectune.errors import SpectuneError
from spectune.training import trainer as trainer_module
from spectune.training.config import load_config
from spectune.training.run import train
from training.folder import save_folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def settings(tmp_path, model_folder):
    data = tmp_path / "data.jsonl"
    numbers = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    records = [{"prompt": f"what is {n}", "completion": f"ahoy {n}"} for n in numbers * 4]
    data.write_text("\n".join(map(json.dumps, records)))
    return [f"model={model_folder}", f"data={data}", "held_out=0.25", "dtype=fp32", "device=cpu", "save_steps=5"]


def run(settings, *more):
    return train(load_config(None, [*settings, *more]))


@pytest.mark.parametrize("method", ["svf", "lora:rank=4", "dora:inner=pissa,rank=4", "adalora:rank=2"])
def test_it_learns_and_the_saved_adapter_is_the_trained_one(settings, tmp_path, model_folder, method):
    result = run(settings, f"output={tmp_path / 'out'}", f"method={method}", "lr=5e-2", "epochs=12")
    assert result.loss_after < 0.7 * result.loss_before
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert lines[0]["eval_loss"] == result.loss_before
    assert lines[-1]["eval_loss"] == result.loss_after
    assert {"loss", "learning_rate", "tokens_per_second"} <= lines[1].keys()
    loaded = spectune.Adapter.load(tmp_path / "out")
    model, _ = spectune.load_base(model_folder, "fp32")
    name = "model.layers.0.mlp.up_proj"
    torch.testing.assert_close(loaded.bind(model).delta(name), result.adapter.delta(name), atol=1e-6, rtol=1e-5)


def test_adalora_learns_the_length_of_the_run(settings, tmp_path):
    method = "adalora:rank=2,initial_rank=4,interval=1"
    result = run(settings, f"output={tmp_path / 'out'}", f"method={method}", "max_steps=12")
    kept = sum(int((layer.terms[0].trained["E"] != 0).sum()) for layer in result.adapter.layers.values())
    assert kept == 2 * len(result.adapter.layers)


@pytest.mark.parametrize("method", ["svf", "adalora:rank=2,interval=1"])
def test_resuming_gives_the_same_adapter_bit_for_bit(settings, tmp_path, method):
    whole = run(settings, f"output={tmp_path / 'whole'}", f"method={method}", "max_steps=10")
    part = [*settings, f"output={tmp_path / 'part'}", f"method={method}", "max_steps=10"]
    interrupt(part, at=7)
    resumed = run(part, "resume=true")
    for name, layer in whole.adapter.layers.items():
        for key, tensor in layer.terms[0].trained.items():
            assert torch.equal(tensor, resumed.adapter.layers[name].terms[0].trained[key])


def interrupt(settings, at):
    original = trainer_module.AdapterTrainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == at:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module.AdapterTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            run(settings)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(settings, tmp_path, monkeypatch):
    original = trainer_module.AdapterTrainer.training_step

    def explode(self, model, *args, **kwargs):
        if self.state.global_step == 7:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(trainer_module.AdapterTrainer, "training_step", explode)
    with pytest.raises(SpectuneError, match=r"loss became nan at step 8.*checkpoint-5"):
        run(settings, f"output={tmp_path / 'out'}", "max_steps=10")
    kept = spectune.Adapter.load(tmp_path / "out" / "checkpoint-5")
    assert all(t.isfinite().all() for layer in kept.layers.values() for t in layer.terms[0].trained.values())


def test_a_checkpoint_holds_the_adapter_and_not_the_base(settings, tmp_path):
    run(settings, f"output={tmp_path / 'out'}", "max_steps=5")
    names = {path.name for path in (tmp_path / "out" / "checkpoint-5").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "adapter_state.safetensors", "optimizer.pt"} <= names
    assert not any(name.startswith("model") for name in names)


def test_an_output_in_use_is_refused_and_resume_without_a_checkpoint_too(settings, tmp_path):
    output = f"output={tmp_path / 'out'}"
    with pytest.raises(SpectuneError, match="no checkpoint in"):
        run(settings, output, "resume=true")
    run(settings, output, "max_steps=1")
    with pytest.raises(SpectuneError, match="holds an adapter already"):
        run(settings, output, "max_steps=1")
    run(settings, output, "max_steps=1", "overwrite=true")


def test_resuming_with_another_method_is_refused(settings, tmp_path):
    output = f"output={tmp_path / 'out'}"
    run(settings, output, "max_steps=5", "method=svf")
    with pytest.raises(SpectuneError, match="other settings"):
        run(settings, output, "max_steps=10", "method=lora:rank=2", "resume=true")


def test_accumulated_batches_equal_one_large_batch(settings, tmp_path):
    large = run(settings, f"output={tmp_path / 'a'}", "batch_size=8", "max_steps=3", "lr=1e-2")
    small = run(settings, f"output={tmp_path / 'b'}", "batch_size=2", "accumulate=4", "max_steps=3", "lr=1e-2")
    name = "model.layers.1.self_attn.q_proj"
    torch.testing.assert_close(
        large.adapter.layers[name].terms[0].trained["z"],
        small.adapter.layers[name].terms[0].trained["z"],
        atol=1e-5,
        rtol=1e-4,
    )
