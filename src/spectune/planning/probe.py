"""What operations take on this machine, timed on stand-ins of their shape."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spectune.methods import Method
from spectune.model.adapting import adapt
from spectune.spectral import Request, decompose_many
from spectune.spectral._types import Kind, empty_decomposition
from spectune.speed import dense

STAND_IN = 1 << 20  # entries of the largest weight that is decomposed to see how long it takes
_LONG = 0.05  # seconds, of all runs together: what takes as long is not moved by a moment's noise
ROWS = 256  # and rows of the largest input that goes through a core
_EACH, _DEPTH = 4, 3  # modules in a module, of those that are adapted to see how long that takes
_COLD = 1 << 25  # bytes of copies that a timed product's second factor is taken from, as weights come from memory


def clock() -> float:
    """Return seconds: of the processor where one thread works, which other processes do not lengthen; else passed."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def typical(run: Callable[[], object], times: int = 5) -> float:
    """Return the median seconds of a run, after one to warm up; of fewer runs where they are long."""
    start = clock()
    run()
    least = clock() - start  # or more: memory is touched and code compiled for the first time
    taken: list[float] = []
    while len(taken) < times and (not taken or sum(taken) + least < _LONG):
        start = clock()
        run()
        taken.append(clock() - start)
        least = min(least, taken[-1])
    return max(sorted(taken)[len(taken) // 2], 1e-9)


def rates() -> dict[str, float]:
    """Return the constants of a `Machine`."""
    a, b, c = (torch.ones(1 << 23) for _ in range(3))
    few, into = torch.randn(1 << 18), torch.empty(1 << 18)
    words = torch.empty(1 << 18, dtype=torch.int64)
    scalar = torch.ones(4, requires_grad=True)

    def many() -> None:
        y = scalar
        for _ in range(50):
            y = y * 1.5
        y.sum().backward()

    written = typical(lambda: a.fill_(1.0))
    fresh = typical(lambda: torch.ones(1 << 24))  # memory that the system hands out page by page
    large = (1, 512, 768, 2048)
    return {
        "fp32": 2 * math.prod(large) / product("torch.float32", *large, False, True),
        "bf16": 2 * math.prod(large) / product("torch.bfloat16", *large, False, True),
        "onednn": 2 * math.prod(large) / product("torch.float32", *large, False, True, onednn=True),
        "bandwidth": 12 * a.numel() / typical(lambda: torch.add(a, b, out=c)),
        "fresh": 4 * (1 << 24) / max(fresh - 2 * written, 1e-9),
        "slow": few.numel() / typical(lambda: torch.exp(few, out=into)),
        "drawn": few.numel() / typical(lambda: into.bernoulli_(0.5)),
        "words": words.numel() / typical(lambda: words.random_(-(2**63), None)),
        "overhead": typical(many) / 150,
        "layer": layer(),
    }


def layer() -> float:
    """Return the seconds of adapting a layer so small that there is next to nothing to compute."""

    def model(depth: int) -> nn.Module:  # layers lie as deep as in models
        return nn.ModuleList(model(depth - 1) for _ in range(_EACH)) if depth else nn.Linear(8, 8)

    models = [model(_DEPTH) for _ in range(6)]
    return typical(lambda: adapt(models.pop(), "lora:rank=1")) / _EACH**_DEPTH


def product(dtype: str, batch: int, m: int, k: int, n: int, left: bool, right: bool, onednn: bool = False) -> float:
    """Return the seconds of a product (m x k) (k x n); `left` and `right` tell which is held transposed."""
    kind = getattr(torch, dtype.rpartition(".")[2])

    def drawn(rows: int, columns: int, transposed: bool) -> Tensor:
        shape = (batch, columns, rows) if transposed else (batch, rows, columns)
        made = torch.full(shape if batch > 1 else shape[1:], 0.5, dtype=kind)
        return made.mT if transposed else made

    a, b = drawn(m, k, left), drawn(k, n, right)
    copies = [b, *(drawn(k, n, right) for _ in range(min(8, _COLD // (b.numel() * b.element_size()))))]
    turn, multiply = [0], dense.matmul if onednn else torch.matmul

    def run() -> None:
        turn[0] += 1
        multiply(a, copies[turn[0] % len(copies)])

    return typical(run)


def attention(dtype: str, heads: int, queries: int, keys: int, size: int, causal: bool, backward: bool) -> float:
    """Return the seconds of fused attention, or of its gradients."""
    kind = getattr(torch, dtype.rpartition(".")[2])
    q, k, v = (torch.randn(1, heads, n, size).to(kind) for n in (queries, keys, keys))
    of = torch.ops.aten
    if not backward:
        return typical(lambda: of._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal))
    out, log_sum = of._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    gradients = of._scaled_dot_product_flash_attention_for_cpu_backward
    return typical(lambda: gradients(torch.ones_like(out), q, k, v, out, log_sum, 0.0, causal))


def operation(func: Callable[..., object], arguments: tuple[Any, ...]) -> float:
    """Return the seconds of one of our operators, on numbers of its arguments' shapes; integers are places."""
    size = arguments[0].shape[-1]

    def filled(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        if value.is_floating_point():
            return torch.randn(value.shape).to(value.dtype)
        return torch.randint(size, value.shape)

    made = [filled(a) for a in arguments]
    return typical(lambda: func(*made))


def stand_in(out_features: int, in_features: int) -> Tensor:
    """Return a weight (out_features x in_features) with a trained one's spectrum: a power-law head on a bulk."""
    generator = torch.Generator().manual_seed(0)
    head = max(1, min(out_features, in_features) // 16)
    W = torch.randn(out_features, in_features, generator=generator) / max(out_features, in_features) ** 0.5
    U = torch.randn(out_features, head, generator=generator) / out_features**0.5
    V = torch.randn(head, in_features, generator=generator) / in_features**0.5
    return W + (U * (6 * torch.arange(1, head + 1) ** -0.6)) @ V


def decomposition(kind: Kind, rank: int | None, out_features: int, in_features: int) -> float:
    """Return the seconds that one core takes for a decomposition of a stand-in weight."""
    weight, threads = stand_in(out_features, in_features), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        return typical(lambda: decompose_many({"": weight}, Request(kind, rank), cache=False), 3)
    finally:
        torch.set_num_threads(threads)


def basis(method: Method, out_features: int, in_features: int) -> tuple[float, float]:
    """Return the seconds of turning a decomposition into frozen tensors: each time, and the first time more."""
    weight = torch.randn(out_features, in_features)
    request = method.request()
    if request is not None and request.rank is not None:
        request = Request(request.kind, min(request.rank, out_features, in_features))
    empty = empty_decomposition(request, out_features, in_features)
    found = None if empty is None else type(empty)(*(torch.rand(t.shape) for t in empty))
    start = clock()
    method.basis(weight, found)
    first = clock() - start
    each = typical(lambda: method.basis(weight, found), 3)
    return each, max(0.0, first - each)
