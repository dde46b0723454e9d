"""What fine-tuning a model by each method takes, from its config alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from spectune.bases.shapes import build, find_config
from spectune.errors import SpectuneError
from spectune.methods import METHODS, Method
from spectune.model.targets import ALL_LINEAR, Targets
from spectune.pages.units import gigabytes, parse_bytes, parse_count
from spectune.planning.batch import Batch
from spectune.planning.machine import Machine, keep, this_machine
from spectune.planning.memory import Weights, precision_of, weights_of
from spectune.planning.planner import FULL, Planner

PRECISIONS = ("fp32", "bf16", "4bit")
DEFAULTS = ("svft:pattern=banded", "svft:pattern=random", "svft:pattern=top_k", "dora:inner=svf", "dora:inner=pissa")


def default_methods() -> list[str]:
    """Return every registered method with its defaults, SVFT's other patterns, DoRA around others, and "full"."""
    return [*METHODS, *DEFAULTS, FULL]


@dataclass
class Plan:
    """What `plan` found; `to_dict` is what `--json` prints."""

    model: str
    parameters: int
    batch: Batch
    machine: Machine
    floor_seconds: dict[str, float | None]
    rows: list[dict[str, object]]
    notes: list[str]

    def to_dict(self) -> dict[str, object]:
        """Return the plan as JSON values."""
        timed = "measured on this machine, scaled" if self.machine.measured else "stored rates of another machine"
        return {
            "model": self.model,
            "parameters": self.parameters,
            "batch": asdict(self.batch),
            "times": timed,
            "threads": self.machine.threads,
            "floor_seconds": self.floor_seconds,
            "rows": self.rows,
            "notes": self.notes,
        }


