"""spectune chat"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from spectune.cli.shared import (
    ADAPTER,
    DEVICE,
    DTYPE,
    FUSED,
    LIBRARY,
    REMOTE_CODE,
    SHOTS,
    STRATEGY,
    decision_text,
    load_transformer2,
    load_with_adapters,
    need_library,
)
from spectune.errors import SpectuneError

_SESSION = 1000  # tokens that a talk is taken to have


def chat(
    model: str = typer.Argument(help="Embedded name (smollm2-135m), local folder or hub id."),
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
    device: str | None = DEVICE,
    trust_remote_code: bool = REMOTE_CODE,
) -> None:
    """Talk to a model with a weighted mixture of adapters, or with a library's; /reset begins anew, /quit ends."""
    from transformers import TextStreamer

    from spectune.bases import generation
    from spectune.model.fusing import fused_where_it_pays

    two = None
    if library is not None:
        two = load_transformer2(model, library, strategy, shots, adapter, dtype, device, trust_remote_code)
        loaded, tokenizer = two.model, two.tokenizer
    else:
        need_library(strategy=strategy, shots=shots)
        loaded, tokenizer = load_with_adapters(model, adapter, dtype, device, trust_remote_code)
    console = Console(stderr=True)
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with fused_where_it_pays(loaded, _SESSION, allowed=fused and two is None):
        while True:
            if sys.stdin.isatty():
                console.print("[bold]you>[/] ", end="")
            line = sys.stdin.readline()
            if not line or line.strip() == "/quit":
                return
            if line.strip() == "/reset":
                messages = list(start)
                continue
            if not line.strip():
                continue
            messages.append({"role": "user", "content": line.strip()})
            try:
                settings: Any = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
                settings |= {"seed": seed, "fused": fused}
                if two is None:
                    (reply,) = generation.generate(loaded, tokenizer, [messages], **settings, streamer=streamer)
                else:
                    decisions = two.choose([messages])
                    console.print(f"[{decision_text(decisions[0])}]", style="dim", markup=False, highlight=False)
                    (reply,) = two.generate([messages], decisions=decisions, **settings, streamer=streamer)
            except SpectuneError as error:
                console.print(f"{error}; or begin anew with /reset", style="yellow", markup=False)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": reply.text})
