"""What transformers' Trainer is to do in a run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from transformers import TrainingArguments

from spectune.training.config import TrainConfig
from spectune.training.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def training_arguments(config: TrainConfig, model: PreTrainedModel, evaluates: bool, task: Task) -> TrainingArguments:
    """Return what transformers' Trainer is to do, given a run's configuration and whether anything is held out."""
    on_cpu = model.device.type == "cpu"
    skips = any(value and ("expert" in key or "layerdrop" in key) for key, value in model.config.to_dict().items())
    schedule = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}[config.schedule]
    goes_back = config.best or config.patience is not None
    arguments = TrainingArguments(
        output_dir=config.output,
        learning_rate=config.learning_rate(),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        lr_scheduler_type=schedule,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm or math.inf,  # with 0 nobody would look at the gradients
        eval_strategy="steps" if evaluates and config.eval_steps else "no",
        eval_steps=config.eval_steps,
        save_steps=(goes_back and config.eval_steps) or config.save_steps,  # or the best might not be there
        save_total_limit=2,
        load_best_model_at_end=goes_back,
        metric_for_best_model=task.best_metric,  # the greater the better, unless it ends in "loss"
        logging_steps=config.log_steps,
        logging_nan_inf_filter=False,  # which would wait for the device, and hide what the trainer looks for
        seed=config.seed,
        data_seed=config.seed,
        report_to=config.reports() or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_broadcast_buffers=False,  # bases are the same everywhere
        ddp_find_unused_parameters=skips,
        prediction_loss_only=True,
        train_sampling_strategy="group_by_length" if task.by_length else "random",
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # one process, one device: DataParallel would cut up packed rows
    return arguments
