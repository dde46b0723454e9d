"""What a machine may do otherwise than the one at hand, imitated: options of pytest, all off unless they are given.

--shuffle N         files in an order drawn by N, and the tests of a file too.
--share K/N         the Kth of N parts, alike in size: whole files, dealt out in an order drawn once.
--seeds N           other random numbers everywhere: every seed that a test or a run gives to PyTorch is moved by N.
--other-sums        products of matrices by NumPy, whose sums are rounded otherwise than those of PyTorch.
--standing-clock    the time of day stands still.

`portable.py` runs the tests under these and under other instruction sets.
"""

from __future__ import annotations

import random
import sys
import time
import warnings
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

_KEPT: list[Any] = []  # libraries of operators, which go with the last reference


def pytest_addoption(parser: pytest.Parser) -> None:
    """Name the options."""
    group = parser.getgroup("imitations of other machines")
    group.addoption("--shuffle", type=int, metavar="N", help="order drawn by N")
    group.addoption("--share", metavar="K/N", help="the Kth of N parts of the files")
    group.addoption("--seeds", type=int, default=0, metavar="N", help="random numbers drawn by N")
    group.addoption("--other-sums", action="store_true", help="products of matrices by NumPy's library")
    group.addoption("--standing-clock", action="store_true", help="the time of day stands still")


def begin(config: pytest.Config) -> None:
    """Imitate what was asked for, for the rest of the process."""
    if config.getoption("--seeds"):
        _move_seeds(100_003 * config.getoption("--seeds"))
    if config.getoption("--other-sums"):
        _multiply_by_numpy()
    if config.getoption("--standing-clock"):
        now = time.time_ns()
        time.time_ns = lambda: now
        time.time = lambda: now / 10**9


@cache
def part(which: str) -> frozenset[Path]:
    """Return the files of a part "K/N": every file is in that of one K."""
    k, n = map(int, which.split("/"))
    files = sorted(Path(__file__).parent.rglob("test_*.py"))
    random.Random(0).shuffle(files)
    return frozenset(files[k - 1 :: n])


def shuffle(items: list[pytest.Item], seed: int) -> None:
    """Put files in an order drawn by a seed, and the tests within each, so that what a file shares is made once."""
    drawn = random.Random(seed)
    files = [list(group) for _, group in groupby(items, key=lambda item: item.path)]
    drawn.shuffle(files)
    for tests in files:
        drawn.shuffle(tests)
    items[:] = [item for tests in files for item in tests]


def _move_seeds(by: int) -> None:
    """Move what tests and runs seed, but no generator of the library's own, which makes the same on every machine."""
    seed, here = torch.manual_seed, str(Path(__file__).parent)

    class Generator(torch.Generator):
        def manual_seed(self, number: int) -> Any:
            of_a_test = sys._getframe(1).f_code.co_filename.startswith(here)
            return super().manual_seed(number + by if of_a_test else number)

    torch.manual_seed = lambda number: seed(int(number) + by)
    torch.Generator = Generator  # type: ignore[misc]


def _multiply_by_numpy() -> None:
    """Take the kernels of products on the processor from PyTorch.

    Those of half precision are summed in float32 and rounded once, as hardware with such units does it.
    """

    def held(t: torch.Tensor) -> np.ndarray:
        t = t.detach()
        return (t.float() if t.dtype in (torch.bfloat16, torch.float16) else t).resolve_conj().resolve_neg().numpy()

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(np.matmul(held(a), held(b)))).to(a.dtype)

    def added(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: Any = 1, alpha: Any = 1) -> torch.Tensor:
        found = torch.from_numpy(np.ascontiguousarray(np.matmul(held(a), held(b)))) * alpha
        if beta != 0:
            found = found + beta * bias.detach().to(found.dtype)
        return found.to(a.dtype)

    def into(function: Any) -> Any:
        def write(*args: Any, out: torch.Tensor, **options: Any) -> torch.Tensor:
            found = function(*args, **options)
            return out.resize_(found.shape).copy_(found)

        return write

    library = torch.library.Library("aten", "IMPL")
    _KEPT.append(library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are replaced is the point
        for name, function in {"mm": product, "bmm": product, "addmm": added, "baddbmm": added}.items():
            library.impl(name, function, "CPU", allow_override=True)
            library.impl(f"{name}.out", into(function), "CPU", allow_override=True)
