"""Whether factors that were read from somewhere are a decomposition of the weight at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from spectune.spectral._svd import full_precision
from spectune.spectral._types import SVD, OneSided, Request, checked

PROBES = 2
_TOLERANCE = 1e-4  # of float32 factors: rounding leaves 1e-6 of ||W||_F


def is_decomposition(W: Tensor, found: SVD | OneSided, request: Request) -> bool:
    """Whether factors are what a request for W is answered with, at the price of a few products with vectors.

    Shapes, dtypes, order and energy are compared, and for random combinations y of the triplets V V^T y = y,
    U^T U y = y, W V y = U S y and W^T U y = V S y.  The last two hold to rounding on the side that a decomposition is
    made from, and to sqrt(tol) on the other, since ||W^T U - V S||_F^2 is at most the energy that a span lacks.  What
    belongs to another weight, another end of the spectrum or no weight at all fails; NaN does too.

    Args:
        W: weight (out x in).
        found: the factors, on W's device.
        request: what they are to answer.
    """
    out_features, in_features = W.shape
    most = min(W.shape)
    k = most if request.rank is None else request.rank
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    left, right = (found.U, found.Vh) if isinstance(found, SVD) else (found.L, found.R)
    expected = ((left, (out_features, k)), (found.S, (k,)), (right, (k, in_features)))
    if any(tuple(tensor.shape) != shape or tensor.dtype != dtype for tensor, shape in expected):
        return False
    W, largest = checked(W)
    S = found.S
    if not 2.0**-30 < largest < 2.0**30:  # whose squares float32 does not hold
        W, S, left, right = (tensor.double() for tensor in (W, S, left, right))
    if not bool((S[1:] <= S[:-1]).all() and S[-1] >= 0):
        return False
    size = float(torch.linalg.vector_norm(W))
    if not _holds_its_share(size**2, float(torch.linalg.vector_norm(S)) ** 2, S, most - k, request):
        return False
    if out_features < in_features:  # of W^T, whose right factor is on the shorter side
        W, left, right = W.mT, right.mT, left.mT
    loose = _TOLERANCE if request.rank is None or request.tol == 0 else max(_TOLERANCE, 4 * request.tol**0.5)
    drawn = torch.randn(PROBES, k, generator=torch.Generator().manual_seed(k), dtype=torch.float64).to(S)
    with full_precision(W):
        for y in drawn:
            mixed, scaled = right.mT @ y, S * y
            made = left @ (scaled if isinstance(found, SVD) else y)
            pairs = [(right @ mixed, y, _TOLERANCE * k**0.5), (W @ mixed, made, _TOLERANCE * size)]
            if isinstance(found, SVD):
                turned = left @ y
                pairs.append((left.mT @ turned, y, _TOLERANCE * k**0.5))
                pairs.append((W.mT @ turned, right.mT @ scaled, loose * size))
            else:
                pairs.append((left.mT @ made, S * scaled, _TOLERANCE * size**2))
            if not all(float(torch.linalg.vector_norm(a - b)) <= allowed for a, b, allowed in pairs):
                return False
    return True


def _holds_its_share(energy: float, held: float, S: Tensor, left: int, request: Request) -> bool:
    """Whether what is left of ||W||_F^2 can lie in as many other singular values as are left."""
    rest, slack = energy - held, _TOLERANCE * energy
    if left == 0:
        return abs(rest) <= slack
    if request.kind == "top":
        return -slack <= rest <= 1.5 * left * float(S[-1]) ** 2 + slack
    return rest >= left * float(S[0]) ** 2 / 1.5 - slack
