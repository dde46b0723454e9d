"""What the decompositions return and what may be asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from spectune.errors import SpectuneError

Which = Literal["full", "top", "bottom"]
Kind = Literal["full", "top", "bottom", "one_sided"]
Certify = Literal["span", "residual"]


class SVD(NamedTuple):
    """Singular triplets: W v_i = s_i u_i and W^T u_i = s_i v_i.

    Args:
        U: left singular vectors (out x k), orthonormal columns.
        S: singular values (k), descending.
        Vh: right singular vectors (k x in), orthonormal rows.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor


class OneSided(NamedTuple):
    """W = L R with one orthonormal factor, k = min(out, in), so that U diag(S c) V^T = L diag(c) R.

    Args:
        L: U S (out x k) where out >= in, else U (out x k).
        R: V^T (k x in) where out >= in, else S V^T (k x in).
        S: singular values (k), descending.
    """

    L: Tensor
    R: Tensor
    S: Tensor


@dataclass(frozen=True)
class Request:
    """What to compute of each weight.

    Args:
        kind: "top" or "bottom" triplets, the "full" decomposition, or "one_sided" factors.
        rank: triplets asked for; None with "full" and "one_sided".
        tol: tolerance of `svd`.
        certify: criterion of `svd`.

    Raises:
        SpectuneError: an unknown kind or criterion, a rank that is missing or out of place, a tol below zero.
    """

    kind: Kind
    rank: int | None = None
    tol: float = 1e-4
    certify: Certify = "span"

    def __post_init__(self) -> None:
        if self.kind not in ("top", "bottom", "full", "one_sided"):
            raise SpectuneError(f"kind must be 'top', 'bottom', 'full' or 'one_sided', not {self.kind!r}")
        if self.kind in ("top", "bottom"):
            if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
                raise SpectuneError(f"rank must be an integer >= 1 where kind is {self.kind!r}, not {self.rank!r}")
        elif self.rank is not None:
            raise SpectuneError(f"rank must be None where kind is {self.kind!r}: all triplets are computed")
        check_criterion(self.tol, self.certify)


def check_criterion(tol: float, certify: str) -> None:
    """Raise unless `tol` is a number >= 0 and `certify` a criterion."""
    if not tol >= 0:
        raise SpectuneError(f"tol must be a number >= 0, not {tol!r}")
    if certify not in ("span", "residual"):
        raise SpectuneError(f"certify must be 'span' or 'residual', not {certify!r}")


def checked(W: Tensor) -> tuple[Tensor, float]:
    """Return W in a dtype that factors (float32, or float64 as given) and its largest magnitude.

    Raises:
        SpectuneError: not a matrix, not floating point, no data, or values that are not finite.
    """
    if W.dim() != 2 or 0 in W.shape:
        raise SpectuneError(
            f"a weight of shape {tuple(W.shape)} is not a matrix with rows and columns; reshape it first"
        )
    if not W.is_floating_point() or W.element_size() < 2:
        raise SpectuneError(
            f"a weight in {W.dtype} is packed or quantized, not floating point; dequantize it first, for its bytes "
            "are not its values"
        )
    if W.is_meta:
        raise SpectuneError("a weight on the meta device has no values; load the checkpoint before decomposing it")
    W = W.detach()
    if W.dtype != torch.float64:
        W = W.float()
    low, high = torch.aminmax(W)
    largest = max(-float(low), float(high))
    if not largest < float("inf"):
        raise SpectuneError("a weight holds values that are not finite; repair the checkpoint")
    return W, largest


def check_rank(rank: int | None, which: str, shape: torch.Size) -> int:
    """Return the number of triplets to compute."""
    k = min(shape)
    if which == "full":
        if rank is not None and rank != k:
            raise SpectuneError(f"which='full' returns all {k} triplets; take which='top' or 'bottom' with rank {rank}")
        return k
    if which not in ("top", "bottom"):
        raise SpectuneError(f"which must be 'full', 'top' or 'bottom', not {which!r}")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise SpectuneError(f"rank must be an integer >= 1 where which is {which!r}, not {rank!r}")
    if rank > k:
        raise SpectuneError(
            f"rank {rank} is above min(out, in) = {k} of a {shape[0]} x {shape[1]} weight; take rank <= {k}"
        )
    return rank


def signs(rows: Tensor) -> Tensor:
    """Return +1 or -1 for each row, such that row * sign has a positive entry of largest magnitude."""
    peak = rows.gather(1, rows.abs().argmax(1, keepdim=True)).squeeze(1)
    return torch.where(peak < 0, -1.0, 1.0).to(rows.dtype)


def empty_decomposition(request: Request | None, out_features: int, in_features: int) -> SVD | OneSided | None:
    """Return what a request for a weight (out_features x in_features) is answered with, on the meta device."""
    if request is None:
        return None
    k = request.rank or min(out_features, in_features)
    left, values, right = (torch.empty(shape, device="meta") for shape in ((out_features, k), (k,), (k, in_features)))
    return OneSided(left, right, values) if request.kind == "one_sided" else SVD(left, values, right)
