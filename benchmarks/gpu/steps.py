"""Training steps over the frozen floor at the layer shapes of Llama-3-8B, beside PEFT's LoRA and DoRA in the same run.

Eight blocks, eight rows of 1024 tokens, bf16.  The floor is the frozen blocks' forward pass and gradient with respect
to their input; a step is that, the gradients of the adapter, and a fused AdamW step.  Sides take turns with the floor.
Bases are random factors of the right shapes, which take as long to multiply by.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

import spectune
from gpu import models
from gpu.part import Part, Place, Skipped, ratio
from spectune.speed.checkpointing import checkpoint_activations
from spectune.speed.norms import fused_norms

METHODS = {
    "LoRA": "lora:rank=16,alpha=32",
    "LoRA-XS": "lora_xs:rank=16",
    "AdaLoRA": "adalora:rank=8,initial_rank=16,total_steps=1000",
    "PiSSA": "pissa:rank=16",
    "MiLoRA": "milora:rank=16,dropout=0.0",
    "DoRA": "dora:inner=lora,rank=16,alpha=32",
    "VeRA": "vera:rank=256",
    "SVF": "svf",
    "SVFT plain": "svft",
    "SVFT banded 8": "svft:pattern=banded,width=8",
    "SVFT random 8": "svft:pattern=random,width=8",
}
ROUNDS = 5
Step = Callable[[], None]


def measure(part: Part) -> None:
    """Fill the rows of the part."""
    place = part.place
    model = models.blocks(place)
    x, grad = (drawn(place, seed) for seed in (0, 1))

    def floor() -> None:
        model(inputs_embeds=x.detach().requires_grad_()).last_hidden_state.backward(grad)

    def side(name: str, made: Callable[[], Any], needs: float = 8.0) -> None:
        def run() -> dict[str, Any]:
            try:
                with made() as step:
                    return timed(place, step, floor)
            finally:
                spectune.detach(model)
                model.train().requires_grad_(False)

        part.row(name, run, needs=place.of(needs, 0.0))

    part.row(
        "floor",
        lambda: {"peak_mib": mib(place.peak(floor)), "floor_s": round(min(place.in_turn({"": floor}, 3)[""]), 5)},
    )
    for name, text in METHODS.items():
        side(name, lambda text=text: ours(place, model, text, x, grad))
        if name in ("LoRA", "DoRA", "SVFT banded 8"):
            side(f"{name}, kernels off", lambda text=text: ours(place, model, text, x, grad, SPECTUNE_KERNELS="off"))
    for name, options in (("PEFT LoRA", {}), ("PEFT DoRA", {"use_dora": True})):
        side(name, lambda options=options: theirs(model, x, grad, options))
    side("LoRA, norms of training", lambda: ours(place, model, METHODS["LoRA"], x, grad, norms=True))
    side("LoRA, products kept", lambda: ours(place, model, METHODS["LoRA"], x, grad, ways="light"))
    side("LoRA, checkpointed", lambda: ours(place, model, METHODS["LoRA"], x, grad, ways=True))


def drawn(place: Place, seed: int) -> torch.Tensor:
    """Return random hidden states of a batch."""
    torch.manual_seed(seed)
    shape = place.of((8, 1024, 4096), (2, 8, models.TINY["hidden_size"]))
    return torch.randn(shape, device=place.device, dtype=place.of(torch.bfloat16, torch.float32))


@contextmanager
def ours(
    place: Place,
    model: Any,
    text: str,
    x: torch.Tensor,
    grad: torch.Tensor,
    norms: bool = False,
    ways: Any = False,
    **environment: str,
) -> Iterator[Step]:
    """Yield the training step of a method."""
    before = {key: os.environ.get(key) for key in environment}
    with models.made_up_decompositions(), fused_norms(model) if norms else nullcontext():
        spectune.adapt(model, text, factored=True)
        os.environ.update(environment)
        checkpoint_activations(model, ways)
        try:
            yield trained(model.train(), x, grad)
        finally:
            if ways:
                model.gradient_checkpointing_disable()
            for key, value in before.items():
                os.environ.pop(key)
                if value is not None:
                    os.environ[key] = value


@contextmanager
def theirs(model: Any, x: torch.Tensor, grad: torch.Tensor, options: dict[str, Any]) -> Iterator[Step]:
    """Yield the training step of PEFT's LoRA."""
    try:
        import peft
    except ImportError:
        raise Skipped("peft is not installed") from None
    config: Any = peft.LoraConfig(r=16, lora_alpha=32, target_modules=models.SEVEN, **options)
    wrapped: Any = peft.get_peft_model(model, config)
    try:
        yield trained(wrapped.train(), x, grad)
    finally:
        wrapped.unload()


def trained(model: Any, x: torch.Tensor, grad: torch.Tensor) -> Step:
    """Return a training step on what a model trains."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        model(inputs_embeds=x).last_hidden_state.backward(grad)
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(place: Place, step: Step, floor: Step) -> dict[str, Any]:
    """Return a step's time over the floor's, and the memory it takes beside weights and adapter."""
    step()
    peak = place.peak(step)
    times = place.in_turn({"floor": floor, "step": step}, place.of(ROUNDS, 1))
    return {
        "step_over_floor": ratio(times["step"], times["floor"]),
        "step_s": round(min(times["step"]), 5),
        "floor_s": round(min(times["floor"]), 5),
        "peak_mib": mib(peak),
    }


def mib(size: int | None) -> int | None:
    """Return bytes in MiB."""
    return None if size is None else round(size / 2**20)


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Return what is shown of the part."""
    return [
        f"{name:26s} {row['step_over_floor']:6.3f} x the floor, {row['step_s'] * 1e3:8.2f} ms, {row['peak_mib']} MiB"
        for name, row in rows.items()
        if "step_over_floor" in row
    ]
