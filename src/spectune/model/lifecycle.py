"""Adapters leave a model: extracted as they are, or detached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
from torch import Tensor

from spectune.adapters.adapter import Adapter
from spectune.adapters.terms import ADDED_BIAS, LayerUpdate, Lent, Term, WholeTerm
from spectune.layers.adapted import Adapted, adapted_layers
from spectune.layers.attention import see_to_attention
from spectune.layers.experts import ExpertLinear
from spectune.layers.kinds import kind_of
from spectune.layers.modules import described, effective_weight, is_stored_transposed, stored_weight, unwrapped
from spectune.layers.packed import Packed, keep_layout
from spectune.layers.parts import PartLinear
from spectune.layers.projections import ProjectionLinear
from spectune.layers.shards import is_part, whole
from spectune.layers.taking import give_back
from spectune.layers.whole import Whole, give_back_whole, parts_of, whole_modules
from spectune.methods import Method
from spectune.methods.bias import Bias
from spectune.methods.head import Head
from spectune.model.first_pass import leave_first_pass
from spectune.model.install import selections
from spectune.model.names import M, check_known_on, check_not_replaced, check_own_weights, method_of, updates_of
from spectune.model.saving import leave_saving
from spectune.model.wanted import groups_of
from spectune.model.whole import is_complete, labels_of, trained_beside

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


QUANTIZE = "spectune_quantize"  # an attribute of models that `load_base` packed: how


def extract(model: nn.Module, name: str = "default") -> Adapter:
    """Return an adapter that is on a model as an `Adapter` of its own, on the CPU.

    It has all that trained with it: what of the base itself is set to train (`requires_grad`) is in it too.
    It holds what was trained and the frozen tensors beside it, and not W, which is at hand as long as the model is.
    Where FSDP2 has sharded the model every process must call it, and the adapter holds neither W nor a basis.

    Raises:
        SpectuneError: no adapter of that name is on the model.
    """
    check_known_on(model, name)
    check_own_weights(adapted_layers(model))
    check_not_replaced(parts_of(model))
    layers: dict[str, LayerUpdate] = {}
    modules: dict[str, WholeTerm] = {}
    for layer_name, layer in adapted_layers(model).items():
        if name not in layer.adapters:
            continue
        terms, added = _terms_of(layer, name)
        if added is not None:
            modules[layer_name] = _bias_of(layer, added)
        if terms:
            layers[layer_name] = _layer_update(layer, terms)
    for module_name, module in whole_modules(model).items():
        own = _own_of(module, name) if name in module.adapters else None
        if own is not None:
            modules[module_name] = own
    modules |= trained_beside(model)
    config: PreTrainedConfig | None = getattr(model, "config", None)
    brought = [n for n, layer in layers.items() if all(t.method.replaces for t in layer.terms)]
    labels = labels_of(model) if brought else None
    base = getattr(config, "_name_or_path", None) or None  # diffusers keeps a Path that it was given
    adapter = Adapter(layers, None if base is None else str(base), labels=labels)
    adapter.modules = {n: (term,) for n, term in modules.items()}
    adapter.groups = tuple(groups_of(model, [*brought, *(n for n, term in modules.items() if term.complete)]))
    adapter.quantize = vars(unwrapped(model)).get(QUANTIZE)
    if hasattr(inner := unwrapped(model), "save_pretrained"):
        adapter.architecture = type(inner).__name__, type(inner).__module__
    return adapter


def _terms_of(layer: Adapted, name: str) -> tuple[list[Term], Tensor | None]:
    """Return what an adapter adds to a layer's weight, and what it adds to its bias."""
    terms: list[Term] = []
    added: Tensor | None = None
    for update in updates_of(layer, name):
        trained = {k: whole(v).cpu().float().clone() for k, v in update.trained().items()}
        if isinstance(update.method, Bias):
            added = update.weight * trained["d"] + (0.0 if added is None else added)
            continue
        frozen = {k: whole(v) for k, v in layer.tensors(update).items() if k not in trained}
        method = _with_own_bias(method_of(update), layer, trained)
        # singular vectors of a W that is no longer there, which nobody could make again
        stays = bool(frozen) and method.request() is not None and not layer.owns(update.basis_key, once=True)
        terms.append(Term(method, trained, update.weight, frozen or None, stays=stays))
    return terms, added


