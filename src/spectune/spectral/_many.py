"""The decompositions of many matrices: through the cache, and as many at once as there are threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.spectral import cache as _cache
from spectune.spectral._hash import tensor_digest
from spectune.spectral._sound import is_decomposition
from spectune.spectral._svd import one_sided, svd
from spectune.spectral._types import SVD, OneSided, Request

Weight = Tensor | Callable[[], Tensor]
SMALL = 1 << 21  # entries: up to here a core works on a matrix by itself


def decompose_many(
    weights: Mapping[str, Weight],
    request: Request,
    *,
    cache: bool | str | os.PathLike[str] = True,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, SVD | OneSided]:
    """Decompose many weights, each as `svd` or `one_sided` would.

    Weights of up to 2 million entries on a CPU go to a pool of `torch.get_num_threads()` threads, one core each, which
    keeps every core in large products and makes results independent of the number of threads; larger ones, and those
    on an accelerator, are taken in turn with all threads.  At any time there is one weight a thread in memory, raised
    to float32, besides what was passed in and the factors to be returned.

    Args:
        weights: by name, tensors (out x in) or functions that return them (called once, when the turn comes).
        request: what to compute.
        cache: False does without, a folder is used in place of the usual one.
        progress: called as progress(done, total) after each weight, in units of work (out * in * min(out, in), in
            millions, where tensors were passed; else weights), so that time left is in proportion.

    Returns:
        The results by name, in the order of `weights`, on the weights' devices.

    Raises:
        SpectuneError: a weight that cannot be decomposed, named.
    """
    results = dict(decompose_each(weights, request, cache=cache, progress=progress))
    return {name: results[name] for name in weights}


def decompose_each(
    weights: Mapping[str, Weight],
    request: Request,
    *,
    cache: bool | str | os.PathLike[str] = True,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[str, SVD | OneSided]]:
    """Yield the names and results of `decompose_many` as they are found, the longest work first, and hold none."""
    folder = None
    if cache is not False:
        folder = _cache.directory() if cache is True else Path(cache)
    job = _Job(request, folder)
    work = {name: _work(weight) for name, weight in weights.items()}
    # the longest first, so that no core begins a long one when the others are done
    order = sorted(weights, key=lambda name: -work[name])
    small = [name for name in order if _is_small(weights[name])]
    done, total = 0, sum(work.values())
    # before the pool is there, whose threads would share the cores with their products
    large = ((name, job.run(name, weights[name])) for name in order if name not in small)
    for name, result in chain(large, _on_cores(job.run, {name: weights[name] for name in small})):
        yield name, result
        del result
        done += work[name]
        if progress is not None:
            progress(done, total)
    if job.stored and folder is not None:
        _cache.prune(folder=folder)


class _Job:
    def __init__(self, request: Request, folder: Path | None) -> None:
        self.request, self.folder, self.stored = request, folder, False

    def run(self, name: str, source: Weight) -> SVD | OneSided:
        """Return one weight's decomposition, from the cache where it is there."""
        weight = source() if callable(source) else source
        try:
            if self.folder is None or weight.is_meta:
                return self.compute(weight)
            return self.cached(weight, self.folder)
        except (SpectuneError, torch.linalg.LinAlgError) as error:
            raise SpectuneError(f"{name!r} cannot be decomposed: {error}") from error

    def cached(self, weight: Tensor, folder: Path) -> SVD | OneSided:
        digest = tensor_digest(weight)
        key = _cache.key(digest, self.request)
        found = self.found(key, weight, self.request, folder)
        found = self.from_full(digest, weight, folder) if found is None else found
        if found is not None:
            return found
        result = self.compute(weight)
        tensors = {field: tensor.cpu() for field, tensor in result._asdict().items()}
        if _cache.store(key, tensors, (weight.shape[0], weight.shape[1]), self.request, folder):
            self.stored = True
        return result

    def found(self, key: str, weight: Tensor, request: Request, folder: Path) -> SVD | OneSided | None:
        """Return what the cache answers a request with, if anything; what is no decomposition of the weight goes."""
        kind = OneSided if request.kind == "one_sided" else SVD
        tensors = _cache.load(key, folder)
        if tensors is None:
            return None
        if set(tensors) == set(kind._fields):
            result = kind(**{field: tensor.to(weight.device) for field, tensor in tensors.items()})
            # the digest in the entry's name says whose it is to be; that it is, is looked at, since adapters are built
            # on it
            if is_decomposition(weight, result, request):
                return result
        _cache.discard(key, folder)
        return None

    def from_full(self, digest: str, weight: Tensor, folder: Path) -> SVD | OneSided | None:
        """Return what a cached full decomposition answers: all that would come out the same up to rounding.

        With a tolerance above zero, top and bottom are cheaper and coarser than that.  To answer them from a full
        decomposition would make an adapter's basis depend on what happened to be in the cache when it was trained.
        """
        kind, rank = self.request.kind, self.request.rank
        if kind == "full" or (kind in ("top", "bottom") and self.request.tol > 0):
            return None
        full = Request("full")
        found = self.found(_cache.key(digest, full), weight, full, folder)
        if found is None or (rank or 1) > len(found.S):
            return None
        U, S, Vh = found
        if kind == "one_sided":
            return OneSided(U * S, Vh, S) if weight.shape[0] >= weight.shape[1] else OneSided(U, S[:, None] * Vh, S)
        part = slice(0, rank) if kind == "top" else slice(len(S) - (rank or 0), len(S))
        return SVD(U[:, part].contiguous(), S[part], Vh[part])

    def compute(self, weight: Tensor) -> SVD | OneSided:
        request = self.request
        if request.kind == "one_sided":
            return one_sided(weight)
        return svd(weight, request.rank, request.kind, request.tol, certify=request.certify)


def _on_cores(
    run: Callable[[str, Weight], SVD | OneSided], weights: Mapping[str, Weight]
) -> Iterator[tuple[str, SVD | OneSided]]:
    """Yield names and what run(name, weight) returns as they finish, each computed on one core.

    `torch.set_num_threads` holds for the calling thread and for threads to come; at the end it is put back.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(weights))
    try:
        if workers <= 1:
            torch.set_num_threads(1)
            for name, weight in weights.items():
                yield name, run(name, weight)
            return
        with ThreadPoolExecutor(workers, "spectune", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures = {pool.submit(run, name, weight): name for name, weight in weights.items()}
            try:
                for future in as_completed(list(futures)):
                    yield futures.pop(future), future.result()
            finally:
                # one weight that cannot be decomposed ends the rest, which nobody will ask for
                pool.shutdown(cancel_futures=True)
    finally:
        torch.set_num_threads(threads)


def _is_small(weight: Weight) -> bool:
    return callable(weight) or (weight.numel() <= SMALL and weight.device.type == "cpu")


def _work(weight: Weight) -> int:
    if callable(weight) or weight.dim() != 2:
        return 1
    return 1 + weight.numel() * min(weight.shape) // 10**6
