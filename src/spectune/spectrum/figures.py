"""The pictures of a checkpoint's spectrum, for the page (SVG) and as one PNG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from spectune.pages.pictures import as_file, faint_grid, plain_logs
from spectune.spectrum.measures import curve
from spectune.spectrum.model import Compared, Document, MatrixRow, MovedRow, Row

DEPTH = LinearSegmentedColormap.from_list("depth", ["#2d7fd3", "#7f68d6", "#c9569b", "#e2733b"])  # on white and black
BAND, FIRST, SECOND = "#2f9e6e", "#2d7fd3", "#e2733b"
R = TypeVar("R", bound=Row)
Other = tuple[Document | Compared, Mapping[str, np.ndarray]]  # what is drawn beside a document, and its values
Bounds = tuple[float | None, float | None]


def draw_spectra(
    axes: Axes,
    rows: Sequence[MatrixRow],
    values: Mapping[str, np.ndarray],
    band: Sequence[float],
    limits: tuple[float, float],
) -> None:
    """Draw singular values against their rank, a line a layer, a dot where each leaves the bulk."""
    layers = [row.layer or 0 for row in rows]
    norm = Normalize(min(layers), max(max(layers), min(layers) + 1))
    axes.axhspan(*band, color=BAND, alpha=0.16, lw=0)
    for row in rows[:: max(1, len(rows) // 128)]:
        color = DEPTH(norm(row.layer or 0))
        ranks, S = curve(values[row.name])
        axes.plot(ranks, np.maximum(S, 1e-6), color=color, lw=0.9, alpha=0.85)
        if row.outliers:
            axes.plot(row.outliers, values[row.name][row.outliers - 1], "o", color=color, ms=2.6, mew=0)
    title = f"{rows[0].kind}  {rows[0].shape[0]} x {rows[0].shape[1]}"
    axes.set(xscale="log", yscale="log", ylim=limits, title=title)
    plain_logs(axes)
    faint_grid(axes)


def common_limits(document: Document, held: Sequence[Mapping[str, np.ndarray]]) -> tuple[float, float]:
    """Return the least and the greatest value to draw: the range, and all but the smallest thousandth of the values."""
    pooled = np.concatenate([values for one in held for values in one.values()])
    low, high = document.range
    return max(1e-8, min(low, float(np.quantile(pooled, 0.001)))) / 1.2, max(high, float(pooled.max())) * 1.2


def draw_distribution(
    figure: Figure | SubFigure, document: Document, values: Mapping[str, np.ndarray], other: Other | None
) -> None:
    """Draw the distribution of all values, and quantiles for each kind, over one axis."""
    low, high = document.range
    kinds = document.kinds
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1.1, 0.25 + 0.17 * len(kinds)])
    sides = [(document, values, FIRST)] + ([(*other, SECOND)] if other else [])
    limits = common_limits(document, [held for _, held, _ in sides])
    edges = np.linspace(math.log10(limits[0]), math.log10(limits[1]), 90)
    for about, held, color in sides:
        pooled = np.concatenate(list(held.values()))
        logs = np.log10(pooled[pooled >= limits[0]])
        weights = np.full(len(logs), 100 / len(pooled))
        style: dict[str, object] = (
            {"histtype": "stepfilled", "alpha": 0.75} if about is document else {"histtype": "step"}
        )
        above.hist(logs, edges, weights=weights, color=color, label=about.label, lw=1.6, **style)
    share = document.summary.share
    for axes in (above, below):
        axes.axvspan(np.log10(low), np.log10(high), color=BAND, alpha=0.16, lw=0)
        faint_grid(axes)
    above.set(
        ylabel="% of values", title=f"{document.label}: {share:.1%} of the singular values in {low:g} to {high:g}"
    )
    if other:
        above.legend(frameon=False, fontsize=8)
    for (about, _, color), offset in zip(sides, ((0.0,), (0.16, -0.16))[len(sides) - 1], strict=True):
        at = {kind.kind: kind.quantiles for kind in about.kinds}
        for i, kind in enumerate(kinds):
            if kind.kind in at:
                q = np.log10(np.clip(at[kind.kind], *limits))
                below.plot([q[0], q[4]], [i - offset] * 2, color=color, lw=1.4)
                below.plot([q[1], q[3]], [i - offset] * 2, color=color, lw=5, solid_capstyle="butt")
                below.plot(q[2], i - offset, "|", color=mpl.rcParams["text.color"], ms=9)
    below.set_yticks(range(len(kinds)), [kind.kind for kind in kinds])
    below.set(
        ylim=(len(kinds) - 0.4, -0.6), xlabel="singular value   (line: middle 99%, bar: middle half, tick: median)"
    )
    below.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{10**v:g}"))
    below.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_map(
    figure: Figure | SubFigure,
    rows: Sequence[R],
    key: Callable[[R], float | None],
    title: str,
    form: str,
    bounds: Bounds = (None, None),
) -> None:
    """Draw a figure of each matrix as colour, kinds against layers; experts by their mean."""
    kinds = list(dict.fromkeys(row.kind for row in rows))
    layers = sorted({row.layer for row in rows}, key=_last_if_none)
    cells: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        if (value := key(row)) is not None:
            cells.setdefault((kinds.index(row.kind), layers.index(row.layer)), []).append(value)
    grid = np.full((len(kinds), len(layers)), np.nan)
    for cell, found in cells.items():
        grid[cell] = np.mean(found)
    axes = figure.subplots()
    low, high = bounds
    if high is None and low is not None and not (grid > low).any():  # or the scale would go below what there can be
        high = low + 1
    shown = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
    axes.set_yticks(range(len(kinds)), kinds)
    step = max(1, len(layers) // 8)
    axes.set_xticks(range(0, len(layers), step), ["-" if layer is None else str(layer) for layer in layers[::step]])
    axes.set(xlabel="layer", title=title)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(shown, ax=axes, format=FuncFormatter(lambda v, _: format(v, form)), pad=0.02)
    bar.outline.set_visible(False)


def _last_if_none(layer: int | None) -> float:
    return math.inf if layer is None else layer


def draw_shift(figure: Figure | SubFigure, rows: Sequence[MovedRow]) -> None:
    """Draw the mean change of each tenth of the spectrum, a line a kind."""
    axes = figure.subplots()
    kinds = list(dict.fromkeys(row.kind for row in rows))
    for i, kind in enumerate(kinds):
        mean = np.mean([row.shift for row in rows if row.kind == kind], axis=0)
        axes.plot(np.arange(len(mean)) * 10 + 5, 100 * mean, "o-", ms=3, lw=1.3, label=kind,
                  color=DEPTH(i / max(1, len(kinds) - 1)))  # fmt: skip
    axes.axhline(0, color=mpl.rcParams["text.color"], lw=0.6)
    axes.set(xlabel="place in the spectrum, % from the top", ylabel="change of the values, %")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    faint_grid(axes)


def depth_bar(figure: Figure | SubFigure, axes: Any, layers: Sequence[int]) -> None:
    """Draw which colour is which layer."""
    bar = figure.colorbar(ScalarMappable(Normalize(min(layers), max(layers)), DEPTH), ax=axes, pad=0.01, aspect=40)
    bar.set_label("layer")
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))


def by_kind(document: Document) -> list[list[MatrixRow]]:
    """Return the document's matrices in lists of one kind."""
    return [[row for row in document.matrices if row.kind == kind.kind] for kind in document.kinds]


def write_png(document: Document, values: Mapping[str, np.ndarray], path: Path, other: Other | None = None) -> None:
    """Write the distribution and the spectra of every kind as one picture."""
    groups = by_kind(document)
    columns = min(4, len(groups))
    lines = -(-len(groups) // columns)
    limits = common_limits(document, [values])

    def draw(figure: Figure) -> None:
        parts: Any = figure.subfigures(2, 1, height_ratios=[3.4 + 0.1 * len(groups), 2.6 * lines])
        upper, lower = parts
        draw_distribution(upper, document, values, other)
        lower.supxlabel("rank")
        grid = lower.subplots(lines, columns, squeeze=False, sharey=True)
        for axes, rows in zip(grid.flat, groups, strict=False):
            draw_spectra(axes, rows, values, document.range, limits)
        for axes in grid.flat[len(groups) :]:
            axes.set_axis_off()
        layers = [row.layer or 0 for row in document.matrices]
        if len(set(layers)) > 1:
            depth_bar(lower, grid, layers)

    as_file(draw, (11, 3.4 + 0.1 * len(groups) + 2.6 * lines), path)
