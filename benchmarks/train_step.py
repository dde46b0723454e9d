"""Time of a training step over the floor: ours and PEFT's, on SmolLM2-135M, r 16, all 210 linears, in one run.

The floor is the frozen model's forward and its gradient with respect to the embeddings.  Every side runs the same rows
of 128 tokens without padding, with logits at the last quarter of the positions, and a fused AdamW step.  Sides take
turns, and the median of each one's ratio to the floor of the same round is kept.  With one thread (OMP_NUM_THREADS=1)
times are the processor's, which other processes hardly lengthen.

In bf16 ours is timed once more with the attention of `spectune train`, which is taken in fp32, and its norms: PyTorch's
own gradients of attention in bf16 are a quarter of the floor.

    python benchmarks/train_step.py [--dtype fp32|bf16] [--batch 8] [--rounds 7] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
import torch.nn.functional as F

import spectune
from _machine import save
from spectune.planning.probe import clock
from spectune.speed.parts import training_parts

OURS = {
    "LoRA": "lora:rank=16,alpha=32",
    "LoRA-XS": "lora_xs:rank=16",
    "AdaLoRA": "adalora:rank=8,initial_rank=16,total_steps=1000",
    "PiSSA": "pissa:rank=16",
    "MiLoRA": "milora:rank=16,dropout=0.0",
    "DoRA": "dora:inner=lora,rank=16,alpha=32",
    "SVF": "svf",
    "SVFT plain": "svft",
    "SVFT banded 8": "svft:pattern=banded,width=8",
}
LENGTH = 128
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peft_configs() -> dict[str, Any]:
    shared: dict[str, Any] = {"target_modules": SEVEN, "lora_alpha": 32}
    return {
        "PEFT LoRA": peft.LoraConfig(r=16, **shared),
        "PEFT DoRA": peft.LoraConfig(r=16, use_dora=True, **shared),
        "PEFT AdaLoRA": peft.AdaLoraConfig(target_r=8, init_r=16, total_step=1000, **shared),
    }


def batch(rows: int) -> dict[str, torch.Tensor]:
    """Return rows of LENGTH tokens, with the last quarter of the positions supervised."""
    generator = torch.Generator().manual_seed(0)
    keep = torch.arange(LENGTH - LENGTH // 4, LENGTH)
    return {
        "input_ids": torch.randint(100, 40_000, (rows, LENGTH), generator=generator),
        "logits_to_keep": keep,
        "labels": torch.randint(100, 40_000, (rows, len(keep)), generator=generator),
    }


def loss_of(model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    logits = model(**inputs, **kwargs, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def floor_step(dtype: str, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    model, _ = spectune.load_base("smollm2-135m", dtype)
    model.requires_grad_(False).train()
    rest = {k: v for k, v in inputs.items() if k != "input_ids"}

    def step() -> None:
        embedded = model.get_input_embeddings()(inputs["input_ids"]).requires_grad_()
        loss_of(model, rest, inputs_embeds=embedded).backward()

    return step


def train_step(
    model: Any, inputs: dict[str, torch.Tensor], after: Callable[[int], None] = lambda n: None
) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    count = [0]

    def step() -> None:
        loss_of(model, inputs).backward()
        optimizer.step()
        count[0] += 1
        after(count[0])
        optimizer.zero_grad()

    return step


def sides(dtype: str, inputs: dict[str, torch.Tensor], only: list[str]) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield the steps one after the other, each with a model of its own."""
    for name, method in OURS.items():
        if not only or name in only:
            model, _ = spectune.load_base("smollm2-135m", dtype)
            step = train_step(spectune.adapt(model, method, factored=True), inputs)
            yield name, step
            if dtype == "bf16":
                with training_parts(model):
                    yield f"{name}, attention of training", step
    for name, config in peft_configs().items():
        if not only or name in only:
            model, _ = spectune.load_base("smollm2-135m", dtype)
            wrapped: Any = peft.get_peft_model(model, config)
            ada = name == "PEFT AdaLoRA"
            yield name, train_step(wrapped, inputs, wrapped.base_model.update_and_allocate if ada else lambda n: None)


def seconds(step: Callable[[], None]) -> float:
    start = clock()
    step()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--name", default="train_step", help="of the file in results/")
    arguments = parser.parse_args()
    inputs = batch(arguments.batch)
    results: dict[str, Any] = {}
    for dtype in arguments.dtype:
        floor = floor_step(dtype, inputs)
        for name, step in sides(dtype, inputs, arguments.only):
            step(), floor()
            ratios, floors = [], []
            for _ in range(arguments.rounds):
                floors.append(seconds(floor))
                ratios.append(seconds(step) / floors[-1])
            results[f"{name} {dtype}"] = {
                "step_over_floor": round(statistics.median(ratios), 3),
                "floor_seconds": round(statistics.median(floors), 4),
            }
            print(
                f"{name:36s} {dtype}  {statistics.median(ratios):.3f} x the floor of {statistics.median(floors):.3f} s",
                flush=True,
            )
            about = {"batch": arguments.batch, "length": LENGTH, "rounds": arguments.rounds}
            save(arguments.name, {**about, "results": results})


if __name__ == "__main__":
    main()
