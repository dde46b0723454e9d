"""The picture of a run: loss against steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spectune.adapters.files import write_atomically


def plot_curve(history: Sequence[Mapping[str, Any]], path: Path, title: str, unit: str = "token") -> None:
    """Draw training and held-out loss of logged lines as a PNG.

    Args:
        history: lines with `step` and `loss` or `eval_loss`.
        path: the picture.
        title: above it.
        unit: what the loss is a mean over.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o--")):
        points = [(line["step"], line[key]) for line in history if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss a {unit}")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
