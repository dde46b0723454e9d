"""What operations on the meta device compute, move and hold."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from spectune.planning.machine import Machine
from spectune.speed.pieces import counted

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
_ONEDNN = "mkldnn::_linear_pointwise"
_PICKING = ("embedding", "gather", "index", "index_select", "scatter_add", "index_put")  # touch a part of a tensor
_MAPPED = 1 << 25  # bytes above which glibc asks the system for memory each time
_SLOW = ("exp", "logsumexp", "silu", "silu_backward", "gelu", "gelu_backward", "tanh", "sigmoid", "_softmax")


class Tally(TorchDispatchMode):
    """Count what operations on the meta device compute, move and hold.

    A product takes what one of its shape does; any other operation the longer of its arithmetic and its traffic, and
    something for itself.  Pieces of memory too large for the heap cost time each time that they are first touched.

    Args:
        machine: rates.

    Attributes:
        seconds, flops: so far.
        held, peak: bytes of results that are alive, now and at most, without what was forgotten.
        most: bytes of results that are alive at most, with what was forgotten.
    """

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine
        self.seconds = self.flops = 0.0
        self.held = self.peak = self.most = 0
        self._times = 1
        self._seen: dict[int, tuple[object, int]] = {}
        self._forgotten: dict[int, int] = {}

    def __enter__(self) -> Tally:
        self._token = counted.set(self._repeated)
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        counted.reset(self._token)

    @contextmanager
    def _repeated(self, times: int) -> Iterator[None]:
        """Count what is done within the context that many times."""
        before, self._times = self._times, self._times * times
        try:
            yield
        finally:
            self._times = before

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = list(_on_meta((*args, *kwargs.values())))
        # a view has its base's storage, and costs no memory; the address is the only thing that tells, on a device
        # without data
        known = {t.untyped_storage()._cdata for t in given}
        made = list(_on_meta((out,)))
        new = [t for t in made if t.untyped_storage()._cdata not in known]
        for tensor in new:
            self._hold(tensor.untyped_storage())
        if new or func._schema.is_mutable:  # the rest are views
            flops = _flops(func, args, kwargs, out)
            self.flops += flops * self._times
            self.seconds += self._charge(func, args, given, made, flops) * self._times
        else:
            self.seconds += self.machine.overhead * self._times
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        # alive as long as something refers to the storage: what autograd keeps for the backward pass is thereby
        # counted, and what it drops is not
        self._seen[key] = (weakref.ref(storage, lambda _: self._release(key)), size)
        self.held += size
        self.peak = max(self.peak, self.held)
        self.most = max(self.most, self.held + sum(self._forgotten.values()))
        self.seconds += (size if size > _MAPPED else 0) / self.machine.fresh * self._times

    def _release(self, key: int) -> None:
        size = self._seen.pop(key)[1]
        if self._forgotten.pop(key, None) is None:
            self.held -= size

    def forget(self, tensor: Tensor | None) -> None:
        """Count a tensor, such as a gradient, in `held` and `peak` no more."""
        if tensor is not None:
            key = tensor.untyped_storage()._cdata
            if key in self._seen and key not in self._forgotten:
                self._forgotten[key] = self._seen[key][1]
                self.held -= self._seen[key][1]

    def _charge(
        self, func: OpOverload, args: tuple[object, ...], given: list[Tensor], made: list[Tensor], flops: float
    ) -> float:
        """Return the seconds of an operation."""
        name, dtype = func._schema.name.removeprefix("aten::"), given[0].dtype if given else torch.float32
        if name == _ONEDNN:
            a, b = given[0], given[1].mT
            sides = (1, a.numel() // a.shape[-1], a.shape[-1], b.shape[-1])
            return self.machine.product(dtype, sides, (_transposed(a), _transposed(b)), onednn=True)
        if name.rstrip("_") in _PRODUCTS:
            a, b = given[-2:]
            sides = (math.prod(a.shape[:-2]), a.shape[-2], a.shape[-1], b.shape[-1])
            return self.machine.product(dtype, sides, (_transposed(a), _transposed(b)))
        if "scaled_dot_product" in name:
            backward = name.endswith("backward")
            query, key = given[1:3] if backward else given[:2]
            sides = (math.prod(query.shape[:2]), query.shape[2], key.shape[2], query.shape[3])
            causal = any(a is True for a in args)
            return self.machine.attention(dtype, sides, causal, backward)
        if name.startswith("spectune::"):
            entries = max((t.numel() for t in (*given, *made) if t.dim() == 1), default=0)
            return self.machine.operation(func, args, entries)
        moved = sum(_bytes(t) for t in given) + sum(_bytes(t) for t in made)
        if "empty" in name:
            moved = 0
        elif name.rstrip("_") in _PICKING:
            moved = 3 * min(_bytes(t) for t in (*given, *made))
        slow = max(t.numel() for t in given) if name.rstrip("_") in _SLOW else 0
        rate = {"bernoulli": self.machine.drawn, "random": self.machine.words}.get(name.rstrip("_"))
        arithmetic = flops / self.machine.fp32 + (made[0].numel() / rate if rate else 0.0)
        return max(self.machine.passing(moved, slow), arithmetic)


def _on_meta(values: Iterable[object]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            if value.is_meta:
                yield value
        elif isinstance(value, (list, tuple)):
            yield from _on_meta(value)


def _bytes(tensor: Tensor) -> int:
    """Return what reading a tensor moves: what it holds, however often an expanded one repeats it."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _transposed(matrix: Tensor) -> bool:
    return matrix.stride(-1) != 1


def _flops(func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, object], out: Any) -> float:
    if func._schema.name == _ONEDNN:
        return 2 * out.numel() * args[0].shape[-1]
    packet = func._overloadpacket
    count = flop_registry.get(torch.ops.aten.addmm if packet is torch.ops.aten.addmm_ else packet)
    return count(*args, **kwargs, out_val=out) if count is not None else 0
