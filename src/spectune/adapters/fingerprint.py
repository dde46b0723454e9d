"""Small random sketches: of a base weight, to know it again, and of an update, to know that it is reproduced."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from functools import lru_cache
from threading import Lock
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from spectune.errors import SpectuneError
from spectune.layers.packed import Packed
from spectune.layers.shards import is_part, whole
from spectune.layers.values import digest
from spectune.spectral._hash import tensor_digest

PROBES = 4
_ROUNDINGS = (torch.bfloat16, torch.float16)
UPDATE_SHAPE = (PROBES * PROBES + 1,)
WEIGHT_SHAPE = (1 + len(_ROUNDINGS), PROBES * PROBES)
_CHUNK = 1 << 20  # elements of a weight held in float64 at once: 8 MiB

# Largest relative differences of two sketches that stand for one thing.
SAME_WEIGHT = 1e-5  # a weight in one dtype: only the order of summation differs
BOTH_ROUNDED = 5e-3  # its bf16 beside its fp16 values, which no longer know each other
SAME_PACKED = 4e-3  # a weight of 4 bits, whose scales some processors round to bf16 once it has answered
SAME_BASIS = 2e-2  # an update over singular vectors of one weight, in 16 bits at worst
ROUNDED_BASIS = 0.2  # the same where W has fewer bits here than there: 0.5 to 8% is usual, another basis gives 100%


_MOST_KEPT = 1 << 14  # sketches by the bytes that they are of: 2 MiB
_by_bytes: OrderedDict[tuple[str, bool, torch.dtype | None], Tensor] = OrderedDict()
_lock = Lock()
_kept = WeakTensorKeyDictionary()  # tensors that own a weight's memory: what it was, and its sketches then


@lru_cache(maxsize=64)
def probes(size: int, salt: int) -> Tensor:
    """Return (PROBES x size) normal numbers, the same on every machine and in every version."""
    drawn = np.random.RandomState(size + salt).standard_normal((PROBES, size)) / size**0.5
    return torch.from_numpy(drawn)


def sketch_update(right_product: Tensor) -> Tensor:
    """Return the sketch of dW (out x in): P_out dW P_in^T, flat, and its norm.

    Args:
        right_product: P_in dW^T (PROBES x out), for the probes P_in of size in.
    """
    product = right_product.detach().cpu().double()
    values = (probes(product.shape[1], 1) @ product.mT).flatten()
    return torch.cat([values, torch.linalg.vector_norm(values)[None]]).float()


def combine(sketches: Iterable[Tensor], weights: Iterable[float]) -> Tensor:
    """Return the sketch of a weighted sum of updates.

    Its last entry is the sum of the parts' norms: what rounding errors are to be compared with where parts cancel.
    """
    parts = [torch.cat([w * s[:-1].double(), abs(w) * s[-1:].double()]) for s, w in zip(sketches, weights, strict=True)]
    return torch.stack(parts).sum(0).float()


def sketch_weight(weight: Tensor) -> Tensor:
    """Return the sketches of W (out x in), of W rounded to bf16 and of W rounded to fp16, (3 x PROBES^2).

    A base that is loaded in 16 bits agrees with the rounded sketch of the base in 32, to the last digits.  It is kept
    until W has other values, so that a checkpoint need not make it again.
    """
    # W of a Conv1D is a transposed view, made anew at each call: it is known by the parameter behind it
    owner = weight._base if weight._is_view() and weight._base is not None else weight
    owner = weight.held if isinstance(weight, Packed) else owner
    state: Any = owner._version, owner.data_ptr()
    if not isinstance(weight, Packed) and not is_part(weight):
        state = digest(weight).clone()  # versions do not count what fused optimizers write, nor what `data` is given
    kept = cast("dict[object, tuple[object, Tensor]]", _kept.setdefault(owner, {}))
    part = _place(weight, owner), weight.shape, weight.stride()  # of a tensor that holds several weights
    if part not in kept or not _same(kept[part][0], state):
        all_of_it = whole(weight)
        sketches = torch.stack([_sketch(all_of_it, None), *(_sketch(all_of_it, d) for d in _ROUNDINGS)]).float()
        kept[part] = state, sketches
    return kept[part][1]


def is_sketch(tensor: Tensor) -> bool:
    """Whether a tensor that was read can be the sketches of a weight."""
    return tuple(tensor.shape) == WEIGHT_SHAPE and tensor.dtype == torch.float32 and bool(tensor.isfinite().all())


def _place(weight: Tensor, owner: Tensor) -> int:
    return 0 if isinstance(weight, Packed) else weight.data_ptr() - owner.data_ptr()


def _same(state: Any, other: Any) -> bool:
    if isinstance(state, Tensor) and isinstance(other, Tensor):
        return state.device == other.device and torch.equal(state, other)
    return type(state) is type(other) and state == other


def _sketch(weight: Tensor, rounding: torch.dtype | None) -> Tensor:
    """Return the sketch of W (out x in), rounded first if asked; in float64, which no setting makes coarser.

    It is kept by the weight's bytes, whose digest costs a twentieth of it and is right however W was written to: the
    adapters that come to one base, a hundred to a server's, each check all of its weights.
    """
    if type(weight) not in (Tensor, torch.nn.Parameter) or weight.device.type != "cpu":
        return _computed(weight, rounding)
    # a Conv1D's is contiguous the other way round
    held = weight if weight.is_contiguous() or not weight.mT.is_contiguous() else weight.mT
    key = tensor_digest(held), held is weight, rounding
    with _lock:
        found = _by_bytes.get(key)
    if found is None:
        found = _computed(weight, rounding)
        with _lock:
            _by_bytes[key] = found
            while len(_by_bytes) > _MOST_KEPT:
                _by_bytes.popitem(last=False)
    return found


def _computed(weight: Tensor, rounding: torch.dtype | None) -> Tensor:
    # two random projections: 16 numbers for any W, of which a change anywhere in it moves all, in proportion to its
    # size
    right = probes(weight.shape[1], 0).to(weight.device)
    rows = max(1, _CHUNK // weight.shape[1])
    pieces = []
    for piece in weight.detach().split(rows):
        if rounding is not None:
            limit = torch.finfo(rounding).max  # in 64 bits, where it is no other number
            piece = piece.double().clamp(-limit, limit).to(rounding)
        pieces.append(right @ piece.double().mT)
    return (probes(weight.shape[0], 1) @ torch.cat(pieces, dim=1).cpu().mT).flatten()


def same_weight(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two sketches of weights, by `sketch_weight`, are of one weight, in whatever dtype each is held."""
    if any(_near(a, b, SAME_WEIGHT) for a, b in zip(ours, theirs, strict=True)):
        return True
    # bf16 drops digits that fp16 keeps, and fp16 exponents that bf16 keeps: neither rounds to the other, so they are
    # only compared roughly, and only where one is held in the one and one in the other
    apart = any(_held_in(a, 1) and _held_in(b, 2) and not _held_in(b, 1) for a, b in ((ours, theirs), (theirs, ours)))
    return apart and _near(ours[1], theirs[1], BOTH_ROUNDED)


