"""Modules that adapters bring whole: heads, embeddings or rows of them, norms, whatever owns parameters of its own."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.layers.adapted import Adapted, adapted_layers
from spectune.layers.attention import reads_children
from spectune.layers.classes import change_class, without
from spectune.layers.merged import active_adapters
from spectune.layers.mixtures import Mixture, weight_at
from spectune.layers.modules import is_linear, named_modules
from spectune.layers.reads import reader_of, watched
from spectune.layers.rows import Rows
from spectune.layers.selection import Selection, within
from spectune.layers.shards import is_part
from spectune.layers.stored import Stored

Weights = tuple[tuple[str, object], ...]  # of the adapters that have a part, by name


class Values(nn.Module):
    """What one adapter has in place of a module's own tensors, each under the same name there.

    Args:
        parameters: those that train.
        buffers: those that the module moves itself, such as BatchNorm's statistics.
        rows: the rows of an embedding that the parameter stands for; None for all.
    """

    rows: Tensor | None

    def __init__(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], rows: Tensor | None = None
    ) -> None:
        super().__init__()
        self.names = tuple(parameters)
        for name, tensor in parameters.items():
            self.register_parameter(name, nn.Parameter(tensor))
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)
        self.register_buffer("rows", rows, persistent=False)

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters and buffers by their names in the module; plain tensors in a replica."""
        held = {name: held_by(self, name) for name in self.names} | self._buffers
        return {name: tensor for name, tensor in held.items() if name != "rows" and tensor is not None}


