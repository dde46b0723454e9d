"""What `spectune plan` predicts against what is measured: memory, start-up and the step, in seconds and over the floor.

A step is what `spectune train` does: packed rows, the cross-entropy of training, and a fused AdamW.  Its time and the
floor's are medians, taken in turn.  Start-up is `spectune.adapt` without the cache.  Memory is the peak resident size
of two steps, in a process for each method, over what it holds once it has trained the same and let it go: what the
libraries keep for themselves, such as programs and buffers for products, is not the plan's.  The heap has glibc's own
settings there, and for times those of `spectune train`.

    python benchmarks/plan.py [--models NAME ...] [--methods METHOD ...] [--dtype fp32|bf16] [--parts PART ...]

With one thread (OMP_NUM_THREADS=1) times are the processor's, which other processes hardly lengthen.  All of it is
written to results/plan.<processor>.json, and a part, unless --output gives another name, to plan_part.<processor>.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["SPECTUNE_CACHE"] = "off"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # as `spectune train` does

import torch
import transformers  # noqa: F401 - part of the libraries that memory is counted above

import spectune
from _machine import forget_peak, resident, save
from spectune.planning.batch import Batch, loss_of, make_inputs, training_attention
from spectune.planning.plan import plan
from spectune.planning.probe import clock
from spectune.speed.checkpointing import checkpoint_activations
from spectune.speed.heap import keep_memory, release_memory

METHODS = ["lora", "svf", "svft:pattern=banded", "svft:pattern=top_k", "pissa", "milora", "lora_xs", "dora"]
METHODS += ["dora:inner=svf", "adalora", "vera", "full"]
MODELS = ["smollm2-135m", "minilm-l6"]
PARTS = ["setup", "step", "memory"]
BATCH = Batch(2, 128)
ROUNDS = 5


def model_for(name: str, method: str, dtype: str) -> Any:
    """Return an adapted model in training mode; "floor" has a gradient to its embeddings, "full" to everything."""
    model, _ = spectune.load_base(name, dtype)
    if method == "floor":
        model.requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    elif method != "full":
        spectune.adapt(model, method, factored=True)
    if method != "floor":
        checkpoint_activations(model, BATCH.gradient_checkpointing)
    return model.train()


def stepper(model: Any) -> Callable[[], None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True) if trained else None
    with training_attention(model):
        inputs = make_inputs(model, BATCH)

    def step() -> None:
        with training_attention(model):
            loss_of(model, inputs).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def released() -> None:
    gc.collect()
    release_memory()


def peak(connection: Any, name: str, method: str, dtype: str) -> None:
    """Send the peak of this process over what it holds now."""
    warnings.simplefilter("ignore")
    trained = stepper(model_for(name, method, dtype))
    trained(), trained()
    del trained
    released()
    before = resident("VmRSS")
    model = model_for(name, method, dtype)
    for parameter in model.parameters():
        parameter.sum()  # a file that is mapped counts as held only where it was read
    step = stepper(model)
    released()
    forget_peak()  # of loading and decomposing
    step()
    step()
    connection.send(resident("VmHWM") - before)


def memory(name: str, found: dict[str, Any], dtype: str) -> dict[str, Any]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers", "spectune", "spectune.planning.plan"])
    results = {}
    for method, row in found.items():
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=peak, args=(theirs, name, method, dtype))
        process.start()
        theirs.close()
        held = ours.recv()
        process.join()
        predicted = row["precisions"][dtype]["memory"]["1"]["total"]
        results[method] = show(f"memory {name} {method}", predicted, held)
    return results


def setup(name: str, found: dict[str, Any], dtype: str) -> dict[str, Any]:
    results = {}
    for method, row in found.items():
        times: list[float] = []
        while method != "full" and len(times) < 3 and sum(times) < 4:
            model, _ = spectune.load_base(name, dtype)
            start = clock()
            spectune.adapt(model, method)
            times.append(clock() - start)
        if times:
            results[method] = show(f"setup {name} {method}", row["setup_seconds"], statistics.median(times))
    return results


def steps(name: str, found: dict[str, Any], dtype: str) -> dict[str, Any]:
    floor = stepper(model_for(name, "floor", dtype))
    results = {}
    for method, row in found.items():
        step = stepper(model_for(name, method, dtype))
        step(), floor()
        floors, taken = [], []
        for _ in range(ROUNDS):
            for one, seconds in ((floor, floors), (step, taken)):
                start = clock()
                one()
                seconds.append(clock() - start)
        at = row["precisions"][dtype]
        ratio = statistics.median(b / a for a, b in zip(floors, taken, strict=True))
        results[method] = show(f"step over floor {name} {method}", at["step_over_floor"], ratio)
        results[f"{method} seconds"] = show(
            f"step seconds {name} {method}", at["step_seconds"], statistics.median(taken)
        )
    return results


def show(what: str, predicted: float, measured: float) -> dict[str, Any]:
    row = {"predicted": predicted, "measured": measured, "ratio": round(predicted / measured, 3)}
    row["within_20_percent"] = abs(row["ratio"] - 1) <= 0.2
    print(f"{what:48s} predicted {predicted:12.4g}  measured {measured:12.4g}  ratio {row['ratio']:.3f}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--output", help="name of the file in results/")
    parser.add_argument(
        "--update", action="store_true", help="replace what is measured in plan.json, and keep the rest"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    keep_memory()
    start = time.perf_counter()
    before = Path(__file__).parent / "results" / "plan.json"
    results: dict[str, Any] = json.loads(before.read_text(encoding="utf-8"))["results"] if options.update else {}
    made: Any = None
    for name in options.models:
        made = plan(
            name, options.methods, batch_size=BATCH.rows, length=BATCH.length, precisions=options.dtype, measured=True
        )
        found = dict(zip(options.methods, made.rows, strict=True))
        print(f"{name} planned after {time.perf_counter() - start:.0f} s", flush=True)
        for dtype in options.dtype:
            for part in options.parts:
                run = {"setup": setup, "step": steps, "memory": memory}[part]
                known = results.get(f"{part} {name} {dtype}", {})
                results[f"{part} {name} {dtype}"] = {**known, **run(name, found, dtype)}
                keep(options, made, results)
    print(f"in {time.perf_counter() - start:.0f} s")


def keep(options: Any, made: Any, results: dict[str, Any]) -> None:
    """Write down what was measured so far."""
    rows = [row for part in results.values() for row in part.values()]
    within = sum(row["within_20_percent"] for row in rows)
    print(f"{within} of {len(rows)} within 20%")
    whole = [options.models, options.methods, options.parts] == [MODELS, METHODS, PARTS] or options.update
    rates = {k: v for k, v in made.machine.__dict__.items() if k != "times"}
    about = {"batch": [BATCH.rows, BATCH.length], "rates": rates, "within": within, "of": len(rows)}
    save(options.output or ("plan" if whole else "plan_part"), {**about, "results": results})


if __name__ == "__main__":
    main()
