"""Go through a checkpoint, one matrix at a time, and keep what was found at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from spectune.adapters.adapter import Adapter
from spectune.adapters.folder import folder_digest
from spectune.errors import SpectuneError, first_line, nearest
from spectune.spectral import singular_values
from spectune.spectrum.checkpoint import Checkpoint, Matrix
from spectune.spectrum.ledger import Ledger, packed, unpacked
from spectune.spectrum.movement import as_entry, movement

FORMAT = 1
_WHOLE = "trained whole, and no update of what the base has there"
Progress = Callable[[float, float, str], None]
_UNREADABLE = (SafetensorError, OSError, ValueError, RuntimeError, NotImplementedError)


def collect(
    checkpoint: Checkpoint, folder: Path, *, device: str = "cpu", progress: Progress | None = None
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the singular values of a checkpoint's matrices by name, and why there are none of the others.

    Each matrix's go to a line of `values-<fingerprint>.jsonl` as soon as they are there; a run that finds the file
    goes on from it.  Memory holds one matrix and twice the square of its smaller side in float64.

    Args:
        checkpoint: what to measure.
        folder: for the file.
        device: where to compute.
        progress: called with work done, work in all and the name of the next matrix.

    Raises:
        SpectuneError: none of them can be measured.
    """
    header = {"format": FORMAT, "fingerprint": checkpoint.fingerprint}
    ledger = Ledger(folder / f"values-{checkpoint.fingerprint[:12]}.jsonl", header)
    problems: dict[str, str] = {}
    for matrix in _remaining(checkpoint.matrices, ledger, progress):
        try:
            S = singular_values(lambda m=matrix: m.read().to(device))
            ledger.add(matrix.name, {"shape": matrix.shape, "values": packed(S.cpu().numpy())})
        except _UNREADABLE as error:
            problems[matrix.name] = first_line(error)
    known = [matrix for matrix in checkpoint.matrices if matrix.name in ledger.done]
    if not known:
        name, reason = next(iter(problems.items()))
        raise SpectuneError(f"no matrix of {checkpoint.model!r} can be measured; {name}: {reason}")
    return {matrix.name: unpacked(ledger.done[matrix.name]["values"]) for matrix in known}, problems


def collect_movement(
    checkpoint: Checkpoint,
    adapter_folder: Path,
    folder: Path,
    *,
    top: int = 10,
    epsilon: float = 0.5,
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[dict[str, dict[str, object]], dict[str, str]]:
    """Return what an adapter did to each matrix that it is on, by name, and why its other layers are left out.

    A run that is stopped goes on as one of `collect` does.

    Args:
        checkpoint: the adapter's base, with the matrices that `collect` has values of.
        adapter_folder: the adapter, in spectune's or PEFT's format.
        folder: for the file of results.
        top: see `movement`.
        epsilon: see `movement`.
        device: where to compute.
        progress: as in `collect`.

    Raises:
        SpectuneError: the adapter is of another base, or none of its layers is among the matrices.
    """
    adapter = Adapter.load(adapter_folder)
    pairs, skipped = match_layers(adapter, checkpoint)
    print_ = folder_digest(adapter_folder)
    header = {
        "format": FORMAT,
        "fingerprint": checkpoint.fingerprint,
        "adapter": print_,
        "top": top,
        "epsilon": epsilon,
    }
    ledger = Ledger(folder / f"moved-{checkpoint.fingerprint[:6]}-{print_[:6]}.jsonl", header)
    matrices = [matrix for matrix in checkpoint.matrices if matrix.name in pairs]
    for matrix in _remaining(matrices, ledger, progress):
        name, W = pairs[matrix.name], matrix.read()
        one = Adapter({name: replace(adapter.layers[name], held=W)}, adapter.base_model)
        one.check_base({name: W})
        moved = movement(W.to(device), one.delta(name).to(device), top, epsilon)
        ledger.add(matrix.name, {**as_entry(moved), "after": packed(moved.after)})
    return {matrix.name: ledger.done[matrix.name] for matrix in matrices}, skipped


def match_layers(adapter: Adapter, checkpoint: Checkpoint) -> tuple[dict[str, str], dict[str, str]]:
    """Return for each matrix that the adapter is on the adapter's name of its layer, and why other layers have none.

    Names are equal, or one ends with the other: a checkpoint of a bare model lacks the prefix of a whole one.

    Raises:
        SpectuneError: no layer of the adapter is among the checkpoint's matrices.
    """
    modules = {matrix.place.module: matrix.name for matrix in checkpoint.matrices if not matrix.place.stacked}
    pairs, skipped = {}, {}
    for name, layer in adapter.layers.items():
        if all(term.method.replaces for term in layer.terms):
            skipped[name] = _WHOLE
            continue
        found = [m for m in modules if m == name] or [
            m for m in modules if m.endswith("." + name) or name.endswith("." + m)
        ]
        if len(found) == 1:
            pairs[modules[found[0]]] = name
        elif found:
            skipped[name] = f"may be {' or '.join(map(repr, found[:3]))} of the base"
        else:
            skipped[name] = "not among the measured matrices"
    skipped |= {name: _WHOLE for name in adapter.modules if name not in adapter.layers}
    if not pairs:
        name, why = next(iter(skipped.items()))
        raise SpectuneError(
            f"no layer of the adapter can be compared with {checkpoint.model!r}; {name!r}: {why}"
            f"{nearest(name, modules)}; is this its base, in safetensors, with all its --targets?"
        )
    return pairs, skipped


def _remaining(matrices: list[Matrix], ledger: Ledger, progress: Progress | None) -> Iterator[Matrix]:
    """Yield the matrices that have no result yet, telling the progress."""
    total = sum(matrix.work for matrix in matrices)
    done = sum(matrix.work for matrix in matrices if matrix.name in ledger.done)
    for matrix in matrices:
        if matrix.name in ledger.done:
            continue
        if progress is not None:
            progress(done, total, matrix.name)
        yield matrix
        done += matrix.work
    if progress is not None:
        progress(total, total, "")
