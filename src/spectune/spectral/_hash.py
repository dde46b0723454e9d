"""A fast digest of a tensor's bytes: against accidents, no defence against forgers."""

from __future__ import annotations

from collections.abc import Mapping

import xxhash
from torch import Tensor

from spectune.storage import bytes_of


def tensor_digest(tensor: Tensor) -> str:
    """Return a hexadecimal digest of a tensor's shape, dtype and bytes, at the speed of memory."""
    digest = xxhash.xxh3_128(f"{tuple(tensor.shape)} {tensor.dtype} ".encode())
    digest.update(bytes_of(tensor))
    return digest.hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return one digest of named tensors."""
    lines = [f"{name} {tensor_digest(tensors[name])}" for name in sorted(tensors)]
    return xxhash.xxh3_128_hexdigest("\n".join(lines).encode())
