"""The names that other tools have for keys of a run: taken where they mean the same, answered with ours where not."""

from __future__ import annotations

from collections.abc import Container

from spectune.errors import SpectuneError

# ours -> what transformers and TRL, PEFT, axolotl and LLaMA-Factory call it
_SAME = {
    "lr": ("learning_rate",),
    "batch_size": ("per_device_train_batch_size", "micro_batch_size", "train_batch_size"),
    "gradient_accumulation_steps": ("accumulate", "accumulation_steps", "grad_accum"),
    "epochs": ("num_train_epochs", "num_epochs"),
    "schedule": ("lr_scheduler_type", "lr_scheduler"),
    "warmup": ("warmup_ratio",),
    "max_length": ("max_seq_length", "max_seq_len", "sequence_len", "cutoff_len", "model_max_length"),
    "log_steps": ("logging_steps",),
    "max_grad_norm": ("gradient_clip_val", "max_norm"),
    "model": ("model_name_or_path", "base_model", "model_name", "model_id"),
    "output": ("output_dir",),
    "data": ("dataset", "dataset_name", "train_file", "dataset_path"),
    "data_config": ("dataset_config", "dataset_config_name"),
    "data_split": ("dataset_train_split", "train_split"),
    "eval_split": ("dataset_test_split", "test_split"),
    "eval_data": ("eval_dataset", "validation_file", "test_file"),
    "held_out": ("val_set_size", "val_size", "validation_split_percentage"),
    "targets": ("target_modules", "lora_target_modules", "lora_target"),
    "exclude": ("exclude_modules",),
    "completion_only": ("assistant_only_loss", "completion_only_loss"),
    "patience": ("early_stopping_patience",),
    "best": ("load_best_model_at_end",),
    "resume": ("resume_from_checkpoint",),
    "overwrite": ("overwrite_output_dir",),
    "dtype": ("torch_dtype",),
    "dpo_loss": ("loss_type",),
    "beta": ("pref_beta",),
    "samples": ("num_generations",),
    "max_new_tokens": ("max_completion_length",),
    "normalize_rewards": ("scale_rewards",),
}
_OURS = {theirs: ours for ours, names in _SAME.items() for theirs in names}

_SHARES = ("val_set_size", "val_size", "validation_split_percentage")  # which may be numbers of records, or percents

# what means something else here, or is said in another way
_INSTEAD = {
    **dict.fromkeys(
        (
            "lora_r",
            "lora_rank",
            "r",
            "rank",
            "lora_alpha",
            "alpha",
            "lora_dropout",
            "use_dora",
            "use_rslora",
            "rslora",
            "lora",
            "peft_config",
            "lora_config",
        ),
        "it is a field of the method: write method: lora:rank=16,alpha=32 (dora:rank=16 for DoRA, lora:rslora=true)",
    ),
    **dict.fromkeys(("peft_type", "finetuning_type", "peft", "use_peft"), "write method: lora, svf, pissa, ..."),
    **dict.fromkeys(
        (
            "load_in_4bit",
            "load_in_8bit",
            "quantization_bit",
            "bnb_4bit_quant_type",
            "quantization",
            "quantization_config",
        ),
        "write quantize: nf4 for 4 bits, int8 for 8",
    ),
    "bf16": "write dtype: bf16",
    "fp16": "write dtype: fp16",
    "tf32": "set torch.backends in your own script",
    **dict.fromkeys(("warmup_steps", "num_warmup_steps"), "write warmup, the share of the steps: warmup: 0.05"),
    **dict.fromkeys(
        ("eval_strategy", "evaluation_strategy", "do_eval"), "write eval_steps: 50, or leave it out for the end only"
    ),
    **dict.fromkeys(("save_strategy",), "write save_steps: 100"),
    **dict.fromkeys(("packing", "sample_packing", "group_by_length", "padding_free"), "examples are packed by itself"),
    **dict.fromkeys(("optim", "optimizer"), "the optimizer is AdamW; write lr, weight_decay and group_lr"),
    **dict.fromkeys(("train_on_inputs", "train_on_prompt", "mask_history"), "write completion_only: false or true"),
    **dict.fromkeys(("stage", "rl", "trainer"), "write task: sft, classify, dpo, kto or reinforce"),
    **dict.fromkeys(
        ("per_device_eval_batch_size", "eval_batch_size"), "evaluations take batch_size, and no gradient: leave it out"
    ),
    **dict.fromkeys(("datasets", "dataset_dir"), "write data: a file, or a list of {path: ..., weight: ...}"),
    **dict.fromkeys(("max_samples", "max_train_samples"), "write max_steps, or give data of fewer records"),
    **dict.fromkeys(("init_lora_weights", "pissa_init"), "it is a method of its own: write method: pissa, milora, ..."),
    **dict.fromkeys(
        ("wandb_project", "wandb_entity", "wandb_name", "run_name", "logging_dir", "logging_strategy"),
        "write report_to and log_steps; a tracker's own settings are its environment variables",
    ),
    **dict.fromkeys(("push_to_hub", "hub_model_id"), "the adapter is pushed after the run, by Adapter.push_to_hub"),
    **dict.fromkeys(
        ("metric_for_best_model", "greater_is_better", "early_stopping_threshold"),
        "best and patience go by what the task measures: leave it out",
    ),
    **dict.fromkeys(
        (
            "attn_implementation",
            "flash_attention",
            "flash_attn",
            "use_liger_kernel",
            "liger_kernel",
            "save_total_limit",
            "save_safetensors",
            "do_train",
            "do_predict",
            "remove_unused_columns",
            "dataloader_num_workers",
            "preprocessing_num_workers",
            "ddp_timeout",
            "overwrite_cache",
            "plot_loss",
        ),
        "it is seen to without a setting: leave it out",
    ),
    "additional_target": "write modules_to_save, or give the layer a method of its own with overrides",
    **dict.fromkeys(("deepspeed", "fsdp_config"), "write fsdp: true, and start with torchrun"),
    **dict.fromkeys(("chat_template", "template"), "the tokenizer's own chat template is taken"),
}


def aliased(values: dict[str, object], known: Container[str]) -> dict[str, object]:
    """Return settings under our names, given some under those of other tools.

    Args:
        values: by key.
        known: the keys that are taken as they are.

    Raises:
        SpectuneError: a setting is given twice, under two names, or a share as a number of records.
    """
    result: dict[str, object] = {}
    for key, value in values.items():
        ours = key if key in known else _OURS.get(key, key)
        if ours in result or (ours != key and ours in values):
            other = ours if ours in values else next(k for k in values if _OURS.get(k) == ours)
            raise SpectuneError(f"{key} and {other} are the same setting: give one of them")
        if key in _SHARES and isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 1:
            raise SpectuneError(f"{key}: {value} is not a share: write held_out: 0.05, or eval_data: a file")
        result[ours] = value
    return result


def hint(key: str) -> str:
    """Return ``": write ..."`` for a key of another tool that is said in another way here, or the empty string."""
    return f": {_INSTEAD[key]}" if key in _INSTEAD else ""
