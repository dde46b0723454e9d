"""The picture of a run: loss against steps."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from spectune.storage import write_atomically


def plot_curve(
    history: Sequence[Mapping[str, object]],
    path: Path,
    title: str,
    unit: str = "token",
    shown: Sequence[str] = (),
    measure: str = "loss",
) -> None:
    """Draw the loss, or another measure, in training and held out as a PNG, and other held-out measures beside it.

    Args:
        history: lines with `step` and the measure, or the measure behind `eval_`.
        path: the picture.
        title: above it.
        unit: what the measure is a mean over.
        shown: measures of evaluations.
        measure: the one to draw.
    """
    from matplotlib.figure import Figure  # a run that fails before its end does without

    figure = Figure(figsize=(11 if shown else 7, 3.6), dpi=120, layout="constrained")
    axes, *beside = figure.subplots(1, 2 if shown else 1, squeeze=False)[0]
    for key, label, style in ((measure, "training", "-"), (f"eval_{measure}", "held out", "o--")):
        points = [(line["step"], line[key]) for line in history if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set_ylabel(f"{spoken(measure)} a {unit}")
    axes.set_title(title, fontsize=10, parse_math=False)
    for name in shown:
        points = [(line["step"], line[f"eval_{name}"]) for line in history if f"eval_{name}" in line]
        beside[0].plot(*zip(*points, strict=True) if points else ([], []), "o--", label=f"held out: {spoken(name)}")
    for each in (axes, *beside):
        each.set_xlabel("step")
        each.grid(alpha=0.3)
        each.legend()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a folder's name, in the script of another language
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def spoken(measure: str) -> str:
    """Return the name of a measure as it is said."""
    return measure.replace("_", " ")
