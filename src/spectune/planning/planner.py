"""One method's row in a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from spectune.adapters.folder import safetensors_size
from spectune.errors import SpectuneError
from spectune.layers.modules import effective_weight, find_linear
from spectune.methods import Method, parse, to_text
from spectune.methods.adalora import AdaLoRA
from spectune.model.targets import Targets, resolve
from spectune.model.wanted import fresh_heads
from spectune.planning.batch import Batch
from spectune.planning.budget import least_of, within_budget
from spectune.planning.machine import Machine
from spectune.planning.memory import NF4, Parts, Weights, precision_of
from spectune.planning.sizes import adapter_sizes, bases_bytes, keras_lora_parameters
from spectune.planning.step import Cost, measure

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

FULL, KERAS = "full", "keras_lora"
DEVICES = (8, 16, 24, 48, 80)  # gigabytes, of devices as they are sold
_TOKENS = 4096  # that a step is passed with; more than the loss takes at once


# targets, exclude and overrides, as `adapt` takes them
Where = tuple[Targets, Targets, Mapping[str, Method | str | None] | None]


class Planner:
    """Makes the rows of one plan.

    Args:
        name, model, config: the model, on the meta device.
        batch, devices, machine: as for `plan`.
        weights: by precision.
        room: bytes of a device, where the largest batch is wanted.
        budget: of trained parameters, where what keeps it is wanted.

    Attributes:
        notes: what could not be told.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        config: PreTrainedConfig,
        batch: Batch,
        machine: Machine,
        weights: Mapping[str, Weights],
        devices: Sequence[int],
        room: int | None,
        budget: int | None,
    ) -> None:
        self.name, self.model, self.config, self.batch, self.machine = name, model, config, batch, machine
        self.weights, self.devices, self.room, self.budget = weights, devices, room, budget
        self.notes: list[str] = []
        self._few = max(1, min(batch.rows, _TOKENS // batch.length))
        self._costs: dict[object, Cost | None] = {}

    def row(self, method: str | Method, where: Where) -> dict[str, object]:
        """Return one method's row."""
        if isinstance(method, str) and method.partition(":")[0] == KERAS:
            return self._keras(method)
        if method == FULL:
            return self._full()
        parsed = parse(method)
        chosen = resolve(self.model, parsed, *where, heads=fresh_heads(self.model))
        shapes = {n: tuple(effective_weight(find_linear(self.model, n)).shape) for n in chosen}
        small = sum(m != parsed and m == parsed.fit(*shapes[n]) for n, m in chosen.items())
        if small:
            self.notes.append(f"{to_text(parsed)}: {small} layers have less room than its rank, and take all there is")
        trained = sum(m.parameter_count(*shapes[n]) for n, m in chosen.items())
        weights_file, config_file = adapter_sizes(self.model, chosen, self.name)
        kinds = Counter((m, *shapes[n]) for n, m in chosen.items())
        row: dict[str, object] = {
            "method": to_text(parsed),
            "trainable_parameters": trained,
            "trainable_share": trained / sum(p.numel() for p in self.model.parameters()),
            "layers": len(chosen),
            "adapter_bytes": weights_file,
            "config_bytes": config_file,
            "setup_seconds": sum(
                self.machine.setup(m, out_features, in_features, n)
                for (m, out_features, in_features), n in kinds.items()
            ),
        }
        pruned = {n: inner for n, m in chosen.items() if isinstance(inner := getattr(m, "inner", m), AdaLoRA)}
        scored = 8 * sum(m.parameter_count(*shapes[n]) for n, m in pruned.items())
        fixed = {"trained": 4 * trained, "optimizer": 8 * trained + scored, "gradients": 4 * trained}
        row["precisions"] = {
            precision: self._costly(precision, chosen, {**fixed, "bases": bases_bytes(self.model, chosen, dtype)})
            for precision, dtype in ((p, precision_of(p).dtype) for p in self.weights)
        }
        if self.budget is not None:
            row |= self._within(parsed, chosen, shapes)
        return row

    def _within(self, method: Method, chosen: Mapping[str, Method], shapes: Mapping[str, Any]) -> dict[str, object]:
        mine = [shapes[n] for n, m in chosen.items() if m == method.fit(*shapes[n])]
        others = [(m, shapes[n]) for n, m in chosen.items() if m != method.fit(*shapes[n])]
        rest = sum(m.parameter_count(*shape) for m, shape in others)
        fitting = within_budget(method, mine, (self.budget or 0) - rest)
        smallest = rest + sum(least_of(method).fit(*shape).parameter_count(*shape) for shape in mine)
        if fitting is None:
            return {"budget": None, "smallest": smallest}
        count = rest + sum(fitting.fit(*shape).parameter_count(*shape) for shape in mine)
        return {"budget": {"method": to_text(fitting), "trainable_parameters": count}, "smallest": smallest}

    def _full(self) -> dict[str, object]:
        parameters = list(self.model.parameters())
        trained = sum(p.numel() for p in parameters)
        names = {id(p): n for n, p in self.model.named_parameters()}
        file = safetensors_size({n: p for n, p in self.model.named_parameters() if id(p) in names}, {"format": "pt"})
        row: dict[str, object] = {
            "method": FULL,
            "trainable_parameters": trained,
            "trainable_share": 1.0,
            "layers": None,
            "adapter_bytes": file,
            "config_bytes": None,
            "setup_seconds": 0.0,
        }
        row["precisions"] = {}
        for precision in self.weights:
            how = precision_of(precision)
            size = how.dtype.itemsize * trained
            fixed = {"trained": 0.0, "optimizer": 2 * size, "gradients": size, "bases": 0.0}
            row["precisions"][precision] = None if how.packs else self._costly(precision, FULL, fixed)
        if self.budget is not None:
            fits = {"method": FULL, "trainable_parameters": trained} if trained <= self.budget else None
            row |= {"budget": fits, "smallest": trained}
        return row

    def _keras(self, method: str) -> dict[str, object]:
        """Return the count of KerasHub's LoRA, whose factors of query and value are per head; nothing else of it."""
        rank = getattr(parse(method.replace(KERAS, "lora", 1)), "rank")  # noqa: B009 - LoRA has one
        trained = keras_lora_parameters(self.config, rank)
        unknown = dict.fromkeys(("layers", "adapter_bytes", "config_bytes", "setup_seconds"))
        row = {"method": f"{KERAS}:rank={rank}", "trainable_parameters": trained, **unknown}
        row |= {"trainable_share": trained / sum(p.numel() for p in self.model.parameters())}
        row["precisions"] = dict.fromkeys(self.weights)
        if self.budget is not None:
            one = keras_lora_parameters(self.config, 1)
            fit = self.budget // one
            counted = {"method": f"{KERAS}:rank={fit}", "trainable_parameters": fit * one}
            row |= {"budget": counted if fit else None, "smallest": one}
        return row

    def _costly(
        self, precision: str, methods: Mapping[str, Method] | str, fixed: Mapping[str, Any]
    ) -> dict[str, object]:
        dtype = precision_of(precision).dtype
        costs = self._two(methods, dtype)
        lines: dict[str, object] = {"activations": None}
        if costs is not None:
            lines = {"activations": self._line(costs, "activations"), "step": self._line(costs, "with_gradients")}
        parts = Parts(self.weights[precision], **lines, **fixed)
        on = {}
        for count in self.devices:
            held = parts.on(count, self.batch.rows).to_dict()
            if self.room is not None:
                held["largest_batch"] = parts.largest_batch(count, self.room)
            else:
                held["fits"] = {str(size): parts.largest_batch(count, size * 10**9) for size in DEVICES}
            on[str(count)] = held
        step, floor = self._step(methods, precision), self._step("floor", precision)
        ratio = None if step is None or floor is None else step / floor
        return {"memory": on, "step_seconds": step, "step_over_floor": ratio}

    def _step(self, methods: Mapping[str, Method] | str, precision: str) -> float | None:
        how = precision_of(precision)
        costs = self._two(methods, how.dtype)
        if costs is None:
            return None
        seconds = costs[0].extended(costs[1], self.batch.rows - self._few).seconds
        if how.packs:  # forward and backward each read every packed weight and write it in 16 bits
            packed = self.weights[precision].packed * 2 * ((NF4 if how.kind == "4bit" else 1.0) + how.dtype.itemsize)
            seconds += packed / self.machine.bandwidth
        return seconds

    def floors(self) -> dict[str, float | None]:
        """Return the floor's seconds in each precision."""
        return {precision: self._step("floor", precision) for precision in self.weights}

    def _two(self, methods: Mapping[str, Method] | str, dtype: torch.dtype) -> tuple[Cost, Cost] | None:
        """Return the costs of `_few` rows and of one more; those of other batches lie on the line through them."""
        one, more = (self._cost(methods, rows, dtype) for rows in (self._few, self._few + 1))
        return None if one is None or more is None else (one, more)

    def _line(self, costs: tuple[Cost, Cost], what: str) -> tuple[float, float]:
        """Return what a batch of one row takes, and each further one."""
        some, each = getattr(costs[0], what), getattr(costs[1], what) - getattr(costs[0], what)
        return some - (self._few - 1) * each, each

    def _cost(self, methods: Mapping[str, Method] | str, rows: int, dtype: torch.dtype) -> Cost | None:
        key = (methods if isinstance(methods, str) else tuple(methods.items()), rows, dtype)
        if key not in self._costs:
            batch = replace(self.batch, rows=rows)
            try:
                self._costs[key] = measure(self.model, methods, batch, dtype, self.machine)
            except SpectuneError as error:
                note = f"{error}; its activations and step are not known"
                if note not in self.notes:
                    self.notes.append(note)
                self._costs[key] = None
        return self._costs[key]
