"""Linear layers whose weight is a part of a tensor that another module, their owner, holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.layers.classes import Maker, change_class, without
from spectune.layers.stored import Stored
from spectune.speed.recompute_cache import current_cache

_KIND = (
    *("dtype", "device", "shape", "ndim", "layout", "is_meta", "is_cuda", "size", "dim", "stride", "numel"),
    *("element_size", "is_contiguous", "data_ptr", "requires_grad", "is_floating_point"),
)  # what is asked of a tensor without a look at its values
_CASTS = ("to", "type_as", "float", "half", "bfloat16", "double", "cuda", "cpu", "contiguous")
_WRITTEN = ("data", "grad", "storage", "untyped_storage")  # where whoever asks for them means to write to W


class StandIn:
    """What an owner's forward method finds in the place of its tensor: it tells its kind, and has the products of W'.

    Whatever else is done with it is done with W' itself, made then.

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

    def _made(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return what stands in the tensor's place with the adapters that answer: W' of its parts, in a dtype."""
        raise NotImplementedError

    def _product(self, func: object, *args: object, **kwargs: object) -> Tensor | None:
        """Return what a function of torch makes of it if that is a product of its layers', or None."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name in _KIND:
            return getattr(self._held, name)
        if name in _CASTS:
            return lambda *args, **kwargs: self._cast(name, *args, **kwargs)
        if name in _WRITTEN or _writes(name):
            raise self._refused(name)
        return getattr(self._made(), name)

    def _cast(self, name: str, *args: object, **kwargs: object) -> object:
        """Return it, or W', in another dtype or on another device."""
        held = self._held
        like = getattr(held.new_empty(0), name)(*args, **kwargs)
        if (like.dtype, like.device) == (held.dtype, held.device):
            return self
        return getattr(self._made(like.dtype), name)(*args, **kwargs)

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, index: Any) -> object:
        return self._made()[index]

    def __setitem__(self, index: object, value: object) -> None:
        raise self._refused("writing to it")

    @classmethod
    def __torch_function__(cls, func: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
        kwargs = kwargs or {}
        ones = [value for value in _flat((*args, *kwargs.values())) if isinstance(value, StandIn)]
        answer = ones[0]._product(func, *args, **kwargs)
        if answer is None:
            name = getattr(func, "__name__", str(func))
            if _writes(name) or kwargs.get("out") is not None:
                raise ones[0]._refused(name)
            answer = func(*_with_values(args), **_with_values(kwargs))
        if (cache := current_cache()) is not None:  # whose mode does not see what is done in here
            cache.hold_last()
        return answer

    def _layers_own(self, layer: Any, dtype: torch.dtype | None) -> Tensor:
        """Return W' (out x in) of an adapted layer."""
        try:
            return layer.made_weight(dtype)
        except SpectuneError as error:
            raise self._refused(str(error)) from None

    def _refused(self, why: str) -> SpectuneError:
        kind = getattr(self._owner, "plain_class", type(self._owner)).__name__
        return SpectuneError(
            f"{kind} uses its {self._key!r} in a way that is not known with adapters ({why}): leave {self._remedy}"
        )


def _operator(name: str) -> Callable[..., object]:
    def operate(self: StandIn, *others: object) -> object:
        return StandIn.__torch_function__(getattr(Tensor, name), (), (self, *others))

    return operate


for _name in (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "matmul", "rmatmul", "pow", "neg", "abs"),
    *("lt", "gt", "le", "ge"),
):
    setattr(StandIn, f"__{_name}__", _operator(f"__{_name}__"))


def _writes(name: str) -> bool:
    """Whether a function of this name writes to its tensor."""
    return name.endswith("_") and not name.endswith("__")


def _flat(values: Iterable[object]) -> Iterator[object]:
    for value in values:
        yield from _flat(value) if isinstance(value, (list, tuple)) else (value,)


def _with_values(tree: Any) -> Any:
    """Return arguments with W' in the place of what stands for it."""
    if isinstance(tree, StandIn):
        return tree._made()
    if type(tree) in (list, tuple):
        return type(tree)(map(_with_values, tree))
    return {key: _with_values(value) for key, value in tree.items()} if type(tree) is dict else tree


class PartLinear(nn.Linear):
    """A linear layer without a bias of its own: its W is a part of a tensor that another module holds.

    Args:
        owner: the module.
        key: name of its tensor.
        shape: (out, in) of W.
    """

    owner: nn.Module
    key: str

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


def be_owner(module: nn.Module, maker: Maker) -> None:
    """Give a module the class that a function makes of its own, unless it has it."""
    if not isinstance(module, Owner):
        change_class(module, maker(type(module)))


def be_plain(module: nn.Module, maker: Maker) -> None:
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
