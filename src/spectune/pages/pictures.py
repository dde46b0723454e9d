"""How every report draws: matplotlib's figures in the page's own ink, and as files."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from spectune.pages.html import INK, inline_svg
from spectune.storage import write_atomically

_SHARED: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9.5, "axes.titlesize": 10,
                           "svg.hashsalt": "spectune"}  # fmt: skip
_FOR_SVG: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "svg.fonttype": "none",
}


def as_svg(draw: Callable[[Figure], None], size: tuple[float, float], prefix: str) -> str:
    """Return what `draw` draws on a figure (inches), as SVG for a page."""
    with mpl.rc_context({**_SHARED, **_FOR_SVG}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return inline_svg(text.getvalue(), prefix)


def as_file(draw: Callable[[Figure], None], size: tuple[float, float], path: Path) -> None:
    """Write what `draw` draws on a figure (inches), in the format that the path ends in: png or svg."""
    kind = path.suffix[1:]
    metadata = {"Date": None} if kind == "svg" else None
    with mpl.rc_context(_SHARED):
        figure = Figure(figsize=size, dpi=130, layout="constrained")
        draw(figure)
        write_atomically(path, lambda temporary: figure.savefig(temporary, format=kind, metadata=metadata))


def plain_logs(axes: Axes) -> None:
    """Write the ticks of logarithmic axes as numbers, and no ticks between them."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.minorticks_off()


def faint_grid(axes: Axes) -> None:
    """Draw faint lines behind what is drawn."""
    axes.grid(color=mpl.rcParams["text.color"], alpha=0.13, lw=0.6)
    axes.set_axisbelow(True)