def _layer_update(layer: Adapted, terms: list[Term]) -> LayerUpdate:
    """Return a layer's terms with what tells its W, and W itself as long as the model is there."""
    weight = effective_weight(layer)
    shape, transposed = (weight.shape[0], weight.shape[1]), is_stored_transposed(layer)
    extracted = LayerUpdate(shape, tuple(terms), transposed, weight).sealed()
    if isinstance(layer, ExpertLinear):
        extracted = replace(extracted, experts=layer.count)
    if isinstance(layer, ProjectionLinear) and layer.rows.size < layer.rows.period:
        extracted = replace(extracted, rows=layer.rows)
    kind, kernel = described(layer)
    extracted = replace(extracted, kind=kind, kernel=kernel)
    if is_part(weight):
        return extracted
    own = stored_weight(layer)  # what is computed is nobody's, and is kept
    held = weight.detach() if own is None else None if own.is_meta else Lent(own, _seen(layer, weight))
    bases = zip(extracted.terms, terms, strict=True)
    return replace(extracted, held=held, terms=tuple(replace(new, basis=old.basis) for new, old in bases))


def _seen(layer: Adapted, weight: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Return what makes W, as the layer holds it, of the tensor that W is held in."""
    if isinstance(weight, Packed):
        return weight.lend
    if isinstance(layer, PartLinear):
        return layer.lender()
    return None if (kind := kind_of(layer)) is None else kind.matrix


def _with_own_bias(method: Method, layer: Adapted, trained: dict[str, Tensor]) -> Method:
    """Return a head's method with the bias that the layer has, which is then among what the adapter brings."""
    if not isinstance(method, Head) or method.bias or layer.bias is None:
        return method
    trained["h"] = whole(layer.bias).cpu().float().clone()
    return Head()


def _bias_of(layer: Adapted, added: Tensor) -> WholeTerm:
    if layer.bias is None:
        return WholeTerm({ADDED_BIAS: added})
    return WholeTerm({"bias": whole(layer.bias).cpu().float() + added})


def _own_of(module: Whole, name: str) -> WholeTerm | None:
    """Return an adapter's own version of a module, or None where it is statistics that never moved."""
    own = module.values(name)
    tensors = {k: whole(t).cpu().clone() for k, t in own.tensors().items()}
    if not own._parameters and all(torch.equal(t, module.get_buffer(k)) for k, t in own.tensors().items()):
        return None
    rows = None if own.rows is None else tuple(own.rows.tolist())
    return WholeTerm(tensors, rows=rows, complete=rows is None and is_complete(module, tensors))


def detach(model: M, name: str | None = None) -> M:
    """Take an adapter, or all of them, off a model; with the last one gone its layers are what they were before.

    Raises:
        SpectuneError: no adapter of that name is on the model.
    """
    if name is not None:
        check_known_on(model, name)
    check_own_weights(adapted_layers(model))
    shared = selections(adapted_layers(model))
    for selection in shared:
        selection.forget_lost()
    for layer in adapted_layers(model).values():
        for gone in [n for n in layer.adapters if name in (None, n)]:
            del layer.adapters[gone]
        used = {update.basis_key for n in layer.adapters for update in updates_of(layer, n)}
        for key in layer.bases.keys() - used:
            del layer.bases[key]
        if not layer.adapters:
            give_back(layer)
    for module in whole_modules(model).values():
        for gone in [n for n in module.adapters if name in (None, n)]:
            del module.adapters[gone]
        if not module.adapters:
            give_back_whole(module)
    see_to_attention(model)
    leave_saving(model)
    leave_first_pass(model)
    left = adapted_layers(model).values()
    if not left:
        keep_layout(model, False)
    in_use = {id(layer.selection) for layer in left}
    for selection in shared:
        selection.mixture = {n: w for n, w in selection.mixture.items() if name not in (None, n)}
        if id(selection) not in in_use:  # layers elsewhere that share it keep frozen what is not in this model
            mine = None if not selection.users else {id(p) for p in model.parameters()}
            for parameter in selection.frozen:
                if mine is None or id(parameter) in mine:
                    parameter.requires_grad_(True)
    for layer in left:
        layer.parts(layer.selection.scope_of_model)
    return model
