"""spectune spectrum"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from spectune.cli import completion
from spectune.cli.shared import JSON, print_json, say_error, say_next
from spectune.errors import SpectuneError

if TYPE_CHECKING:
    from spectune.spectrum.model import Document


def spectrum(
    model: str = typer.Argument(
        autocompletion=completion.models,
        help="Embedded name, local folder, hub id, a .safetensors or .gguf file; or a run's folder: -a and its base.",
    ),
    out: Path = typer.Option(Path("runs/spectrum"), help="Folder for the report; a stopped run goes on from it."),
    range_: tuple[float, float] = typer.Option(
        (0.1, 1.1), "--range", metavar="LOW HIGH", help="The share of singular values within this is counted."
    ),
    targets: list[str] = typer.Option(
        ["all-linear"], help="Name suffixes, or a regex; every matrix but embeddings and the output head by default."
    ),
    exclude: list[str] = typer.Option([], help="Name suffixes, or a regex, of what to leave out."),
    compare: str | None = typer.Option(None, metavar="MODEL", help="Another model, to be shown beside it."),
    adapter: str | None = typer.Option(
        None, "--adapter", "-a", metavar="FOLDER", help="An adapter on this model: what did it do to the spectrum?"
    ),
    top: int = typer.Option(10, min=1, help="With an adapter: leading vectors in which new directions are looked for."),
    epsilon: float = typer.Option(0.5, help="With an adapter: a direction is new below this |cosine| with all of W's."),
    rank: int = typer.Option(16, min=1, help="Mean of the ranks to recommend."),
    ranks: tuple[int, int] = typer.Option((4, 64), metavar="LOW HIGH", help="The least and the greatest of them."),
    method: str = typer.Option("lora", help="The method that the ranks are for."),
    bin_: bool = typer.Option(False, "--bin", help="Read a pickled checkpoint, as weights only."),
    device: str = typer.Option("cpu", help="Where to compute: cpu, cuda, ..."),
    json: bool = JSON,
) -> None:
    """Measure the singular values of a checkpoint, one matrix at a time: is there a big and a small group?

    spectune spectrum smollm2-135m --out runs/spectrum
    spectune spectrum runs/chats
    """
    from spectune.bases.runs import named
    from spectune.spectrum.run import report

    base, own, _ = named(model)
    if adapter is not None and own is not None:
        raise SpectuneError(f"{model} is a model with an adapter: leave -a out, or give the base, {base}, with -a")

    bar = _Bar()
    try:
        document = report(
            base,
            out,
            targets=_one_or_more(targets),
            exclude=_one_or_more(exclude),
            low=range_[0],
            high=range_[1],
            rank=rank,
            ranks=ranks,
            method=method,
            compare=compare,
            adapter=adapter or own,
            top=top,
            epsilon=epsilon,
            allow_bin=bin_,
            device=device,
            progress=bar,
        )
    except KeyboardInterrupt:
        say_error("stopped; the same command goes on from here")
        raise typer.Exit(130) from None
    finally:
        bar.stop()
    if json:
        print_json(document.model_dump(exclude_unset=True))
        return
    _show(document)
    if "overrides" in document.files:
        say_next("spectune", "train", Path(document.files["overrides"]), "data=DATA", "output=FOLDER")


def _one_or_more(patterns: list[str]) -> str | list[str]:
    return patterns[0] if len(patterns) == 1 else patterns


def _show(document: Document) -> None:
    console = Console()
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("kind", no_wrap=True, min_width=max(len(kind.kind) for kind in document.kinds))
    for heading in ("count", "in range", "0.5%", "median", "99.5%", "eff. rank", "outliers", "rank"):
        table.add_column(heading, justify="right")
    for kind in document.kinds:
        q, outliers = kind.quantiles, kind.outliers
        cells = (f"{kind.matrices}", f"{kind.share:.1%}", f"{q[0]:.3g}", f"{q[2]:.3g}", f"{q[4]:.3g}")
        ranks = "-".join(map(str, dict.fromkeys(kind.ranks)))
        table.add_row(
            kind.kind,
            *cells,
            f"{kind.effective_rank:.0f}",
            "" if outliers is None else f"{outliers:.0f}",
            ranks,
        )
    console.print(table)
    for sentence in document.answer:
        console.print(sentence, highlight=False, markup=False)
    layers = document.adapter.skipped if document.adapter is not None else {}
    for what, skipped in (("not measured", document.skipped), ("of the adapter's layers left out", layers)):
        if skipped:
            name, why = next(iter(skipped.items()))
            text = f"{len(skipped)} {what}, the first {name}: {why}"
            console.print(text, style="yellow", highlight=False, markup=False)
    console.print(f"saved {document.files['page']}", highlight=False, markup=False, soft_wrap=True)


class _Bar:
    """A progress bar on stderr for each checkpoint in turn."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[at]}"))
        self._progress = Progress(*columns, *times, console=Console(file=sys.stderr))

    def __call__(self, what: str) -> Callable[[float, float, str], None]:
        self._progress.start()
        task = self._progress.add_task(Path(what).name, total=None, at="")

        def update(done: float, total: float, at: str) -> None:
            self._progress.update(task, completed=done, total=total, at=at)

        return update

    def stop(self) -> None:
        """Take the bar away."""
        self._progress.stop()
