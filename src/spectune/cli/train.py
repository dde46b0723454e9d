"""spectune train"""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from spectune.cli.shared import JSON, print_json
from spectune.errors import SpectuneError
from spectune.training.config import TrainConfig, load_config

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}


def _keys() -> str:
    lines = []
    for name, field in TrainConfig.model_fields.items():
        default = "required" if field.is_required() else f"default {field.default}"
        lines.append(f"* {name}: {field.description} ({default})")
    return "\n".join(lines)


HELP = f"""Fine-tune a model: spectune train run.yaml lr=1e-4 method=pissa:rank=16

Settings come from a YAML file, then from key=value or --key value, which win. The keys:

{_keys()}
"""


def train(
    context: typer.Context,
    run: Path | None = typer.Argument(None, metavar="[RUN.YAML]", help="Settings; all may be given as key=value."),
    settings: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Settings that win over the file's."),
    json: bool = JSON,
) -> None:
    pairs = list(settings or [])
    if run is not None and "=" in str(run) and not run.exists():
        pairs.insert(0, str(run))
        run = None
    config = load_config(run, _join(pairs + context.args))
    from spectune.training.run import train as train_

    console = Console(stderr=True)
    result = train_(config, console)
    if json:
        print_json(
            {
                "output": config.output,
                "trained_parameters": result.adapter.parameter_count(),
                "steps": result.steps,
                "held_out_loss_before": result.loss_before,
                "held_out_loss_after": result.loss_after,
                "tokens_per_second": result.tokens_per_second,
                "seconds": result.seconds,
            }
        )
        return
    if result.loss_before is not None and result.loss_after is not None:
        console.print(f"held-out loss {result.loss_before:.3f} -> {result.loss_after:.3f}", highlight=False)
    console.print(f"saved {result.adapter!r} in {config.output}", highlight=False)


def _join(arguments: list[str]) -> list[str]:
    """Turn `--key value` and `--key=value` into key=value."""
    pairs, i = [], 0
    while i < len(arguments):
        argument = arguments[i]
        if argument.startswith("--"):
            key = argument[2:].replace("-", "_")
            if "=" not in key:
                i += 1
                if i == len(arguments):
                    raise SpectuneError(f"{argument} needs a value")
                key = f"{key}={arguments[i]}"
            else:
                name, _, value = argument[2:].partition("=")
                key = f"{name.replace('-', '_')}={value}"
            pairs.append(key)
        else:
            pairs.append(argument)
        i += 1
    return pairs
