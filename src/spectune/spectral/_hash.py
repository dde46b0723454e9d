"""A fast digest of a tensor's bytes: against accidents, no defence against forgers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor


def tensor_digest(tensor: Tensor) -> str:
    """Return a hexadecimal digest of a tensor's shape, dtype and bytes, at the speed of memory."""
    digest = xxhash.xxh3_128(f"{tuple(tensor.shape)} {tensor.dtype} ".encode())
    data: Any = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy()  # a buffer, untyped before 3.12
    digest.update(data)
    return digest.hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return one digest of named tensors."""
    lines = [f"{name} {tensor_digest(tensors[name])}" for name in sorted(tensors)]
    return xxhash.xxh3_128_hexdigest("\n".join(lines).encode())
