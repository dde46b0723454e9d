"""What several commands share: adapters with weights, models with adapters, JSON and errors."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape

from spectune.cli import completion
from spectune.errors import SpectuneError
from spectune.reading import TEXT_BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from spectune.adapters.adapter import Adapter
    from spectune.transformer2.library import Library
    from spectune.transformer2.strategies import Decision
    from spectune.transformer2.two_pass import Transformer2

MODEL = typer.Argument(
    autocompletion=completion.models,
    help="Embedded name (smollm2-135m, minilm-l6), local folder or hub id; or a run's or an adapter's folder.",
)
ADAPTER = typer.Option(
    [],
    "--adapter",
    "-a",
    metavar="FOLDER[:WEIGHT]",
    help="An adapter's folder, with a weight; may be repeated.",
)
LIBRARY = typer.Option(None, "--library", help="A library's folder, whose adapters answer the prompts they suit.")
STRATEGY = typer.Option(
    None, "--strategy", help="prompt, classifier or few-shot; by default few-shot with shots, else the best there is."
)
SHOTS = typer.Option(None, "--shots", help="Examples of the task for few-shot, as for `train`.")
FUSED = typer.Option(
    True,
    "--fused/--no-fused",
    help="Answer from merged weights beside the base's, where that is faster and memory allows.",
)
DTYPE = typer.Option(None, help="fp32, bf16 or fp16; the faster of the first two if not given.")
QUANTIZE = typer.Option(
    None, help="nf4 or int8: the base in 4 or 8 bits, by bitsandbytes; as the adapter was trained if not given."
)
DEVICE = typer.Option(None, help="cpu, cuda, mps, ...; the accelerator if there is one.")
STRATEGIES = ("prompt", "classifier", "few-shot")
JSON = typer.Option(False, "--json", help="One JSON document on stdout, and nothing else.")
CHECK = typer.Option(
    True, "--check/--no-check", help="Refuse a base with other weights than the adapters were trained on."
)
OVERWRITE = typer.Option(False, "--overwrite", help="Replace an earlier result in that folder.")
ALLOW_LOSS = typer.Option(False, "--allow-loss", help="Write it however far --rank is from the exact update.")
REMOTE_CODE = typer.Option(False, "--trust-remote-code", help="Run code that comes with the model.")


def say_error(message: str) -> None:
    """Print a message on stderr, plainly."""
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)


def typed(*words: object) -> str:
    """Return a command as it has to be typed."""
    return shlex.join(map(str, words))


def say_next(*words: object) -> None:
    """Say on stderr which command comes next, as it has to be typed, from anywhere: each `Path` in full."""
    say_command(typed(*(word.resolve() if isinstance(word, Path) else word for word in words)))


def say_command(line: str) -> None:
    """Say on stderr which command comes next, given as a line for a shell."""
    Console(stderr=True).print(f"next: {escape(line)}", highlight=False, soft_wrap=True)


def say_export(model: str) -> None:
    """Say how to take a run's adapter elsewhere, where a model's name is its folder."""
    from spectune.bases.runs import named

    if named(model).adapter is not None:
        run = Path(model).resolve()
        say_next("spectune", "export", run, run.with_name(f"{run.name}-merged"), "--format", "merged")


def say_chat(folder: Path, adapter: Adapter) -> None:
    """Say how to talk to an adapter that was saved in a folder, or classify with it, where it names its base."""
    if adapter.base_model:
        say_next("spectune", "classify" if adapter.labels else "chat", folder)


def let_the_main_process_speak(seconds: float) -> None:
    """In another process than the main one, wait to be ended by its end; whoever is still there speaks for itself."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(seconds)


def print_json(document: object) -> None:
    """Print one JSON document on stdout."""
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def read_stdin(*, line: bool = False) -> str:
    """Return what is piped in, or its next line.

    Raises:
        SpectuneError: it does not end.
    """
    read = sys.stdin.readline if line else sys.stdin.read
    text = read(TEXT_BYTES + 1)
    if len(text) > TEXT_BYTES:
        raise SpectuneError(
            f"more than {TEXT_BYTES:,} characters were piped in, which are not read: give a part of them"
        )
    return text


def weighted(text: str) -> tuple[Path, float]:
    """Return the folder and the weight of `FOLDER[:WEIGHT]`.

    Raises:
        SpectuneError: the weight is not a number.
    """
    folder, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        number = float(weight)
    except ValueError:
        raise SpectuneError(f"{text!r} is not FOLDER or FOLDER:WEIGHT") from None
    if not abs(number) < 1e30:
        raise SpectuneError(f"the weight in {text!r} is no finite number")
    return Path(folder), number


def need_library(**options: object) -> None:
    """Raise where options that say how a library answers are given without one."""
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if given:
        raise SpectuneError(f"{' and '.join(given)} say how a library's adapters are chosen: give --library too")


