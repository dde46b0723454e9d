"""Programs that serve adapters, and which form of one each takes."""

from __future__ import annotations

from typing import Literal, NamedTuple

from spectune.adapters.contents import Contents
from spectune.errors import SpectuneError
from spectune.layers.kinds import LINEAR
from spectune.methods.dora import DoRA

LoRAFormat = Literal["peft", "diffusers", "gguf", "mlx"]


class Engine(NamedTuple):
    """What a program takes.

    Args:
        format: of `Adapter.export`.
        dora: it knows DoRA.
        most: the largest rank that it takes.
        one_rank: it reads one rank and one alpha for all layers, s = alpha / rank, whatever else the files say.
        embeddings: it knows LoRAs of embeddings.
    """

    format: LoRAFormat
    dora: bool = False
    most: int | None = None
    one_rank: bool = False
    embeddings: bool = False


ENGINES = {
    "vllm": Engine("peft", most=512, embeddings=True),
    "sglang": Engine("peft", one_rank=True, embeddings=True),
    "tgi": Engine("peft", one_rank=True),
    "lorax": Engine("peft", one_rank=True),
    "llama.cpp": Engine("gguf"),
    "ollama": Engine("gguf"),
    "mlx": Engine("mlx", dora=True),
    "diffusers": Engine("diffusers", dora=True),
}


def check_taken(name: str, adapter: Contents, rank: int | None) -> Engine:
    """Return the engine of this name.

    Raises:
        SpectuneError: no such engine, or it does not take the adapter; what to do instead is said.
    """
    if name not in ENGINES:
        raise SpectuneError(f"no program {name!r} is known: one of {', '.join(ENGINES)}, or give a format")
    engine = ENGINES[name]
    instead = "give a --rank for a LoRA that is near it, or --format merged"
    has_dora = any(isinstance(t.method, DoRA) for layer in adapter.layers.values() for t in layer.terms)
    if has_dora and not engine.dora and rank is None:
        raise SpectuneError(f"{name} takes no DoRA: {instead}")
    # SGLang, TGI and LoRAX leave it out without a word
    heads = (n for n, layer in adapter.layers.items() if any(t.method.replaces for t in layer.terms))
    whole = min([*adapter.modules, *heads], default=None)
    if engine.format == "peft" and whole is not None:
        raise SpectuneError(
            f"{whole!r} was trained beside the LoRA, and {name} takes LoRA alone: merge it (--format merged)"
        )
    # told here what each format tells itself: of these the file could hold them, and the program would not read them
    taken = (LINEAR, "embedding") if engine.embeddings else (LINEAR,)
    for other, layer in adapter.layers.items() if engine.format == "peft" else ():
        if layer.kind not in taken or (engine.one_rank and layer.experts):
            what = "experts" if layer.experts else f"{layer.kind} layers"
            raise SpectuneError(
                f"{name} takes no LoRA of {what}, as {other!r}: leave it out, or merge it (--format merged)"
            )
    if rank is not None and engine.most is not None and rank > engine.most:
        raise SpectuneError(f"{name} takes ranks of up to {engine.most}, not {rank}: {instead}")
    return engine


def check_ranks(name: str, written: Contents) -> None:
    """Raise where a LoRA has a larger rank than an engine takes.

    Raises:
        SpectuneError: it has.
    """
    most = ENGINES[name].most
    ranks = [len(t.trained["A"]) for layer in written.layers.values() for t in layer.terms if "A" in t.trained]
    if most is not None and max(ranks, default=0) > most:
        raise SpectuneError(
            f"{name} takes ranks of up to {most}, and an exact LoRA of this adapter has {max(ranks)}: give a --rank "
            "for a LoRA that is near it, or --format merged"
        )
