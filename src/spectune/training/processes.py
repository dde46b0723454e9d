"""The processes of one run, as torchrun or accelerate starts them: which one this is, and what they agree on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn as nn
from accelerate import PartialState

from spectune.bases.devices import checked_device
from spectune.errors import SpectuneError
from spectune.layers.updates import Basis

T = TypeVar("T")

_PATIENCE = timedelta(days=1)  # others wait while the main process decomposes a large model
# "group" of all processes, on the CPU whatever the accelerator, and "fsdp" if launched so
_talk: dict[str, object] = {}


def start(device: str | None = None) -> torch.device:
    """Join the other processes of this run, where a launcher started several, and return this one's device.

    Args:
        device: "cpu", "cuda", ...; None takes the accelerator if there is one.  Each process takes its own of several.

    Raises:
        SpectuneError: a device with a number, of which each process needs its own, or one on which they cannot talk.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if device is None and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"):
        device = "cpu"
    chosen = checked_device(device or None)
    if launched == 1 and not dist.is_initialized():
        return chosen
    if chosen.index is not None:
        raise SpectuneError(f"device={device} is for one process; with {launched} give device={chosen.type}")
    if os.environ.pop("ACCELERATE_USE_FSDP", "").lower() == "true":  # the sharding is ours
        _talk["fsdp"] = True
    own = PartialState(cpu=chosen.type == "cpu").device
    assert own is not None  # once the state is there
    if not dist.is_initialized() or own.type != chosen.type:
        raise SpectuneError(f"{launched} processes cannot train together on {chosen.type}; give device=cpu")
    return own


def load_device(device: str | None, sharded: bool) -> torch.device:
    """Return where to load the base: main memory where it is then sharded, for no one device need hold all of it."""
    own = start(device)
    return torch.device("cpu") if wants_shards(sharded) else own


def finish() -> None:
    """Leave the other processes."""
    _talk.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def _group() -> dist.ProcessGroup:
    if "group" not in _talk:
        _talk["group"] = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return cast("dist.ProcessGroup", _talk["group"])


def is_main() -> bool:
    """Whether this is the process that writes files and speaks."""
    return rank() == 0


def gather(value: T) -> list[T]:
    """Return the value of each process."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value, group=_group())
    return values


def total(*values: float) -> list[float]:
    """Return sums over all processes."""
    if count() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums, group=_group())
    return sums.tolist()


@contextmanager
def together() -> Iterator[None]:
    """Within the context, an error of one process becomes an error of all, so that none waits for the others.

    Raises:
        SpectuneError: another process failed.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    told = None if failed is None else (isinstance(failed, SpectuneError), f"{failed or type(failed).__name__}")
    others = gather(told) if count() > 1 else []
    if failed is not None:
        raise failed
    for number, other in enumerate(others):
        if other is not None:
            raise SpectuneError(other[1] if other[0] else f"process {number} failed: {other[1]}")


def main_first(work: Callable[[], T]) -> T:
    """Return what `work` returns, done by the main process before the others, which then find its files."""
    done: list[T] = []
    for turn in (True, False):
        with together():
            if is_main() == turn:
                done.append(work())
    return done[0]


def wants_shards(asked: bool) -> bool:
    """Whether the model is to be sharded: asked for in the configuration, or by `accelerate launch --use_fsdp`."""
    return count() > 1 and (asked or "fsdp" in _talk)


def shard(model: nn.Module) -> None:
    """Shard a model's parameters and bases over the processes with FSDP2: each block, then what is left.

    accelerate, which knows no FSDP2 on the CPU and saves the base with every checkpoint, is told to leave it alone.
    """
    from torch.distributed.fsdp import fully_shard  # with torch.distributed.tensor, which takes its time

    for module in model.modules():
        if isinstance(module, Basis):
            module.as_parameters()
    own = PartialState().device
    assert own is not None
    mesh = dist.init_device_mesh(own.type, (count(),))
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    vars(model)["_is_accelerate_prepared"] = True