def as_trained(weight: Tensor, base: Tensor | None) -> Tensor:
    """Return W as the adapter was trained on it: rounded to 16 bits where W is held in more here than there.

    The singular vectors of the rounded weight are others where singular values are nearly equal; with SVFT and LoRA-XS
    an update over those of the unrounded weight can be half wrong.

    Args:
        weight: W (out x in).
        base: the sketch of W as it was trained on, where it is known.
    """
    if base is None or _near(_sketch(weight, None), base[0], SAME_WEIGHT):
        return weight
    fitting = (dtype for dtype in _ROUNDINGS if _near(_sketch(weight, dtype), base[0], SAME_WEIGHT))
    rounded = next(fitting, None)
    return weight if rounded is None else weight.to(rounded)


def check_shape(name: str, weight: Tensor, shape: tuple[int, int]) -> None:
    """Raise unless a weight has the shape (out, in) of the one that an adapter's layer was trained on.

    Raises:
        SpectuneError: it has not.
    """
    if tuple(weight.shape) != tuple(shape):
        raise SpectuneError(
            f"the adapter belongs to another base: {name!r} is {tuple(weight.shape)} here and {tuple(shape)} there"
        )


def check_weight(name: str, weight: Tensor, expected: Tensor, quantize: str | None = None) -> None:
    """Raise unless a weight (out x in) has the sketch of the one that an adapter's layer was trained on.

    Args:
        name: the layer.
        weight: the weight.
        expected: the sketch.
        quantize: how the base was packed there, as far as it is known, for the message.

    Raises:
        SpectuneError: it has not.
    """
    tolerance = SAME_PACKED if isinstance(weight, Packed) and weight.rounds_scales else SAME_WEIGHT
    if _near(_sketch(weight, None), expected[0], tolerance) or same_weight(sketch_weight(weight), expected):
        return
    there = "a base that was quantized there" if quantize is None else f"its base had quantize={quantize}, and"
    raise SpectuneError(
        f"the adapter belongs to another base: the weight of {name!r} differs from the one it was trained on; {there} "
        "is the same only if it is loaded with the same quantize"
    )


def check_update(name: str, made: Tensor, stored: Tensor, weight: Tensor | None, base: Tensor | None) -> None:
    """Raise unless the sketch of an update is the one that was stored.

    Args:
        name: the layer.
        made: the sketch of dW as it comes out here.
        stored: the sketch of dW as it was trained.
        weight: W (out x in), where it is at hand.
        base: the sketch of W as it was trained on, where it is known.

    Raises:
        SpectuneError: it is not.
    """
    if _near(made[:-1], stored[:-1], SAME_BASIS, float(stored[-1])):
        return
    if weight is not None:
        rounded = base is not None and not _near(_sketch(weight, None), base[0], SAME_WEIGHT)
        # DoRA's magnitude is a difference from W's row norms, known no better than W is
        size = PROBES * float(weight.detach().double().square().mean().sqrt())
        slack = size * (2**-9 if rounded else 2**-20)
        if _near(made[:-1], stored[:-1], ROUNDED_BASIS if rounded else SAME_BASIS, float(stored[-1]), slack):
            return
    if not stored.isfinite().all():
        raise SpectuneError(
            f"the adapter's update on {name!r} is not finite where it was saved: its training fell apart; take an "
            "earlier checkpoint, or a smaller learning rate"
        )
    raise SpectuneError(
        f"the adapter does not reproduce its update on {name!r}: the singular vectors of this base came out "
        "differently; load the base in the dtype that the adapter was trained in, or save the adapter with "
        'bases="embed" where it was trained'
    )


def _near(ours: Tensor, stored: Tensor, tolerance: float, size: float | None = None, slack: float = 1e-12) -> bool:
    size = float(torch.linalg.vector_norm(stored.double())) if size is None else size
    return float(torch.linalg.vector_norm(ours.double() - stored.double())) <= tolerance * size + slack


def _held_in(sketches: Tensor, which: int) -> bool:
    """Whether rounding leaves the weight as it is: to bf16 (1) or to fp16 (2)."""
    return _near(sketches[0], sketches[which], 1e-7)
