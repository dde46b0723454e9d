"""Decompositions against `torch.linalg.svd` on the card: time, and what certificates say of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gpu.part import Part, Place
from spectune.spectral import certificate, one_sided, svd

HEAD = 1 / 16  # of the triplets make the power-law head of a weight
RANKS = ("top", 16), ("top", 128), ("bottom", 16), ("bottom", 128)
THEIRS = "torch.linalg.svd"


def measure(part: Part) -> None:
    """Fill the rows of the part."""
    place = part.place
    sizes = place.of([(4096, 4096), (14336, 4096)], [(60, 60), (90, 60)])
    for out, into in sizes:
        for which, rank in RANKS:
            rank = place.of(rank, rank // 8)
            part.row(
                f"{out}x{into} {which} {rank}",
                lambda size=(out, into), which=which, rank=rank: ends(place, size, which, rank),
                needs=place.of(3.0, 0.0),
            )
        part.row(f"{out}x{into} one-sided", lambda size=(out, into): sided(place, size), needs=place.of(4.0, 0.0))
        part.row(f"{out}x{into} full", lambda size=(out, into): full(place, size), needs=place.of(4.0, 0.0))
    for out, into in sizes:  # last, for they may take longer than the rest together
        part.row(f"{out}x{into} {THEIRS}", lambda size=(out, into): theirs(place, size), needs=place.of(5.0, 0.0))


@lru_cache(maxsize=2)
def weight(place: Place, m: int, n: int) -> Tensor:
    """Return a power-law head on a Marchenko-Pastur bulk (m x n), the bulk's edge at about 2."""
    torch.manual_seed(0)
    head = max(1, int(HEAD * min(m, n)))
    W = torch.randn(m, n, device=place.device) / math.sqrt(max(m, n))
    U, V = (torch.linalg.qr(torch.randn(k, head, device=place.device))[0] for k in (m, n))
    return W + (U * (12 * torch.arange(1, head + 1, device=place.device) ** -0.6)) @ V.T


def least(place: Place, run: Callable[[], Any]) -> float:
    """Return the seconds of the faster of two runs, the first of which may load libraries."""
    return round(min(place.seconds(run) for _ in range(2)), 4)


def ends(place: Place, size: tuple[int, int], which: Any, rank: int) -> dict[str, Any]:
    """Return the time and the certificate of one end of the spectrum."""
    W = weight(place, *size)
    took = least(place, lambda: svd(W, rank, which))
    told = certificate(W, svd(W, rank, which), which)
    met = told.met()
    return {
        "ok": met != "neither" and told.orthogonality < 1e-4,
        "s": took,
        "met": met,
        "worst_residual": float(f"{told.residual:.2e}"),
        "excess": float(f"{told.excess:.2e}"),
        "orthogonality": float(f"{told.orthogonality:.2e}"),
    }


def full(place: Place, size: tuple[int, int]) -> dict[str, Any]:
    """Return the time of all triplets, how far U S V^T is from W, and U and V from orthonormal."""
    W = weight(place, *size)
    took = least(place, lambda: svd(W))
    told = certificate(W, svd(W))
    ok = told.error < 1e-5 and told.orthogonality < 1e-4
    return {
        "ok": ok,
        "s": took,
        "lost": float(f"{told.error:.2e}"),
        "orthogonality": float(f"{told.orthogonality:.2e}"),
    }


def sided(place: Place, size: tuple[int, int]) -> dict[str, Any]:
    """Return the time of W = L R, how far L R is from W, and the orthonormal factor from that."""
    W = weight(place, *size)
    took = least(place, lambda: one_sided(W))
    L, R, _ = one_sided(W)
    rows = R if W.shape[0] >= W.shape[1] else L.mT
    off = float((rows.double() @ rows.double().mT - torch.eye(len(rows), device=W.device)).abs().max())
    lost = float((L.double() @ R.double() - W.double()).norm() / W.double().norm())
    ok = off < 1e-5 and lost < 1e-5
    return {"ok": ok, "s": took, "lost": float(f"{lost:.2e}"), "orthogonality": float(f"{off:.2e}")}


def theirs(place: Place, size: tuple[int, int]) -> dict[str, Any]:
    """Return the time of torch.linalg.svd, and how far its singular values are from ours, as a part of the largest."""
    W, found = weight(place, *size), []
    took = place.seconds(lambda: found.append(torch.linalg.svd(W, full_matrices=False)[1]))
    off = float((one_sided(W).S - found[0]).abs().max() / found[0][0])
    return {"ok": off < 1e-4, "s": round(took, 4), "largest_difference": float(f"{off:.2e}")}


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Return what is shown of the part."""
    lines = []
    for name, row in rows.items():
        size, _, what = name.partition(" ")
        if "s" in row and what != THEIRS:
            other = rows.get(f"{size} {THEIRS}", {}).get("s")
            faster = f"{other / row['s']:.1f} x as fast as {THEIRS}" if other else ""
            lines.append(f"{name:24s} {row['s']:8.3f} s  {row.get('met', ''):8s} {faster}")
    return lines