class Whole(Stored):
    """Mixed into a module's class: it answers as its own class does, with the tensors of the selected adapters.

    The module's own tensors are never written to: each answer is that of a shallow copy, whose tensors are others, so
    that threads do not meet in it.
    """

    adapters: nn.ModuleDict
    selection: Selection
    plain_class: type[nn.Module]
    adapted_as: str

    def forward(self, *args: object, **kwargs: object) -> object:
        if not isinstance(self, Whole):  # who wrapped this method while it was one calls it for the plain module too
            return type(self).forward(self, *args, **kwargs)
        learning = torch.is_grad_enabled()
        scope = self.selection.scope_with_gradients() if learning else self.selection.scope()
        y = self._chosen(scope.choice, args, kwargs)
        if learning and isinstance(y, Tensor):
            self.selection.in_graph(scope, y)
        return y

    def _chosen(self, rows: Mixture | Rows, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        if not isinstance(rows, Rows):
            weights = self._weights(rows)
            return self._answer(weights, args, kwargs) if weights else super().forward(*args, **kwargs)
        x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        layout = None if x is None else rows.layout(self, x)
        if x is None or layout is None:
            return self._answer(self._weights(self._only(rows)), args, kwargs)
        count, slices = rows.count or len(rows.mixtures), x.shape[layout.axis]
        answers, order, counts = [], [], []
        inside = {m.selection for m in self.modules() if m is not self and isinstance(m, (Adapted, Whole))}
        for mixture, wanted in rows.groups():
            index = torch.tensor(wanted, device=x.device)

            def part(value: Any, index: Tensor = index) -> object:
                laid_out = isinstance(value, Tensor) and value.dim() > layout.axis
                return layout.take(value, count, index) if laid_out and value.shape[layout.axis] == slices else value

            taken = [part(a) for a in args], {k: part(v) for k, v in kwargs.items()}
            # to what lies inside and adapters change too, these rows are the batch
            with within(list(inside), mixture) if inside else nullcontext():
                answers.append(self._answer(self._weights(mixture), *taken))
            order += wanted
            counts.append(len(wanted))
        if not all(isinstance(answer, Tensor) and answer.dim() > layout.axis for answer in answers):
            raise SpectuneError(
                f"rows of one batch cannot have different {self.plain_class.__name__} modules: what it answers is no "
                "tensor with a row for each"
            )
        return layout.join(answers, counts, torch.tensor(order, device=x.device).argsort())

    def _weights(self, mixture: Mixture) -> Weights:
        weights = [(name, weight_at(mixture, name, self)) for name in mixture if name in self.adapters]
        return tuple((name, w) for name, w in weights if isinstance(w, Tensor) or w)

    def _answer(self, weights: Weights, args: Sequence[Any], kwargs: Mapping[str, Any]) -> object:
        partial = [name for name, _ in weights if self.values(name).rows is not None]
        whole = tuple((name, weight) for name, weight in weights if name not in partial)
        # the plain answer is that of the whole versions already, so that what has rows of its own is laid over it;
        # and a copy's, so that whoever reads a tensor of this module is another one
        total = y = cast(Any, self.version(whole)).forward(*args, **kwargs)
        for name, weight in weights:
            if name in partial:
                own = self._with_rows(y, name, *args)
                total = own if _is_one(weight) and len(partial) == 1 else total + weight * (own - y)
        return total

    def _with_rows(self, y: Tensor, name: str, ids: Tensor) -> Tensor:
        """Return an embedding's answer y (..., d) with an adapter's own rows where ids (...) ask for one of them.

        A linear layer's answer gets an adapter's own outputs in its rows' places.
        """
        values = self.values(name)
        weight = held_by(values, "weight")
        assert values.rows is not None
        assert weight is not None
        if is_linear(self):
            bias = held_by(self, "bias")
            own = F.linear(ids, weight.to(ids.dtype), None if bias is None else bias[values.rows].to(ids.dtype))
            return y.index_copy(-1, values.rows, own.to(y.dtype))
        # rows are sorted, so that their place is found without a table as long as the vocabulary
        places = torch.searchsorted(values.rows, ids).clamp_max(len(values.rows) - 1)
        hit = values.rows[places] == ids
        small = shallow(self, self.plain_class, {"weight": weight.to(y.dtype)}, padding_idx=None)
        return torch.where(hit[..., None], small.forward(places), y)

    def __getattr__(self, name: str) -> Any:
        held = super().__getattr__(name)
        if not isinstance(held, Tensor) or "selection" not in vars(self):
            return held
        if torch.compiler.is_compiling():
            return self._own(name, held)  # type: ignore[call-arg,arg-type] - its decorator has no type
        choice = self.selection.scope().choice
        mixtures = choice.mixtures if isinstance(choice, Rows) else [choice]
        if not any(map(self._weights, mixtures)) or reader_of(self, sys._getframe(1), None) is None:
            return held
        # another module's forward method computes with what this one holds: with the adapters' values as well
        own: Any = self._own
        return watched(held, self.adapted_as, lambda: own(name, held))

    @torch.compiler.disable  # which knows no context, and no frames
    def _own(self, name: str, held: Tensor) -> Tensor:
        """Return what is in the place of one of the module's tensors now, with the adapters that answer."""
        weights = self._weights(self._only(self.selection.scope().choice))
        return self.mixed(weights).get(name, held) if weights else held

    def read(self) -> nn.Module:
        """Return the module for whoever computes with its tensors in its place: of its plain class, with those now."""
        return self.version(self._weights(self._only(self.selection.scope().choice)))

    def _only(self, choice: Mixture | Rows) -> Mixture:
        """Return the mixture that all rows have here.

        Raises:
            SpectuneError: they have different ones.
        """
        if not isinstance(choice, Rows):
            return choice
        if not choice.same(self):
            raise SpectuneError(
                f"rows of one batch cannot have different versions of {self.adapted_as!r}, whose tensors the model "
                "reads apart from any row: give all rows the same choice, or leave it out of modules_to_save"
            )
        return choice.mixtures[0]

    def values(self, name: str) -> Values:
        """Return what an adapter has here."""
        return cast(Values, self.adapters[name])

    def version(self, weights: Weights) -> nn.Module:
        """Return a shallow copy of the module, of its plain class, with the tensors of a mixture."""
        children = {
            key: child.version(kept) if (kept := tuple((n, w) for n, w in weights if n in child.adapters)) else child
            for key, child in self._modules.items()
            if isinstance(child, Whole) and reads_children(self)
        }
        return shallow(self, self.plain_class, self.mixed(weights), modules=children)

    def merged(self, name: str) -> dict[str, Tensor]:
        active = active_adapters(self)
        return self.mixed(active) if active else {}

    def mixed(self, weights: Weights) -> dict[str, Tensor]:
        """Return T + sum of w (T_a - T) for each of the module's tensors T that adapters a have their own of."""
        found: dict[str, Tensor] = {}
        for key in {key: None for name, _ in weights for key in self.values(name).tensors()}:
            of = [
                (values.tensors()[key], w, values.rows)
                for n, w in weights
                if key in (values := self.values(n)).tensors()
            ]
            plain: Any = held_by(self, key)
            (first, weight, rows) = of[0]
            if len(of) == 1 and rows is None and _is_one(weight):
                found[key] = first if key in self._buffers else first.to(plain.dtype)
                continue
            if not plain.is_floating_point():
                found[key] = first
                continue
            total = plain.detach().to(first.dtype)
            for tensor, w, rows in of:
                if rows is None:
                    total = total + w * (tensor - plain.detach())
                elif is_part(plain):
                    raise SpectuneError(
                        f"rows of the sharded embedding {self.adapted_as!r} cannot be merged: save the adapter with "
                        "spectune.extract(model).save(folder), and merge it into a base that is not sharded"
                    )
                else:
                    total = total.index_add(0, rows, w * (tensor - plain.detach()[rows]))
            found[key] = total.to(plain.dtype)
        return found

    def _replicate_for_data_parallel(self) -> object:
        replica = super()._replicate_for_data_parallel()
        replica.selection = self.selection.of_this_thread()  # in a thread without the caller's context
        return replica

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self.selection.note(self, self.adapted_as, shaped=False)  # which knows of no part when it is a copy


def held_by(module: nn.Module, key: str) -> Tensor | None:
    """Return a module's own parameter or buffer; the plain tensor in its place in a replica of nn.DataParallel."""
    held = module._parameters.get(key)
    held = module._buffers.get(key) if held is None else held
    return vars(module).get(key) if held is None else held


def shallow(
    module: nn.Module,
    kind: type[nn.Module],
    tensors: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module] | None = None,
    **attributes: object,
) -> nn.Module:
    """Return a copy of a module that shares all with it but the tensors, modules and attributes that are given."""
    # no __init__ and no __setattr__: both would register modules and parameters with the copy, and cost more than the
    # answer
    copy = object.__new__(kind)
    state = {**vars(module), **attributes}
    state.pop("forward", None)  # what wraps it, as accelerate's offloading does, goes around the module itself
    state["_parameters"] = {k: tensors.get(k, v) for k, v in module._parameters.items()}
    state["_buffers"] = {k: tensors.get(k, v) for k, v in module._buffers.items()}
    state["_modules"] = {k: v for k, v in {**module._modules, **(modules or {})}.items() if k != "adapters"}
    known = {*module._parameters, *module._buffers}
    vars(copy).update(state, **{k: v for k, v in tensors.items() if k not in known})
    return copy


