"""How fast this machine is: rates of a training step, and times of decompositions on stand-in weights."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from spectune.home import cache_dir
from spectune.methods import Method
from spectune.planning import probe
from spectune.reading import read_json
from spectune.spectral import Request
from spectune.storage import write_atomically

_DRAWN = 1.5e8  # random numbers a second
# seconds for 10^9 of out * in * min(out, in) on one core of the machine of the committed benchmarks
_STORED = {"one_sided": 0.24, "full": 0.34, "top": 0.1, "bottom": 0.15}
_KRYLOV = 12  # a rank below this part of the smaller side is iterated for, at a cost in proportion


@dataclass(frozen=True)
class Machine:
    """Rates that a step's cost follows from; the defaults are those of one core of an AMD EPYC.

    Args:
        fp32, bf16: floating-point operations a second in a large product.
        onednn: those of float32 where oneDNN takes it.
        bandwidth: bytes a second of an elementwise operation.
        fresh: bytes a second of memory that the system gives out for the first time.
        slow: exponentials and the like a second.
        drawn: numbers of a model's own dropout a second.
        words: random words of 64 bits a second, of which an adapter's dropout takes one for four numbers.
        overhead: seconds of any operation.
        layer: seconds of changing a layer's class and registering its tensors.
        threads: that share the decompositions.
        measured: on this machine; else as stored.
        times: what was timed here on stand-ins, by its shape -> seconds.
    """

    fp32: float = 8.5e10
    onednn: float = 2e11
    bf16: float = 1.9e11
    bandwidth: float = 2.3e10
    fresh: float = 1.7e9
    slow: float = 1e9
    drawn: float = 2.5e8
    words: float = 3.0e8
    overhead: float = 3e-6
    layer: float = 2.5e-4
    threads: int = 1
    measured: bool = False
    times: dict[str, float] = field(default_factory=dict, repr=False)

    def passing(self, moved: float, slow: int = 0) -> float:
        """Return the seconds of an elementwise operation.

        Args:
            moved: bytes read and written.
            slow: exponentials and the like that it computes.
        """
        return self.overhead + max(moved / self.bandwidth, slow / self.slow)

    def product(
        self, dtype: torch.dtype, sides: tuple[int, int, int, int], held: tuple[bool, bool], onednn: bool = False
    ) -> float:
        """Return the seconds of a product of matrices, at the rate of one that is like it and small enough to time.

        Args:
            dtype: of the matrices.
            sides: how many, and m, k, n of (m x k) (k x n).
            held: whether the first and the second are held transposed.
            onednn: taken by `spectune.speed.dense` and not by PyTorch's own choice.
        """
        flops = 2 * math.prod(sides)
        if not flops:
            return self.overhead
        if not self.measured:
            least = min(sides[1:])
            return self.overhead + flops / ((self.onednn if onednn else self._peak(dtype)) * least / (least + 8))
        like = (min(sides[0], 8), _near(sides[1]), _near(sides[2]), _near(sides[3]))
        key = f"product {dtype} {like} {held}{' oneDNN' * onednn}"
        timed = self._timed(key, lambda: probe.product(str(dtype), *like, *held, onednn))
        return self.overhead + timed * flops / (2 * math.prod(like))

    def attention(self, dtype: torch.dtype, sides: tuple[int, int, int, int], causal: bool, backward: bool) -> float:
        """Return the seconds of fused attention or of its gradients.

        Args:
            dtype: of the queries.
            sides: heads in all rows, queries, keys, and the size of a head.
            causal: whether a query meets earlier keys only.
            backward: the gradients.
        """
        heads, queries, keys, size = sides
        flops = 4 * math.prod(sides) * (2.5 if backward else 1.0)
        if not self.measured:
            return self.overhead + flops / (0.4 * self._peak(dtype))
        like = (min(heads, 16), _near(queries), _near(keys), size)
        key = f"attention {dtype} {like} {causal} {backward}"
        timed = self._timed(key, lambda: probe.attention(str(dtype), *like, causal, backward))
        return self.overhead + timed * math.prod(sides) / math.prod(like)

    def operation(self, func: Any, arguments: Sequence[Any], entries: int) -> float:
        """Return the seconds of the product with a core that has some entries, timed with a part of its rows."""
        rows = arguments[0].shape[0]
        if not self.measured:
            return self.overhead + 2 * rows * entries / (0.2 * self.fp32)
        few = min(rows, probe.ROWS)
        cut = tuple(a[:few] if isinstance(a, Tensor) and a.dim() > 1 else a for a in arguments)
        shapes = [tuple(a.shape) if isinstance(a, Tensor) else a for a in cut]
        timed = self._timed(f"{func} {cut[0].dtype} {shapes}", lambda: probe.operation(func, cut))
        return self.overhead + timed * rows / few

    def _peak(self, dtype: torch.dtype) -> float:
        return self.fp32 if dtype not in (torch.bfloat16, torch.float16) else self.bf16

    def _timed(self, key: str, run: Callable[[], float]) -> float:
        if key not in self.times:
            self.times[key] = run()
        return self.times[key]

    def setup(self, method: Method, out_features: int, in_features: int, count: int) -> float:
        """Return the seconds that adapting `count` weights (out x into) takes, without the cache of decompositions."""
        request = method.request()
        values = method.parameter_count(out_features, in_features)
        seconds = self.layer + values / _DRAWN + 4 * out_features * in_features / self.bandwidth
        if request is not None:
            seconds += self._decomposition(request, out_features, in_features) / self.threads
        first, each = self._basis(method, out_features, in_features)
        return count * (seconds + each) + first

    def _decomposition(self, request: Request, out_features: int, in_features: int) -> float:
        if not self.measured:
            k = min(out_features, in_features)
            share = min(1.0, _KRYLOV * request.rank / k) if request.rank else 1.0
            return _STORED[request.kind] * out_features * in_features * k * share / 1e9
        shrink = max(1.0, (out_features * in_features / probe.STAND_IN) ** 0.5)
        small_out, small_into = max(1, round(out_features / shrink)), max(1, round(in_features / shrink))
        rank = request.rank and max(1, round(request.rank / shrink))
        key = f"{request.kind} {rank} {small_out} {small_into}"
        timed = self._timed(key, lambda: probe.decomposition(request.kind, rank, small_out, small_into))
        return timed * shrink**3

    def _basis(self, method: Method, out_features: int, in_features: int) -> tuple[float, float]:
        """Return the seconds of turning a decomposition into frozen tensors: the first time more, and each time."""
        frozen = type(method).basis is not Method.basis
        if not frozen or not self.measured:
            return 0.0, 0.0
        shrink = max(1.0, (out_features * in_features / probe.STAND_IN) ** 0.5)
        small = max(1, round(out_features / shrink)), max(1, round(in_features / shrink))
        key = f"basis {method!r} {small[0]} {small[1]}"
        if key not in self.times:
            self.times[key], self.times[f"{key} first"] = probe.basis(method, *small)
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
        kept = read_json(_file())
        if isinstance(kept, dict) and kept.pop("key", None) == _key():
            return TypeAdapter(Machine).validate_python(kept)
    except ValueError:  # SpectuneErrors and pydantic's among them: measured anew
        pass
    rates: dict[str, Any] = probe.rates()
    return Machine(**rates, threads=torch.get_num_threads(), measured=True)


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


def _near(side: int) -> int:
    """Return a side of a product to time: up to 32 itself, above that the nearest power of two up to 1024."""
    return side if side <= 32 else 1 << min(10, round(math.log2(side)))
