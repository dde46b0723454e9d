"""The methods of a comparison: at which size each is compared, and the ladder of its learning rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from spectune.compare.config import CompareConfig
from spectune.errors import SpectuneError
from spectune.layers.modules import effective_weight, find_linear
from spectune.methods import parse, to_text
from spectune.methods.head import Head
from spectune.model.targets import resolve
from spectune.model.wanted import fresh_heads
from spectune.pages.units import parse_count
from spectune.planning.budget import within_budget

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASE, FULL = "base", "full"
FULL_LR = 5e-5


def candidates(config: CompareConfig, model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Return what is compared, and sentences on what is not as it was asked for.

    Args:
        config: the comparison.
        model: the base, without adapters.

    Raises:
        SpectuneError: no method, one twice, or one that the model's layers cannot take.
    """
    notes: list[str] = []
    chosen: dict[str, None] = {}
    for text in config.methods:
        if text == FULL and config.quantize is not None:
            notes.append("full is left out: it trains the base's own weights, which quantize packs")
            continue
        name, note = _as_compared(text, config, model)
        notes += note
        if name in chosen:
            raise SpectuneError(f"methods: {text!r} is there twice")
        chosen[name] = None
    if not chosen:
        raise SpectuneError("methods: nothing is given to compare")
    return list(chosen), notes


def _as_compared(text: str, config: CompareConfig, model: PreTrainedModel) -> tuple[str, list[str]]:
    if text in (BASE, FULL):
        return text, []
    name = to_text(parse(text))
    return (name, []) if config.budget is None else _at_budget(name, config, model)


def _at_budget(text: str, config: CompareConfig, model: PreTrainedModel) -> tuple[str, list[str]]:
    method, budget = parse(text), parse_count(config.budget or "")
    layers = resolve(model, **config.where() | {"method": method, "heads": fresh_heads(model)})
    shapes = [
        tuple(effective_weight(find_linear(model, name)).shape)
        for name, own in layers.items()
        if not isinstance(own, Head)
    ]
    sized = within_budget(method, shapes, budget)
    if sized is not None:
        return to_text(sized), []
    least = sum(method.fit(*shape).parameter_count(*shape) for shape in shapes)
    return text, [f"{text} cannot be made as small as {config.budget} parameters; it is compared at {least:,}"]


def baseline(config: CompareConfig, methods: Sequence[str], model: PreTrainedModel) -> str | None:
    """Return the compared method that differences are taken against, or None where the default is not among them.

    Args:
        config: the comparison.
        methods: as `candidates` returned them.
        model: the base, without adapters.

    Raises:
        SpectuneError: a baseline that is given is not among them.
    """
    name, _ = _as_compared(config.baseline, config, model)
    if name in methods:
        return name
    of_kind = [method for method in methods if method.partition(":")[0] == config.baseline]
    if not of_kind and "baseline" in config.model_fields_set:
        raise SpectuneError(f"baseline: {config.baseline} is not among what is compared ({', '.join(methods)})")
    return of_kind[0] if of_kind else None


def rate(config: CompareConfig, method: str, place: int = 0, middle: float | None = None) -> float | None:
    """Return the learning rate at a place of a method's ladder; None for the base.

    A step of the ladder is the root of `lr_factor`: the rates that are tried first are two steps apart.

    Args:
        config: the comparison.
        method: the method.
        place: on the ladder.
        middle: of the ladder; the method's own rate if not given.
    """
    if method == BASE:
        return None
    centre = middle or (FULL_LR if method == FULL else parse(method).learning_rate)
    return float(f"{centre * config.lr_factor ** (place / 2):.2g}")
