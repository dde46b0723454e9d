"""Train in one of several processes, and write what came of it: python one_process.py FOLDER HOW KIND TRAINER."""

import faulthandler
import json
import os
import sys
from pathlib import Path

import transformers
from ecosystem_cases import ROWS, adapted, base
from transformers import TrainingArguments

import spectune
import spectune.peft

folder, how, kind, which = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
ZERO = {
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto",
    "zero_optimization": {
        "stage": int(how[-1]) if how.startswith("zero") else 0,
        "stage3_gather_16bit_weights_on_model_save": True,
        "stage3_param_persistence_threshold": 0,  # else what is as small as it is here stays whole
    },
    "zero_force_ds_cpu_optimizer": False,
}  # fmt: skip
FSDP = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "FULL_STATE_DICT"},
}


def without_its_own_build() -> None:
    """Have DeepSpeed reduce by gloo, and by no extension that it would compile first, for minutes and in silence."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None:
        deepspeed.ops.__compatible_ops__[builder.NAME] = False


def main() -> None:
    if how.startswith("zero"):
        without_its_own_build()
    more = {"deepspeed": ZERO} if how.startswith("zero") else FSDP if how == "fsdp2" else {}
    rows_each = 4 // int(os.environ["WORLD_SIZE"])
    arguments = TrainingArguments(
        str(folder / "run"), max_steps=3, per_device_train_batch_size=rows_each, learning_rate=1e-2, report_to="none",
        use_cpu=True, disable_tqdm=True, save_steps=3, logging_steps=1, seed=3, lr_scheduler_type="constant", **more,
    )  # fmt: skip
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(base(), LoraConfig(target_modules="all-linear"))
    else:
        model = adapted(base(), kind)
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    trainer_class = transformers.Trainer if which == "plain" else spectune.trainer_for(transformers.Trainer)
    trainer = trainer_class(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (folder / "losses.json").write_text(json.dumps(losses))


faulthandler.dump_traceback_later(600)  # nothing hangs without a word
main()
