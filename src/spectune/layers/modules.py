"""The layers of a model that multiply by a matrix: nn.Linear, transformers' Conv1D, and those of other kinds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel
from transformers.pytorch_utils import Conv1D

from spectune.errors import SpectuneError, nearest
from spectune.layers.attention import IN, InProjection, find_in_projection, in_projections
from spectune.layers.experts import expert_layers, find_expert
from spectune.layers.kinds import LINEAR, kind_of
from spectune.layers.packed import is_packed, packed_weight
from spectune.layers.parts import PartLinear, tensor_of
from spectune.layers.projections import projection_layers, projections
from spectune.layers.values import PLAIN

OF_ADAPTERS = ("adapters", "bases")  # what an adapted layer or module holds beside its own
_LARGE = 64.0  # times what a layer is tried with


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer."""
    return isinstance(module, (nn.Linear, Conv1D))


@torch.no_grad()
def is_another_function(layer: nn.Module) -> bool:
    """Whether a layer whose class has a forward method of its own answers otherwise than x W^T + b, as some x show.

    Args:
        layer: one that `is_linear`, and not adapted.
    """
    if type(layer).forward in (nn.Linear.forward, Conv1D.forward) or effective_weight(layer).is_meta:
        return False
    if is_packed(layer):  # which rounds its input as well, and is no other function for that
        return False
    weight, bias = effective_weight(layer), layer._parameters.get("bias")
    x = torch.linspace(-1, 1, 2 * weight.shape[1]).reshape(2, -1).to(weight.device, weight.dtype)
    for size in (1, _LARGE):  # what is cut off shows at large ones alone
        try:
            answer, expected = layer.forward(size * x), F.linear(size * x, weight, bias)
        except TypeError:
            return False  # it takes more than an input
        except (RuntimeError, ValueError):
            return True
        if not isinstance(answer, Tensor) or answer.shape != expected.shape:
            return True
        answer, expected = answer.double().nan_to_num(), expected.double().nan_to_num()
        # classes that compute in few bits are off by some percent here and there, and not all the same way
        along, length = (answer * expected).sum(), expected.square().sum()
        if (answer - expected).abs().max() > 0.1 * expected.abs().max() or (along - length).abs() > 0.03 * length:
            return True
    return False


class Offloading(Protocol):
    """accelerate's hook that holds a layer's parameters elsewhere."""

    weights_map: Mapping[str, Tensor]
    execution_device: torch.device | int | str | None


def is_conv1d(module: nn.Module) -> bool:
    """Whether a layer is a Conv1D, whose weight is stored (in x out)."""
    return isinstance(module, Conv1D)


def described(layer: nn.Module) -> tuple[str, tuple[int, ...]]:
    """Return the name of a layer's kind, and the axes of its kernel, as adapters' files have them."""
    if (kind := kind_of(layer)) is not None:
        return kind.name, kind.kernel(layer)
    return (IN if isinstance(layer, InProjection) else LINEAR), ()


def is_stored_transposed(layer: nn.Module) -> bool:
    """Whether a layer's weight is stored (in x out)."""
    return layer.is_held_transposed if isinstance(layer, PartLinear) else is_conv1d(layer)


def effective_weight(layer: nn.Module) -> Tensor:
    """Return W (out x in) of a layer; a view, transposed for Conv1D, or a `Packed` one."""
    if isinstance(layer, PartLinear):
        return layer.own_weight()
    weight: Any = layer._parameters.get("weight")
    if type(weight) not in PLAIN and (packed := packed_weight(layer)) is not None:
        return packed
    if weight is None:  # computed when it is asked for, or held as a plain tensor by a replica
        weight = layer.weight
    if not torch.compiler.is_compiling() and is_lazy(weight):
        raise SpectuneError(
            "a lazy layer has no weight before its first input: pass a batch through the model, and adapt it then"
        )
    if weight.is_meta and (hook := offloading(layer)) is not None:
        weight = hook.weights_map["weight"]
    return as_matrix(layer, weight)


def as_matrix(layer: nn.Module, held: Tensor) -> Tensor:
    """Return W (out x in) of a weight as a layer holds it; a view. The inverse of `as_held`."""
    if not is_linear(layer) and (kind := kind_of(layer)) is not None:
        return kind.matrix(held)
    return held.mT if is_stored_transposed(layer) else held


def as_held(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return W (out x in) as a layer holds it."""
    if (kind := kind_of(layer)) is not None:
        return kind.held(weight, kind.kernel(layer)).contiguous()
    return weight.mT.contiguous() if is_stored_transposed(layer) else weight


def stored_weight(layer: nn.Module) -> Tensor | None:
    """Return the tensor of the model's state that W is, or is a part of; None where W is computed."""
    if isinstance(layer, PartLinear):
        return tensor_of(layer.owner, layer.key)
    return layer._parameters.get("weight")


def offloading(layer: nn.Module) -> Offloading | None:
    """Return accelerate's hook that holds a layer's parameters elsewhere until the layer is called, or None."""
    hook = vars(layer).get("_hf_hook")
    hooks = getattr(hook, "hooks", [hook])
    return next((h for h in hooks if getattr(h, "offload", False) and h.weights_map is not None), None)


def device_of(layer: nn.Module, weight: Tensor) -> torch.device:
    """Return where a layer of weight W computes."""
    hook = offloading(layer)
    device = None if hook is None else hook.execution_device
    return weight.device if device is None else torch.zeros(0, device=device).device


# what wrappers call the module that they wrap: no part of a layer's name, which is the base's own
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)
_WRAPPED_BY_PEFT = ("base_layer", "base_model", "model")


