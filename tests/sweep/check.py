"""What must hold of an adapted model, tried on one of any architecture."""

from __future__ import annotations

import copy
import math
import re
import tempfile
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import spectune
from spectune import LoRA, SpectuneError
from spectune.layers.adapted import Adapted, adapted_layers
from spectune.layers.modules import is_linear
from spectune.model.targets import output_embeddings

RIGHT, REFUSED, WRONG, SKIPPED = "right", "refused", "wrong", "not built"


class Verdict(NamedTuple):
    """What came of a model: whether it was right, and of routing rows; and why not."""

    whole: str
    rows: str
    layers: int
    idle: int
    why: str


def floats(output: Any) -> list[Tensor]:
    """Return the floating-point tensors of a model's output, without caches."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [t for k, v in output.items() if "past" not in k and "cache" not in k for t in floats(v)]
    if isinstance(output, (list, tuple)):
        return [t for v in output for t in floats(v)]
    return []


def away(a: list[Tensor], b: list[Tensor]) -> float:
    """Return the largest difference, as a part of the largest value."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    found = 0.0
    for x, y in zip(a, b, strict=True):
        x, y = x.detach().nan_to_num(0, 0, 0), y.detach().nan_to_num(0, 0, 0)
        found = max(found, float((x - y).abs().max() / y.abs().max().clamp_min(1e-6)) if x.numel() else 0.0)
    return found


class _Wrong(AssertionError):
    pass


def _must(held: float, at_most: float, what: str) -> None:
    if not held <= at_most:
        raise _Wrong(f"{what}: off by {held:.1e}")


