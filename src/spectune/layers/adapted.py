"""The adapted layer: a linear layer that takes over its own class, keeps its weight, and adds updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import cast

import torch
import torch.nn as nn
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.layers.factors import Factors
from spectune.layers.fused import Fused
from spectune.layers.layouts import Layout
from spectune.layers.linear import adapted_linear
from spectune.layers.merged import merged_tensors, weight_with_gradients
from spectune.layers.mixtures import Part, weight_at
from spectune.layers.modules import children_of, effective_weight
from spectune.layers.parts import PartLinear
from spectune.layers.products import finish
from spectune.layers.rows import Rows
from spectune.layers.selection import Scope, replaced
from spectune.layers.sums import with_updates
from spectune.layers.updates import Basis, Update, updates_in
from spectune.layers.values import WeightValues
from spectune.layers.watched_layer import WatchedLayer
from spectune.private import any_autocast, is_transformed, unseen
from spectune.speed.recompute_cache import learns


class Adapted(WatchedLayer):
    """Mixed into a linear layer's class: y = W x + b + the updates of the selected adapters."""

    fused: Fused | None  # W', within `spectune.fused`

    def forward(self, input: Tensor | None = None, *more: object, **named: object) -> Tensor:
        if more or named or input is None:
            return self._called(*(() if input is None else (input,)), *more, **named)
        if torch.compiler.is_compiling():
            return self._compiled(input)
        try:
            fused = self.fused
        except AttributeError:  # who wrapped this method while the layer was adapted calls it for the plain one too
            if isinstance(self, Adapted):
                raise
            return type(self).forward(self, input)
        if fused is not None:
            scope = self.selection.scope()
            apart = isinstance(scope.choice, Rows) and not scope.choice.alike
            apart = apart or (learns() and not torch.is_grad_enabled())
            y = fused.answer(scope, None if apart else self.parts(scope), input)
            if y is not None:
                return y
        if torch.is_grad_enabled():
            weight = self._parameters.get("weight")
            if weight is not None and weight.is_inference():
                raise SpectuneError(
                    f"the weight of {self.adapted_as!r} was made under torch.inference_mode, and no gradient can go "
                    "through it: load the model outside of that mode, or ask it without gradients"
                )
            scope = self.selection.scope_with_gradients()
            try:
                y = self._answer(scope, input)
            except RuntimeError as error:
                if (told := self._resized()) is not None:
                    raise told from error
                raise
            self.selection.in_graph(scope, y)
            return y
        scope = self.selection.scope()
        try:
            # the way of one token in decoding: what every layer asks here is asked hundreds of times for each
            if type(scope.choice) is not Rows and not learns():
                parts = self.parts(scope)
                if len(parts) == 1 and self._is_lean(input):
                    update, weight = parts[0]
                    if (
                        type(weight) is float
                        and weight * update.weight == 1.0
                        and not (update.training and update.drops)
                    ):
                        return self._lean(update, input)
            return self._answer(scope, input)
        except RuntimeError as error:
            if (told := self._resized()) is not None:
                raise told from error
            raise

    def parts(self, scope: Scope) -> list[Part]:
        """Return the updates that answer in this layer, where all rows have the same, and their adapters' weights."""
        known, parts = self.prepared
        if known is scope:
            return parts
        mixture = scope.choice.mixtures[0] if isinstance(scope.choice, Rows) else scope.choice
        there = self.adapters._modules  # of which there may be many more than are in use
        weights = {name: weight_at(mixture, name, self) for name in mixture if name in there}
        used = {name: w for name, w in weights.items() if isinstance(w, Tensor) or w}
        parts: list[Part] = [(u, w) for name, w in used.items() for u in updates_in(self.adapters, name)]
        # kept for what the model is set to alone: a context's choice is asked for by one thread, and this is every
        # thread's
        if scope is self.selection.scope_of_model:
            vars(self)["prepared"] = scope, parts
        return parts

    def alone(self, scope: Scope) -> Update | None:
        """Return the update that answers with weight one for all rows, if nothing else has a part in the layer."""
        called = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        if called or self.fused is not None or "forward" in vars(self) or isinstance(scope.choice, Rows):
            return None
        parts = self.parts(scope)
        if len(parts) != 1 or isinstance(parts[0][1], Tensor) or parts[0][1] * parts[0][0].weight != 1.0:
            return None
        return parts[0][0]

    def _resized(self) -> SpectuneError | None:
        """Return what there is to say where W has another shape than when it was adapted."""
        return None if self.adapted_as not in self.selection.lost() else SpectuneError(replaced(self.adapted_as))

    def _called(self, *args: object, **named: object) -> Tensor:
        """Return the answer to a call with more than an input, or with an input by its name."""
        given = signature(self.plain_class.forward).bind(self, *args, **named).arguments
        if len(given) == 2:
            (x,) = [value for key, value in given.items() if value is not self]
            return self(x)
        scope = self.selection.scope()
        if type(scope.choice) is not Rows and not self.parts(scope):
            return super().forward(*args, **named)
        raise SpectuneError(
            f"a layer of class {self.plain_class.__name__} was called with {', '.join(list(given)[2:])} beside its "
            "input, and what an adapter should make of that is not known; exclude the layer"
        )

    def _compiled(self, x: Tensor) -> Tensor:
        """Return the answer as torch.compile traces it: from what `prepare` left, which `activate` may exchange."""
        # torch.compile sees no context variable change and would guard on every object of the selection: what a context
        # says is asked outside of the graph
        if self.selection.contexts or (self.fused is not None and self.fused.in_place):
            return self._in_context(x)  # type: ignore[call-arg,arg-type] - its decorator has no type
        return self._of_parts(self.prepared[1], x)

    @torch.compiler.disable
    def _in_context(self, x: Tensor) -> Tensor:  # which torch.compile cannot ask for
        return self(x)

    def _answer(self, scope: Scope, x: Tensor) -> Tensor:
        rows = scope.choice
        layout = rows.layout(self, x) if isinstance(rows, Rows) else None
        if not isinstance(rows, Rows) or layout is None:
            parts = self.parts(scope)
            beside = scope.aside.get(self.selection) if scope.aside and not parts else None
            return self._of_parts(parts, x) if beside is None else self._compared(self.parts(beside), x)
        if layout.in_front:
            return self._by_row(x, rows, layout)
        count = rows.count or len(rows.mixtures)
        return layout.back(self._by_row(layout.front(x, count), rows, layout), count)

    def _by_row(self, x: Tensor, rows: Rows, layout: Layout) -> Tensor:
        """Return the answer to x (rows x ... x in), each row with a mixture of its own."""
        if not torch.is_grad_enabled() and self.fuses(x):
            return rows.forward_of(self, x, layout).answer(x, self._own(x))
        shares = rows.shares(self, x, layout).items()
        updates = [(u, share) for name, share in shares for u in updates_in(self.adapters, name)]
        return with_updates(self, updates, x, plain := self._plain(x), plain) if updates else self._own(x)

    def _of_parts(self, parts: list[Part], x: Tensor) -> Tensor:
        if not parts:
            return self._own(x)
        update, weight = parts[0]
        if len(parts) > 1 or isinstance(weight, Tensor) or weight * update.weight != 1.0:
            return with_updates(self, parts, x, plain := self._plain(x), plain)
        return self._alone(update, x)

    def _is_lean(self, x: Tensor) -> bool:
        """Whether, without gradients, W is a plain matrix in x's dtype whose product nothing else has a part in."""
        weight = self._parameters.get("weight")
        return (
            self.is_plain
            and weight is not None
            and weight.dtype is x.dtype
            and not any_autocast()
            and not is_transformed()
        )

    def _lean(self, update: Update, x: Tensor) -> Tensor:
        """Return the answer of one update with weight one, without gradients: no value of it is kept from before."""
        tensors, method = self.tensors(update), update.method
        if method.replaces:
            return method.replacement(tensors, x, self.bias)
        if not method.in_factors:
            return self._alone(update, x)
        ratio = None if method.additive else update.ratio(tensors, self.base())
        if ratio is not None and ratio.rows is not None:
            return self._alone(update, x)
        if x.is_cuda:  # where many rows are a kernel's
            return self._fused(update, x, tensors, None if ratio is None else ratio.values)
        bias = self._parameters["bias"]
        if ratio is not None:
            method.add(tensors, x, y := self._product(x, None))
            return finish(y, ratio.values, bias)
        y = super().forward(x) if self.is_transposed else self._product(x, bias)
        method.add(tensors, x, y)
        return y

    def _alone(self, update: Update, x: Tensor) -> Tensor:
        """Return the answer of one update with weight one."""
        tensors, method, training = self.tensors(update), update.method, update.training
        if method.replaces:
            return method.replacement(tensors, x, self.bias)
        with unseen():  # modes, such as a checkpointed region's, would be asked at every access
            if method.in_factors and self.fuses(x) and not (training and method.drop):
                ratio = update.ratio(tensors, self.base())
                if ratio is None or ratio.rows is None:
                    return self._fused(update, x, tensors, None if ratio is None else ratio.values)
        plain = self._plain(x)
        return plain + method.respond(tensors, x, self.base(plain), training)

    def _fused(self, update: Update, x: Tensor, tensors: dict[str, Tensor], ratio: Tensor | None) -> Tensor:
        method, training = update.method, update.training
        whole = self.whole(update, tensors)
        y = adapted_linear(
            x.reshape(-1, x.shape[-1]),
            effective_weight(self) if whole is None else None,
            self.bias,
            whole or method.factors(tensors),
            ratio,
            training,
        )
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def whole(self, update: Update, tensors: Mapping[str, Tensor]) -> Factors | None:
        """Return the factors of W + dW, where W is to be answered through its own."""
        if not update.training or not self.selection.factored or not self.owns(update.basis_key):
            return None
        return update.method.whole(tensors)

    def _compared(self, parts: list[Part], x: Tensor) -> Tensor:
        """Return the base's answer, to the last bit that of an adapter beside it that does nothing.

        With an update that is added this is W x + b.  One that goes through the factors of W, or has a ratio, rounds
        elsewhere.
        """
        if len(parts) == 1 and not isinstance(parts[0][1], Tensor):
            update, weight = parts[0]
            method, training = update.method, update.training
            dropped = training and method.drop
            if weight * update.weight == 1.0 and method.in_factors and self.fuses(x) and not dropped:
                tensors = method.still(self.tensors(update))
                whole = self.whole(update, tensors)
                if whole is not None or not method.additive:
                    y = adapted_linear(
                        x.reshape(-1, x.shape[-1]),
                        effective_weight(self) if whole is None else None,
                        self.bias,
                        whole or method.factors(tensors)._replace(scale=0.0),
                        None if method.additive else x.new_ones(len(effective_weight(self)), dtype=torch.float32),
                        training,
                    )
                    return y.reshape(*x.shape[:-1], y.shape[-1])
        return self._plain(x)

    def made_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return W' (out x in) of the adapters that answer here, with their gradients, in a dtype or in W's.

        It is for whoever does something else with a weight than multiply vectors by it.

        Raises:
            SpectuneError: there is no one W', or it is not all that the adapters do.
        """
        return weight_with_gradients(self, dtype)

    def merged(self, name: str) -> dict[str, Tensor]:
        # a part of a tensor is in the state of the tensor's owner
        return {} if isinstance(self, PartLinear) else self.merged_layer(name)

    def merged_layer(self, name: str) -> dict[str, Tensor]:
        """Return W' and b', as far as the adapters that answer now make them, given the layer's name in the model."""
        return merged_tensors(name, self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> object:
        for basis in self.bases._modules.values():
            cast(Basis, basis).check_kept(fn)
        return super()._apply(fn, recurse)

    def _replicate_for_data_parallel(self) -> object:
        replica = super()._replicate_for_data_parallel()
        # a replica's tensors are other ones, in a thread without the caller's context
        replica.selection, replica.prepared = self.selection.of_this_thread(), (None, [])
        replica.fused, replica.weight_values = None, WeightValues()
        return replica

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self.selection.note(self, self.adapted_as)  # which knows of no part when it is a copy


Adapted.forward_code = Adapted.forward.__code__


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """Return the adapted layers of a model by name, without a look at the many modules that they hold.

    Compiled, parallel and PEFT's wrappers have no part in the names.
    """
    found: dict[str, Adapted] = {}
    seen: set[nn.Module] = set()

    def visit(module: nn.Module, name: str) -> None:
        if module in seen:
            return
        seen.add(module)
        if isinstance(module, Adapted):
            found[name] = module
            return
        for inner, child in children_of(module, name):
            visit(child, inner)

    visit(model, "")
    return found