def load_with_adapters(
    name: str,
    adapters: Sequence[str],
    dtype: str | None,
    device: str | None,
    trust_remote_code: bool,
    quantize: str | None = None,
    check: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, and put a weighted mixture of adapters on it."""
    from spectune.adapters.adapter import Adapter
    from spectune.bases.devices import default_device
    from spectune.bases.loading import load_base
    from spectune.bases.runs import named
    from spectune.model.adapting import attach
    from spectune.model.routing import activate

    name, own, packed = named(name)
    adapters, quantize = [*([own] if own is not None else []), *adapters], quantize or packed
    loaded = [(Adapter.load(folder), weight, folder) for folder, weight in map(weighted, adapters)]
    labels = list(dict.fromkeys(adapter.labels for adapter, _, _ in loaded if adapter.labels))
    if len(labels) > 1:
        raise SpectuneError(f"the adapters have different labels: {'; '.join(', '.join(each) for each in labels)}")
    theirs = {adapter.quantize for adapter, _, _ in loaded}
    if quantize is None and check and len(theirs) == 1:  # as their base was where they were trained
        (quantize,) = theirs
    model, tokenizer = load_base(
        name,
        dtype,
        device=device or default_device(),
        labels=labels[0] if labels else None,
        new_head=True,  # the adapter brings its own
        quantize=quantize,
        trust_remote_code=trust_remote_code,
    )
    mixture: dict[str, float] = {}
    for adapter, weight, folder in loaded:
        label = re.sub(r"\W", "_", folder.resolve().name, flags=re.ASCII)
        label += "" if len(loaded) == 1 else f"-{len(mixture)}"
        attach(model, adapter, f"a-{label}", check=check)
        mixture[f"a-{label}"] = weight
    if mixture:
        activate(model, mixture)
    return model, tokenizer


def load_library(
    folder: Path, name: str | None, dtype: str | None, device: str | None, trust_remote_code: bool
) -> tuple[Library, PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a library, and load its base, or the one that is named, with its tokenizer."""
    from spectune.bases.devices import default_device
    from spectune.bases.loading import load_base
    from spectune.bases.runs import named
    from spectune.transformer2.library import Library

    library = Library.open(folder)
    if name is not None and named(name).adapter is not None:
        raise SpectuneError(
            f"{name} is a model with an adapter, and the library has its own: name the base, or put the adapter into "
            f"the library, `{typed('spectune', 'library', 'add', folder, name)}`"
        )
    base = name or library.base_model
    if not base:
        raise SpectuneError(f"the library {str(folder)!r} does not say which base it belongs to; name it with --model")
    model, tokenizer = load_base(base, dtype, device=device or default_device(), trust_remote_code=trust_remote_code)
    return library, model, tokenizer


def load_transformer2(
    name: str,
    folder: Path,
    strategy: str | None,
    shots: Path | None,
    adapters: Sequence[str],
    dtype: str | None,
    device: str | None,
    trust_remote_code: bool,
) -> Transformer2:
    """Load a model with a library whose adapters answer by a strategy."""
    from spectune.transformer2.few_shot import FewShot
    from spectune.transformer2.prompts import read_records
    from spectune.transformer2.two_pass import Transformer2, default_strategy

    if strategy not in (None, *STRATEGIES):
        raise SpectuneError(f"--strategy must be one of {', '.join(STRATEGIES)}, not {strategy!r}")
    if adapters:
        raise SpectuneError("give --library or -a, not both: `spectune library add` adds an adapter to a library")
    if (strategy == "few-shot" and shots is None) or (shots is not None and strategy not in (None, "few-shot")):
        raise SpectuneError("the few-shot strategy and --shots belong together: give both or neither")
    examples = read_records(shots) if shots is not None else None
    library, model, tokenizer = load_library(folder, name, dtype, device, trust_remote_code)
    with search_progress() as progress:
        chosen = default_strategy(library) if strategy is None else strategy
        wanted = FewShot(examples) if examples is not None else chosen
        return Transformer2(model, library, strategy=wanted, tokenizer=tokenizer, progress=progress)


@contextmanager
def search_progress() -> Iterator[Callable[[int, int, float], None]]:
    """Show a search on stderr: a function to be called with the iteration, how many there are and the best score."""
    with Console(stderr=True).status("") as status:

        def show(done: int, total: int, score: float) -> None:
            status.update(f"mixing: iteration {done}/{total}, best score {score:.3f}")

        yield show


def decision_text(decision: Decision) -> str:
    """Return who answers, with weights, in a few words."""
    sure = "" if decision.confidence is None else f", {decision.confidence:.0%} sure"
    if not decision.weights:
        return f"the base alone{sure}"
    parts = []
    for name, weight in decision.weights.items():
        one = not isinstance(weight, dict)
        parts.append(f"{name} {weight:.2f}" if one else f"{name} {sum(weight.values()) / len(weight):.2f} (mean)")
    return ", ".join(parts) + sure
