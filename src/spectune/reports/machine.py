"""How fast this machine is: rates of a training step, and times of decompositions on stand-in weights."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectune.adapters.files import write_atomically
from spectune.home import cache_dir
from spectune.methods import Method
from spectune.spectral import Request, decompose_many

STAND_IN = 1 << 20  # entries of the largest weight that is decomposed to see how long it takes
_PER_LAYER = 8e-4  # seconds to change a layer's class and register its tensors
_DRAWN = 1.5e8  # random numbers a second
# seconds for 10^9 of out * in * min(out, in) on one core of the machine of the committed benchmarks
_STORED = {"one_sided": 0.24, "full": 0.34, "top": 0.1, "bottom": 0.15}
_KRYLOV = 12  # a rank below this part of the smaller side is iterated for, at a cost in proportion


@dataclass(frozen=True)
class Machine:
    """Rates that a step's cost follows from; the defaults are those of one core of an AMD EPYC.

    Args:
        fp32, bf16: floating-point operations a second in a large product.
        thin: the same in a float32 product one of whose sides is a rank.
        bandwidth: bytes a second of an elementwise operation.
        overhead: seconds of any operation.
        threads: that share the decompositions.
        measured: on this machine; else as stored.
        times: decompositions timed here, "kind rank out in" -> seconds on one core.
    """

    fp32: float = 8e10
    bf16: float = 1.6e11
    thin: float = 4e10
    bandwidth: float = 2.5e10
    overhead: float = 4e-6
    threads: int = 2
    measured: bool = False
    times: dict[str, float] = field(default_factory=dict, repr=False)

    def seconds(self, flops: float, moved: float, dtype: torch.dtype, smallest: int = 1 << 30) -> float:
        """Return the time of one operation: the longer of arithmetic and traffic, and its overhead.

        Args:
            flops: floating-point operations.
            moved: bytes read and written.
            dtype: of the result.
            smallest: side of the matrices in a product.
        """
        rate = self.fp32 if dtype not in (torch.bfloat16, torch.float16) else self.bf16
        if smallest <= 128:
            rate *= self.thin / self.fp32
        return self.overhead + max(flops / rate, moved / self.bandwidth)

    def setup(self, method: Method, out: int, into: int, count: int) -> float:
        """Return the seconds that adapting `count` weights (out x into) takes, without the cache of decompositions."""
        request = method.request()
        values = method.parameter_count(out, into)
        seconds = _PER_LAYER + values / _DRAWN + 4 * out * into / self.bandwidth
        if request is not None:
            seconds += self._decomposition(request, out, into) / self.threads
        first, each = self._basis(method, out, into)
        return count * (seconds + each) + first

    def _decomposition(self, request: Request, out: int, into: int) -> float:
        if not self.measured:
            k = min(out, into)
            share = min(1.0, _KRYLOV * request.rank / k) if request.rank else 1.0
            return _STORED[request.kind] * out * into * k * share / 1e9
        shrink = max(1.0, (out * into / STAND_IN) ** 0.5)
        small_out, small_into = max(1, round(out / shrink)), max(1, round(into / shrink))
        rank = request.rank and max(1, round(request.rank / shrink))
        key = f"{request.kind} {rank} {small_out} {small_into}"
        if key not in self.times:
            self.times[key] = _time_decomposition(request.kind, rank, small_out, small_into)
        return self.times[key] * shrink**3

    def _basis(self, method: Method, out: int, into: int) -> tuple[float, float]:
        """Return the seconds of turning a decomposition into frozen tensors: the first time more, and each time."""
        frozen = type(method).basis is not Method.basis
        if not frozen or not self.measured:
            return 0.0, 0.0
        shrink = max(1.0, (out * into / STAND_IN) ** 0.5)
        small = max(1, round(out / shrink)), max(1, round(into / shrink))
        key = f"basis {method!r} {small[0]} {small[1]}"
        if key not in self.times:
            self.times[key], self.times[f"{key} first"] = _time_basis(method, *small)
        power = shrink**2
        return self.times[f"{key} first"] * power, self.times[key] * power


def this_machine(measure: bool = True) -> Machine:
    """Return this machine's rates: measured the first time (a second), kept, and read back later.

    Args:
        measure: False takes the stored rates of another machine.
    """
    if not measure:
        return Machine()
    try:
        kept = json.loads(_file().read_text(encoding="utf-8"))
        if kept.pop("key") == _key():
            return Machine(**kept)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    return Machine(**_rates(), threads=torch.get_num_threads(), measured=True)


def keep(machine: Machine) -> None:
    """Write down what was measured, where that is possible."""
    if machine.measured:
        text = json.dumps({"key": _key(), **asdict(machine)}, indent=1)
        try:
            _file().parent.mkdir(parents=True, exist_ok=True)
            write_atomically(_file(), lambda path: path.write_text(text, encoding="utf-8"))
        except OSError:
            pass


def _file() -> Path:
    return cache_dir() / "machine.json"


def _key() -> str:
    return f"{platform.node()} {platform.machine()} {torch.__version__} {torch.get_num_threads()}"


def _rates() -> dict[str, Any]:
    x, W, A = torch.randn(512, 768), torch.randn(2048, 768), torch.randn(16, 768)
    xb, Wb = x.bfloat16(), W.bfloat16()
    a = torch.ones(1 << 23)
    scalar = torch.ones(4, requires_grad=True)

    def many() -> None:
        y = scalar
        for _ in range(50):
            y = y * 1.5
        y.sum().backward()

    large, small = 2 * 512 * 768 * 2048, 2 * 512 * 768 * 16
    return {
        "fp32": large / _best(lambda: x @ W.mT, 6),
        "bf16": large / _best(lambda: xb @ Wb.mT, 6),
        "thin": small / _best(lambda: x @ A.mT, 6),
        "bandwidth": 12 * len(a) / _best(lambda: a + a, 6),
        "overhead": _best(many, 6) / 150,
    }


def _best(run: Callable[[], Any], times: int = 2) -> float:
    """Return the least seconds of a run, by the processor's time, which other processes do not lengthen."""
    taken = []
    for _ in range(times):
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return max(min(taken) / torch.get_num_threads(), 1e-9)


def stand_in(out: int, into: int) -> Tensor:
    """Return a weight (out x into) with the spectrum that trained ones have: a power-law head on a random bulk."""
    generator = torch.Generator().manual_seed(0)
    head = max(1, min(out, into) // 16)
    W = torch.randn(out, into, generator=generator) / max(out, into) ** 0.5
    U = torch.randn(out, head, generator=generator) / out**0.5
    V = torch.randn(head, into, generator=generator) / into**0.5
    return W + (U * (12 * torch.arange(1, head + 1) ** -0.6)) @ V


def _time_decomposition(kind: Any, rank: int | None, out: int, into: int) -> float:
    weight, threads = stand_in(out, into), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        return _best(lambda: decompose_many({"": weight}, Request(kind, rank), cache=False))
    finally:
        torch.set_num_threads(threads)


def _time_basis(method: Method, out: int, into: int) -> tuple[float, float]:
    from spectune.reports.step import empty_decomposition

    weight = torch.randn(out, into)
    request = method.request()
    if request is not None and request.rank is not None:
        request = Request(request.kind, min(request.rank, out, into))
    empty = empty_decomposition(request, out, into)
    decomposition = None if empty is None else type(empty)(*(torch.rand(t.shape) for t in empty))
    start = time.process_time()
    method.basis(weight, decomposition)
    first = (time.process_time() - start) / torch.get_num_threads()
    each = _best(lambda: method.basis(weight, decomposition))
    return each, max(0.0, first - each)
