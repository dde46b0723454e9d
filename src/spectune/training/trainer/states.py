"""The states that a run goes on from: the adapter's tensors, the optimizer's and the schedule, taken and given back."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from spectune.errors import SpectuneError
from spectune.layers.shards import as_part, is_part, whole
from spectune.training.trainer.checkpoint_files import OPTIMIZER, SCHEDULER, STATE, damaged

_OWN = ("initial_lr", "weight_decay")  # of a group of parameters: the configuration's, not the checkpoint's


class _OptimizerState(TypedDict):
    state: dict[int, dict[str, Tensor | float]]
    param_groups: list[dict[str, object]]


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Return every tensor of the adapters in a model's state, schedules included, by name."""
    return {key: value for key, value in model.state_dict().items() if ".adapters." in f".{key}"}


def put_adapter_state(model: nn.Module, checkpoint: str) -> None:
    """Give a model's adapters the tensors that a checkpoint has.

    Raises:
        SpectuneError: the file is damaged, or was made with other settings.
    """
    try:
        state = load_file(Path(checkpoint) / STATE)
    except (OSError, SafetensorError) as error:
        raise damaged(checkpoint, error) from None
    target = adapter_state(model)
    if state.keys() != target.keys():
        differing = min(state.keys() ^ target.keys())
        raise SpectuneError(
            f"{checkpoint} was made with other settings (it differs in {differing!r}); "
            "resume with the configuration of the run"
        )
    for key, tensor in state.items():
        if (tensor.shape, tensor.dtype) != (target[key].shape, target[key].dtype):
            raise SpectuneError(
                f"{checkpoint} was made with other settings ({key!r} is {tensor.dtype} {tuple(tensor.shape)} there "
                f"and {target[key].dtype} {tuple(target[key].shape)} here); resume with the configuration of the "
                "run"
            )
    with torch.no_grad():
        for key, tensor in state.items():
            target[key].copy_(as_part(tensor, target[key]))


def optimizer_state(optimizer: torch.optim.Optimizer) -> _OptimizerState:
    """Return an optimizer's state with its tensors whole."""
    state = optimizer.state_dict()
    found = {
        index: {key: whole(value) if is_part(value) else value for key, value in values.items()}
        for index, values in state["state"].items()
    }
    return {"param_groups": state["param_groups"], "state": found}


def put_optimizer_state(optimizer: torch.optim.Optimizer, schedule: LRScheduler, checkpoint: str) -> None:
    """Give an optimizer and its schedule the states that a checkpoint has; learning rates and decay stay this run's.

    Raises:
        SpectuneError: a file is damaged, or was made with other settings.
    """
    folder = Path(checkpoint)
    try:
        state, where = (
            torch.load(folder / name, map_location="cpu", weights_only=True) for name in (OPTIMIZER, SCHEDULER)
        )
    except Exception as error:  # whatever a damaged file makes of the reader
        raise damaged(checkpoint, error) from None
    # a checkpoint is one process': tensors in the optimizer's state are whole there, and parts where the parameter
    # is
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    _check_optimizer(state, parameters, checkpoint)
    # FSDP2 shards a parameter, and its moments have to be cut in the same places
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameters[index].shape:
                values[key] = as_part(value, parameters[index])
    # `load_state_dict` brings the groups' options back as well, those that the user has changed since among them
    own = [{key: group[key] for key in _OWN if key in group} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        raise SpectuneError(
            f"{checkpoint} was made with other groups of parameters ({error}); resume with the configuration of the run"
        ) from None
    schedule.load_state_dict(where)
    _keep_rates(optimizer, schedule, own)


def _check_optimizer(state: _OptimizerState, parameters: list[Tensor], checkpoint: str) -> None:
    """Raise unless an optimizer's state has, for parameters that there are, tensors of their shapes or single numbers.

    Raises:
        SpectuneError: it has not.
    """
    try:
        for index, values in state["state"].items():
            for key, value in values.items():
                if isinstance(value, Tensor) and value.dim() and value.shape != parameters[index].shape:
                    raise SpectuneError(
                        f"{checkpoint} was made with other settings ({key!r} of the optimizer is {tuple(value.shape)} "
                        f"there, and its parameter {tuple(parameters[index].shape)} here); resume with the "
                        "configuration of the run"
                    )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise damaged(checkpoint, error) from None


def _keep_rates(optimizer: torch.optim.Optimizer, schedule: LRScheduler, own: list[dict[str, float]]) -> None:
    """Train with this run's learning rates and decay, where the schedule is, and not with those of before."""
    groups = optimizer.param_groups
    for group, values in zip(groups, own, strict=True):
        group.update(values)
    if isinstance(schedule, LambdaLR):  # as all of transformers' are that do not look at the loss
        schedule.base_lrs = [group["initial_lr"] for group in groups]
        set_rates(schedule)


def set_rates(schedule: LambdaLR) -> None:
    """Give the optimizer the learning rates that its schedule has where it is."""
    groups = schedule.optimizer.param_groups
    for group, base, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * factor(schedule.last_epoch)
    # what LRScheduler.step keeps for get_last_lr(); no public function takes rates without making a step
    schedule._last_lr = [group["lr"] for group in groups]
