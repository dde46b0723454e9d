"""spectune export"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from spectune.bases.embedded import EMBEDDED
from spectune.cli.shared import ALLOW_LOSS, CHECK, JSON, OVERWRITE, REMOTE_CODE, print_json, say_chat, say_next
from spectune.errors import SpectuneError

_MODELFILE = """# the base model as a GGUF file, of the weights that the adapter was trained on
FROM ./base.gguf
ADAPTER ./adapter.gguf
"""
_VLLM_RANKS = (32, 64, 128, 256, 320, 512)  # that it takes above 16


class Format(str, Enum):
    """What to write."""

    peft = "peft"
    diffusers = "diffusers"
    gguf = "gguf"
    mlx = "mlx"
    merged = "merged"


class To(str, Enum):
    """Programs that an adapter can go to."""

    vllm = "vllm"
    sglang = "sglang"
    tgi = "tgi"
    lorax = "lorax"
    llama_cpp = "llama.cpp"
    ollama = "ollama"
    mlx = "mlx"
    diffusers = "diffusers"


def export(
    adapter: Path = typer.Argument(help="A run's or an adapter's folder."),
    out: Path | None = typer.Argument(None, help="Folder for the result; beside the adapter by default."),
    format: Format | None = typer.Option(
        None,
        help="peft, a LoRA's folder, by default; the file that diffusers' pipelines or llama.cpp (gguf) load; mlx_lm's "
        "folder; or merged, the model with the update folded in.",
    ),
    to: To | None = typer.Option(
        None, help="The program that is to serve it, which says the format and what it takes no part of."
    ),
    rank: int | None = typer.Option(None, min=1, help="For a LoRA: the best of this rank, not an exact one."),
    one_rank: bool = typer.Option(
        False,
        "--one-rank",
        help="For peft: one rank and alpha for all layers, as llama.cpp reads them.",
    ),
    component: str | None = typer.Option(
        None,
        help="For diffusers: the pipeline's component, unet or transformer say; told from the model by default.",
    ),
    base: str | None = typer.Option(None, help="The base model; the adapter's own by default."),
    dtype: str | None = typer.Option(None, help="For merged: the dtype of the written model, fp32 if not given."),
    check: bool = CHECK,
    overwrite: bool = OVERWRITE,
    allow_loss: bool = ALLOW_LOSS,
    trust_remote_code: bool = REMOTE_CODE,
    json: bool = JSON,
) -> None:
    """Write an adapter as a LoRA for other programs, or merged into its model.

    spectune export runs/pirate merged --format merged
    spectune export runs/pirate --to llama.cpp
    """
    from spectune.adapters.adapter import Adapter
    from spectune.adapters.destination import check_destination
    from spectune.adapters.engines import ENGINES, check_taken
    from spectune.bases.loading import base_name, bind_to_base, load_base
    from spectune.bases.merged import write_merged
    from spectune.bases.shapes import find_config
    from spectune.model.adapting import attach
    from spectune.storage import telling_of_full_disks, write_atomically

    if format is not None and to is not None:
        raise SpectuneError(f"--to {to.value} says the format: leave --format out")
    format = format or (Format.peft if to is None else Format(ENGINES[to.value].format))
    merged = format is Format.merged
    out = out or _beside(adapter, (to or format).value)
    if component is not None and format is not Format.diffusers:
        raise SpectuneError(f"--component is for --format diffusers, and not for {format.value}")
    if merged and (rank is not None or one_rank):
        option = "--one-rank" if rank is None else "--rank"
        raise SpectuneError(
            f"{option} is for a LoRA, and --format merged writes the exact update: leave one of them out"
        )
    if dtype is not None and not merged:
        raise SpectuneError(f"--dtype is for --format merged, and not for {format.value}")
    check_destination(out, [adapter, *([base] if base else [])], overwrite=overwrite, merged=merged)
    loaded = Adapter.load(adapter)
    if to is not None:
        check_taken(to.value, loaded, rank)
    config = find_config(base_name(loaded, base)) if format in (Format.gguf, Format.mlx) else None
    error = 0.0
    if merged:
        name, labels = base_name(loaded, base), loaded.labels
        check_destination(out, [name], overwrite=overwrite, merged=True)
        model, tokenizer = load_base(
            name, dtype or "fp32", labels=labels, new_head=True, trust_remote_code=trust_remote_code
        )
        write_merged(attach(model, loaded, check=check), tokenizer, out, name, adapter)
    else:
        bound = bind_to_base(loaded, base, check=check)
        options: dict[str, Any] = {"format": format.value} if to is None else {"to": to.value}
        options |= {"rank": rank, "one_rank": one_rank, "allow_loss": allow_loss}
        options |= {"component": component, "config": config}
        with telling_of_full_disks(out, "what was there is as it was"):
            error = bound.export(out, **options).error
            if to is To.ollama:
                write_atomically(out / "Modelfile", lambda file: file.write_text(_MODELFILE, encoding="utf-8"))
    if json:
        print_json({"output": str(out), "format": format.value, "error": error})
        return
    note = "" if merged else f", relative error {error:.2e}"
    Console().print(f"saved {out}{note}", highlight=False, soft_wrap=True, markup=False)
    if to is not None:
        words = _next_there(to, out.resolve(), base or loaded.base_model)
        if words:
            say_next(*words)
    elif merged:
        say_next("spectune", "classify" if loaded.labels else "chat", out)
    elif format is Format.peft:
        say_chat(out, loaded)


def _beside(adapter: Path, what: str) -> Path:
    """Return a folder for what is made of an adapter: beside it, or for one of the hub's where the command runs."""
    folder = adapter.resolve() if adapter.exists() else Path(adapter.name)
    return folder.with_name(f"{folder.name}-{what}")


def _next_there(to: To, out: Path, base: str | None) -> tuple[str | Path, ...]:
    """Return the command of the program that an adapter went to, as it takes it; nothing where it has none."""
    from spectune.bases.places import model_path

    model: str | Path = base or "BASE"
    if base is not None and (base in EMBEDDED or Path(base).is_dir()):
        model = Path(model_path(base))
    named = f"{out.name}={out}"
    if to is To.vllm:
        return "vllm", "serve", model, "--enable-lora", *_vllm_rank(out), "--lora-modules", named
    commands: dict[To, tuple[str | Path, ...]] = {
        To.sglang: ("python", "-m", "sglang.launch_server", "--model-path", model, "--lora-paths", named),
        To.tgi: ("text-generation-launcher", "--model-id", model, "--lora-adapters", named),
        To.lorax: ("lorax-launcher", "--model-id", model, "--adapter-id", out, "--adapter-source", "local"),
        To.llama_cpp: ("llama-cli", "-m", "base.gguf", "--lora", out / "adapter.gguf"),
        To.ollama: ("ollama", "create", out.name, "-f", out / "Modelfile"),
        To.mlx: ("mlx_lm.generate", "--model", model, "--adapter-path", out, "--prompt", "Hello"),
    }
    return commands.get(to, ())


def _vllm_rank(out: Path) -> tuple[str, ...]:
    """Return the option without which vLLM takes no rank above 16, where a LoRA has one."""
    from spectune.adapters.folder import read_config

    config: dict[str, Any] = read_config(out)
    most = max([config["r"], *config.get("rank_pattern", {}).values()])
    return () if most <= 16 else ("--max-lora-rank", str(next(rank for rank in _VLLM_RANKS if rank >= most)))
