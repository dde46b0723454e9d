"""Adapters as low-rank factors: stacked exactly, or truncated to the best of a given rank."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from spectune.adapters.contents import Contents
from spectune.adapters.terms import LayerUpdate, Term, lora_term
from spectune.errors import SpectuneError
from spectune.layers.cores import Diagonal
from spectune.methods.dora import DoRA
from spectune.methods.lora import LoRA
from spectune.spectral import singular_values, svd
from spectune.spectral._eigh import eigh

LOSSY = 0.1  # relative error above which a LoRA does not stand for the adapter that it was made of
_NOISE = 1e-13  # relative size of an eigenvalue of a float64 Gram matrix that is rounding error


class _Product(NamedTuple):
    """dW = left @ right, left (out x p) and right (p x in)."""

    left: Tensor
    right: Tensor


class _Part(NamedTuple):
    """A truncated product, with the squared Frobenius norms of the whole and of what was cut off."""

    product: _Product
    total: float
    lost: float


def to_lora(adapter: Contents, rank: int | None) -> Contents:
    """See `Adapter.to_lora`."""
    if rank is not None:
        return compress(adapter, rank)
    adapter.complete()
    heads = _heads(adapter)
    updates = {name: layer for name, layer in adapter.layers.items() if name not in heads}
    exact = {name: _stacked(layer) or _as_product(adapter.delta(name)) for name, layer in updates.items()}
    layers = {name: _lora_layer(adapter.layers[name], f) for name, f in exact.items()}
    return _as(adapter, {**layers, **heads})


def compress(adapter: Contents, rank: int) -> Contents:
    """See `Adapter.compress`."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise SpectuneError(f"rank must be an integer >= 1, not {rank!r}")
    adapter.complete()
    parts: dict[str, _Part] = {}
    by_width: defaultdict[int, dict[str, _Product]] = defaultdict(dict)
    heads = _heads(adapter)
    updates = {name: layer for name, layer in adapter.layers.items() if name not in heads}
    for name, layer in updates.items():
        stacked = _stacked(layer)
        if stacked is None:
            parts[name] = _truncate_dense(adapter.delta(name), rank)
        else:
            by_width[stacked.left.shape[1]][name] = stacked
    # layers whose factors are as wide go together: a hundred small eigenproblems in one call
    for products in by_width.values():
        parts |= zip(products, _truncate(list(products.values()), rank), strict=True)
    total, lost = sum(p.total for p in parts.values()), sum(p.lost for p in parts.values())
    layers = {name: _lora_layer(layer, parts[name].product) for name, layer in updates.items()}
    # one number for the whole adapter: what layers lose adds in squares, as their norms do, so that a layer whose dW
    # is small does not count as much as one whose dW is large
    error = (lost / total) ** 0.5 if total > 0 else 0.0
    return _as(adapter, {**layers, **heads}, error)


def to_one_rank(adapter: Contents) -> Contents:
    """Return an adapter of LoRAs (DoRA around them is one) with one rank and one alpha, filled up with zeros."""
    heads = _heads(adapter)
    ranks = [_lora(layer.terms[0]).rank for name, layer in adapter.layers.items() if name not in heads]
    return to_scale_one(adapter, max(ranks))


def _lora(term: Term) -> LoRA:
    return cast(LoRA, term.method.inner if isinstance(term.method, DoRA) else term.method)


def to_scale_one(adapter: Contents, rank: int | None = None) -> Contents:
    """Return an adapter of LoRAs (DoRA around them is one) with alpha = rank, so that s = 1, and s in B.

    Args:
        adapter: the adapter.
        rank: fill the factors up with zeros to this one; None leaves each layer its own.
    """
    heads = _heads(adapter)
    layers = {name: layer for name, layer in adapter.layers.items() if name not in heads}
    wanted = rank
    for name, layer in layers.items():
        (term,) = layer.terms
        inner, A, B = _lora(term), term.trained["A"], term.trained["B"]
        rank = inner.rank if wanted is None else wanted
        wider = LoRA(rank=rank, alpha=float(rank), dropout=inner.dropout)
        method = replace(term.method, inner=wider) if isinstance(term.method, DoRA) else wider
        trained = {
            **term.trained,
            "A": torch.cat([A, A.new_zeros(rank - len(A), A.shape[1])]),
            "B": torch.cat([B * inner.scale, B.new_zeros(len(B), rank - len(A))], dim=1),
        }
        layers[name] = replace(layer, terms=(replace(term, method=method, trained=trained),))
    return _as(adapter, {**layers, **heads}, adapter.error)


