"""Decompositions of one matrix or many."""
# placeholder by the lead, with the agreed names: replace wholly
from dataclasses import dataclass
from typing import NamedTuple
import torch

class SVD(NamedTuple):
    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor
class OneSided(NamedTuple):
    L: torch.Tensor
    R: torch.Tensor
    S: torch.Tensor
@dataclass(frozen=True)
class Request:
    kind: str
    rank: int | None = None
    tol: float = 1e-4
def svd(W, rank=None, which="full", tol=1e-4, *, seed=0):
    U, S, Vh = torch.linalg.svd(W.detach().double(), full_matrices=False)
    sign = Vh.gather(1, Vh.abs().argmax(1, keepdim=True)).sign()
    Vh, U = Vh * sign, U * sign.T
    if which == "top": U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    if which == "bottom": U, S, Vh = U[:, -rank:], S[-rank:], Vh[-rank:]
    dt = W.dtype if W.dtype == torch.float64 else torch.float32
    return SVD(*(x.to(dt).contiguous() for x in (U, S, Vh)))
def one_sided(W):
    U, S, Vh = svd(W)
    if W.shape[0] >= W.shape[1]: return OneSided(U * S, Vh, S)
    return OneSided(U, S[:, None] * Vh, S)
def decompose_many(weights, request, *, cache=True, progress=None, order=None):
    out = {}
    for i, (n, w) in enumerate(weights.items()):
        w = w() if callable(w) else w
        out[n] = one_sided(w) if request.kind == "one_sided" else svd(w, request.rank, request.kind, request.tol)
        if progress: progress(i + 1, len(weights))
    return out