def plan(
    model: str,
    methods: Sequence[str | Method] = (),
    *,
    targets: Targets = ALL_LINEAR,
    exclude: Targets = (),
    overrides: Mapping[str, Method | str | None] | None = None,
    batch_size: int = 8,
    length: int = 512,
    supervised: float = 1.0,
    gradient_checkpointing: bool | Literal["selective"] = "selective",
    precisions: Sequence[str] = PRECISIONS,
    devices: Iterable[int] = (1,),
    memory: str | int | None = None,
    budget: str | int | None = None,
    measured: bool = True,
    machine: Machine | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Return what each method trains, stores, holds in memory and costs on a model, from its config alone.

    The model is built on the meta device and a training step is run on it without numbers: what it computes, moves and
    holds is counted from the code that would train.

    Args:
        model: a built-in or embedded name, or a folder with a config.json.
        methods: methods or their texts, "full" and "keras_lora:rank=8" too; all with their defaults if empty.
        targets: as for `spectune.adapt`.
        exclude: as for `spectune.adapt`.
        overrides: as for `spectune.adapt`.
        batch_size: sequences on each device.
        length: tokens of a sequence.
        supervised: share of the positions that a causal model computes logits and the loss at, in (0, 1].
        gradient_checkpointing: what the backward pass computes again, as in `spectune train`.
        precisions: of "fp32", "bf16", "4bit" (NF4 with doubly quantized scales; adapters in float32), "4bit:rank=16"
            (a part of this rank held beside each packed weight) and "8bit" (LLM.int8).
        devices: numbers of devices, with FSDP2.
        memory: of a device, such as "24GB": adds the largest batch that fits.
        budget: of trained parameters, such as "100k": adds the largest rank or width that keeps it.
        measured: time decompositions and products on this machine (seconds, once); False takes stored rates.
        machine: rates to use instead.
        progress: called as progress(done, total) after each method.

    Raises:
        SpectuneError: an unknown model or method, a layer that cannot take one that was asked for, a malformed size,
            a budget that nothing keeps, or a memory that does not hold the weights.
    """
    batch, devices = Batch(batch_size, length, supervised, gradient_checkpointing), _checked_devices(devices)
    _check(batch, precisions)
    room = None if memory is None else parse_bytes(memory)
    limit = None if budget is None else parse_count(budget)
    config = find_config(model, trust_remote_code=trust_remote_code)
    built = build(config, trust_remote_code=trust_remote_code)
    weights = {precision: weights_of(built, precision) for precision in precisions}
    if room is not None:
        _check_room(model, weights, devices, room)
    machine = machine or this_machine(measured)
    planner = Planner(model, built, config, batch, machine, weights, devices, room, limit)
    rows, asked = [], list(methods) or default_methods()
    for i, method in enumerate(asked):
        try:
            rows.append(planner.row(method, (targets, exclude, overrides)))
        except SpectuneError as error:
            if methods or "cannot take" not in str(error):
                raise
            planner.notes.append(f"{method} is left out: {error}")
        keep(machine)  # what has been timed by now, so that a plan that is broken off is quicker the next time
        if progress is not None:
            progress(i + 1, len(asked))
    if limit is not None:
        _check_budget(model, rows, limit)
    total = sum(p.numel() for p in built.parameters())
    return Plan(model, total, batch, machine, planner.floors(), rows, planner.notes)


def _check_budget(model: str, rows: Sequence[Mapping[str, Any]], limit: int) -> None:
    if any(row["budget"] for row in rows):
        return
    least = min(rows, key=lambda row: row["smallest"])
    raise SpectuneError(
        f"no rank or width of {', '.join(row['method'] for row in rows)} trains as few as {limit:,} parameters on "
        f"{model}: the least is {least['smallest']:,} by {least['method']}; raise the budget or narrow the targets"
    )


def _check(batch: Batch, precisions: Sequence[str]) -> None:
    if batch.rows < 1 or batch.length < 1:
        raise SpectuneError(f"batch_size and length must be at least 1, not {batch.rows} and {batch.length}")
    if not 0 < batch.supervised <= 1:
        raise SpectuneError(f"supervised must be a share in (0, 1], not {batch.supervised}")
    if batch.gradient_checkpointing not in (True, False, "selective"):
        raise SpectuneError(
            f"gradient_checkpointing must be selective, true or false, not {batch.gradient_checkpointing!r}"
        )
    for precision in precisions:
        precision_of(precision)


def parse_devices(text: str) -> list[int]:
    """Return the numbers of devices that `4`, `1,2,8` or `1-8` stands for.

    Raises:
        SpectuneError: it is none of these.
    """
    counts: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()) or int(high or low) > 4096:
            raise SpectuneError(f"devices: {text!r} is not a number, a list such as 1,4,8 or a range such as 1-8")
        counts += range(int(low), int(high or low) + 1)
    return counts


def _checked_devices(devices: Iterable[int]) -> list[int]:
    counts = sorted(set(devices))
    if not counts or counts[0] < 1:
        raise SpectuneError("devices must be numbers of at least 1")
    return counts


def _check_room(model: str, weights: Mapping[str, Weights], devices: Sequence[int], room: int) -> None:
    """Raise where no precision's weights fit; say what would."""
    most = devices[-1]

    def each(precision: str, count: int) -> float:
        held = weights[precision]
        return held.total / count + held.working + (held.block if count > 1 else 0)

    least = min(weights, key=lambda p: each(p, most))
    if each(least, most) <= room:
        return
    advice = []
    if not any(precision_of(p).packs for p in weights):
        advice.append("4-bit weights (4bit)")
    enough = next((n for n in range(most + 1, 1025) if each(least, n) <= room), None)
    if enough is not None:
        advice.append(f"{enough} devices")
    advice.append("a smaller model")
    raise SpectuneError(
        f"the weights of {model} alone take {gigabytes(each(least, most))} in {least} on each of {most} device"
        f"{'s' if most > 1 else ''}, and {gigabytes(room)} was given; what would fit: {', or '.join(advice)}"
    )
