"""Time of the Triton kernels over that of the PyTorch code in whose place they are, in one run.

Products alone, and forward and backward of whole adapted layers, at the sizes of a 7B model's projections.  The two
sides take turns, and the median of the ratios of each round is kept; below 1 the kernels are faster.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn

import spectune
from gpu.models import made_up_decompositions
from gpu.part import Part, Place, ratio
from spectune.layers import products
from spectune.layers.core_ops import band_entries, banded_entries, banded_product
from spectune.layers.kernels import kernels

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


def measure(part: Part) -> None:
    """Fill the rows of the part."""
    place = part.place
    rows, sizes = place.of((8192, [(4096, 4096), (4096, 14336)]), (16, [(40, 40)]))
    for dtype in DTYPES:
        for n_in, n_out in sizes:
            shape = (place, rows, n_in, n_out, dtype)
            bands = of_bands(place, rows, n_in, dtype) if n_out == n_in else ()
            for name, sides in (*of_products(*shape), *bands, *of_layers(*shape)):
                key = f"{name} {n_in}x{n_out} {str(dtype).removeprefix('torch.')}"
                part.row(key, lambda sides=sides: compared(place, sides()))


def of_products(
    place: Place, rows: int, n_in: int, n_out: int, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], Sides]]]:
    """Yield each product with thin factors, with the casts that PyTorch needs."""

    def sides(run: Callable[[Any, dict[str, Any]], Any]) -> Callable[[], Sides]:
        def made() -> Sides:
            low_rank = kernels("low_rank", torch.zeros(1, device=place.device)) or products
            drawn: dict[str, Any] = {
                "x": torch.randn(rows, n_in, device=place.device, dtype=dtype),
                "y": torch.randn(rows, n_out, device=place.device, dtype=dtype),
                "t": torch.randn(rows, RANK, device=place.device, dtype=dtype),
                "A": torch.randn(RANK, n_in, device=place.device),
                "B": torch.randn(n_out, RANK, device=place.device),
                "ratio": torch.rand(n_out, device=place.device) + 0.5,
                "bias": torch.randn(n_out, device=place.device, dtype=dtype),
            }
            return lambda: run(low_rank, drawn), lambda: run(products, drawn)

        return made

    def factor(ops: Any, matrix: Any) -> Any:
        return ops.factor(matrix, dtype)

    yield "project", sides(lambda ops, d: ops.project(d["x"], factor(ops, d["A"])))
    yield "add", sides(lambda ops, d: ops.add(d["y"], d["t"], factor(ops, d["B"]), 0.1))
    yield (
        "add, ratio, bias",
        sides(lambda ops, d: ops.add(d["y"], d["t"], factor(ops, d["B"]), 0.1, d["ratio"], d["bias"])),
    )
    yield "over_rows", sides(lambda ops, d: ops.over_rows(d["y"], d["t"], 0.1))
    yield "through_ratio", sides(lambda ops, d: ops.through_ratio(d["y"], d["y"], d["bias"], d["ratio"]))


def of_switch(run: Callable[[], Any]) -> Sides:
    """Return the same with kernels and without."""

    def without() -> None:
        before = os.environ.get("SPECTUNE_KERNELS")
        os.environ["SPECTUNE_KERNELS"] = "off"
        try:
            run()
        finally:
            del os.environ["SPECTUNE_KERNELS"]
            if before is not None:
                os.environ["SPECTUNE_KERNELS"] = before

    return run, without


def of_bands(place: Place, rows: int, size: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Sides]]]:
    """Yield products with banded cores, and their gradients."""
    for width in (1, 8, 16):

        def made(width: int, gradient: bool) -> Sides:
            t = torch.randn(rows, size, device=place.device, dtype=dtype)
            values = torch.randn(band_entries(size, width), device=place.device, dtype=dtype)
            if gradient:
                return of_switch(lambda: banded_entries(t, t, width, False))
            return of_switch(lambda: banded_product(t, values, width, False))

        yield f"banded {width}", lambda width=width, made=made: made(width, False)
        yield f"banded {width} gradient", lambda width=width, made=made: made(width, True)


def of_layers(
    place: Place, rows: int, n_in: int, n_out: int, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], Sides]]]:
    """Yield forward and backward of adapted layers."""

    def made(method: str) -> Sides:
        model = nn.Sequential(nn.Linear(n_in, n_out, bias=False, device=place.device, dtype=dtype))
        with made_up_decompositions():
            spectune.adapt(model, method).train()
        x = torch.randn(rows, n_in, device=place.device, dtype=dtype, requires_grad=True)
        grad = torch.randn(rows, n_out, device=place.device, dtype=dtype)
        return of_switch(lambda: model(x).backward(grad))

    for method in METHODS:
        yield f"layer {method}", lambda method=method: made(method)


def compared(place: Place, sides: Sides) -> dict[str, Any]:
    """Return the ratio of the two sides' times."""
    times = place.in_turn({"kernel": sides[0], "pytorch": sides[1]}, place.of(15, 1), warm=place.of(3, 1))
    return {
        "kernel_over_pytorch": ratio(times["kernel"], times["pytorch"]),
        "kernel_ms": round(1e3 * min(times["kernel"]), 4),
        "pytorch_ms": round(1e3 * min(times["pytorch"]), 4),
    }


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Return what is shown of the part."""
    return [
        f"{name:60s} {row['kernel_over_pytorch']:6.3f} of {row['pytorch_ms']:8.3f} ms"
        for name, row in rows.items()
        if "kernel_over_pytorch" in row and ("bfloat16" in name)
    ]