def _as(adapter: Contents, layers: dict[str, LayerUpdate], error: float = 0.0) -> Contents:
    """Return the contents of an adapter with other layers."""
    kept = adapter.labels, adapter.modules, adapter.architecture, adapter.groups, adapter.quantize
    return Contents(layers, adapter.base_model, error, *kept)


def _heads(adapter: Contents) -> dict[str, LayerUpdate]:
    """Return the layers that are whole heads, which no low rank is asked of, each as one term.

    Raises:
        SpectuneError: a sum of heads that is no head, because the weights do not sum to one.
    """
    heads = {}
    for name, layer in adapter.layers.items():
        whole = [term for term in layer.terms if term.method.replaces]
        if not whole:
            continue
        total = sum(term.weight for term in whole)
        if len(whole) < len(layer.terms) or len({t.method for t in whole}) > 1 or abs(total - 1) > 1e-6:
            raise SpectuneError(
                f"the heads on {name!r} have weights that sum to {total:g}, so that part of the base's own layer "
                "remains and no one head is their sum; give weights that sum to 1"
            )
        trained = {key: torch.stack([t.weight * t.trained[key] for t in whole]).sum(0) for key in whole[0].trained}
        heads[name] = replace(layer, terms=(Term(whole[0].method, trained),))
    return heads


def _truncate(products: list[_Product], rank: int) -> list[_Part]:
    """Return the best approximation of this rank to each of several products L R of one width p.

    All that is done in p x p: with L^T L = V D V^T and X = D^1/2 V^T R R^T V D^1/2 = Y diag(S^2) Y^T, the columns of
    Q = L V D^-1/2 Y are the left singular vectors of L R and S its singular values, and Q_r (Q_r^T L R) is the best
    approximation of rank r.  The Gram matrices square the condition number, so they are float64; the columns of L and
    the rows of R are first brought to equal lengths, so that how dW is split into factors does not matter.
    """
    width = products[0].left.shape[1]
    # there is nothing to cut off: the factors stay as they are, bit for bit
    if width <= rank:
        return [_Part(p, _squared_norm(p), 0.0) for p in products]
    products = [_Product(p.left.double(), p.right.double()) for p in products]
    left_gram = torch.stack([p.left.mT @ p.left for p in products])
    right_gram = torch.stack([p.right @ p.right.mT for p in products])
    lengths = left_gram.diagonal(dim1=1, dim2=2).sqrt(), right_gram.diagonal(dim1=1, dim2=2).sqrt()
    # a LoRA with a tiny A and a huge B is the same dW as one with both alike, but its Gram matrices are not: without
    # this step their eigenvalues lie further apart than float64 has digits. A column or row of zeros is left out
    balance = torch.where((lengths[0] > 0) & (lengths[1] > 0), (lengths[1] / lengths[0]).sqrt(), 0.0)
    inverse = torch.where(balance > 0, 1 / balance, 0.0)
    D, V = eigh(balance[:, :, None] * left_gram * balance[:, None])
    # factors that are linearly dependent (two adapters of one origin, added) have eigenvalues of zero, which come out
    # as rounding and would be divided by below
    D = torch.where(_NOISE * D[:, -1:] < D, D, 0.0)
    root = D.sqrt()
    to_right = root[:, :, None] * V.mT * inverse[:, None]  # D^1/2 V^T, for R as it was
    squares, Y = eigh(to_right @ right_gram @ to_right.mT)
    squares, kept = squares.clamp_min(0), Y[..., -rank:]
    to_left = balance[:, :, None] * V @ (torch.where(root > 0, 1 / root, 0.0)[:, :, None] * kept)
    singular = squares[:, -rank:].sqrt()
    # half of each singular value to either factor, as LoRA's own are: both then train on at one learning rate
    share = torch.where(singular > 0, singular.sqrt(), 1.0)  # of the singular value, half to each factor
    to_left, to_right = to_left * share[:, None], (kept / share[:, None]).mT @ to_right
    totals, losses = squares.sum(1).tolist(), squares[:, :-rank].sum(1).tolist()
    return [
        _Part(_Product((L @ to_left[i]).float(), (to_right[i] @ R).float()), totals[i], losses[i])
        for i, (L, R) in enumerate(products)
    ]


