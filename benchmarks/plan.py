"""What `spectune plan` predicts against what is measured: memory, start-up and step over the floor.

Memory: SmolLM2-135M and MiniLM.  The peak resident size of two steps, in a process for each method, over what it held
with its libraries imported.  `of_allocator`, for LoRA: what is saved by giving back every freed block of more than
64 kB (glibc's M_MMAP_THRESHOLD); the allocator keeps that much for itself.
Start-up: `spectune.adapt` without the cache.  Steps: each in turn with the floor, medians of the ratios.

    python benchmarks/plan.py [--quick] [--only memory|setup|step] [--dtype fp32|bf16]
"""

from __future__ import annotations

import argparse
import ctypes
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

import torch
import transformers  # noqa: F401 - part of the libraries that memory is counted above

import spectune
from _machine import save
from spectune.reports.plan import plan
from spectune.reports.step import Batch, loss_of, make_inputs

METHODS = ["lora", "svf", "svft:pattern=banded", "svft:pattern=top_k", "pissa", "milora", "lora_xs", "dora"]
METHODS += ["dora:inner=svf", "adalora", "vera", "full"]
ROWS, LENGTH = 2, 128
MODELS = {"smollm2-135m": METHODS, "minilm-l6": ["lora", "svf", "lora_xs", "dora", "full"]}


def model_for(name: str, method: str, dtype: str) -> Any:
    """Return an adapted model in training mode; "floor" has a gradient to its embeddings, "full" to everything."""
    model, _ = spectune.load_base(name, dtype)
    if method == "floor":
        model.requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    elif method != "full":
        spectune.adapt(model, method)
    return model.train()


def stepper(model: Any, batch: Batch) -> Callable[[], None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=False) if trained else None
    inputs = make_inputs(model, batch)

    def step() -> None:
        loss_of(model, inputs).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def peak(connection: Any, name: str, method: str, dtype: str, tight: bool) -> None:
    """Send the peak of this process over what it holds now."""
    warnings.simplefilter("ignore")
    if tight:
        ctypes.CDLL(None).mallopt(-3, 1 << 16)
    before = resident("VmRSS")
    step = stepper(model_for(name, method, dtype), Batch(ROWS, LENGTH))
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak of loading
    step()
    step()
    connection.send(resident("VmHWM") - before)


def memory(found: dict[str, Any], dtype: str, quick: bool) -> dict[str, Any]:
    context = multiprocessing.get_context("forkserver")

    def of(*arguments: Any) -> int:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=peak, args=(theirs, *arguments))
        process.start()
        theirs.close()
        size = ours.recv()
        process.join()
        return size

    results = {}
    for name, methods in MODELS.items():
        for method in methods[:3] if quick else methods:
            predicted = found[name][method]["precisions"][dtype]["memory"]["1"]["total"]
            held = of(name, method, dtype, False)
            more = {"of_allocator": held - of(name, method, dtype, True)} if method == "lora" else {}
            results[f"{name} {method}"] = show(f"memory {name} {method}", predicted, held, **more)
    return results


def setup(found: dict[str, Any], dtype: str, quick: bool) -> dict[str, Any]:
    results = {}
    for method in METHODS[:3] if quick else METHODS[:-1]:
        times: list[float] = []
        while len(times) < 3 and sum(times) < 4:
            model, _ = spectune.load_base("smollm2-135m", dtype)
            start = time.perf_counter()
            spectune.adapt(model, method)
            times.append(time.perf_counter() - start)
        results[method] = show(
            f"setup {method}", found["smollm2-135m"][method]["setup_seconds"], statistics.median(times)
        )
    return results


def steps(found: dict[str, Any], dtype: str, quick: bool) -> dict[str, Any]:
    batch = Batch(ROWS, LENGTH)
    floor = stepper(model_for("smollm2-135m", "floor", dtype), batch)
    results = {}
    for method in METHODS[:3] if quick else METHODS:
        step = stepper(model_for("smollm2-135m", method, dtype), batch)
        step(), floor()
        ratios = []
        for _ in range(3):
            times = [time.perf_counter()]
            for one in (floor, step):
                one()
                times.append(time.perf_counter())
            ratios.append((times[2] - times[1]) / (times[1] - times[0]))
        predicted = found["smollm2-135m"][method]["precisions"][dtype]["step_over_floor"]
        results[method] = show(f"step {method}", predicted, statistics.median(ratios))
    return results


def show(what: str, predicted: float, measured: float, **more: Any) -> dict[str, Any]:
    row = {"predicted": predicted, "measured": measured, "ratio": round(predicted / measured, 3), **more}
    row["within_20_percent"] = abs(row["ratio"] - 1) <= 0.2
    print(f"{what:40s} predicted {predicted:12.4g}  measured {measured:12.4g}  ratio {row['ratio']:.3f}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first three methods, and nothing is saved")
    parser.add_argument("--only", choices=["memory", "setup", "step"])
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    found: dict[str, Any] = {}
    rates: dict[str, Any] = {}
    for name, methods in MODELS.items():
        made = plan(name, methods, batch_size=ROWS, length=LENGTH, precisions=[options.dtype])
        found[name] = dict(zip(methods, made.rows, strict=True))
        rates = {k: v for k, v in made.machine.__dict__.items() if k != "times"}
    results: dict[str, Any] = {"plan_seconds": round(time.perf_counter() - start, 1)}
    parts = {"setup": setup, "step": steps, "memory": memory}
    for part, run in parts.items():
        if options.only in (None, part):
            results[part] = run(found, options.dtype, options.quick)
    rows = [row for part in parts for row in results.get(part, {}).values()]
    within = sum(row["within_20_percent"] for row in rows)
    print(f"{within} of {len(rows)} within 20%, in {time.perf_counter() - start:.0f} s")
    if not options.quick and options.only is None:
        about = {
            "batch": [ROWS, LENGTH],
            "dtype": options.dtype,
            "rates": rates,
        }
        save("plan", {**about, **results})


if __name__ == "__main__":
    main()