Part = Adapted | Whole  # of a model: what adapters change


def parts_of(model: nn.Module) -> dict[str, Part]:
    """Return the adapted layers of a model, and the modules that adapters bring whole, by name."""
    return {**adapted_layers(model), **whole_modules(model)}


def whole_modules(model: nn.Module) -> dict[str, Whole]:
    """Return the modules of a model that adapters bring whole, by name."""
    return {name: module for name, module in named_modules(model) if isinstance(module, Whole)}


@cache
def whole_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class whose modules adapters may bring whole: a subclass, so that isinstance goes on holding."""
    # a model keeps its name, which libraries write into its config
    name = kind.__name__ if hasattr(kind, "save_pretrained") else f"Whole{kind.__name__}"
    members = {"__module__": kind.__module__, "plain_class": kind, "made_by": (whole_class, kind)}
    return type(name, (Whole, kind), members)


def take_over_whole(module: nn.Module, name: str, selection: Selection) -> Whole:
    """Make a module one that adapters may bring whole, in place, without touching its tensors."""
    change_class(module, whole_class(type(module)))
    whole = cast(Whole, module)
    whole.adapters, whole.selection, whole.adapted_as = nn.ModuleDict(), selection, name
    selection.note(whole, name, shaped=False)
    return whole


def give_back_whole(module: Whole) -> None:
    """Make a module the plain one it was."""
    module.selection.forget(module)
    del module.adapters, module.selection, module.adapted_as
    change_class(module, without(type(module), whole_class))


def _is_one(weight: object) -> bool:
    return isinstance(weight, float) and weight == 1.0