@torch.no_grad()
def run(model: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    torch.manual_seed(7)
    return floats(model(**inputs))


def move(model: Any, name: str, seed: int) -> None:
    """Take an adapter away from its start."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if f".adapters.{name}." in parameter_name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))


def check(model: Any, inputs: Mapping[str, Any]) -> Verdict:
    """Adapt, train, save, load, route, detach and merge a model, each compared with what it must be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _check(model, inputs)


def _check(model: Any, inputs: Mapping[str, Any]) -> Verdict:
    start = run(model, inputs)
    if not start:
        raise ValueError("it gives no floating-point tensor")
    if away(run(model, inputs), start) > 0:
        raise ValueError("it gives other numbers each time")
    fresh, heads = copy.deepcopy(model), copy.deepcopy(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kinds = {n: type(m) for n, m in model.named_modules()}
    try:
        spectune.adapt(model, LoRA(rank=2), name="a")
    except SpectuneError as error:
        return Verdict(REFUSED, REFUSED, 0, 0, str(error))
    layers = adapted_layers(model)
    try:
        idle = _train(model, inputs, layers)
        trained = run(model, inputs)
        with tempfile.TemporaryDirectory() as folder:
            spectune.extract(model, "a").save(folder)
            loaded = spectune.attach(fresh, spectune.Adapter.load(folder), name="a")
        _must(away(run(loaded, inputs), trained), 1e-5, "saved and loaded")
        rows, why = _rows(model, inputs)
        spectune.detach(model)
        after = model.state_dict()
        if after.keys() != before.keys() or not all(torch.equal(after[k], before[k]) for k in before):
            raise _Wrong("detached: the weights are others")
        if {n: type(m) for n, m in model.named_modules()} != kinds:
            raise _Wrong("detached: the modules are others")
        _must(away(run(model, inputs), start), 0.0, "detached")
        why = why or _merged(loaded, inputs, trained)
        why = why or _head(heads, inputs)
    except _Wrong as error:
        return Verdict(WRONG, "", len(layers), 0, str(error))
    return Verdict(RIGHT, rows, len(layers), idle, why)


def _train(model: Any, inputs: Mapping[str, Any], layers: Mapping[str, Adapted]) -> int:
    """Take one step; every layer that was called must have gradients. Return how many were not."""
    move(model, "a", 1)
    called: set[str] = set()
    hooks = [m.register_forward_hook(lambda *_, n=n: called.add(n)) for n, m in layers.items()]
    torch.manual_seed(7)
    outputs = floats(model(**inputs))
    if not any(t.requires_grad for t in outputs):  # reversible layers take gradients of what takes them alone
        model.enable_input_require_grads()
        outputs = floats(model(**inputs))
        model.disable_input_require_grads()
    for hook in hooks:
        hook.remove()
    sum(t.nan_to_num(0, 0, 0).float().square().mean() for t in outputs if t.requires_grad).backward()  # type: ignore[union-attr]
    without = [n for n in called if any(p.grad is None for p in layers[n].adapters.parameters())]
    if without:
        used = _used(model, inputs, without)
        if used:
            raise _Wrong(f"no gradient reaches {used[0]!r}")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None and parameter.requires_grad:
                parameter -= 1e-2 * parameter.grad.clamp(-1, 1)
                parameter.grad = None
    return len(layers) - len(called) + len(without)


def _used(model: Any, inputs: Mapping[str, Any], names: list[str]) -> list[str]:
    """Return the layers whose answer makes a difference to the model's, and whose weight gets a gradient in the base.

    What goes through rounding, such as how long a sound lasts, gives none to anybody.
    """
    expected, found = run(model, inputs), []
    for name in names:
        hook = model.get_submodule(name).register_forward_hook(lambda *args: args[2] + 1)
        if away(run(model, inputs), expected) > 1e-6:
            found.append(name)
        hook.remove()
    if not found:
        return []
    weights = {name: model.get_submodule(name).weight.requires_grad_() for name in found}
    with spectune.base_alone(model):
        outputs = floats(model(**inputs))
    total = sum((t.nan_to_num(0, 0, 0).float().square().mean() for t in outputs if t.requires_grad), torch.zeros(()))
    gradients = (
        torch.autograd.grad(total, weights.values(), allow_unused=True) if total.requires_grad else [None] * len(found)  # type: ignore[arg-type]
    )
    for weight in weights.values():
        weight.requires_grad_(False)
    return [name for name, gradient in zip(found, gradients, strict=True) if gradient is not None]


def _rows(model: Any, inputs: Mapping[str, Any]) -> tuple[str, str]:
    """Compare a batch whose rows have two adapters with each row by itself."""
    spectune.adapt(model, LoRA(rank=2), name="b")
    move(model, "b", 2)
    rows = [{k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in inputs.items()} for i in (0, 1)]
    alone = []
    for row, name in zip(rows, "ab", strict=True):
        spectune.activate(model, name)
        try:
            alone.append(run(model, row))
        except Exception as error:
            return REFUSED, f"a row alone: {type(error).__name__}"
    try:
        with spectune.route(model, ["a", "b"]):
            together = run(model, inputs)
    except SpectuneError as error:
        return REFUSED, str(error)
    off = _off_by_row(together, alone)
    if off > 2e-3:
        spectune.activate(model, None)
        if _off_by_row(run(model, inputs), [run(model, row) for row in rows], math.inf) > 2e-3:
            return REFUSED, "its answer for a row depends on the rows beside it or on chance, without adapters too"
    _must(off, 2e-3, "rows of a batch")
    return RIGHT, ""


def _off_by_row(together: list[Tensor], alone: list[list[Tensor]], without: float = 0.0) -> float:
    """Return how far the rows of answers to a batch are from the answers to each row; `without` if none compares."""
    found = []
    for i, one_by_one in enumerate(alone):
        pairs = [
            (whole[i : i + 1], one)
            for whole, one in zip(together, one_by_one, strict=True)
            if whole.dim() and one.dim() and (whole.shape[0], *one.shape[1:]) == (2, *whole.shape[1:])
        ]
        found.append(away([whole for whole, _ in pairs], [one for _, one in pairs]) if pairs else without)
    return max(found)


def _merged(model: Any, inputs: Mapping[str, Any], expected: list[Tensor]) -> str:
    """Merge, save and load again."""
    spectune.activate(model, "a")
    spectune.merge(model)
    _must(away(run(model, inputs), expected), 1e-3, "merged")
    return _loaded_again(model, type(model), inputs, "merged")


def _head(model: Any, inputs: Mapping[str, Any]) -> str:
    """Adapt the output embedding alone, which in most is tied to the input's; save as it is and merged, load again."""
    cls, outputs = type(model), output_embeddings(model)
    names = [name for name, module in model.named_modules() if module in outputs and is_linear(module)]
    if not names:
        return ""
    try:
        spectune.adapt(model, LoRA(rank=2), targets="|".join(map(re.escape, names)), name="a")
    except SpectuneError as error:
        return f"output embedding: {error}"
    move(model, "a", 3)
    expected = run(model, inputs)
    why = _loaded_again(model, cls, inputs, "with an adapted output embedding")
    spectune.merge(model)
    _must(away(run(model, inputs), expected), 1e-3, "output embedding merged")
    return why or _loaded_again(model, cls, inputs, "output embedding merged")


def _loaded_again(model: Any, cls: Any, inputs: Mapping[str, Any], what: str) -> str:
    expected = run(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            again = cls.from_pretrained(folder).eval()
        except SpectuneError as error:
            return f"{what}: {error}"
        except Exception as error:
            return f"transformers does not save and load it: {type(error).__name__}"
        _must(away(run(again, inputs), expected), 1e-3, f"{what}, saved and loaded")
    return ""