def _truncate_dense(delta: Tensor, rank: int) -> _Part:
    """Return the best approximation of this rank to a dense update."""
    total = float(delta.double().square().sum())
    if rank >= min(delta.shape) or not total:
        return _Part(_as_product(delta), total, 0.0)
    U, S, Vh = svd(delta, rank, "top", tol=1e-6)
    product = _Product(U * S.sqrt(), S.sqrt()[:, None] * Vh)
    # measured, and not the sum of the values left out, which the top of a spectrum does not know
    return _Part(product, total, float((delta - product.left @ product.right).double().square().sum()))


def _stacked(layer: LayerUpdate) -> _Product | None:
    """Return the factors of a layer's terms side by side, or None where they would be as wide as dW itself."""
    if not all(term.method.additive for term in layer.terms):
        return None
    products = [_factored(term) for term in layer.terms]
    product = products[0]
    if len(products) > 1:
        product = _Product(torch.cat([p.left for p in products], dim=1), torch.cat([p.right for p in products], dim=0))
    if product.left.shape[1] == 0:
        return _Product(torch.zeros(layer.shape[0], 1), torch.zeros(1, layer.shape[1]))
    # from there on the factors hold more numbers than dW does, and their Gram matrices are no smaller than its own
    return product if product.left.shape[1] < min(layer.shape) else None


def _factored(term: Term) -> _Product:
    """Return the factors of one term, without what a diagonal core has at zero."""
    f = term.method.factors(term.tensors())
    left, right, scale = f.core.transposed(f.left), f.right, f.scale * term.weight
    left = left if scale == 1.0 else left * scale
    # AdaLoRA's pruned triplets, and SVF's values that did not move: they would only widen what is truncated
    if isinstance(f.core, Diagonal):
        kept = f.core.values != 0
        left, right = left[:, kept], right[kept]
    return _Product(left, right)


def _as_product(delta: Tensor) -> _Product:
    """Return a dense update as a product with an identity matrix, or as one of width 1 where it is zero."""
    out_features, in_features = delta.shape
    if not delta.any():
        return _Product(torch.zeros(out_features, 1), torch.zeros(1, in_features))
    return (
        _Product(delta, torch.eye(in_features))
        if in_features <= out_features
        else _Product(torch.eye(out_features), delta)
    )


def _squared_norm(product: _Product) -> float:
    left, right = product.left.double(), product.right.double()
    # ||L R||^2 = <L^T L, R R^T>: p x p, where dW would be out x in
    return float(((left.mT @ left) * (right @ right.mT)).sum())


def _lora_layer(layer: LayerUpdate, product: _Product) -> LayerUpdate:
    return replace(layer, terms=(lora_term(product.left, product.right),))


def errors_by_rank(adapter: Contents) -> dict[int, float]:
    """Return the relative error of the best LoRA of each rank: 1, 2, 4, ..., the least that is not `LOSSY`, and all."""
    adapter.complete()
    heads = _heads(adapter)
    layers = [_squared_values(layer, adapter, name) for name, layer in adapter.layers.items() if name not in heads]
    most = max((len(values) for values in layers), default=1)
    lost = torch.zeros(most + 1, dtype=torch.float64)  # by rank
    for values in layers:
        # what rank r leaves is all that comes behind the r-th, summed from the smallest up, or the small ones would
        # round away
        tails = values.flip(0).cumsum(0).flip(0)
        lost[: len(tails)] += tails
    errors = (lost / lost[0]).sqrt() if lost[0] > 0 else lost
    ranks = {2**i for i in range(most.bit_length())} | {int((errors > LOSSY).sum()), most}
    return {rank: float(errors[rank]) for rank in sorted(ranks) if rank > 0}


def _squared_values(layer: LayerUpdate, adapter: Contents, name: str) -> Tensor:
    """Return the squared singular values of a layer's dW, descending, in float64."""
    product = _stacked(layer)
    if product is None:
        return singular_values(adapter.delta(name)).double().square()
    # the triangular factors have the singular values of the product, and are as small as it is thin
    left, right = (torch.linalg.qr(part.double())[1] for part in (product.left, product.right.mT))
    return torch.linalg.svdvals(left @ right.mT).square()
