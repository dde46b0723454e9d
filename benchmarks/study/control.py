"""Is it PiSSA's directions or its scale?  PiSSA along random directions, at its own singular values, on a grid.

    python benchmarks/study/control.py            what has no line yet, then the table

PiSSA's B0 and A0 make its first gradients as large as W's largest singular values are; LoRA's B is zero at the start.
The control has B0 = Q sqrt(S_r / s) and A0 = sqrt(S_r / s) P^T with PiSSA's S_r, and random orthonormal Q and P in the
place of its singular vectors; the product is taken off W as PiSSA's is, so that training starts from W.  It shares with
PiSSA the magnitude of the update (cf. arXiv 2507.06558), and lacks its directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from grid import GRID, PLANS, data_of, fill, lines
from regret import Surface, surfaces
from torch import Tensor

from spectune.methods.pissa import PiSSA
from spectune.methods.registry import METHODS
from spectune.spectral import SVD

TASK = "question-types"
FOUND = GRID / "control.jsonl"
CONTROL = "matched_lora:rank=16"
COMPARED = ("lora:rank=16", "pissa:rank=16")


@dataclass(frozen=True)
class MatchedLoRA(PiSSA):
    """PiSSA's singular values along random orthonormal directions, the same ones for every layer of a shape."""

    name: ClassVar[str] = "matched_lora"
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = "W + s (B A - B0 A0) from random directions; B and A train"

    def basis(self, weight: Tensor, decomposition: SVD) -> dict[str, Tensor]:
        S = decomposition.S
        root = (S / self.scale).sqrt()
        draw = torch.Generator().manual_seed(sum(weight.shape))
        Q, P = (
            torch.linalg.qr(torch.randn(size, len(S), generator=draw))[0].to(S.device, S.dtype) for size in weight.shape
        )
        return {"A0": root[:, None] * P.T, "B0": Q * root}


def said(grids: dict[str, Surface]) -> list[str]:
    """Return a row for each method, at its best rate."""
    rows = []
    for method, surface in grids.items():
        place = max(surface.truth, key=lambda at: surface.truth[at])
        rows.append(f"{method}: {100 * surface.truth[place]:.1f} at place {place} of its ladder")
    return rows


def main() -> None:
    """Fill the control's grid, and print it beside LoRA's and PiSSA's."""
    METHODS[MatchedLoRA.name] = MatchedLoRA
    try:
        plan = PLANS[TASK]
        fill(TASK, plan, [CONTROL], data_of(plan), FOUND)
    finally:
        del METHODS[MatchedLoRA.name]  # for whoever imports this
    grids = surfaces(plan, [*lines(FOUND), *lines(GRID / f"{TASK}.jsonl")])
    print("\n".join(said({method: grids[method] for method in (CONTROL, *COMPARED) if method in grids})))
    if CONTROL in grids and COMPARED[1] in grids:
        ours, theirs = (max(grids[method].truth.values()) for method in (CONTROL, COMPARED[1]))
        print(f"PiSSA - control, each at its best rate: {100 * (theirs - ours):+.1f} points")


if __name__ == "__main__":
    main()
