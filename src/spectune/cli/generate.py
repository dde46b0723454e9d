"""spectune generate"""

from __future__ import annotations

import sys

import typer

from spectune.cli.shared import ADAPTER, DEVICE, DTYPE, JSON, REMOTE_CODE, load_with_adapters, print_json
from spectune.errors import SpectuneError


def generate(
    model: str = typer.Argument(help="Embedded name (smollm2-135m), local folder or hub id."),
    prompts: list[str] = typer.Argument(None, metavar="[PROMPT]...", help="Prompts; one on stdin if none is given."),
    adapter: list[str] = ADAPTER,
    max_new_tokens: int = typer.Option(128, min=1, help="Length limit of a reply, in tokens."),
    temperature: float = typer.Option(0.0, min=0.0, help="0 takes the likeliest token each time."),
    top_p: float = typer.Option(1.0, min=0.0, max=1.0, help="Nucleus sampling, where the temperature is above 0."),
    seed: int | None = typer.Option(None, help="Of the sampling."),
    raw: bool = typer.Option(False, help="Continue the text as it is, without a chat template."),
    dtype: str | None = DTYPE,
    device: str | None = DEVICE,
    trust_remote_code: bool = REMOTE_CODE,
    json: bool = JSON,
) -> None:
    """Answer prompts with a model and a weighted mixture of adapters."""
    asked = prompts or [sys.stdin.read().strip()]
    if not all(asked):
        raise SpectuneError("the prompt is empty; give it as an argument or on stdin")
    from spectune import generation

    loaded, tokenizer = load_with_adapters(model, adapter, dtype, device, trust_remote_code)
    replies = generation.generate(
        loaded,
        tokenizer,
        asked,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        raw=raw,
    )
    if json:
        print_json([{"prompt": p, **reply._asdict()} for p, reply in zip(asked, replies, strict=True)])
        return
    typer.echo("\n\n".join(reply.text for reply in replies))
