"""spectune library"""

from __future__ import annotations

from enum import Enum
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from spectune.cli.shared import (
    DEVICE,
    DTYPE,
    JSON,
    OVERWRITE,
    REMOTE_CODE,
    load_library,
    print_json,
    say_chat,
    say_next,
    search_progress,
)

app = typer.Typer(help="Libraries of adapters that answer the prompts they suit.", no_args_is_help=True)
LIBRARY = typer.Argument(help="The library's folder.")
MODEL = typer.Option(None, "--model", "-m", help="The base; the one that the library names if not given.")


class Kind(str, Enum):
    """What labels the prompts."""

    hidden = "hidden"
    adapter = "adapter"


class By(str, Enum):
    """What has a weight of its own."""

    all = "global"
    layer = "layer"
    projection = "projection"


class Search(str, Enum):
    """How weights are found."""

    cem = "cem"
    gradient = "gradient"


@app.command()
def add(
    library: Path = LIBRARY,
    adapter: Path = typer.Argument(help="A run's or an adapter's folder."),
    name: str | None = typer.Option(None, help="Its name in the library; the folder's if not given."),
    description: str = typer.Option("", help="What it is for; the prompt strategy tells the model."),
    prompts: Path | None = typer.Option(
        None, help="What it was trained on (as for `train`), or a text file with a prompt on each line."
    ),
    base: str | None = typer.Option(None, help="Load this base and check the adapter against its weights."),
    json: bool = JSON,
) -> None:
    """Copy an adapter into a library, which is made if need be.

    spectune library add skills runs/pirate --prompts chats.jsonl
    """
    from spectune.bases.loading import load_base
    from spectune.bases.runs import named
    from spectune.transformer2.library import Library
    from spectune.transformer2.prompts import read_prompts

    model = None if base is None else load_base(named(base).base)[0]
    read = read_prompts(prompts) if prompts is not None else []
    opened = Library(library)
    record = opened.add(name or adapter.resolve().name, adapter, description, read, model)
    if json:
        print_json(record._asdict())
        return
    _say(f"added {record.name} to {library}: {len(opened)} adapters")
    if not opened.sketches():
        _say("its files do not say which weights it belongs to; with --base NAME the library knows and checks them")
    if sum(each.prompts > 0 for each in opened.records) > 1:
        say_next("spectune", "library", "train-classifier", library)
    elif opened.base_model:
        say_next("spectune", "chat", opened.base_model, "--library", library)


@app.command()
def ls(library: Path = LIBRARY, json: bool = JSON) -> None:
    """List the adapters of a library.

    spectune library ls skills
    """
    from spectune.transformer2.library import Library

    opened = Library.open(library)
    if json:
        print_json({"base_model": opened.base_model, "adapters": [record._asdict() for record in opened.records]})
        return
    table = Table("name", "method", "parameters", "bytes", "prompts", "description")
    for record in opened.records:
        numbers = (f"{number:,}" for number in (record.parameters, record.bytes, record.prompts))
        table.add_row(record.name, record.method, *numbers, escape(record.description))
    Console().print(table)
    _say(f"{len(opened)} adapters for {opened.base_model or 'a base without a name'}")


@app.command()
def rm(
    library: Path = LIBRARY, names: list[str] = typer.Argument(help="Adapters to delete."), json: bool = JSON
) -> None:
    """Delete adapters from a library.

    spectune library rm skills pirate
    """
    from spectune.transformer2.library import Library

    opened = Library.open(library)
    names = list(dict.fromkeys(names))
    for name in names:
        opened.record(name)
    for name in names:
        opened.remove(name)
    if json:
        print_json({"removed": names, "left": opened.names})
        return
    _say(f"removed {', '.join(names)}: {len(opened)} adapters left")


