"""Checkpoints of the adapter alone, for transformers.Trainer and every trainer that is built on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectune.adapters.files import write_atomically
from spectune.errors import SpectuneError
from spectune.model import extract

STATE = "adapter_state.safetensors"
T = TypeVar("T")


def trainer_for(kind: type[T], adapter: str = "default") -> type[T]:
    """Return a trainer's class that saves, resumes from and pushes the adapter alone, and never the base.

    Works for transformers.Trainer and what is built on it, TRL's SFTTrainer, DPOTrainer and GRPOTrainer among them.

    Args:
        kind: the trainer's class.
        adapter: the name that the adapter has on the model.
    """
    members = {"adapter_name": adapter, "__doc__": kind.__doc__}
    return type(f"Adapter{kind.__name__}", (AdapterCheckpoints, kind), members)  # type: ignore[return-value]


class AdapterCheckpoints:
    """Mixed in before a Trainer: what it saves, resumes from and pushes is the adapter, and never the base.

    A checkpoint holds the adapter as `Adapter.save` writes it, which is what to take from it, and every tensor of it
    with its schedules as they are in the model, from which a run goes on bit for bit.

    Attributes:
        adapter_name: the adapter on the model.
        last_checkpoint: the folder of the last checkpoint of this run.
    """

    adapter_name = "default"
    last_checkpoint: str | None = None
    args: Any
    model: Any
    state: Any
    accelerator: Any
    processing_class: Any

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        extract(self.accelerator.unwrap_model(self.model), self.adapter_name).save(folder)
        if folder != Path(self.args.output_dir or "."):
            state = {k: v.contiguous() for k, v in adapter_state(self.model).items()}
            write_atomically(folder / STATE, lambda path: save_file(state, path))
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]
        self.last_checkpoint = str(Path(self.args.output_dir or ".") / f"checkpoint-{self.state.global_step}")

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state = load_file(Path(resume_from_checkpoint) / STATE)
        target = adapter_state(model if model is not None else self.model)
        if state.keys() != target.keys():
            differing = min(state.keys() ^ target.keys())
            raise SpectuneError(
                f"{resume_from_checkpoint} was made with other settings (it differs in {differing!r}); "
                "resume with the configuration of the run"
            )
        with torch.no_grad():
            for key, tensor in state.items():
                target[key].copy_(tensor)


def adapter_state(model: Any) -> dict[str, Tensor]:
    """Return every tensor of the adapters in a model's state, schedules included, by name."""
    return {key: value for key, value in model.state_dict().items() if ".adapters." in f".{key}"}
