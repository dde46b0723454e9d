"""A term of each kind of method, and what terms do to a weight."""

import pytest
import torch

from spectune import SVF, SVFT, LoRA, LoRAXS, PiSSA
from spectune.adapters.terms import Term
from spectune.spectral import decompose_many

METHODS = [
    SVF(),
    SVF(parametrization="sigmoid"),
    SVFT(pattern="banded", width=2),
    LoRAXS(rank=3, alpha=6),
    PiSSA(rank=3),
    LoRA(rank=3),
    LoRA(rank=3, alpha=5, rslora=True),
]
every_method = pytest.mark.parametrize("method", METHODS, ids=repr)


def weight(seed=0, shape=(7, 9)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def term(method, W, seed=1, **options) -> Term:
    request = method.request()
    basis = None if request is None else method.basis(W, decompose_many({"": W}, request, cache=False)[""])
    torch.manual_seed(seed)
    trained = {
        k: v + 0.3 * torch.randn_like(v) for k, v in method.initial(method.shapes(*W.shape), basis or {}).items()
    }
    return Term(method, trained, basis=basis, **options)


def delta(terms, W):
    return sum(t.weight * t.method.delta(t.tensors(), W) for t in terms)
