"""Trainers of transformers and TRL keep the adapter alone: saved, resumed and pushed."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from datasets import Dataset
from huggingface_hub.utils import filter_repo_objects
from transformers import Trainer, TrainingArguments

import spectune
from spectune.errors import SpectuneError
from spectune.training.trainer import checkpoints as checkpoints_module
from training.folder import make_model, make_tokenizer, save_folder

RENAMED = hasattr(TrainingArguments, "activation_checkpointing")  # since transformers 5.23 or so
PLAINLY = {"bf16": False, "activation_checkpointing" if RENAMED else "gradient_checkpointing": False}
BASE_FILES = ("model", "pytorch_model", "training_args")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("model"))


def settings(output, **more):
    common = {"output_dir": str(output), "max_steps": 4, "save_steps": 2, "report_to": "none", "use_cpu": True}
    common |= {"per_device_train_batch_size": 2, "learning_rate": 2e-2, "disable_tqdm": True, "logging_steps": 1}
    return {**common, **more}


def adapted(folder=None, method="svf"):
    model = make_model() if folder is None else spectune.load_base(folder, "fp32")[0]
    torch.manual_seed(0)
    return spectune.adapt(model, method)


def plain(output, method="svf", **more):
    data = [{"input_ids": [3 + (i + j) % 30 for j in range(6)]} for i in range(12)]
    data = [{**row, "labels": row["input_ids"]} for row in data]
    model = adapted(method=method)
    arguments = TrainingArguments(**settings(output, **more))
    return spectune.trainer_for(Trainer)(model=model, args=arguments, train_dataset=data, eval_dataset=data[:4])


def sft(output, folder):
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list(
        [{"prompt": "one plus two is", "completion": " three"}, {"prompt": "say", "completion": " ahoy"}] * 4
    )
    arguments = SFTConfig(**settings(output, **PLAINLY))
    kind = spectune.trainer_for(SFTTrainer)
    return kind(adapted(folder), args=arguments, train_dataset=data, processing_class=make_tokenizer())


def dpo(output, folder):
    from trl import DPOConfig, DPOTrainer

    data = Dataset.from_list([{"prompt": "say", "chosen": " ahoy ahoy", "rejected": " hello"}] * 8)
    arguments = DPOConfig(**settings(output, **PLAINLY))
    model = adapted(folder)
    kind = spectune.trainer_for(DPOTrainer)
    reference = spectune.Reference(model)
    return kind(model, reference, args=arguments, train_dataset=data, processing_class=make_tokenizer())


def grpo(output, folder):
    from trl import GRPOConfig, GRPOTrainer

    data = Dataset.from_list([{"prompt": "say"}, {"prompt": "what is one"}] * 4)
    arguments = GRPOConfig(**settings(output, **PLAINLY), num_generations=2, max_completion_length=4)

    def reward(completions, **kwargs):
        return [float(text.count("ahoy")) for text in completions]

    kind = spectune.trainer_for(GRPOTrainer)
    return kind(adapted(folder), reward, args=arguments, train_dataset=data, processing_class=make_tokenizer())


def assert_adapter_only(path, state):
    names = {file.name for file in path.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert ("adapter_state.safetensors" in names) == state
    assert not [name for name in names if name.startswith(BASE_FILES)]


def tensors(model):
    return {k: v.clone() for k, v in model.state_dict().items() if ".adapters." in k}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # by TRL
@pytest.mark.parametrize("make", [sft, dpo, grpo])
def test_trl_saves_and_resumes_the_adapter_alone(tmp_path, folder, make):
    whole = make(tmp_path / "whole", folder)
    whole.train()
    assert_adapter_only(tmp_path / "whole" / "checkpoint-2", state=True)
    whole.save_model()
    assert_adapter_only(tmp_path / "whole", state=False)
    loaded = spectune.Adapter.load(tmp_path / "whole").bind(whole.model)
    name = "model.layers.1.mlp.down_proj"
    trained = spectune.extract(whole.model).delta(name)
    assert trained.abs().max() > 0
    torch.testing.assert_close(loaded.delta(name), trained, atol=1e-6, rtol=1e-5)
    resumed = make(tmp_path / "resumed", folder)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    ours, theirs = tensors(resumed.model), tensors(whole.model)
    assert resumed.state.global_step == 4
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_spectunes_trainer_is_transformers_own_with_such_checkpoints(tmp_path):
    assert issubclass(spectune.Trainer, Trainer)
    trainer = spectune.Trainer(model=adapted(), args=TrainingArguments(**settings(tmp_path)))
    trainer.save_model()
    assert_adapter_only(tmp_path, state=False)


@pytest.mark.parametrize("method", ["svf", "dora:inner=lora,rank=2", "adalora:rank=2,interval=1"])
def test_transformers_trainer_resumes_bit_for_bit(tmp_path, method):
    whole = plain(tmp_path / "whole", method, max_steps=6, save_steps=3)
    whole.train()
    assert_adapter_only(tmp_path / "whole" / "checkpoint-3", state=True)
    resumed = plain(tmp_path / "resumed", method, max_steps=6, save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    ours, theirs = tensors(resumed.model), tensors(whole.model)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_an_optimizer_with_other_groups_is_refused(tmp_path):
    plain(tmp_path, max_steps=2).train()
    other = plain(tmp_path)
    other.optimizer = torch.optim.AdamW([p for p in other.model.parameters() if p.requires_grad])
    with pytest.raises(SpectuneError, match=r"checkpoint-2 was made with other groups of parameters .*; resume with"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_best_checkpoint_is_loaded_again(tmp_path):
    trainer = plain(
        tmp_path, lr_scheduler_type="constant", learning_rate=3.0, load_best_model_at_end=True, eval_strategy="steps",
        eval_steps=2, max_steps=8,
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


def answer_as_hub(monkeypatch, **functions):
    """Put functions in the place of the hub's, which transformers asks for by name, and later as one object."""
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: SimpleNamespace(**functions), raising=False)
    for name, function in functions.items():
        monkeypatch.setattr(transformers.trainer, name, function, raising=False)


