"""TRL's trainers with a `peft_config` of ours: trained, saved, gone on with bit for bit; no second model beside it."""

import pytest
import torch
import transformers
from datasets import Dataset
from peft import PeftModel
from transformers import TrainingArguments

import spectune
import spectune.peft as sp
from training.folder import make_tokenizer, save_folder

RENAMED = hasattr(TrainingArguments, "activation_checkpointing")
PLAINLY = {"bf16": False, "activation_checkpointing" if RENAMED else "gradient_checkpointing": False}
SAID = [{"prompt": "one plus two is", "completion": " three"}, {"prompt": "say", "completion": " ahoy"}] * 4
PAIRS = [{"prompt": "say", "chosen": " ahoy ahoy", "rejected": " hello"}] * 8
JUDGED = [{**row, "label": i % 2 == 0} for i, row in enumerate(SAID)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("model"))


def settings(output):
    common = {"output_dir": str(output), "max_steps": 4, "save_steps": 2, "report_to": "none", "use_cpu": True}
    common |= {"per_device_train_batch_size": 2, "learning_rate": 2e-2, "disable_tqdm": True, "logging_steps": 1}
    return {**common, **PLAINLY}


def base(folder, kind=transformers.AutoModelForCausalLM, **more):
    torch.manual_seed(0)
    return kind.from_pretrained(folder, **more)


def with_config(kind, model, output, arguments, rows, config, *given):
    return kind(
        model, *given, args=arguments(**settings(output)), train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(), peft_config=config,
    )  # fmt: skip


def sft(output, folder, config):
    from trl import SFTConfig, SFTTrainer

    return with_config(SFTTrainer, base(folder), output, SFTConfig, SAID, config)


def dpo(output, folder, config):
    from trl import DPOConfig, DPOTrainer

    return with_config(DPOTrainer, base(folder), output, DPOConfig, PAIRS, config)


def kto(output, folder, config):
    try:
        from trl import KTOConfig, KTOTrainer
    except ImportError:
        from trl.experimental.kto import KTOConfig, KTOTrainer

    return with_config(KTOTrainer, base(folder), output, KTOConfig, JUDGED, config)


def reward(output, folder, config):
    from trl import RewardConfig, RewardTrainer

    model = base(folder, transformers.AutoModelForSequenceClassification, num_labels=1)
    config.task_type, config.modules_to_save = "SEQ_CLS", ["score"]
    return with_config(RewardTrainer, model, output, RewardConfig, PAIRS, config)


def grpo(output, folder, config):
    from trl import GRPOConfig, GRPOTrainer

    def ahoy(completions, **kwargs):
        return [float(text.count("ahoy")) for text in completions]

    return GRPOTrainer(
        base(folder), ahoy, args=GRPOConfig(**settings(output), num_generations=2, max_completion_length=4),
        train_dataset=Dataset.from_list([{"prompt": "say"}, {"prompt": "what is one"}] * 4),
        processing_class=make_tokenizer(), peft_config=config,
    )  # fmt: skip


def trained(model):
    return {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}


@pytest.mark.filterwarnings("ignore")  # of TRL and PEFT
@pytest.mark.parametrize(
    ("make", "config"),
    [
        (sft, sp.SVFConfig),
        (dpo, sp.SVFConfig),
        pytest.param(kto, sp.SVFConfig, marks=pytest.mark.slow),
        pytest.param(reward, sp.SVFConfig, marks=pytest.mark.slow),
        pytest.param(grpo, sp.SVFConfig, marks=pytest.mark.slow),
        pytest.param(sft, sp.MiLoRAConfig, marks=pytest.mark.slow),
        pytest.param(dpo, sp.LoRAXSConfig, marks=pytest.mark.slow),
    ],
)
def test_it_goes_on_where_it_stopped(tmp_path, folder, make, config):
    torch.manual_seed(0)
    whole = make(tmp_path / "whole", folder, config())
    assert isinstance(whole.model, PeftModel)
    assert getattr(whole, "ref_model", None) is None
    start = trained(whole.model)
    whole.train()
    moved = trained(whole.model)
    assert start.keys() == moved.keys()
    assert any(not torch.equal(start[key], moved[key]) for key in start)
    assert all(p.requires_grad == (key in start) for key, p in whole.model.named_parameters())
    files = {file.name for file in (tmp_path / "whole" / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in files
    assert not {"model.safetensors", "pytorch_model.bin"} & files
    torch.manual_seed(0)
    resumed = make(tmp_path / "resumed", folder, config())
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    again = trained(resumed.model)
    assert all(torch.equal(again[key], moved[key]) for key in moved)
    whole.save_model(str(tmp_path / "saved"))
    adapter = spectune.Adapter.load(tmp_path / "saved")
    assert adapter.layers.keys() == set(whole.model.base_model.targeted_module_names)
    assert adapter.modules.keys() == ({"score"} if make is reward else set())
