"""Adapters as low-rank factors: stacked exactly, or truncated to the best of a given rank."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import torch
from torch import Tensor

from spectune.adapters.adapter import Adapter, LayerUpdate, lora_term
from spectune.errors import SpectuneError
from spectune.methods.adalora import AdaLoRA
from spectune.spectral import svd


def to_lora(adapter: Adapter, rank: int | None) -> Adapter:
    """See `Adapter.to_lora`."""
    if rank is not None:
        return compress(adapter, rank)
    layers = {}
    for name in adapter.layers:
        factors = _stacked(adapter, name) or _dense_factors(adapter, name, None)
        layers[name] = _lora_layer(adapter.layers[name], *factors)
    return Adapter(layers, adapter.base_model)


def compress(adapter: Adapter, rank: int) -> Adapter:
    """See `Adapter.compress`.

    With dW = L R, L = Q_l T_l and R^T = Q_r T_r by QR, the singular values of dW are those of T_l T_r^T, a matrix
    of the stacked rank.  Layers of equal shapes are done at once.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise SpectuneError(f"rank must be an integer >= 1, not {rank!r}")
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    alike: defaultdict[tuple[int, int, int], list[str]] = defaultdict(list)
    total = lost = 0.0
    for name in adapter.layers:
        stacked = _stacked(adapter, name)
        if stacked is None:
            factors[name] = _dense_factors(adapter, name, rank)
            exact = adapter.delta(name)
            total += float(exact.double().square().sum())
            lost += float((exact - factors[name][0] @ factors[name][1]).double().square().sum())
        else:
            factors[name] = stacked
            if stacked[0].shape[1] > rank:
                alike[stacked[0].shape[0], stacked[1].shape[1], stacked[0].shape[1]].append(name)
            else:
                total += float(((stacked[0].mT @ stacked[0]) * (stacked[1] @ stacked[1].mT)).double().sum())
    for names in alike.values():
        left, right, S = _truncate(
            torch.stack([factors[n][0] for n in names]), torch.stack([factors[n][1] for n in names]), rank
        )
        squares = S.double().square()
        total += float(squares.sum())
        lost += float(squares[:, rank:].sum())
        factors.update({n: (left[i], right[i]) for i, n in enumerate(names)})
    layers = {n: _lora_layer(adapter.layers[n], *factors[n]) for n in adapter.layers}
    return Adapter(layers, adapter.base_model, error=(lost / total) ** 0.5 if total else 0.0)


def _truncate(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best L, R of this rank for the batch of products left @ right, and all singular values."""
    q_left, t_left = torch.linalg.qr(left)
    q_right, t_right = torch.linalg.qr(right.mT)
    U, S, Vh = torch.linalg.svd(t_left @ t_right.mT)
    root = S[:, :rank].sqrt()
    return q_left @ (U[..., :rank] * root[:, None]), (root[..., None] * Vh[:, :rank]) @ q_right.mT, S


def _stacked(adapter: Adapter, name: str) -> tuple[Tensor, Tensor] | None:
    """Return L (out x p) and R (p x in) with dW = L R, or None where p would reach min(out, in)."""
    terms = adapter.complete(name).terms
    if not all(t.method.additive for t in terms):
        return None
    lefts, rights = [], []
    for term in terms:
        tensors = term.tensors()
        f = term.method.factors(tensors)
        if f.left.shape[1] >= min(adapter.layers[name].shape):
            return None
        left, right = f.core.transposed(f.left) * (f.scale * term.weight), f.right
        if isinstance(term.method, AdaLoRA):
            kept = tensors["E"] != 0
            left, right = left[:, kept], right[kept]
        lefts.append(left)
        rights.append(right)
    left, right = torch.cat(lefts, dim=1), torch.cat(rights, dim=0)
    return (left, right) if 0 < left.shape[1] < min(adapter.layers[name].shape) else None


def _dense_factors(adapter: Adapter, name: str, rank: int | None) -> tuple[Tensor, Tensor]:
    """Return the factors of the dense update, of full rank or of the best rank."""
    delta = adapter.delta(name)
    smaller = min(delta.shape)
    if rank is None or rank >= smaller:
        eye = torch.eye(smaller)
        return (delta, eye) if delta.shape[1] == smaller else (eye, delta)
    U, S, Vh = svd(delta, rank, "top", tol=1e-6)
    return U * S.sqrt(), S.sqrt()[:, None] * Vh


def _lora_layer(layer: LayerUpdate, left: Tensor, right: Tensor) -> LayerUpdate:
    return replace(layer, terms=(lora_term(left, right),), update_sketch=None)
