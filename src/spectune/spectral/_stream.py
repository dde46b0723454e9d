"""Decompose a checkpoint one tensor at a time, without loading the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.reading import inside, open_tensors, read_json
from spectune.spectral._many import decompose_many
from spectune.spectral._types import SVD, OneSided, Request


class Streamed(NamedTuple):
    """One weight of a checkpoint.

    Args:
        name: in the checkpoint.
        shape: (out, in).
        result: its decomposition.
    """

    name: str
    shape: tuple[int, int]
    result: SVD | OneSided


def stream(
    checkpoint: str | os.PathLike[str],
    request: Request | None = None,
    *,
    select: Callable[[str, tuple[int, int]], bool] | None = None,
    cache: bool | str | os.PathLike[str] = False,
) -> Iterator[Streamed]:
    """Decompose the matrices of a safetensors checkpoint in turn, sharded or not.

    One tensor is in memory at a time, read from the mapped file: the peak is about four times the largest matrix in
    float32, besides the result, which the caller is free to drop.

    Args:
        checkpoint: a .safetensors file, its .index.json, or a folder that holds one.
        request: what to compute; None is the full decomposition.
        select: given a name and a shape (out, in), whether to take that matrix; None takes all that are floating
            point with two dimensions.
        cache: as in `decompose_many`; off by default, for a large model would fill it.

    Yields:
        Name, shape and decomposition, file by file, by name.

    Raises:
        SpectuneError: no such checkpoint, a damaged file, or a selected tensor that cannot be decomposed, named.
    """
    request = Request("full") if request is None else request
    for path in shards(Path(checkpoint)):
        try:
            with open_tensors(path) as file:
                for name in sorted(file.keys()):
                    piece = file.get_slice(name)
                    shape = tuple(piece.get_shape())
                    if len(shape) != 2 or 0 in shape or (select is None and not _floating(piece.get_dtype())):
                        continue
                    if select is not None and not select(name, shape):
                        continue
                    yield Streamed(name, shape, _decompose(name, lambda: file.get_tensor(name), request, cache))  # noqa: B023
        except (SafetensorError, OSError) as error:
            raise SpectuneError(f"{path} cannot be read as safetensors ({error}); download it again") from error


def _decompose(
    name: str, read: Callable[[], Tensor], request: Request, cache: bool | str | os.PathLike[str]
) -> SVD | OneSided:
    return decompose_many({name: read}, request, cache=cache)[name]


def _floating(dtype: str) -> bool:
    return dtype in ("F64", "F32", "F16", "BF16")


def shards(checkpoint: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint: a file, its .index.json, or a folder that holds one.

    Raises:
        SpectuneError: no such checkpoint, or an index that is none.
    """
    if checkpoint.is_dir():
        index = checkpoint / "model.safetensors.index.json"
        single = checkpoint / "model.safetensors"
        files = [index] if index.is_file() else [single] if single.is_file() else []
        files = files or sorted(checkpoint.glob("*.safetensors.index.json")) or sorted(checkpoint.glob("*.safetensors"))
        if not files:
            raise SpectuneError(f"{checkpoint} holds no safetensors checkpoint; give a folder, file or index that does")
        return [shard for file in files for shard in shards(file)]
    if not checkpoint.is_file():
        raise SpectuneError(f"there is no checkpoint {checkpoint}")
    if checkpoint.name.endswith(".index.json"):
        return sorted({checkpoint.parent / name for name in weight_map(checkpoint).values()})
    return [checkpoint]


def weight_map(index: Path) -> dict[str, str]:
    """Return which file of its folder a tensor is in, by an index of shards.

    Raises:
        SpectuneError: it is no index, or names a file elsewhere.
    """
    found = read_json(index)
    names = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(names, dict):
        raise SpectuneError(f"{index} is not an index of shards: it has no weight_map")
    for name in names.values():
        inside(index.parent, name, str(index))
    return names
