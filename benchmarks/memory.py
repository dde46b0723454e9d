"""Peak memory of a training step on short chat pairs: LoRA and DoRA, and what recomputing activations saves and costs.

SmolLM2-135M, r 16, all 210 linears, eight exchanges of film dialogue packed in one row, which has the chat template's
system prompt once.  The peak is that of the bytes that PyTorch's allocator has given out since the step began, with
gradients and without weights; it is exact and does not depend on the machine's load.  Times are of the processor, the
sides take turns, and the median of each one's ratio to the step without recomputation in the same round is kept.

    python benchmarks/memory.py [--dtype fp32 bf16] [--rounds 5] [--layers N]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

import spectune
from _machine import save
from spectune.speed.checkpointing import checkpoint_activations
from spectune.speed.loss import cross_entropy_sum
from spectune.speed.parts import training_parts
from spectune.training.data.encoding import encode_one
from spectune.training.data.packing import Packer
from train_job import BATCH, pairs

METHODS = {"LoRA": "lora:rank=16,alpha=32", "DoRA": "dora:inner=lora,rank=16,alpha=32"}
HOW: dict[str, Any] = {"false": False, "selective": "selective", "true": True}


def peak_bytes(step: Callable[[], None]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    events, changes = list(profiler.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = most = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        held += size
        most = max(most, held)
    return most


def choose(model: Any, how: Any) -> None:
    if model.is_gradient_checkpointing:
        model.activation_checkpointing_disable()
    checkpoint_activations(model, how)


def seconds(step: Callable[[], None]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def measure(dtype: str, method: str, rounds: int, layers: int | None) -> dict[str, Any]:
    model, tokenizer = spectune.load_base("smollm2-135m", dtype)
    model.model.layers = model.model.layers[:layers]
    spectune.adapt(model, method).train()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    examples = [encode_one(pair, tokenizer) for pair in pairs(4 * BATCH)][-BATCH:]
    with training_parts(model):
        batch = Packer(model, 0)(examples)

        def step() -> None:
            inputs = dict(batch)
            cross_entropy_sum(model, inputs, inputs.pop("labels")).backward()
            model.zero_grad()

        peaks, times = {}, {name: [] for name in HOW}
        for name, how in HOW.items():
            choose(model, how)
            step()
            peaks[name] = peak_bytes(step)
        for _ in range(rounds):
            for name, how in HOW.items():
                choose(model, how)
                times[name].append(seconds(step))
    found: dict[str, Any] = {"tokens": batch["input_ids"].numel(), "weights_mib": round(weights / 2**20, 1)}
    for name in HOW:
        ratios = [a / b for a, b in zip(times[name], times["false"], strict=True)]
        found[name] = {
            "peak_mib": round(peaks[name] / 2**20, 1),
            "peak_ratio": round(peaks[name] / peaks["false"], 3),
            "time_ratio": round(statistics.median(ratios), 3),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, help="of the model, for a quick look")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for dtype in arguments.dtype:
        found = {name: measure(dtype, method, arguments.rounds, arguments.layers) for name, method in METHODS.items()}
        more: dict[str, Any] = {}
        for how in HOW:
            lora, dora = (found[name][how]["peak_mib"] for name in METHODS)
            weights = found["LoRA"]["weights_mib"]
            more[how] = {
                "of_the_step": round(dora / lora - 1, 3),
                "with_the_weights": round((dora + weights) / (lora + weights) - 1, 3),
            }
        results[dtype] = {**found, "extra_memory_of_dora": more}
        print(dtype, results[dtype], flush=True)
    if arguments.layers is None:
        save("memory", {"batch": BATCH, "rounds": arguments.rounds, "results": results})


if __name__ == "__main__":
    main()
