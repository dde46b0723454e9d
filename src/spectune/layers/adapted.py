"""The adapted layer: a linear layer that takes over its own class, keeps its weight, and adds updates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from spectune.errors import SpectuneError, nearest
from spectune.layers.cores import mix
from spectune.layers.factors import Base, Factors

if TYPE_CHECKING:
    from spectune.methods.base import Method

Mixture = Mapping[str, float]


class Basis(nn.Module):
    """The frozen tensors of a method on one weight, shared by every adapter that has the same basis."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return dict(self.named_buffers(recurse=False))


class Update(nn.Module):
    """One term of one adapter on one layer: a method, its trained tensors as parameters, and a weight.

    Args:
        method: what to do with the tensors.
        trained: the tensors that train.
        weight: factor of the whole update; 1 except in a sum of adapters.
    """

    def __init__(self, method: Method, trained: Mapping[str, Tensor], weight: float = 1.0) -> None:
        super().__init__()
        self.method, self.weight = method, weight
        for name, tensor in trained.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def trained(self) -> dict[str, Tensor]:
        """Return the trained tensors by name."""
        return dict(self.named_parameters(recurse=False))

    def extra_repr(self) -> str:
        return repr(self.method)


class Selection:
    """Which adapters answer, shared by every adapted layer of a model.

    Args:
        mixture: adapter names and weights for every row.
        rows: a mixture for each row of the batch instead.
        expandable: each row of `rows` may stand for several consecutive rows of the batch (beams).
        frozen: the parameters that adapting froze, to be set free by detaching.
    """

    def __init__(self) -> None:
        self.mixture: Mixture = {}
        self.rows: list[Mixture] | None = None
        self.expandable = False
        self.frozen: list[nn.Parameter] = []

    def weights(self, names: Iterable[str], x: Tensor) -> dict[str, float | Tensor]:
        """Return the weight of each adapter in use: a number, or one for each row of x."""
        if self.rows is None:
            return {name: self.mixture[name] for name in names if self.mixture.get(name)}
        times, rest = divmod(x.shape[0], len(self.rows))
        if rest or (times != 1 and x.dim() > 2 and not self.expandable):
            raise SpectuneError(
                f"route was given {len(self.rows)} rows and the batch has {x.shape[0]}; give one entry for each row"
            )
        weights: dict[str, float | Tensor] = {}
        for name in names:
            column = [row.get(name, 0.0) for row in self.rows]
            if any(column):
                weights[name] = torch.tensor(column, device=x.device).repeat_interleave(times)
        return weights


class Adapted(nn.Module):
    """Mixed into a linear layer's class: y = W x + b + the updates of the selected adapters."""

    adapters: nn.ModuleDict
    bases: nn.ModuleDict
    selection: Selection
    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        weights = self.selection.weights(self.adapters, x)
        return self._respond(weights, x, y) if weights else y

    def _respond(self, weights: Mapping[str, float | Tensor], x: Tensor, y: Tensor) -> Tensor:
        plain = y
        groups: dict[tuple[Any, ...], list[tuple[Factors, float | Tensor]]] = {}
        for name, weight in weights.items():
            for update in self.adapters[name]:  # type: ignore[attr-defined]
                term_weight = weight * update.weight
                if not update.method.core_only:
                    y = self._add(y, update, term_weight, x, plain)
                    continue
                factors = update.method.factors(self.tensors(update))
                core = factors.core
                key = (update.method.basis_key, type(core), core.values.shape, getattr(core, "width", None))
                groups.setdefault(key, []).append((factors, term_weight))
        for group in groups.values():
            y = y + _mixed(group, x).apply(x)
        return y

    def _add(self, y: Tensor, update: Update, weight: float | Tensor, x: Tensor, plain: Tensor) -> Tensor:
        tensors = self.tensors(update)
        if not isinstance(weight, Tensor):
            part = update.method.respond(tensors, x, self.base(plain), update.training)
            return y + (part if weight == 1.0 else part * weight)
        rows = weight.nonzero().flatten()
        part = update.method.respond(tensors, x[rows], self.base(plain[rows]), update.training)
        scale = weight[rows].to(part.dtype).reshape(-1, *(1,) * (part.dim() - 1))
        return y.index_add(0, rows, part * scale)

    def base(self, output: Tensor | None = None) -> Base:
        """Return what an update may ask of the frozen layer whose output is `output`."""

        def without_bias() -> Tensor:
            if output is None:
                raise RuntimeError("this update was asked for outside a forward pass")
            return output if self.bias is None else output - self.bias

        return Base(without_bias, lambda r: F.linear(r.to(self.weight.dtype), effective_weight(self)))

    def tensors(self, update: Update) -> dict[str, Tensor]:
        """Return an update's trained and frozen tensors by name."""
        key = update.method.basis_key
        frozen = self.bases[key].tensors() if key in self.bases else {}  # type: ignore[operator]
        return {**frozen, **update.trained()}


def _mixed(group: list[tuple[Factors, float | Tensor]], x: Tensor) -> Factors:
    """Add updates over one basis into one, with a core for each row where the weights differ by row."""
    first, weight = group[0]
    if len(group) == 1 and isinstance(weight, float) and weight == 1.0:
        return first
    scaled = [w * f.scale for f, w in group]
    weights = torch.stack([torch.as_tensor(w, dtype=torch.float32, device=x.device) for w in scaled], dim=-1)
    return first._replace(core=mix([f.core for f, _ in group], weights), scale=1.0)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is of a kind that can be adapted."""
    return isinstance(module, (nn.Linear, Conv1D))


def is_conv1d(module: nn.Module) -> bool:
    """Whether a layer is a Conv1D, whose weight is stored (in x out)."""
    return isinstance(module, Conv1D)


def effective_weight(layer: nn.Module) -> Tensor:
    """Return W (out x in) of a linear layer; a view, transposed for Conv1D."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.T if is_conv1d(layer) else weight


def find_linear(model: nn.Module, name: str) -> nn.Module:
    """Return the linear layer of this name in a model.

    Raises:
        SpectuneError: there is none; the nearest names are listed.
    """
    found = dict(model.named_modules()).get(name)
    if found is None or not is_linear(found):
        linears = [n for n, m in model.named_modules() if is_linear(m)]
        raise SpectuneError(f"the model has no linear layer {name!r}{nearest(name, linears)}")
    return found


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """Return the adapted layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


@cache
def adapted_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that adds updates to `kind`: a subclass of it, so that isinstance goes on holding."""
    return type(f"Adapted{kind.__name__}", (Adapted, kind), {"__module__": kind.__module__, "plain_class": kind})


def take_over(layer: nn.Module, selection: Selection) -> Adapted:
    """Make a linear layer an adapted one, in place, without touching its parameters."""
    layer.__class__ = adapted_class(type(layer))
    layer.adapters, layer.bases = nn.ModuleDict(), nn.ModuleDict()
    layer.selection = selection  # type: ignore[assignment]
    return layer  # type: ignore[return-value]


def give_back(layer: Adapted) -> None:
    """Make an adapted layer the plain one it was."""
    del layer.adapters, layer.bases, layer.selection
    layer.__class__ = layer.plain_class  # type: ignore[attr-defined]
