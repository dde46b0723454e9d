"""The layer that PEFT sees: its names and states around an adapted linear layer, which does the work."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn as nn
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from spectune.adapters import fingerprint
from spectune.adapters.terms import Term, needs_basis
from spectune.errors import SpectuneError
from spectune.layers.adapted import Adapted
from spectune.layers.experts import ExpertLinear
from spectune.layers.kinds import kind_of
from spectune.layers.modules import as_held, as_matrix, effective_weight, is_linear
from spectune.layers.packed import Packed, keep_layout
from spectune.layers.selection import Selection
from spectune.layers.shards import is_part
from spectune.layers.taking import answers_otherwise, give_back, take_over
from spectune.layers.updates import Update
from spectune.methods import Method
from spectune.model.install import bases_for, check_layer
from spectune.model.names import updates_of
from spectune.peft.held import BASE, SKETCH, HeldUpdate, Sketches
from spectune.peft.merging import Kept, Merging


class PeftLayer(nn.Module, Merging):
    """PEFT's tuner layer around a layer that Spectune adapted in place.

    The layer inside keeps its weight and holds the frozen tensors; what trains lies here, under PEFT's names.

    Args:
        base_layer: a linear layer, a convolution or an embedding, or another tuner layer around one.
        name: the layer's name in the model.
    """

    prefix = ""  # of the names of a method's tensors, in a subclass for each

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapter_layer_names: tuple[str, ...] = ()
        self.other_param_names: tuple[str, ...] = ()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self.own: dict[str, HeldUpdate] = {}
        self.unseen: set[str] = set()  # adapters that may have been loaded since they were last compared with the base
        self.made_of: dict[str, Tensor] = {}  # what tells W again of which an adapter's basis was made
        self._reloaded = False  # a state with another W was loaded
        self._kept: Kept | None = None
        plain = self.get_base_layer()
        if (why := _refusal(plain)) is not None:
            raise SpectuneError(f"{name!r} is a {type(plain).__name__}{why}: leave it out of target_modules")
        check_layer(name, plain)
        if not isinstance(plain, Adapted):
            take_over(plain, name, Selection())
        self.out_features, self.in_features = effective_weight(self.adapted).shape
        for kind in (BASE, SKETCH):
            self.add_module(f"{self.prefix}{kind}", Sketches(self, kind))
        self.register_load_state_dict_pre_hook(_see_base)
        self.register_load_state_dict_post_hook(_look_again)

    @property
    def adapted(self) -> Adapted:
        """The linear layer inside."""
        layer = self.get_base_layer()
        assert isinstance(layer, Adapted)
        return layer

    # -- adapters come and go

    def add(self, adapter: str, method: Method) -> None:
        """Put an adapter of this method on the layer, without values and without a basis, which `fill` brings."""
        shapes = method.shapes(self.out_features, self.in_features)
        device = effective_weight(self.adapted).device
        for name, shape in shapes.items():
            attribute = f"{self.prefix}{name}"
            if attribute not in self.adapter_layer_names:
                self.add_module(attribute, nn.ParameterDict())
                self.adapter_layer_names = (*self.adapter_layer_names, attribute)
            self._modules[attribute][adapter] = nn.Parameter(torch.zeros(shape, device=device))  # type: ignore[index]
        for kind in (BASE, SKETCH) if needs_basis(method) else ():
            self._sketches(kind).add(adapter)
        update = HeldUpdate(method, shapes, self, adapter)
        update.needs_basis = type(method).basis is not Method.basis
        update.unmade = effective_weight(self.adapted).is_meta
        self.own[adapter] = update
        self.unseen.add(adapter)
        self.adapted.adapters[adapter] = nn.ModuleList([update]).train(self.training)

    @torch.no_grad()
    def start(self, adapter: str, *, random: bool) -> None:
        """Give an adapter the values that its method starts from, or random ones; on the meta device nothing."""
        update, weight = self.own[adapter], effective_weight(self.adapted)
        held = update.trained()
        if weight.is_meta or any(tensor.is_meta for tensor in held.values()):
            return
        method = self._method(update)
        if needs_basis(method):
            self.made_of[adapter] = fingerprint.sketch_weight(weight.detach())
        shapes = method.shapes(self.out_features, self.in_features)
        frozen = {k: v for k, v in self.adapted.tensors(update).items() if k not in shapes}
        table = (kind := kind_of(self.adapted)) is not None and kind.looks_up
        initial = method.initial_of_table if table else method.initial
        for name, value in initial(shapes, frozen).items():
            held[name].copy_(value + 0.1 * torch.randn_like(value) if random else value)

    def method_of(self, adapter: str) -> Method | None:
        """Return an adapter's method here, or None where it has no part."""
        update = self.own.get(adapter)
        return None if update is None else update.method  # type: ignore[return-value]

    def delete_adapter(self, adapter_name: str) -> None:
        if self.own.pop(adapter_name, None) is not None:
            del self.adapted.adapters[adapter_name]
            left = {u.basis_key for name in self.adapted.adapters for u in updates_of(self.adapted, name)}
            for key in self.adapted.bases.keys() - left:
                del self.adapted.bases[key]
        self.unseen.discard(adapter_name)
        self.made_of.pop(adapter_name, None)
        for kind in (BASE, SKETCH):
            if adapter_name in self._sketches(kind):
                del self._sketches(kind)[adapter_name]
        super().delete_adapter(adapter_name)
        self._answer()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._answer()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        if not enabled and self.merged:
            self.unmerge()
        self._answer()

    def _answer(self) -> None:
        """Have the layer inside answer with what is active, enabled and not merged here."""
        silent = self._disable_adapters or self.merged
        mine = {} if silent else {name: 1.0 for name in self.active_adapters if name in self.own}
        layer = self.adapted
        mixture = {n: w for n, w in layer.selection.mixture.items() if n not in self.own and n in layer.adapters}
        layer.selection.mixture = mixture | mine
        layer.parts(layer.selection.scope_of_model)

    # -- the answer

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        if self.unseen:
            self.check()
        if vars(self).get("_is_replica"):
            for update in (u for name in self.adapted.adapters for u in updates_of(self.adapted, name)):
                vars(update)["holder"] = self
        return self.base_layer(x, *args, **kwargs)

    def _replicate_for_data_parallel(self) -> object:
        if self.unseen:  # of which a replica, whose tensors are others, could not tell
            self.check()
        return super()._replicate_for_data_parallel()

    def check(self) -> None:
        """Raise where an adapter was loaded that belongs to another base, or would not reproduce its update on this.

        Raises:
            SpectuneError: it is so; the layer is named.
        """
        name, weight = self.adapted.adapted_as, self._weight()
        if torch.compiler.is_compiling() or weight.is_meta or is_part(weight):
            return
        for adapter in list(self.unseen):
            update = self.own[adapter]
            if any(tensor.is_meta for tensor in update.trained().values()):
                continue
            self.unseen.discard(adapter)
            if (schedule := vars(update).get("schedule")) is not None:
                schedule.watch()  # the tensors that were loaded may be others than those it began with
            base, sketch = (self._sketches(kind).pop_told(adapter) for kind in (BASE, SKETCH))
            if base is None:  # made here
                if self._reloaded and adapter in self.made_of:
                    fingerprint.check_weight(name, weight, self.made_of[adapter])
                continue
            self.made_of[adapter] = base
            fingerprint.check_weight(name, weight, base)
            if fingerprint.as_trained(weight, base) is not weight:
                self._decompose_as_trained(update, base)
            self._term(update, sketch).check(name, weight, base)

    def _decompose_as_trained(self, update: HeldUpdate, base: Tensor) -> None:
        """Give an adapter that was trained on a base in fewer bits the basis that it had there."""
        layer, key = self.adapted, update.basis_key
        others = [u for name in layer.adapters for u in updates_of(layer, name) if u is not update]
        if key in layer.bases and all(other.basis_key != key for other in others):
            del layer.bases[key]
            plan = {layer.adapted_as: [Term(self._method(update), {})]}
            layer.bases.update(
                bases_for({layer.adapted_as: layer}, plan, {layer.adapted_as: base}, None, None)[layer.adapted_as]
            )

    def _weight(self) -> Tensor:
        """Return W (out x in), of a merged layer too."""
        if self._kept is None:
            return effective_weight(self.adapted).detach()
        return as_matrix(self.adapted, self._kept.weight)

    def _term(self, update: HeldUpdate, sketch: Tensor | None = None) -> Term:
        trained = update.trained()
        frozen = {k: v for k, v in self.adapted.tensors(update).items() if k not in trained}
        return Term(self._method(update), trained, basis=frozen or None, sketch=sketch)

    def _sketches(self, kind: str) -> Sketches:
        held = self._modules[f"{self.prefix}{kind}"]
        assert isinstance(held, Sketches)
        return held

    @torch.no_grad()
    def sketch(self, adapter: str, kind: str) -> Tensor | None:
        """Return what tells the base or the update again; None where that is not at hand."""
        weight, update = self._weight(), self.own[adapter]
        tensors = self.adapted.tensors(update).values()
        if any(tensor.is_meta or is_part(tensor) for tensor in (weight, *tensors)):
            return None
        return fingerprint.sketch_weight(weight) if kind == BASE else self._term(update).make_sketch(weight)

    # -- merging

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the linear layer as it was before it was adapted, with W' as its weight if `merge`."""
        if merge:
            names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.own]
            if names:
                self._merge(names, safe_merge, keep=False)
        self.leave()
        return self.base_layer

    def leave(self) -> None:
        """Take the adapters off the layer inside, which is the plain one it was when no others are left there."""
        layer = self.adapted
        for name in self.own:
            del layer.adapters[name]
        if not layer.adapters:
            give_back(layer)
            keep_layout(layer, False)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return W' - W of an adapter, in W's dtype and as the layer holds W."""
        layer, update = self.adapted, self.own[adapter]
        weight = self._weight()
        dense = weight.dense() if isinstance(weight, Packed) else weight
        delta = self._method(update).delta(layer.tensors(update), dense).to(weight.dtype)
        return as_held(layer, delta)

    @staticmethod
    def _method(update: Update) -> Method:
        assert isinstance(update.method, Method)
        return update.method

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return is_linear(self.adapted) and not isinstance(self.adapted, ExpertLinear)  # no layer without Spectune


def _refusal(layer: nn.Module) -> str | None:
    """Return why a layer cannot be adapted, as words that follow its class, or None."""
    if is_linear(layer):
        return None
    kind = kind_of(layer)
    if kind is None:
        return ", and the methods of spectune.peft adapt linear layers, convolutions and embeddings"
    why = kind.refusal(layer)
    if why is None and answers_otherwise(layer):
        why = "that answers otherwise than its class does"
    return None if why is None else f" {why}"


def _see_base(layer: PeftLayer, state: Mapping[str, object], prefix: str, *_: object) -> None:
    """Note that a state has W, behind a few tuners at most; whether it has an expert's is not looked for."""
    within = (f"{prefix}{'base_layer.' * depth}weight" for depth in range(1, 5))
    layer._reloaded = isinstance(layer.adapted, ExpertLinear) or any(key in state for key in within)


def _look_again(layer: PeftLayer, incompatible: object) -> None:
    """After values were loaded, compare them with the base, as far as both are there."""
    layer.unseen.update(layer.own)
    layer.check()
