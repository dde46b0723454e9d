"""spectune generate"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from spectune.cli.shared import (
    ADAPTER,
    CHECK,
    DEVICE,
    DTYPE,
    FUSED,
    JSON,
    LIBRARY,
    MODEL,
    QUANTIZE,
    REMOTE_CODE,
    SHOTS,
    STRATEGY,
    decision_text,
    load_transformer2,
    load_with_adapters,
    need_library,
    print_json,
    read_stdin,
    say_export,
)
from spectune.errors import SpectuneError


def generate(
    model: str = MODEL,
    prompts: list[str] = typer.Argument(None, metavar="[PROMPT]...", help="Prompts; one on stdin if none is given."),
    adapter: list[str] = ADAPTER,
    library: Path | None = LIBRARY,
    strategy: str | None = STRATEGY,
    shots: Path | None = SHOTS,
    max_new_tokens: int = typer.Option(128, min=1, help="Length limit of a reply, in tokens."),
    temperature: float = typer.Option(0.0, min=0.0, help="0 takes the likeliest token each time."),
    top_p: float = typer.Option(1.0, min=0.0, max=1.0, help="Nucleus sampling, where the temperature is above 0."),
    seed: int | None = typer.Option(None, help="Of the sampling."),
    raw: bool = typer.Option(False, help="Continue the text as it is, without a chat template."),
    fused: bool = FUSED,
    dtype: str | None = DTYPE,
    quantize: str | None = QUANTIZE,
    device: str | None = DEVICE,
    check: bool = CHECK,
    trust_remote_code: bool = REMOTE_CODE,
    json: bool = JSON,
) -> None:
    """Answer prompts with a model and a weighted mixture of adapters, or with those of a library that suit each.

    spectune generate smollm2-135m "Where is the captain?" -a runs/pirate:0.7
    """
    asked = prompts or [read_stdin().strip()]
    if not all(asked):
        raise SpectuneError("the prompt is empty; give it as an argument or on stdin")
    from spectune.bases import generation

    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    settings |= {"seed": seed, "raw": raw, "fused": fused}
    if library is not None:
        if quantize is not None:
            raise SpectuneError("--quantize is for adapters given by -a, and a library's base is loaded whole")
        if not check:
            raise SpectuneError("--no-check is for adapters given by -a, and a library is of one base")
        two = load_transformer2(model, library, strategy, shots, adapter, dtype, device, trust_remote_code)
        replies = two.generate(asked, **settings)
        for reply in replies:
            typer.echo(f"[{decision_text(reply.decision)}]", err=True)
    else:
        need_library(strategy=strategy, shots=shots)
        loaded, tokenizer = load_with_adapters(model, adapter, dtype, device, trust_remote_code, quantize, check)
        replies = generation.generate(loaded, tokenizer, asked, **settings)
    if json:
        print_json([{"prompt": p, **_fields(reply)} for p, reply in zip(asked, replies, strict=True)])
        return
    typer.echo("\n\n".join(reply.text for reply in replies))
    say_export(model)


def _fields(reply: Any) -> dict[str, Any]:
    fields = reply._asdict()
    decision = fields.pop("decision", None)
    return fields if decision is None else {**fields, **decision._asdict()}