def wrapped_in(module: nn.Module) -> str | None:
    """Return the key of the child that a module wraps: torch's compiled and parallel modules, and PEFT's; or None."""
    children = module._modules
    if any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__):
        return next((key for key in _WRAPPED_BY_PEFT if children.get(key) is not None), None)
    if isinstance(module, _WRAPPERS):
        return "module"
    return next((key for key in _WRAPPED if children.get(key) is not None), None)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the model itself, past the wrappers around it."""
    while (wrapped := wrapped_in(module)) is not None:
        module = module.get_submodule(wrapped)
    return module


def children_of(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield a module's children with their names in the base, in which wrappers have no part.

    What lies in a wrapper beside the module that it wraps, PEFT's own factors among it, is passed over, and so is what
    adapters have in a layer or module.
    """
    wrapped = wrapped_in(module)
    if wrapped is not None:
        yield name, module.get_submodule(wrapped)
        return
    adapted = "adapted_as" in vars(module)
    for key, child in module._modules.items():
        if child is not None and not (adapted and key in OF_ADAPTERS):
            yield f"{name}.{key}" if name else key, child


def modules_around(root: nn.Module, name: str) -> list[nn.Module]:
    """Return the modules on the way to a part of this name, from the root inwards; of wrappers what they wrap."""
    if not name:
        return []
    found = [root]
    for key in name.split(".")[:-1]:
        found.append(_child(found[-1], key))
    return found


def _child(module: nn.Module, key: str) -> nn.Module:
    return getattr(unwrapped(module), key)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model, each once, with their names in the base; wrappers come before what they wrap."""
    seen: set[nn.Module] = set()

    def visit(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        if module not in seen:
            seen.add(module)
            yield name, module
            for inner, child in children_of(module, name):
                yield from visit(child, inner)

    yield from visit(model, "")


def find_module(model: nn.Module, name: str) -> nn.Module:
    """Return the module of this name, past wrappers.

    Raises:
        AttributeError: there is none.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        part = _find_part(model, name)
        return _child(modules_around(model, name)[-1], name.rpartition(".")[2]) if part is None else part


def _find_part(model: nn.Module, name: str) -> PartLinear | None:
    """Return the layer of an expert, or of a projection in a fused layer, by its name; None if there is none."""
    expert = find_expert(model, name)
    if expert is not None:
        return expert
    fused, _, key = name.rpartition(".")
    try:
        around = unwrapped(modules_around(model, fused)[-1] if fused else model)
        owner = _child(around, fused.rpartition(".")[2]) if fused else around
    except AttributeError:
        return None
    if (projection := find_in_projection(unwrapped(owner), key)) is not None or not fused:
        return projection
    fused = fused.rpartition(".")[2]
    return projection_layers(around, fused)[key] if key in projections(around, fused) else None


def linear_layers(model: nn.Module, *, split: bool = False, others: bool = False) -> dict[str, nn.Module]:
    """Return the linear layers of a model by name, in its order; each once, where several names are one layer's.

    Experts whose weights lie in one tensor have a layer each, `experts.3.down_proj`.

    Args:
        model: the model.
        split: give each projection in a fused layer a layer of its own, `c_attn.q_proj`, in the place of the fused one.
        others: those too that multiply by a matrix and are no linear layers (`spectune.layers.kinds`).
    """
    found: dict[str, nn.Module] = {}
    parts: dict[nn.Module, Mapping[str, nn.Module]] = {}
    for name, module in named_modules(model):
        if split:
            parts |= {
                c: p for key, c in module._modules.items() if c is not None and (p := projection_layers(module, key))
            }
        if module in parts:
            found |= {f"{name}.{key}": part for key, part in parts[module].items()}
        elif is_linear(module) or (others and kind_of(module) is not None):
            found[name] = module
        else:
            inside = [*in_projections(module, split=split).items(), *expert_layers(module)]
            found |= {f"{name}.{inner}" if name else inner: layer for inner, layer in inside}
    return found


def tied_parameters(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that several modules share."""
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {key for key, count in owners.items() if count > 1}


def find_linear(model: nn.Module, name: str) -> nn.Module:
    """Return the layer of this name in a model: a linear one, or one of another kind.

    Raises:
        SpectuneError: there is none; the nearest names are listed.
    """
    try:
        found = model.get_submodule(name)
    except AttributeError:
        found = None
    if found is None or not (is_linear(found) or kind_of(found) is not None):
        part = _find_part(model, name)
        if part is not None:
            return part
        linears = linear_layers(model)
        if name not in linears:
            raise SpectuneError(f"the model has no linear layer {name!r}{nearest(name, linears)}")
        found = linears[name]
    return found