@app.command("train-classifier")
def train_classifier(
    library: Path = LIBRARY,
    model: str | None = MODEL,
    kind: Kind = typer.Option(Kind.hidden, help="A regression on the base's hidden states, or a trained adapter."),
    none: Path | None = typer.Option(None, help="Prompts that are for no adapter, as for `add --prompts`."),
    held: float = typer.Option(0.3, help="Share of the prompts held out, to calibrate and to report."),
    layer: int | None = typer.Option(
        None, min=0, help="For the regression: which hidden state; two thirds of the way up if not given."
    ),
    method: str = typer.Option("svf", help="For the adapter: name or name:field=value,..."),
    lr: float | None = typer.Option(None, help="For the adapter: its learning rate."),
    epochs: float = typer.Option(3.0, help="For the adapter: passes over the prompts."),
    seed: int = typer.Option(0, min=0, help="Of the split and of the training."),
    dtype: str | None = DTYPE,
    device: str | None = DEVICE,
    trust_remote_code: bool = REMOTE_CODE,
    json: bool = JSON,
) -> None:
    """Train what tells from a prompt which adapter it is for, on the adapters' example prompts.

    spectune library train-classifier skills
    """
    from spectune.transformer2.pool import Pool
    from spectune.transformer2.prompts import read_prompts
    from spectune.transformer2.train_classifier import train_classifier as train_

    others = read_prompts(none) if none is not None else []
    opened, loaded, tokenizer = load_library(library, model, dtype, device, trust_remote_code)
    classifier = train_(
        Pool(loaded, opened),
        tokenizer,
        kind.value,
        none=others,
        held=held,
        layer=layer,
        method=method,
        lr=lr,
        epochs=epochs,
        seed=seed,
        console=Console(stderr=True),
    )
    if json:
        print_json({"labels": list(classifier.labels), **classifier.calibration._asdict(), **classifier.report})
        return
    report = classifier.report
    _say(
        f"{report['accuracy']:.1%} of {report['held_out']} held-out prompts go to their adapter "
        f"({report['none']:.1%} to none, calibration error {report['calibration_error']:.3f})"
    )
    if model or opened.base_model:
        say_next("spectune", "chat", model or opened.base_model, "--library", library)


@app.command()
def mix(
    library: Path = LIBRARY,
    shots: Path = typer.Argument(help="About ten examples of the task, as for `train`."),
    out: Path = typer.Argument(help="Folder for the mixture, an ordinary adapter."),
    model: str | None = MODEL,
    by: By = typer.Option(By.all, help="One weight an adapter, or one for each block or kind of projection."),
    search: Search = typer.Option(Search.cem, help="The cross-entropy method, or gradient ascent."),
    iterations: int | None = typer.Option(None, min=1, help="At most; 100, or 30 gradient steps."),
    population: int = typer.Option(32, min=1, help="Mixtures in an iteration of the cross-entropy method."),
    elites: int = typer.Option(6, min=1, help="The best of them, from which the next are drawn."),
    reward: str | None = typer.Option(None, help="module:function as for `train`, instead of the log-likelihood."),
    only: list[str] = typer.Option([], help="An adapter to mix; may be repeated. All if not given."),
    seed: int = typer.Option(0, min=0, help="Of the draws."),
    overwrite: bool = OVERWRITE,
    dtype: str | None = DTYPE,
    device: str | None = DEVICE,
    trust_remote_code: bool = REMOTE_CODE,
    json: bool = JSON,
) -> None:
    """Find the mixture of a library's adapters that suits a few examples best, and save it as an adapter.

    spectune library mix skills shots.jsonl runs/mix
    """
    from spectune.adapters.destination import check_destination
    from spectune.storage import telling_of_full_disks
    from spectune.transformer2.few_shot import FewShot
    from spectune.transformer2.pool import Pool
    from spectune.transformer2.prompts import read_records

    check_destination(out, [library, *library.glob("adapters/*")], overwrite=overwrite)
    wanted = FewShot(
        read_records(shots),
        by=by.value,
        search=search.value,
        reward=reward,
        names=only or None,
        population=population,
        elites=elites,
        iterations=iterations,
        seed=seed,
    )
    opened, loaded, tokenizer = load_library(library, model, dtype, device, trust_remote_code)
    with search_progress() as progress:
        found = wanted.find(Pool(loaded, opened), tokenizer, progress)
    with telling_of_full_disks(out, "what was there is as it was"):
        mixed = found.adapter(opened)
        mixed.save(out)
    if json:
        print_json({"output": str(out), **found.summary()})
        return
    table = Table(by.value, *found.names)
    for kind, row in zip(found.kinds, found.weights.tolist(), strict=True):
        table.add_row(kind, *(f"{weight:.2f}" for weight in row))
    Console().print(table)
    scored = "log-likelihood of the shots, a token:" if reward is None else "mean reward of the shots:"
    _say(f"{scored} {found.score:.3f}; saved in {out}")
    say_chat(out, mixed)


def _say(text: str) -> None:
    """Print a line as it is."""
    Console().print(text, highlight=False, soft_wrap=True, markup=False)
