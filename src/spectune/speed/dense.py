"""Products of matrices without gradients, by whichever of PyTorch's two libraries for processors is the faster.

And whether products of float32 are products of float32, which PyTorch has two kinds of settings for.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from spectune.private import any_autocast, is_transformed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias, as `torch.nn.functional.linear` does, but without gradients.

    PyTorch gives float32 products on a processor to MKL, which uses half of the vector units of those that are not
    Intel's; oneDNN, which comes with PyTorch too, uses all.  `torch.backends.mkldnn.enabled = False` takes MKL.

    Args:
        x: (..., in).
        weight: W (out x in).
        bias: (out), or None.
    """
    if _product is not None and by_onednn(x, weight):
        return _product(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a b for a (..., k) and b (k x m), without gradients, as `linear` does."""
    return linear(a, b.mT)


class PackedWeight:
    """A matrix laid out once as oneDNN multiplies by it, which otherwise lays it out anew in each product.

    It answers one row of bfloat16 in half of the time, and of float32 where MKL is slow, and some rows in a fifth less
    elsewhere (`least_rows`); it takes as much memory as the matrix does.

    Args:
        weight: W (out x in), which `PackedWeight.takes`.
    """

    def __init__(self, weight: Tensor) -> None:
        assert _lay_out is not None  # or it takes no weight
        assert _product is not None
        self._product, self._packed, self.dtype = _product, _lay_out(weight.contiguous()), weight.dtype
        self._least = (least_rows(weight.dtype) - 1) * weight.shape[1] + 1  # numbers in x

    @staticmethod
    def takes(weight: Tensor) -> bool:
        """Whether a matrix can be laid out, and products with it are then what they were, but for their rounding."""
        if weight.device.type != "cpu" or weight.dim() != 2 or not weight.numel() or _lay_out is None:
            return False
        if _product is None or not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
            return False
        return weight.dtype is torch.float32 or (weight.dtype is torch.bfloat16 and _multiplies_bf16())

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """Return x W^T + bias.

        None where gradients or transforms would go through it, autocast have a part, or W as it is answers sooner.
        """
        if x.dtype is not self.dtype or (x.requires_grad and torch.is_grad_enabled()):
            return None
        if any_autocast() or is_transformed() or x.device.type != "cpu" or 0 < x.numel() < self._least:
            return None
        return self._product(x, self._packed, bias, "none", [], "")


_SMALL = 1 << 20  # multiplications, below which a call of oneDNN takes longer than the product
_product: Callable[..., Tensor] | None = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_lay_out: Callable[[Tensor], Tensor] | None = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_multiplies_bf16: Callable[[], bool] = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether x W^T is oneDNN's where PyTorch's own choice is MKL."""
    if torch.compiler.is_compiling() or x.device.type not in ("cpu", "meta"):
        return False
    if not (x.dtype is weight.dtype is torch.float32) or x.numel() * len(weight) < _SMALL:
        return False
    if not (weight.is_contiguous() or weight.mT.is_contiguous()):  # of which it takes products hundreds of times slower
        return False
    return torch.backends.mkldnn.enabled and _mkl_is_slow()


@cache
def least_rows(dtype: torch.dtype) -> int:
    """Return the number of rows from which on a matrix that is laid out answers sooner than PyTorch does.

    Measured on AMD's processors with AVX2 and with AVX-512, and on Intel's with AMX, whose one row of float32 takes 1.4
    times as long and whose four take 0.8.
    """
    if torch.backends.cpu.get_cpu_capability().startswith(("AVX2", "DEFAULT")):
        return 2
    return 1 if dtype is not torch.float32 or _mkl_is_slow() else 4


def one_row_pays(dtype: torch.dtype) -> bool:
    """Whether a matrix that is laid out answers one row sooner."""
    return least_rows(dtype) == 1


@cache
def _mkl_is_slow() -> bool:
    """Whether this is a processor with AVX-512 that is not Intel's, on which MKL keeps to AVX2."""
    both = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available() and _product is not None
    return both and torch.backends.cpu.get_cpu_capability().startswith("AVX512") and "AuthenticAMD" in _processor()


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()


def float32_is_exact() -> bool:
    """Whether PyTorch takes products of float32 in float32, and not in TF32 or bfloat16."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # it was set library by library, which the one setting for all does not know
        return not _coarse_libraries()


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within the context products of float32 are taken in float32."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        libraries = _coarse_libraries()
        for library, _ in libraries:
            library.fp32_precision = "ieee"
        try:
            yield
        finally:
            for library, precision in libraries:
                library.fp32_precision = precision
        return
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)


class _Precision(Protocol):
    """The settings of one library."""

    fp32_precision: str


def _coarse_libraries() -> list[tuple[_Precision, str]]:
    """Return the settings of libraries that take products of float32 in fewer bits, and what they are."""
    both = [cast(_Precision, torch.backends.cuda.matmul), cast(_Precision, cast(Any, torch.backends.mkldnn).matmul)]
    return [(library, library.fp32_precision) for library in both if library.fp32_precision not in ("ieee", "none")]
