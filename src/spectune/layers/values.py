"""Whether tensors have the values that they had when something was made of them."""

from __future__ import annotations

from functools import cache
from itertools import count
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from spectune.layers.packed import Packed
from spectune.layers.shards import is_part
from spectune.private import is_shared

_CHUNK = 1 << 22  # elements of a matrix held at once in another dtype: 16 MiB of float32
_ROUNDING = 1e-6  # by which sums in another order may differ, relative to what is summed
_probes: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
_data: Any = torch.Tensor.data
values_of = torch.Tensor.detach  # for who reads alone: `Watched` does not count it
_requests = 0  # for the memory of any watched parameter


def requests() -> int:
    """Return a number that is another one when somebody has asked for the memory of a parameter that is watched."""
    return _requests


def _note_request() -> None:
    global _requests
    _requests += 1


class Watched(nn.Parameter):
    """A parameter that counts who asks for its memory: what is written there, no version counts.

    Attributes:
        asked: how often `data` was asked for, where one may write as long as the parameter is there.
        lent: how often another tensor, or an array, was made of its memory, where one may write as long as that is.
        number: of the time since which it is watched; what was counted before is forgotten.
    """

    asked = 0
    lent = 0
    number = 0

    @property
    def data(self) -> Tensor:
        self.asked += 1
        _note_request()
        return _data.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        self.asked += 1
        _note_request()
        _data.__set__(self, value)

    def detach(self) -> Tensor:
        self._lend()
        return values_of(self)

    def numpy(self, **options: bool) -> object:
        self._lend()
        return super().numpy(**options)

    def __array__(self, *args: object, **options: object) -> object:
        self._lend()
        return super().__array__(*args, **options)

    def __dlpack__(self, *args: object, **options: object) -> object:
        self._lend()
        return super().__dlpack__(*args, **options)

    def _lend(self) -> None:
        self.lent += 1
        _note_request()

    @property
    def is_lent(self) -> bool:
        """Whether what was made of its memory may be there still."""
        return self.lent > 0 and is_shared(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        # a copy is nobody's to watch: it is a parameter as any other
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(values_of(self).clone(), self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:  # nor is what is read back
        return nn.Parameter(values_of(self), self.requires_grad).__reduce_ex__(protocol)


PLAIN = (nn.Parameter, Watched)  # a weight that is not packed, nor of another library's making


def watch(parameter: object) -> bool:
    """Watch a parameter, if it is a plain one; return whether that began now."""
    if type(parameter) is not nn.Parameter or parameter.is_inference():
        return False
    # the class and not the object: optimizers, ties and graphs hold this very parameter
    parameter.__class__ = Watched
    vars(parameter)["number"] = next(_numbers)
    _count_steps()
    return True


_numbers = count(1)


@cache
def _count_steps() -> None:
    """Have versions count what optimizers write to watched parameters: fused ones, and those of other makers, do not.

    It stays, with nothing to do where none is watched: PyTorch goes through these hooks in every optimizer's thread,
    and fails where one goes meanwhile.
    """

    def stepped(optimizer: Optimizer, *_: object) -> None:
        of_all = (p for group in optimizer.param_groups for p in group["params"])
        torch.autograd.graph.increment_version([p for p in of_all if type(p) is Watched and p.grad is not None])

    # before it too: hooks of the optimizer itself come before those of all
    register_optimizer_step_pre_hook(stepped)
    register_optimizer_step_post_hook(stepped)


def unwatch(parameter: object) -> None:
    """Make a watched parameter the plain one that it was."""
    kind = type(parameter)
    if kind is Watched:
        parameter.__class__ = nn.Parameter
        _note_request()  # whoever else watched it has to look again
        for name in ("asked", "lent", "number"):
            vars(parameter).pop(name, None)


def digest(tensor: Tensor) -> Tensor:
    """Return a short tensor that is another one when the values are, whatever way they were written.

    Versions do not count what is written by way of `.data`, as averages of weights are swapped in, so the values are
    looked at: a matrix (... x n x k) by its product with a fixed random vector (k), in float32 at least, a vector as it
    is.  A change that this rounds away is one of a 10-millionth of its row.
    """
    if tensor.dim() < 2:
        return values_of(tensor)
    wide = torch.promote_types(tensor.dtype, torch.float32)
    matrix, probe = values_of(tensor), _probe(tensor.shape[-1], wide, tensor.device)
    if matrix.dtype is wide or matrix.dim() > 2 or matrix.numel() <= _CHUNK:
        return torch.matmul(matrix.to(wide), probe)
    # a copy of all of W in float32 would take twice its memory, only to look at it
    return torch.cat([piece.to(wide) @ probe for piece in matrix.split(max(1, _CHUNK // matrix.shape[1]))])


def _probe(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    probe = _probes.get((size, dtype, device))
    if probe is None:
        with torch.inference_mode(False):
            # from 0.5 to 1.5, so that no entry is multiplied by nearly nothing and changes unseen
            drawn = torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
            probe = _probes[size, dtype, device] = drawn.to(dtype).to(device)
    return probe


@torch.no_grad()
def row_norms(weight: Tensor) -> Tensor:
    """Return ||W_i|| of W (out x in), in float32 at least."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    if weight.dtype is wide or weight.numel() <= _CHUNK or torch.compiler.is_compiling():
        return torch.linalg.vector_norm(weight, dim=1, dtype=wide)
    pieces = weight.split(max(1, _CHUNK // weight.shape[1]))
    return torch.cat([torch.linalg.vector_norm(piece, dim=1, dtype=wide) for piece in pieces])


class Seen(NamedTuple):
    owner: Any
    version: int
    pointer: int
    number: int
    lent: int
    digest: Tensor
    norms: Tensor


class WeightValues:
    """What a layer's W was when it was last looked at: its digest and the norms of its rows.

    The parameter that W is, or is a part of, is watched; only where somebody may have written to it unseen is W looked
    at again.
    """

    def __init__(self) -> None:
        self._seen: Seen | None = None

    def of(self, weight: Tensor, owner: Tensor | None, once: bool = False) -> Seen:
        """Return what W (out x in) is now; the same object as long as its values are the same.

        Args:
            weight: W.
            owner: the tensor of the model that W is, or is a part of; None where W is computed.
            once: begin to watch nothing.
        """
        seen = self._seen
        if (
            seen is not None
            and seen.owner is owner
            and type(owner) is Watched
            and not owner.asked
            and owner.lent == seen.lent
            and owner.number == seen.number
            and not owner.is_lent
            and owner._version == seen.version
            and owner.data_ptr() == seen.pointer
        ):
            return seen
        # several processes gather a weight of parts anew, and it has the version of those
        if not once and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            watch(owner)
        version, number, lent = (owner._version, owner.number, owner.lent) if type(owner) is Watched else (0, 0, 0)
        with torch.inference_mode(False), torch.no_grad():
            now = digest(weight).clone()
            same = seen is not None and seen.digest.device == now.device and torch.equal(seen.digest, now)
            if seen is not None and same and seen.digest.dtype is now.dtype:
                now, norms = seen.digest, seen.norms
            else:
                norms = row_norms(weight)
        pointer = 0 if owner is None else owner.data_ptr()
        self._seen = seen = Seen(owner, version, pointer, number, lent, now, norms)
        return seen

    def end(self) -> None:
        """Let the parameter be as it was."""
        if self._seen is not None:
            unwatch(self._seen.owner)
        self._seen = None

    def __reduce__(self) -> tuple[object, ...]:  # a copy of a layer has another W
        return WeightValues, ()


class Made(NamedTuple):
    """W as it was when something was made of it: its digest, or None where it was another one, and its dtype."""

    digest: Tensor | None
    dtype: torch.dtype


def made_of(weight: Tensor) -> Made | None:
    """Return what tells W (out x in) when something is made of it; None where that cannot be known.

    A packed weight is nobody's to write to, and one that is sharded or without values has no digest here.
    """
    if isinstance(weight, Packed) or is_part(weight) or weight.is_meta:
        return None
    with torch.inference_mode(False), torch.no_grad():
        return Made(digest(weight).clone(), weight.dtype)


def is_made_of(made: Made | None, now: Seen, weight: Tensor) -> bool:
    """Whether what was made of W was made of its values of now, but for the rounding of W to another dtype.

    Args:
        made: what `made_of` returned then.
        now: of W.
        weight: W.
    """
    if made is None:
        return True
    if made.digest is None:
        return False
    then = made.digest.to(now.digest)
    if torch.equal(then, now.digest):
        return True
    rounding = _ROUNDING if weight.dtype is made.dtype else max(_ROUNDING, torch.finfo(weight.dtype).eps / 2)
    size = now.norms * torch.linalg.vector_norm(_probe(weight.shape[1], now.norms.dtype, weight.device))
    return bool(((then - now.digest).abs() <= rounding * size).all())
