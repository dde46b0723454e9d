"""The adapted layer: a linear layer that takes over its own class, keeps its weight, and adds updates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from spectune.dense import by_onednn, linear
from spectune.errors import SpectuneError, nearest
from spectune.layers.cores import mix
from spectune.layers.factors import Base, Factors
from spectune.layers.linear import adapted_linear
from spectune.layers.recompute import frozen_linear
from spectune.layers.stacks import Gather, Stack

if TYPE_CHECKING:
    from spectune.methods.base import Method

# the weight of each adapter: a number, a tensor () that takes gradients, or one of these for each layer (0 elsewhere)
Weight = float | Tensor
Mixture = Mapping[str, "Weight | dict[Adapted, Weight]"]


class Basis(nn.Module):
    """The frozen tensors of a method on one weight, shared by every adapter that has the same basis."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {**self._buffers, **self._parameters}  # type: ignore[dict-item]

    def as_parameters(self) -> None:
        """Hold the matrices as frozen parameters, which FSDP2 shards, and not as buffers, which it does not."""
        for name, tensor in list(self._buffers.items()):
            if tensor is not None and tensor.dim() > 1 and tensor.is_floating_point():
                del self._buffers[name]
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


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
        self._kept: tuple[Any, Tensor | None] | None = None
        self.basis_key = method.basis_key
        for name, tensor in trained.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def trained(self) -> dict[str, Tensor]:
        """Return the trained tensors by name."""
        return dict(self._parameters)  # type: ignore[arg-type]

    def ratio(self, tensors: dict[str, Tensor], base: Base) -> Tensor | None:
        """Return the method's ratio; without gradients it is kept until a parameter is written to."""
        trained: list[Any] = list(self._parameters.values())
        if self.method.additive or torch.is_grad_enabled() or any(p.is_inference() for p in trained):
            self._kept = None
            return self.method.ratio(tensors, base)
        state = [(p.data_ptr(), p._version) for p in trained]
        if self._kept is None or self._kept[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                self._kept = state, self.method.ratio(tensors, base)
        return self._kept[1]

    def extra_repr(self) -> str:
        return repr(self.method)


class Share(NamedTuple):
    """The weight of one adapter in each row of a batch.

    Args:
        column: weights (batch), zero where the adapter has no part.
        rows: the rows (n) where it has.
        weights: their weights (n).
        uses: both, by row, without gradients.
    """

    column: Tensor
    rows: Tensor
    weights: Tensor
    uses: list[tuple[int, Any]]


class Rows:
    """A mixture of adapters for each row of a batch.

    Args:
        mixtures: adapter names and weights of each row.
        stacks: the factors that are held side by side, which other batches may go on from.
    """

    def __init__(self, mixtures: Sequence[Mixture], stacks: dict[Any, Stack] | None = None) -> None:
        self.mixtures = list(mixtures)
        self.stacks = {} if stacks is None else stacks
        self._gathers: dict[Any, Gather] = {}
        self._by_layer = {name for row in mixtures for name, weight in row.items() if isinstance(weight, dict)}
        self._shares: dict[tuple[str, Adapted | None, int, torch.device], Share | None] = {}

    def share(self, name: str, layer: Adapted, times: int, device: torch.device) -> Share | None:
        """Return an adapter's part in a layer, or None if it has none; a row stands for `times` rows of the batch."""
        key = (name, layer if name in self._by_layer else None, times, device)
        if key not in self._shares:
            column = [weight_at(row, name, layer) for row in self.mixtures for _ in range(times)]
            rows = [i for i, weight in enumerate(column) if isinstance(weight, Tensor) or weight]
            if any(isinstance(weight, Tensor) for weight in column):
                weights = torch.stack([torch.as_tensor(weight, dtype=torch.float32) for weight in column]).to(device)
            else:
                weights = torch.tensor(column, device=device)
            index = torch.tensor(rows, device=device, dtype=torch.int64)
            uses = [(i, weight.detach() if isinstance(weight := column[i], Tensor) else weight) for i in rows]
            self._shares[key] = Share(weights, index, weights[index], uses) if rows else None
        return self._shares[key]

    def times(self, x: Tensor, expandable: bool) -> int:
        """Return for how many consecutive rows of a layer's input x a mixture stands; more than one if `expandable`."""
        given = len(self.mixtures)
        times, rest = divmod(x.shape[0], given)
        if rest or x.dim() < 2 or (times != 1 and x.dim() > 2 and not expandable):
            raise SpectuneError(
                f"route was given {given} rows and the input of a layer is {tuple(x.shape)}; give one entry for "
                "each row of the batch"
            )
        return times

    def shares(self, layer: Adapted, x: Tensor, times: int) -> dict[str, Share]:
        """Return the part of each adapter that has one in a layer."""
        shares = {name: self.share(name, layer, times, x.device) for name in layer.adapters}
        return {name: share for name, share in shares.items() if share is not None}

    def gather(self, layer: Adapted, x: Tensor, expandable: bool) -> Gather:
        """Return how a layer answers without gradients, kept as long as its adapters do not change."""
        times = self.times(x, expandable)
        key = (layer, times, x.dtype, x.device, layer.training)
        gather = self._gathers.get(key)
        if gather is None or gather.outdated:
            gather = self._gathers[key] = Gather(layer, self.shares(layer, x, times), x, self.stacks)
        return gather


class Selection:
    """Which adapters answer, shared by the adapted layers of a model.

    Args:
        frozen: the parameters that adapting froze, to be set free by detaching.

    Attributes:
        mixture: adapter names and weights for every row.
        rows: a mixture for each row of the batch instead.
        expandable: each row of `rows` may stand for several consecutive rows of the batch (beams).
        factored: whether training goes through the factors of W where a basis holds all of it.
    """

    def __init__(self, frozen: Iterable[nn.Parameter] = ()) -> None:
        self.mixture: Mixture = {}
        self.rows: Rows | None = None
        self.expandable = False
        self.factored = False
        self.frozen = list(frozen)

    def weights(self, layer: Adapted, x: Tensor) -> dict[str, float | Share]:
        """Return the weight of each adapter in use in a layer: a number, or one for each row of its input x."""
        if self.rows is None:
            there = layer.adapters._modules  # of which there may be many more than are in use
            weights = {name: weight_at(self.mixture, name, layer) for name in self.mixture if name in there}
            return {name: weight for name, weight in weights.items() if weight}  # type: ignore[misc]
        return self.rows.shares(layer, x, self.rows.times(x, self.expandable))  # type: ignore[return-value]


class Adapted(nn.Module):
    """Mixed into a linear layer's class: y = W x + b + the updates of the selected adapters."""

    adapters: nn.ModuleDict
    bases: nn.ModuleDict
    selection: Selection
    plain_class: type[nn.Module]
    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        rows = self.selection.rows
        if rows is not None and not torch.is_grad_enabled() and self._fuses(x):
            return rows.gather(self, x, self.selection.expandable).answer(x, super().forward(x))
        weights = self.selection.weights(self, x)
        if not weights:
            return super().forward(x)
        updates = [(u, weight) for name, weight in weights.items() for u in self.adapters[name]]  # type: ignore[attr-defined]
        update, weight = updates[0]
        if len(updates) > 1 or isinstance(weight, (Share, Tensor)) or weight * update.weight != 1.0:
            return self.sum(updates, x, plain := self._plain(x), plain)
        return self._alone(update, x)

    def _alone(self, update: Update, x: Tensor) -> Tensor:
        """Return the answer of one update with weight one."""
        tensors, method, training = self.tensors(update), update.method, update.training
        if method.replaces:
            return method.replacement(tensors, x, self.bias)
        with torch._C.DisableTorchFunction():  # modes, such as a checkpointed region's, would be asked at every access
            if self._fuses(x) and not (training and method.drop):
                return self._fused(update, x, tensors)
        plain = self._plain(x)
        return plain + method.respond(tensors, x, self.base(plain), training)

    def _fused(self, update: Update, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        method, training = update.method, update.training
        whole = method.whole(tensors) if training and self.selection.factored else None
        y = adapted_linear(
            x.reshape(-1, x.shape[-1]),
            effective_weight(self) if whole is None else None,
            self.bias,
            whole or method.factors(tensors),
            update.ratio(tensors, self.base()),
            training,
        )
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _plain(self, x: Tensor) -> Tensor:
        """Return the answer of the frozen layer."""
        if self.training and by_onednn(x, effective_weight(self)) and self._fuses(x):
            return frozen_linear(x, effective_weight(self), self.bias)
        return super().forward(x)

    def _fuses(self, x: Tensor) -> bool:
        """Whether W is a plain frozen matrix in x's dtype, so that its product may be taken here."""
        weight, bias = self.weight, self.bias
        return (
            self.plain_class in (nn.Linear, Conv1D)
            and weight.dtype == x.dtype
            and not weight.requires_grad
            and not (bias is not None and bias.requires_grad)
            and not torch.compiler.is_compiling()
            and (x.is_meta or not torch.is_autocast_enabled(x.device.type))
        )

    def sum(self, updates: Sequence[tuple[Update, float | Share]], x: Tensor, plain: Tensor, y: Tensor) -> Tensor:
        """Return y and the answer of several updates, or of updates that differ by row; the base's is `plain`."""
        over_bases: dict[Any, list[tuple[Factors, float | Share, float]]] = {}
        for update, weight in updates:
            if not update.method.core_only:
                y = self._add(y, update, weight, x, plain)
                continue
            factors = update.method.factors(self.tensors(update))
            core: Any = factors.core  # never the identity, which has nothing to train
            key = (update.basis_key, core.layout)
            over_bases.setdefault(key, []).append((factors, weight, update.weight))
        for group in over_bases.values():
            y = y + _joined(group).apply(x)
        return y

    def _add(self, y: Tensor, update: Update, weight: float | Share, x: Tensor, plain: Tensor) -> Tensor:
        tensors = self.tensors(update)
        if isinstance(weight, Share):
            rows = weight.rows
            part = update.method.respond(tensors, x[rows], self.base(plain[rows]), update.training)
            scale = (weight.weights * update.weight).to(part.dtype)
            return y.index_add(0, rows, part * scale.reshape(-1, *(1,) * (part.dim() - 1)))
        part = update.method.respond(tensors, x, self.base(plain), update.training)
        return y + part * (weight * update.weight)

    def base(self, output: Tensor | None = None) -> Base:
        """Return what an update may ask of the frozen layer whose output is `output`."""

        def without_bias() -> Tensor:
            if output is None:
                raise RuntimeError("this update was asked for outside a forward pass")
            return output if self.bias is None else output - self.bias.to(output.dtype)

        return Base(without_bias, lambda R: linear(effective_weight(self), R.to(self.weight.dtype)), self.bias)

    def tensors(self, update: Update) -> dict[str, Tensor]:
        """Return an update's trained and frozen tensors by name."""
        basis = self.bases._modules.get(update.basis_key)
        return update.trained() if basis is None else {**basis.tensors(), **update._parameters}  # type: ignore

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # the class is made at run time: copies and pickles name the one that it was made from
        return _blank, (self.plain_class,), *super().__reduce_ex__(protocol)[2:]  # type: ignore[misc]


def weight_at(mixture: Mixture, name: str, layer: Adapted) -> Weight:
    """Return the weight of an adapter in one layer, 0 where it has no part."""
    weight = mixture.get(name, 0.0)
    return weight.get(layer, 0.0) if isinstance(weight, dict) else weight


def _joined(group: list[tuple[Factors, float | Share, float]]) -> Factors:
    """Add updates over one basis into one, with a core for each row where the weights differ by row."""
    first, weight, factor = group[0]
    if len(group) == 1 and not isinstance(weight, Share):
        return first._replace(scale=first.scale * weight * factor)
    weights = [(w.column if isinstance(w, Share) else w) * (factor * f.scale) for f, w, factor in group]
    return first._replace(core=mix([f.core for f, _, _ in group], weights), scale=1.0)


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
    try:
        found = model.get_submodule(name)
    except AttributeError:
        found = None
    if found is None or not is_linear(found):
        linears = [n for n, m in model.named_modules() if is_linear(m)]
        raise SpectuneError(f"the model has no linear layer {name!r}{nearest(name, linears)}")
    return found


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """Return the adapted layers of a model by name, without a look at the many modules that they hold."""
    found: dict[str, Adapted] = {}
    seen: set[nn.Module] = set()

    def visit(module: nn.Module, name: str) -> None:
        if module in seen:
            return
        seen.add(module)
        if isinstance(module, Adapted):
            found[name] = module
            return
        for key, child in module._modules.items():
            if child is not None:
                visit(child, f"{name}.{key}" if name else key)

    visit(model, "")
    return found


@cache
def adapted_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that adds updates to `kind`: a subclass of it, so that isinstance goes on holding."""
    return type(f"Adapted{kind.__name__}", (Adapted, kind), {"__module__": kind.__module__, "plain_class": kind})


def take_over(layer: nn.Module, selection: Selection) -> Adapted:
    """Make a linear layer an adapted one, in place, without touching its parameters."""
    _change_class(layer, adapted_class(type(layer)))
    layer.adapters, layer.bases = nn.ModuleDict(), nn.ModuleDict()
    layer.selection = selection  # type: ignore[assignment]
    return layer  # type: ignore[return-value]


def give_back(layer: Adapted) -> None:
    """Make an adapted layer the plain one it was."""
    del layer.adapters, layer.bases, layer.selection
    _change_class(layer, layer.plain_class)


def _change_class(layer: nn.Module, to: type[nn.Module]) -> None:
    """Change a layer's class, and what wrappers such as accelerate's hooks keep of its forward method."""
    before = type(layer).forward
    layer.__class__ = to
    for name, value in vars(layer).items():
        if getattr(value, "__self__", None) is layer and getattr(value, "__func__", None) is before:
            vars(layer)[name] = MethodType(to.forward, layer)


def _blank(kind: type[nn.Module]) -> nn.Module:
    cls = adapted_class(kind)
    return cls.__new__(cls)
