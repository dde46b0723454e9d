"""spectune chat"""

from __future__ import annotations

import sys
from pathlib import Path

import typer
from rich.console import Console

from spectune.cli.shared import (
    ADAPTER,
    CHECK,
    DEVICE,
    DTYPE,
    FUSED,
    LIBRARY,
    MODEL,
    QUANTIZE,
    REMOTE_CODE,
    SHOTS,
    STRATEGY,
    load_transformer2,
    load_with_adapters,
    need_library,
    read_stdin,
    say_export,
)
from spectune.errors import SpectuneError

_SESSION = 1000  # tokens that a talk is taken to have


def chat(
    model: str = MODEL,
    adapter: list[str] = ADAPTER,
    library: Path | None = LIBRARY,
    strategy: str | None = STRATEGY,
    shots: Path | None = SHOTS,
    system: str | None = typer.Option(None, help="A system message."),
    max_new_tokens: int = typer.Option(256, min=1, help="Length limit of a reply, in tokens."),
    temperature: float = typer.Option(0.0, min=0.0, help="0 takes the likeliest token each time."),
    top_p: float = typer.Option(1.0, min=0.0, max=1.0, help="Nucleus sampling, where the temperature is above 0."),
    seed: int | None = typer.Option(None, help="Of the sampling."),
    fused: bool = FUSED,
    dtype: str | None = DTYPE,
    quantize: str | None = QUANTIZE,
    device: str | None = DEVICE,
    check: bool = CHECK,
    trust_remote_code: bool = REMOTE_CODE,
) -> None:
    """Talk to a model with a weighted mixture of adapters, or with a library's; /help says what can be typed.

    spectune chat runs/chats
    """
    from spectune.bases.generation import check_generates
    from spectune.cli.talk import Talk
    from spectune.model.fusing import fused_where_it_pays

    two = None
    if library is not None:
        if quantize is not None:
            raise SpectuneError("--quantize is for adapters given by -a, and a library's base is loaded whole")
        if not check:
            raise SpectuneError("--no-check is for adapters given by -a, and a library is of one base")
        two = load_transformer2(model, library, strategy, shots, adapter, dtype, device, trust_remote_code)
        loaded, tokenizer = two.model, two.tokenizer
    else:
        need_library(strategy=strategy, shots=shots)
        loaded, tokenizer = load_with_adapters(model, adapter, dtype, device, trust_remote_code, quantize, check)
    check_generates(loaded)
    settings: object = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    settings |= {"seed": seed, "fused": fused}
    console = Console(stderr=True, highlight=False)
    talk = Talk(loaded, tokenizer, system, settings, console, two)
    if sys.stdin.isatty():
        console.print("/help says what can be typed", style="dim")
    with fused_where_it_pays(loaded, _SESSION, allowed=fused and two is None):
        while True:
            if sys.stdin.isatty():
                console.print("[bold]you>[/] ", end="")
            line = read_stdin(line=True)
            if not line or line.strip() in ("/quit", "/exit"):
                break
            try:
                talk.hear(line.strip())
            except SpectuneError as error:
                console.print(f"{error}; or begin anew with /reset", style="yellow", markup=False)
    say_export(model)