def test_a_push_uploads_the_adapter_and_not_the_base(tmp_path, monkeypatch):
    pushed = {}

    def upload_folder(folder_path, ignore_patterns, **kwargs):
        pushed.update({file.name: file.stat().st_size for file in tmp_path.iterdir()})
        return SimpleNamespace(repo_id=kwargs["repo_id"])

    answer_as_hub(monkeypatch, upload_folder=upload_folder)
    trainer = plain(tmp_path)
    trainer.hub_model_id = "someone/something"
    trainer.push_to_hub()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= pushed.keys()
    assert not [name for name in pushed if name.startswith(BASE_FILES)]


def test_pushing_as_it_trains_uploads_the_adapter_and_no_pickles(tmp_path, monkeypatch):
    pushed = []

    def upload_folder(folder_path, ignore_patterns, path_in_repo, **kwargs):
        files = [str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()]
        pushed.append((path_in_repo, set(filter_repo_objects(files, ignore_patterns=ignore_patterns))))
        return SimpleNamespace(done=lambda: True)

    def create_repo(name, **kwargs):
        return SimpleNamespace(repo_id=name)

    answer_as_hub(monkeypatch, create_repo=create_repo)
    monkeypatch.setattr(transformers.trainer, "is_peft_available", lambda: False)
    monkeypatch.setattr(checkpoints_module, "upload_folder", upload_folder)
    more = {"push_to_hub": True, "hub_model_id": "someone/something", "max_steps": 2, "logging_strategy": "no"}
    plain(tmp_path / "every", hub_strategy="every_save", **more).train()
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert pushed == [(None, adapter)]
    assert not (tmp_path / "every" / "training_args.bin").exists()
    spectune.Adapter.load(tmp_path / "every")
    plain(tmp_path / "whole", hub_strategy="checkpoint", **more).train()
    assert pushed[1] == (None, adapter)
    assert pushed[2][0] == "last-checkpoint"
    assert {*adapter, "adapter_state.safetensors", "optimizer.pt", "trainer_state.json"} <= pushed[2][1]


def test_the_reference_is_the_base_and_leaves_the_model_as_it_was():
    model = make_model().eval()
    ids = torch.tensor([[1, 5, 6, 7]])
    base = model(ids).logits
    spectune.adapt(model, "lora:rank=2,dropout=0.5")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    before = model(ids).logits
    model.train()
    reference = spectune.Reference(model)
    assert torch.equal(reference(ids).logits, base)
    assert sum(p.numel() for p in reference.parameters()) == 0
    assert all(module.training for module in model.modules())
    assert torch.equal(model.eval()(ids).logits, before)
