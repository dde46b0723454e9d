"""A whole run on a tiny model: it learns, resumes bit for bit, and stops at a loss that is not finite."""

import itertools
import json

import pandas
import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

import spectune
from spectune.errors import SpectuneError
from spectune.training.config import load_config
from spectune.training.run import train
from spectune.training.tasks.sft import Sft
from spectune.training.trainer import trainer as trainer_module
from tiny import ARCHITECTURES
from training.folder import make_tokenizer
from training.setbacks import forgetting


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
                [p for p in model.parameters() if p.requires_grad][-1].fill_(float("nan"))
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


def test_an_output_that_cannot_be_is_refused_before_anything_is_loaded(settings, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        SpectuneError, match=r"cannot be written, for .*file is in the way \(it is a file\): give another"
    ):
        run(settings, f"output={tmp_path / 'file' / 'run'}", "model=nowhere")


def test_accumulated_batches_equal_one_large_batch(settings, tmp_path):
    large = run(settings, f"output={tmp_path / 'a'}", "batch_size=8", "max_steps=3", "lr=1e-2")
    small = run(
        settings, f"output={tmp_path / 'b'}", "batch_size=2", "gradient_accumulation_steps=4", "max_steps=3", "lr=1e-2"
    )
    name = "model.layers.1.self_attn.q_proj"
    torch.testing.assert_close(
        large.adapter.layers[name].terms[0].trained["z"],
        small.adapter.layers[name].terms[0].trained["z"],
        atol=1e-5,
        rtol=1e-4,
    )


def test_a_resumed_run_trains_with_the_rates_that_it_is_given(settings, tmp_path):
    more = [f"output={tmp_path / 'out'}", "method=dora:inner=lora,rank=2", "schedule=linear", "warmup=0"]
    groups = []
    original = trainer_module.AdapterTrainer.training_step

    def look(self, *args, **kwargs):
        groups.append({g["lr"]: g["weight_decay"] for g in self.optimizer.param_groups})
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module.AdapterTrainer, "training_step", look)
        run(settings, *more, "max_steps=5", "group_lr={magnitude: 1e-3}", "lr=1e-2")
        changed = ["group_lr={magnitude: 1e-2}", "lr=4e-2", "weight_decay=0.5", "max_steps=10", "resume=true"]
        result = run(settings, *more, *changed)
    assert groups[:2] == [{1e-2: 0, 1e-3: 0}, {8e-3: 0, 8e-4: 0}]
    assert groups[5] == {2e-2: 0.5, 5e-3: 0.5}  # of the middle of the schedule
    rates = [line["learning_rate"] for line in result.history if "learning_rate" in line]
    assert rates[5:7] == pytest.approx([5e-3, 4e-3])
    with pytest.raises(SpectuneError, match="with another group_lr"):
        run(settings, *more, *changed, "group_lr={}")


def test_patience_stops_and_ends_with_the_best_checkpoint(settings, tmp_path, monkeypatch):
    forgetting(monkeypatch, after=5)
    more = ["eval_steps=5", "save_steps=5", "patience=1", "max_steps=60", "schedule=constant"]
    result = run(settings, f"output={tmp_path / 'out'}", *more)
    first, best, last, after = (line["eval_loss"] for line in result.history if "eval_loss" in line)
    assert result.steps == 10
    assert best < 0.99 * first
    assert last == pytest.approx(first, rel=1e-5)
    assert after == result.loss_after == pytest.approx(best, rel=1e-5)


def test_a_resumed_run_is_as_patient_as_a_whole_one(settings, tmp_path, monkeypatch):
    evaluations = itertools.count()
    monkeypatch.setattr(Sft, "metrics", lambda self, sums: {"loss": float(next(evaluations))})  # each is worse
    more = [*settings, "eval_steps=5", "patience=2", "max_steps=30", "lr=5e-2", "schedule=constant"]
    whole = run(more, f"output={tmp_path / 'whole'}")
    assert whole.steps == 15
    part = [*more, f"output={tmp_path / 'part'}"]
    interrupt(part, at=13)  # after the first evaluation that is not better
    assert run(part, "resume=true").steps == 15
    assert run(part, "resume=true").steps == 15  # there is nothing left to do
    assert run(part, "resume=true", "patience=3").steps == 20


