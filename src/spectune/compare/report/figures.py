"""The pictures of a comparison: what the metric costs, how the loss falls, which learning rates were tried."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from spectune.compare.report.model import Document, Mean, MethodRow
from spectune.compare.report.verdict import few
from spectune.pages.pictures import as_file, faint_grid
from spectune.training.curve import spoken

Spot = tuple[str, float, float, str]  # a name, where its point is, and its colour
Line = tuple[tuple[float, float], tuple[float, float]]  # its ends
# read on white and on black
HUES = ("#2d7fd3", "#e2733b", "#2f9e6e", "#c9569b", "#7f68d6", "#b08a1e", "#1f9aa8", "#d1495b")
DASHES: tuple[object, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)))
MARKERS = ("o", "s", "D")


class Cost(NamedTuple):
    """What the metric is drawn against.

    Args:
        key: of a row; a mean where it has an interval.
        label: of the axis.
        log: whether the axis is logarithmic.
        scale: factor from the row's unit to the axis's.
    """

    key: str
    label: str
    log: bool = False
    scale: float = 1.0

    def of(self, row: MethodRow) -> Any:
        """Return a row's value in the unit of the axis, None where it has none."""
        value = getattr(row, self.key)
        value = value.mean if isinstance(value, Mean) else value
        return None if value is None or (self.log and value <= 0) else value * self.scale


COSTS = (
    Cost("trainable_parameters", "trained parameters", log=True),
    Cost("step_seconds", "time of a step, ms", scale=1e3),
    Cost("peak_bytes", "peak memory above the base, MB", scale=1e-6),
    Cost("forgetting", "forgetting"),
)


def styles(document: Document) -> dict[str, tuple[str, object, str]]:
    """Return colour, dashes and marker of each method, the same in every picture."""
    found = {}
    for i, row in enumerate(document.methods):
        turn = i // len(HUES) % len(DASHES)
        found[row.method] = (HUES[i % len(HUES)], DASHES[turn], MARKERS[turn])
    return found


def drawn(document: Document, cost: Cost) -> list[MethodRow]:
    """Return the rows that have a place in a picture of the metric against a cost."""
    return [r for r in document.methods if r.ran and r.trainable_parameters and cost.of(r) is not None]


def front(rows: Sequence[MethodRow], cost: Cost, greater_is_better: bool) -> list[MethodRow]:
    """Return the rows that none beats in the metric at the same cost or less, the cheapest first."""
    sign, kept = (1 if greater_is_better else -1), []
    for row in sorted(rows, key=lambda row: (cost.of(row), -sign * row.value.mean)):
        if not kept or sign * row.value.mean > sign * kept[-1].value.mean:
            kept.append(row)
    return kept


