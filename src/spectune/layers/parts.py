"""Linear layers whose weight is a part of a tensor that another module, their owner, holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.layers.classes import change_class, without
from spectune.layers.stored import Stored

_KIND = (
    *("dtype", "device", "shape", "ndim", "layout", "is_meta", "is_cuda", "size", "dim", "stride", "numel"),
    *("element_size", "is_contiguous", "data_ptr", "requires_grad", "is_floating_point", "__len__"),
)  # what is asked of a tensor without a look at its values


class StandIn:
    """What an owner's forward method finds in the place of its tensor: it tells its kind, has the products of W', and
    no values.

    Args:
        owner: the module that holds the tensor.
        key: its name there.
    """

    def __init__(self, owner: nn.Module, key: str) -> None:
        self._owner, self._key = owner, key

    @property
    def _held(self) -> Tensor:
        """What it stands for."""
        raise NotImplementedError

    @property
    def _remedy(self) -> str:
        """How to leave it out."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name in _KIND:
            return getattr(self._held, name)
        raise self._refused(name)

    def _refused(self, what: str) -> SpectuneError:
        return SpectuneError(
            f"{type(self._owner).__name__} uses its {self._key!r} in a way that is not known with adapters ({what}): "
            f"leave {self._remedy}"
        )


class PartLinear(nn.Linear):
    """A linear layer without a bias of its own: its W is a part of a tensor that another module holds.

    Args:
        owner: the module.
        key: name of its tensor.
        shape: (out, in) of W.
    """

    owner: Any
    key: Any

    def __init__(self, owner: nn.Module, key: str, shape: tuple[int, int]) -> None:
        nn.Module.__init__(self)
        # past nn.Module's own way of setting attributes: the owner is no submodule of what is a part of it
        vars(self).update(owner=owner, key=key, training=owner.training)
        vars(self).update(out_features=shape[0], in_features=shape[1])
        self.register_parameter("bias", None)

    @property
    def weight(self) -> Any:
        """W (out x in); a view of the owner's tensor where it can be one."""
        return self.own_weight()

    def own_weight(self) -> Tensor:
        """Return W (out x in), of an adapted layer too, whose `weight` is for others to see."""
        return self.part(tensor_of(self.owner, self.key))

    @property
    def is_held_transposed(self) -> bool:
        """Whether the owner holds W (in x out)."""
        raise NotImplementedError

    @property
    def place(self) -> str:
        """The layer's name in its owner."""
        raise NotImplementedError

    def part(self, held: Tensor) -> Tensor:
        """Return W (out x in) of a tensor like the owner's."""
        raise NotImplementedError

    def put(self, held: Tensor, weight: Tensor) -> None:
        """Write a weight into a tensor like the owner's, the weight laid out as the owner holds W."""
        raise NotImplementedError

    def lender(self) -> Callable[[Tensor], Tensor]:
        """Return what makes W, laid out as it is held, of the owner's tensor, without a reference to the owner."""
        raise NotImplementedError

    def join(self) -> None:
        """Make the layer, which is adapted, a part of its owner, which becomes an `Owner`."""
        raise NotImplementedError

    def leave(self) -> None:
        """Take the layer, no longer adapted, out of its owner, which is the plain module it was with the last."""
        raise NotImplementedError


class Owner(Stored):
    """Mixed into the class of a module some of whose parts are adapted."""

    plain_class: type[nn.Module]

    def adapted_parts(self) -> Iterator[tuple[str, Any]]:
        """Yield the adapted layers by their names in the module."""
        raise NotImplementedError

    def asked(self) -> bool:
        """Whether an adapter may have a part in the module's answer; its layers know whose they are afterwards."""
        layers = [layer for _, layer in self.adapted_parts()]
        for layer in layers:
            vars(layer)["owner"] = self  # in a replica another than in the module that it was made of
        return any(layer._forward_pre_hooks or layer.is_asked() for layer in layers)

    def merged(self, name: str) -> dict[str, Tensor]:
        parts = ((layer, layer.merged_layer(f"{name}.{inner}").get("weight")) for inner, layer in self.adapted_parts())
        made = put_together((layer, weight) for layer, weight in parts if weight is not None)
        return {key: tensor for (_, key), tensor in made.items()}

    def adapters_keys(self, prefix: str) -> list[str]:
        return [key for inner, layer in self.adapted_parts() for key in layer.adapters_keys(f"{prefix}{inner}.")]


def be_owner(module: nn.Module, maker: Any) -> None:
    """Give a module the class that a function makes of its own, unless it has it."""
    if not isinstance(module, Owner):
        change_class(module, maker(type(module)))


def be_plain(module: nn.Module, maker: Any) -> None:
    """Give a module back the class it had, once none of its parts is adapted."""
    if isinstance(module, Owner) and next(module.adapted_parts(), None) is None:
        change_class(module, without(type(module), maker))


def tensor_of(owner: nn.Module, key: str) -> Tensor:
    """Return a tensor of an owner; a parameter, or what is plain in a replica or while it is sharded."""
    held = owner._parameters.get(key)
    return vars(owner)[key] if held is None else held


@torch.no_grad()
def put_together(weights: Iterable[tuple[PartLinear, Tensor]]) -> dict[tuple[nn.Module, str], Tensor]:
    """Return the tensors of owners with other weights for some of their parts, by owner and name.

    Args:
        weights: the layer of each and its W' as the owner holds W, one at a time in memory.
    """
    found: dict[tuple[nn.Module, str], Tensor] = {}
    for layer, weight in weights:
        key = layer.owner, layer.key
        if key not in found:
            found[key] = tensor_of(*key).detach().clone()
        layer.put(found[key], weight)
    return found