def test_the_best_evaluation_has_a_checkpoint(settings, tmp_path, monkeypatch):
    forgetting(monkeypatch, after=3)
    given = ("best=true", "eval_steps=1", "max_steps=5", "schedule=constant")  # save_steps is 5
    result = run(settings, f"output={tmp_path / 'out'}", *given)
    *losses, after = (line["eval_loss"] for line in result.history if "eval_loss" in line and line["step"])
    assert min(losses) < 0.99 * losses[4]
    assert after == result.loss_after == pytest.approx(min(losses), rel=1e-5)


def test_a_tensor_can_have_its_own_learning_rate(settings, tmp_path):
    still = ["method=dora:inner=lora,rank=2", "max_steps=2", "group_lr={magnitude: 1e-12}", "lr=1e-2"]
    result = run(settings, f"output={tmp_path / 'out'}", *still)
    layer = result.adapter.layers["model.layers.0.mlp.up_proj"]
    norms = layer.weight.norm(dim=1)
    torch.testing.assert_close(layer.terms[0].trained["magnitude"], norms, atol=1e-6, rtol=0)
    assert layer.terms[0].trained["B"].abs().max() > 1e-3
    with pytest.raises(SpectuneError, match="no trained tensor is named 'magnitud'; did you mean 'magnitude'"):
        run(settings, f"output={tmp_path / 'b'}", "method=dora:inner=lora,rank=2", "group_lr={magnitud: 1}")


@pytest.mark.parametrize("task", ["sft", "dpo", "reinforce"])
@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_a_model_with_an_encoder_is_refused(settings, tmp_path, architecture, task):
    folder = tmp_path / "seq2seq"
    bart = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    small = BartConfig(vocab_size=96, encoder_attention_heads=4, decoder_attention_heads=4, **bart)
    (ARCHITECTURES["t5"]() if architecture == "t5" else BartForConditionalGeneration(small)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (tmp_path / "data.jsonl").write_text(
        json.dumps({"prompt": "say", "completion": "one", "chosen": "one", "rejected": "two"}) + "\n"
    )
    more = ["reward=training.two_processes:length"] if task == "reinforce" else []
    with pytest.raises(SpectuneError, match=f"task: {task} needs a causal language model, and .*ForConditional"):
        run(settings, f"model={folder}", f"task={task}", *more, "held_out=0", f"output={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables(settings, tmp_path, suffix):
    table = pandas.DataFrame({"prompt": ["say one", "say two"] * 8, "completion": ["ahoy", "hello"] * 8})
    path = tmp_path / f"data.{suffix}"
    table.to_csv(path, index=False) if suffix == "csv" else table.to_parquet(path)
    result = run(settings, f"data={path}", f"output={tmp_path / 'out'}", "max_steps=1")
    assert result.steps == 1
    table.drop(columns="completion").to_csv(tmp_path / "bad.csv", index=False)
    with pytest.raises(SpectuneError, match=r"bad.csv, row 1: has the keys 'prompt'"):
        run(settings, f"data={tmp_path / 'bad.csv'}", f"output={tmp_path / 'b'}")


def test_recomputed_activations_give_the_same_adapter(settings, tmp_path):
    kept = run(settings, f"output={tmp_path / 'a'}", "max_steps=3", "lr=1e-2")
    recomputed = run(settings, f"output={tmp_path / 'b'}", "max_steps=3", "lr=1e-2", "gradient_checkpointing=true")
    name = "model.layers.1.self_attn.q_proj"
    z, again = (r.adapter.layers[name].terms[0].trained["z"] for r in (kept, recomputed))
    torch.testing.assert_close(z, again, atol=1e-6, rtol=1e-6)