def draw_pareto(figure: Figure, document: Document, costs: Sequence[Cost]) -> None:
    """Draw the metric with its intervals against costs, the front as a line; who is far off is put at the border."""
    panels = figure.subplots(-(-len(costs) // 2), min(2, len(costs)), squeeze=False).flat
    found = [(axes, *_pareto(axes, document, cost)) for axes, cost in zip(panels, costs, strict=False)]
    for axes in panels[len(costs) :]:
        axes.set_axis_off()
    figure.draw_without_rendering()
    for axes, spots, lines in found:
        _put_labels(axes, spots, lines)
    figure.set_layout_engine("none")  # the names are where the axes are now


def _pareto(axes: Axes, document: Document, cost: Cost) -> tuple[list[Spot], list[Line]]:
    rows = drawn(document, cost)
    factor = 100 if document.percent else 1
    ink, look = mpl.rcParams["text.color"], styles(document)
    low, high = _limits(document, rows, factor)
    axes.set(
        xlabel=cost.label, ylabel=_metric_label(document), ylim=(low, high), xscale="log" if cost.log else "linear"
    )
    best = front(rows, cost, document.greater_is_better)
    steps = [(cost.of(row), np.clip(factor * row.value.mean, low, high)) for row in best]
    axes.plot(*zip(*steps, strict=True), color=ink, lw=1, alpha=0.45, drawstyle="steps-post", zorder=1)
    spots: list[Spot] = []
    lines: list[Line] = []
    for (x, y), (next_x, next_y) in itertools.pairwise(steps):
        lines += [((x, y), (next_x, y)), ((next_x, y), (next_x, next_y))]
    for row in rows:
        value, x = factor * row.value.mean, cost.of(row)
        color, _, marker = look[row.method]
        inside = low <= value <= high
        if inside and row.value.ends is not None:
            ends = [factor * end for end in row.value.ends]
            axes.plot([x, x], ends, color=color, lw=1.2, alpha=0.6, zorder=2)
            lines.append(((x, ends[0]), (x, ends[1])))
        shape = marker if inside else "v" if value < low else "^"
        face, size = (color, 6.5) if row in best else ("none", 5.5)
        axes.plot(x, np.clip(value, low, high), shape, color=color, mfc=face, ms=size, clip_on=False)
        text = row.label if inside else f"{row.label} ({value:.3g})"
        spots.append((text, x, float(np.clip(value, low, high)), color))
    base = next((r for r in document.methods if r.method == "base" and r.ran and r not in rows), None)
    if base is not None and low <= factor * base.value.mean <= high:
        y = factor * base.value.mean
        axes.axhline(y, color=ink, lw=0.8, ls=":", alpha=0.7)
        axes.annotate("base", (1, y), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    axes.margins(x=0.12)
    if cost.log:
        axes.xaxis.set_major_locator(LogLocator(10))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: few(v)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    faint_grid(axes)
    return spots, lines


def _limits(document: Document, rows: Sequence[MethodRow], factor: float) -> tuple[float, float]:
    """Return the range of the metric to draw: without those that are far worse than the better half."""
    sign = 1 if document.greater_is_better else -1
    values = sign * factor * np.array([row.value.mean for row in rows])
    best, middle = values.max(), np.median(values)
    floor = middle - 3 * max(best - middle, 1e-3 * abs(best))
    kept = values[values >= floor]
    ends = [(sign * factor * end, row.value.mean) for row in rows for end in row.value.ends or ()]
    span = max(best - kept.min(), 1e-3 * abs(best), 1e-6)
    room = [value for value, mean in ends if sign * factor * mean >= floor]
    low = max(min([kept.min(), *room]), kept.min() - 0.6 * span) - 0.08 * span
    high = min(max([best, *room]), best + 0.6 * span) + 0.08 * span
    return (low, high) if sign > 0 else (-high, -low)


def _put_labels(axes: Axes, spots: Sequence[Spot], lines: Sequence[Line]) -> None:
    """Write each name where it covers least, trying places around its point; a thin line leads to one far away."""
    frame, unit = axes.get_window_extent(), axes.figure.dpi / 72
    points = [axes.transData.transform((x, y)) for _, x, y, _ in spots]
    taken = [np.array([px - 4 * unit, py - 4 * unit, px + 4 * unit, py + 4 * unit]) for px, py in points]
    for line in lines:
        ends = axes.transData.transform(line)
        taken.append(np.array([*ends.min(0) - 1.5 * unit, *ends.max(0) + 1.5 * unit]))
    places = [
        (dx * reach, dy * reach)
        for reach in (7, 13, 20, 30, 42)
        for dx, dy in ((1, 0.35), (-1, 0.35), (1, -0.9), (-1, -0.9), (0, 1), (0, -1.4), (1, 1), (-1, 1))
    ]
    for (text, x, y, color), (px, py) in sorted(zip(spots, points, strict=True), key=lambda pair: -pair[1][1]):
        note = axes.annotate(text, (x, y), fontsize=8, color=mpl.rcParams["text.color"], annotation_clip=False)
        box = note.get_window_extent()
        width, height = box.width, box.height
        best, cost = None, np.inf
        for dx, dy in places:
            align = 0 if dx > 0 else width if dx < 0 else width / 2
            left, bottom = px + dx * unit - align, py + dy * unit - height * (0.3 if dy < 0 or dx else 0)
            spot = np.array([left, bottom, left + width, bottom + height])
            outside = max(0, frame.x0 - left) + max(0, left + width - frame.x1 - 8 * unit)
            outside += max(0, frame.y0 - bottom) + max(0, bottom + height - frame.y1)
            total = sum(_overlap(spot, other) for other in taken) + 40 * outside + 0.6 * unit * np.hypot(dx, dy)
            if total < cost:
                best, cost, reach = spot, total, np.hypot(dx, dy)
        assert best is not None
        taken.append(best)
        note.remove()
        leader: dict[str, Any] = (
            {"arrowprops": {"arrowstyle": "-", "color": color, "lw": 0.6, "shrinkB": 3}} if reach > 16 else {}
        )
        axes.annotate(
            text, (x, y), xytext=((best[0] - px) / unit, (best[1] - py) / unit), textcoords="offset points",
            fontsize=8, color=mpl.rcParams["text.color"], annotation_clip=False, **leader,
        )  # fmt: skip


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    return float(sides.prod()) if (sides > 0).all() else 0.0


def curve_keys(document: Document) -> list[str]:
    """Return the held-out measures that were followed over the steps: the loss, and the metric."""
    known = {key for row in document.methods for key, points in row.curves.items() if len(points) > 1}
    return [key for key in dict.fromkeys(("eval_loss", f"eval_{document.metric}")) if key in known]


def draw_curves(figure: Figure, document: Document, key: str) -> None:
    """Draw a held-out measure over the steps, the mean over seeds, a line a method."""
    axes, look = figure.subplots(), styles(document)
    measure = key.removeprefix("eval_")
    factor = 100 if document.percent and measure == document.metric else 1
    values: list[float] = []
    for row in document.methods:
        points = row.curves.get(key) if row.ran else None
        if points and len(points) > 1:
            steps, ys = zip(*points, strict=True)
            color, dash, marker = look[row.method]
            axes.plot(steps, factor * np.array(ys), color=color, ls=dash, marker=marker, ms=3, lw=1.5, label=row.label)
            values += [factor * y for y in ys]
    low, high = np.quantile(values, [0.1, 0.9])
    if max(values) > high + 2 * (high - low) and measure == "loss":
        axes.set_ylim(min(values) - 0.05 * (high - low), high + (high - low))
    unit = ", %" if factor == 100 else ""
    axes.set(xlabel="step", ylabel=f"{spoken(measure)} on validation{unit}")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    faint_grid(axes)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)


def draw_rates(axes: Axes, document: Document, row: MethodRow) -> None:
    """Draw what each run of the search came to on validation, the chosen rate filled, and the mean of each rate."""
    percent = document.percent and document.searched_by == document.metric
    factor = 100 if percent else 1
    color = styles(document)[row.method][0]
    tried = [(point, point.lr or 0.0, point.value) for point in row.search]
    points = [(lr, factor * value, point) for point, lr, value in tried if value is not None]
    whole: dict[float, list[float]] = {}
    for lr, value, point in points:
        if not point.pruned:
            whole.setdefault(lr, []).append(value)
    means = [(lr, float(np.mean(values))) for lr, values in whole.items()]
    axes.plot(*zip(*means, strict=True) if means else ([], []), "-", color=color, lw=1.2, alpha=0.8)
    for lr, value, point in points:
        chosen = lr == row.lr
        face = color if chosen else "none"
        axes.plot(lr, value, "v" if point.pruned else "o", color=color, mfc=face, ms=6 if chosen else 4)
    bottom = 0.04 if document.greater_is_better or document.searched_by != "loss" else 0.9
    for _, lr, value in tried:
        if value is None:
            axes.plot(lr, bottom, "x", color=mpl.rcParams["text.color"], ms=6, transform=axes.get_xaxis_transform())
    edge = f"\nbest at the {row.edge} tried" if row.edge else ""
    axes.set(xscale="log")
    axes.set_title(row.label + edge, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0,), numticks=4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.minorticks_off()
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.margins(x=0.08, y=0.16)
    faint_grid(axes)


def searched(document: Document) -> list[MethodRow]:
    """Return the rows whose learning rate was searched for with something to show."""
    return [row for row in document.methods if any(point.value is not None for point in row.search)]


def write_pictures(document: Document, folder: Path) -> list[Path]:
    """Write pareto and curves as png and svg; those that have something to show."""
    paths: list[Path] = []
    costs = [cost for cost in COSTS if drawn(document, cost)]
    keys, rows = curve_keys(document), searched(document)

    def pareto(figure: Figure) -> None:
        draw_pareto(figure, document, costs)

    def curves(figure: Figure) -> None:
        lines = -(-len(rows) // 4)
        heights = [4.2] * bool(keys) + [2.2 * lines] * bool(rows)
        parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)
        if keys:
            for part, key in zip(parts[0, 0].subfigures(1, len(keys), squeeze=False).flat, keys, strict=True):
                draw_curves(part, document, key)
        if rows:
            grid = parts[-1, 0].subplots(lines, 4, squeeze=False)
            for axes, row in zip(grid.flat, rows, strict=False):
                draw_rates(axes, document, row)
            for axes in grid.flat[len(rows) :]:
                axes.set_axis_off()

    for name, draw, size in (
        ("pareto", pareto, (5.2 * min(2, len(costs)), 4.4 * -(-len(costs) // 2))),
        ("curves", curves, (11, 4.2 * bool(keys) + 2.2 * -(-len(rows) // 4))),
    ):
        if size[0] and size[1]:
            for kind in ("png", "svg"):
                paths.append(folder / f"{name}.{kind}")
                as_file(draw, size, paths[-1])
    return paths


def _metric_label(document: Document) -> str:
    return f"test {spoken(document.metric)}{', %' if document.percent else ''}"
