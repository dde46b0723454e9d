"""Many adapters in one batch against one for all of its rows: prefill, and decoding behind a cache.

A whole SmolLM2-135M with random weights, 64 rows of 16 tokens with 1, 8 or 64 adapters, beside PEFT's `adapter_names`.
The two sides of a ratio take turns; `first` is the prefill that enters the context, as a new batch does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import DynamicCache

import spectune
from gpu import models
from gpu.part import Part, Place, Skipped, ratio
from spectune.bases.generation import cache_key

METHODS = {"svf": "svf", "lora_xs": "lora_xs:rank=16", "lora": "lora:rank=16,alpha=32"}
ROUNDS = 5


class Ours:
    """Adapters of a method on a model: `activate` for one, `route` for many."""

    def __init__(self, model: Any, method: str, count: int) -> None:
        self.model, self.stacks = model, {}
        with models.made_up_decompositions():
            spectune.adapt(model, METHODS[method], name="a0")
            adapter = spectune.extract(model, "a0")
            for i in range(1, count):
                spectune.attach(model, adapter, name=f"a{i}")
        _move(p for name, p in model.named_parameters() if ".adapters." in name)
        model.requires_grad_(False)

    def one(self) -> Any:
        spectune.activate(self.model, "a0")
        return nullcontext(self.model)

    @contextmanager
    def many(self, names: list[str]) -> Any:
        with spectune.route(self.model, names, stacks=self.stacks):
            yield self.model


class Peft:
    """LoRA adapters of PEFT on a model: `set_adapter` for one, `adapter_names` for many."""

    def __init__(self, model: Any, method: str, count: int) -> None:
        try:
            import peft
        except ImportError:
            raise Skipped("peft is not installed") from None
        config: Any = peft.LoraConfig(r=16, lora_alpha=32, target_modules=models.SEVEN)
        self.model: Any = peft.get_peft_model(model, config, adapter_name="a0")
        for i in range(1, count):
            self.model.add_adapter(f"a{i}", config)
        _move(p for name, p in self.model.named_parameters() if "lora_" in name)
        self.model.eval().requires_grad_(False)

    def one(self) -> Any:
        self.model.set_adapter("a0")
        return nullcontext(self.model)

    @contextmanager
    def many(self, names: list[str]) -> Any:
        yield lambda **inputs: self.model(adapter_names=names, **inputs)


def _move(parameters: Any) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(1e-3)


def measure(part: Part) -> None:
    """Fill the rows of the part."""
    place = part.place
    counts, rows, length = place.of(([1, 8, 64], 64, 16), ([1, 4], 4, 5))
    for method in ("lora", "svf", "lora_xs", "PEFT lora"):
        made: list[Any] = []  # the side, once a row asks for it

        def side(made: list[Any] = made, method: str = method) -> Any:
            if not made:
                kind = Peft if method == "PEFT lora" else Ours
                made.append(kind(models.small(place), method, max(counts)))
            return made[0]

        for count in counts:
            part.row(
                f"{method}, {count} of {rows}",
                lambda side=side, count=count: timed(place, side(), count, rows, length),
                needs=place.of(10.0, 0.0),
            )
        made.clear()


@torch.no_grad()
def timed(place: Place, side: Any, count: int, rows: int, length: int) -> dict[str, Any]:
    """Return the times of a batch with so many adapters over those with one."""
    vocabulary = side.model.config.vocab_size
    ids = torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0)).to(place.device)
    last, names = torch.tensor([-1], device=place.device), [f"a{i % count}" for i in range(rows)]
    cache = DynamicCache()
    with side.one() as model:
        key = cache_key(model)
        model(input_ids=ids, **{key: cache}, logits_to_keep=last)

    def prefill(model: Any) -> None:
        model(input_ids=ids, use_cache=False, logits_to_keep=last)

    def decode(model: Any) -> None:
        model(input_ids=ids[:, :1], **{key: cache}, logits_to_keep=last)
        cache.crop(-1)

    found: dict[str, Any] = {}
    for kind, step in (("prefill", prefill), ("decode", decode)):
        one, first, many = turns(place, side, names, step)
        found[f"{kind}_many_over_one"] = ratio(many, one)
        found[f"{kind}_one_s"], found[f"{kind}_many_s"] = round(min(one), 5), round(min(many), 5)
        if kind == "prefill":
            found["first_over_one"] = ratio(first, one)
    return found


def turns(place: Place, side: Any, names: list[str], step: Callable[[Any], None]) -> tuple[list[float], ...]:
    """Return the seconds with one adapter, with many on entering the context, and with many in it."""
    found = []
    for _ in range(1 + place.of(ROUNDS, 1)):
        with side.one() as model:
            one = place.seconds(lambda: step(model))
        with side.many(names) as model:
            found.append((one, place.seconds(lambda: step(model)), place.seconds(lambda: step(model))))
    return tuple(list(times) for times in zip(*found[1:], strict=True))


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Return what is shown of the part."""
    return [
        f"{name:22s} prefill {row['prefill_many_over_one']:6.2f} (first {row['first_over_one']:6.2f})  "
        f"decode {row['decode_many_over_one']:6.2f} x one adapter's {row['decode_one_s'] * 1e3:.2f} ms"
        for name, row in rows.items()
        if "decode_many_over_one" in row
    ]
