"""Time of the Triton kernels over that of the PyTorch code in whose place they are, on a GPU, in one run.

Products alone, and forward and backward of whole adapted layers, at the sizes of a 7B model's projections.  The two
sides take turns, and the median of the ratios of each round is kept; below 1 the kernels are faster.

    python benchmarks/kernels.py [--rows 8192] [--rounds 20]
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import torch
import torch.nn as nn

import spectune
from _machine import save
from spectune.layers import products
from spectune.layers.core_ops import band_entries, banded_entries, banded_product
from spectune.layers.kernels import kernels

SIZES = [(4096, 4096), (4096, 11008)]
DTYPES = [torch.bfloat16, torch.float32]
RANK = 16
METHODS = [
    "lora:rank=16",
    "pissa:rank=16",
    "adalora:rank=8,initial_rank=16,total_steps=1000",
    "dora:inner=lora,rank=16",
    "svft:pattern=banded,width=8",
]
Sides = tuple[Callable[[], Any], Callable[[], Any]]


def of_products(rows: int, n_in: int, n_out: int, dtype: torch.dtype, device: str) -> Iterator[tuple[str, Sides]]:
    """Yield each product with thin factors, with the casts that PyTorch needs."""
    low_rank: Any = kernels("low_rank", torch.zeros(1, device=device))
    x, y = (torch.randn(rows, k, device=device, dtype=dtype) for k in (n_in, n_out))
    t = torch.randn(rows, RANK, device=device, dtype=dtype)
    A, B = torch.randn(RANK, n_in, device=device), torch.randn(n_out, RANK, device=device)
    ratio, bias = torch.rand(n_out, device=device) + 0.5, torch.randn(n_out, device=device, dtype=dtype)
    work = y.clone()

    def sides(run: Callable[[Any], Any]) -> Sides:
        return lambda: run(low_rank), lambda: run(products)

    yield "project", sides(lambda ops: ops.project(x, ops.factor(A, dtype)))
    yield "add", sides(lambda ops: ops.add(work, t, ops.factor(B, dtype), 0.1))
    yield "add, ratio, bias", sides(lambda ops: ops.add(work, t, ops.factor(B, dtype), 0.1, ratio, bias))
    yield "over_rows", sides(lambda ops: ops.over_rows(y, t, 0.1))
    yield "through_ratio", sides(lambda ops: ops.through_ratio(y, y, bias, ratio))


def of_switch(run: Callable[[], Any]) -> Sides:
    """Return the same with kernels and without."""

    def without() -> None:
        os.environ["SPECTUNE_KERNELS"] = "off"
        run()
        del os.environ["SPECTUNE_KERNELS"]

    return run, without


def of_bands(rows: int, size: int, dtype: torch.dtype, device: str) -> Iterator[tuple[str, Sides]]:
    """Yield products with banded cores, and their gradients."""
    t = torch.randn(rows, size, device=device, dtype=dtype)
    for width in (1, 8, 16):
        values = torch.randn(band_entries(size, width), device=device, dtype=dtype)
        yield f"banded {width}", of_switch(lambda v=values, w=width: banded_product(t, v, w, False))
        yield f"banded {width} gradient", of_switch(lambda w=width: banded_entries(t, t, w, False))


def of_layers(rows: int, n_in: int, n_out: int, dtype: torch.dtype, device: str) -> Iterator[tuple[str, Sides]]:
    """Yield forward and backward of adapted layers."""
    for method in METHODS:
        model = nn.Sequential(nn.Linear(n_in, n_out, bias=False, device=device, dtype=dtype))
        spectune.adapt(model, method).train()
        x = torch.randn(rows, n_in, device=device, dtype=dtype, requires_grad=True)
        grad = torch.randn(rows, n_out, device=device, dtype=dtype)
        yield f"layer {method}", of_switch(lambda m=model, x=x, g=grad: m(x).backward(g))


def milliseconds(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def ratio_of(sides: Sides, rounds: int) -> dict[str, float]:
    ours, theirs = sides
    for _ in range(3):
        ours(), theirs()
    pairs = [(milliseconds(ours), milliseconds(theirs)) for _ in range(rounds)]
    return {
        "kernel_over_pytorch": round(statistics.median(a / b for a, b in pairs), 3),
        "kernel_ms": round(statistics.median(a for a, _ in pairs), 4),
        "pytorch_ms": round(statistics.median(b for _, b in pairs), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no GPU here, and the kernels run on nothing else: nothing is measured.")
        return
    if kernels("low_rank", torch.zeros(1, device="cuda")) is None:
        raise SystemExit("Triton's kernels are switched off here, or do not work")
    results: dict[str, Any] = {}
    for dtype in DTYPES:
        for n_in, n_out in SIZES:
            shape = (arguments.rows, n_in, n_out, dtype, "cuda")
            bands = of_bands(arguments.rows, n_in, dtype, "cuda") if n_out == n_in else ()
            for name, sides in (*of_products(*shape), *bands, *of_layers(*shape)):
                key = f"{name} {n_in}x{n_out} {str(dtype).removeprefix('torch.')}"
                results[key] = ratio_of(sides, arguments.rounds)
                print(key, results[key], flush=True)
    versions = {"triton": metadata.version("triton")}
    save(
        "kernels",
        {"versions": versions, "rows": arguments.rows, "rank": RANK, "rounds": arguments.rounds, "results": results},
    )


if __name__ == "__main__":
    main()
