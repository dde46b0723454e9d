"""spectune classify"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from spectune.cli.shared import (
    ADAPTER,
    CHECK,
    DEVICE,
    DTYPE,
    JSON,
    MODEL,
    QUANTIZE,
    REMOTE_CODE,
    load_with_adapters,
    print_json,
    read_stdin,
    say_export,
)
from spectune.errors import SpectuneError
from spectune.reading import lines_of

if TYPE_CHECKING:
    from spectune.bases.classifiers import Prediction


def classify(
    model: str = MODEL,
    texts: list[str] = typer.Argument(None, metavar="[TEXT]...", help="Texts; the lines of stdin if none is given."),
    adapter: list[str] = ADAPTER,
    pair: list[str] = typer.Option([], help="A second text, for each text one."),
    batch_size: int = typer.Option(32, min=1, help="Texts in a forward pass."),
    dtype: str | None = DTYPE,
    quantize: str | None = QUANTIZE,
    device: str | None = DEVICE,
    check: bool = CHECK,
    trust_remote_code: bool = REMOTE_CODE,
    json: bool = JSON,
) -> None:
    """Say which label a classifier gives to texts and how sure it is; or which labels, or which number, by its kind.

    spectune classify runs/spam "You have won a prize!"
    """
    asked = texts or [line for line in lines_of(read_stdin()) if line.strip()]
    if not asked:
        raise SpectuneError("there is no text; give it as an argument or on stdin, one a line")
    from spectune.bases.classifiers import classify as classify_

    loaded, tokenizer = load_with_adapters(model, adapter, dtype, device, trust_remote_code, quantize, check)
    found = classify_(loaded, tokenizer, asked, pair or None, batch_size=batch_size)
    if json:
        said = [{key: value for key, value in one._asdict().items() if value not in (None, {})} for one in found]
        print_json([{"text": text, **values} for text, values in zip(asked, said, strict=True)])
        return
    for text, one in zip(asked, found, strict=True):
        typer.echo(f"{spoken(one)}\t{text}")
    say_export(model)


def spoken(one: Prediction) -> str:
    """Return a prediction in a few words: labels and how sure they are, or a number."""
    if one.value is not None:
        return f"{one.value:.4g}"
    chosen = (one.label,) if one.labels is None else one.labels
    sure = " ".join(f"{one.probabilities[name]:.3f}" for name in chosen)
    return f"{', '.join(chosen) or '-'}\t{sure}"
