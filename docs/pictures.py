"""Draw the pictures of docs/methods: each method's matrices, what is frozen in grey and what trains in colour.

python docs/pictures.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams |= {
    "svg.hashsalt": "spectune",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
}

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import Circle, Polygon, Rectangle  # noqa: E402

FOLDER = Path(__file__).parent / "images" / "methods"
FROZEN, TRAINED, INK = "#a9b1ba", "#f08a3c", "#808890"  # readable on white and on near-black
OUT, IN, RANK = 2.6, 1.9, 0.5  # a tall W, k = in

Item = tuple[Any, ...]  # ("+",) or (label, height, width, trained, kind)


def box(label: str, height: float, width: float, trained: bool = False, kind: str = "full") -> Item:
    return label, height, width, trained, kind


W, B, A = box("W", OUT, IN), box("B", OUT, RANK, True), box("A", RANK, IN, True)
B0, A0 = box("B₀", OUT, RANK), box("A₀", RANK, IN)
RESIDUAL = [W, ("+ s (",), B, A, ("\u2212",), B0, A0, (")",)]

# the matrices, and the part of the spectrum of W that they come from
PICTURES: dict[str, tuple[Sequence[Item], str]] = {
    "lora": ([W, ("+ s",), B, A], "none"),
    "svf": ([box("U", OUT, IN), box("S z", IN, IN, True, "diagonal"), box("Vᵀ", IN, IN)], "all"),
    "svft": ([box("U", OUT, IN), box("S + M", IN, IN, True, "band"), box("Vᵀ", IN, IN)], "all"),
    "pissa": (RESIDUAL, "top"),
    "milora": (RESIDUAL, "bottom"),
    "lora_xs": (
        [W, ("+ s",), box("Uᵣ", OUT, RANK), box("R", RANK, RANK, True), box("SᵣVᵣᵀ", RANK, IN)],
        "top",
    ),
    "dora": ([box("m", OUT, 0.22, True), ("⊙",), ("(",), W, ("+ s",), B, A, (")  /  row norm",)], "none"),
    "adalora": (
        [W, ("+ s",), box("P", OUT, 0.75, True), box("E", 0.75, 0.75, True, "pruned"), box("Q", 0.75, IN, True)],
        "none",
    ),
    "vera": (
        [
            W,
            ("+",),
            box("b", OUT, OUT, True, "diagonal"),
            box("B", OUT, 0.9),
            box("d", 0.9, 0.9, True, "diagonal"),
            box("A", 0.9, IN),
        ],
        "none",
    ),
}
BARS = 16


def draw(name: str) -> None:
    """Draw one method's picture."""
    items, part = PICTURES[name]
    figure, axes = plt.subplots(figsize=(7.2, 2.5))
    x = 0.0
    for item in items:
        x += (_sign if len(item) == 1 else _matrix)(axes, x, *item) + 0.16
    if part != "none":
        x = _spectrum(axes, x + 0.4, part)
    axes.set_xlim(-0.1, max(x, 8.6))
    axes.set_ylim(-0.75, OUT + 0.1)
    axes.set_aspect("equal")
    axes.axis("off")
    FOLDER.mkdir(parents=True, exist_ok=True)
    figure.savefig(FOLDER / f"{name}.svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def _sign(axes: Any, x: float, text: str) -> float:
    width = 0.14 * len(text) + 0.1
    axes.text(x + width / 2, OUT / 2, text, ha="center", va="center", color=INK, fontsize=13)
    return width


def _matrix(axes: Any, x: float, label: str, height: float, width: float, trained: bool, kind: str) -> float:
    y = (OUT - height) / 2
    colour = TRAINED if trained else FROZEN
    filled = kind == "full"
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour if filled else "none", edgecolor=INK, lw=1))
    if kind in ("diagonal", "band"):
        reach = 0.07 * height if kind == "diagonal" else 0.2 * height
        corners = [(0, height), (reach, height), (width, reach), (width, 0), (width - reach, 0), (0, height - reach)]
        axes.add_patch(Polygon([(x + a, y + b) for a, b in corners], facecolor=TRAINED, edgecolor="none"))
    if kind == "pruned":
        for i in range(5):
            centre = (x + width * (i + 0.5) / 5, y + height * (1 - (i + 0.5) / 5))
            kept = i not in (1, 4)
            axes.add_patch(Circle(centre, 0.06, facecolor=TRAINED if kept else "none", edgecolor=TRAINED, lw=1))
    axes.text(x + width / 2, y - 0.12, label, ha="center", va="top", color=INK)
    return width


def _spectrum(axes: Any, x: float, part: str) -> float:
    """Draw the singular values, coloured where the factors come from."""
    used = {"all": range(BARS), "top": range(4), "bottom": range(BARS - 4, BARS)}[part]
    for i in range(BARS):
        height = 1.9 / (1 + 0.35 * i) + 0.12
        colour = TRAINED if i in used else FROZEN
        axes.add_patch(Rectangle((x + 0.12 * i, 0.35), 0.09, height, facecolor=colour, edgecolor="none"))
    words = {"all": "all singular values", "top": "from the largest", "bottom": "from the smallest"}[part]
    axes.text(x + 0.06 * BARS, 0.2, words, ha="center", va="top", color=INK)
    return x + 0.12 * BARS + 0.2


def main() -> None:
    for name in PICTURES:
        draw(name)


if __name__ == "__main__":
    main()
