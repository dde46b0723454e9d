"""From a checkpoint to its report: measure, describe, write."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from spectune.adapters.adapter import Adapter
from spectune.adapters.destination import check_run_folder
from spectune.bases.devices import checked_device
from spectune.bases.loading import auto_class
from spectune.bases.quiet import quiet
from spectune.errors import SpectuneError
from spectune.methods import parse, to_text
from spectune.model.targets import resolve
from spectune.spectrum.checkpoint import Checkpoint, open_checkpoint
from spectune.spectrum.collect import Progress, collect, collect_movement, match_layers
from spectune.spectrum.document import Spectra, compared, describe, moved
from spectune.spectrum.figures import Other, write_png
from spectune.spectrum.model import Advice, Document
from spectune.spectrum.names import override_names
from spectune.spectrum.page import spectrum_page
from spectune.storage import write_atomically

Targets = str | list[str]


def report(
    model: str,
    out: str | Path,
    *,
    targets: Targets = "all-linear",
    exclude: Targets = "",
    low: float = 0.1,
    high: float = 1.1,
    rank: int = 16,
    ranks: tuple[int, int] = (4, 64),
    method: str = "lora",
    compare: str | None = None,
    adapter: str | Path | None = None,
    top: int = 10,
    epsilon: float = 0.5,
    allow_bin: bool = False,
    device: str = "cpu",
    progress: Callable[[str], Progress] | None = None,
) -> Document:
    """Measure a checkpoint's singular values and write spectrum.html, .png, .json and overrides.yaml.

    Args:
        model: embedded name, folder, hub id or file.
        out: folder for the report, and for what a run that is stopped goes on from.
        targets: which matrices; "all-linear" is all but embeddings and the output head.
        exclude: suffixes or a regex of what to leave out.
        low: lower end of the range whose share is counted.
        high: upper end.
        rank: the mean of the ranks to recommend.
        ranks: the least and the greatest of them.
        method: that the ranks are for.
        compare: another model, to be shown beside it.
        adapter: folder of an adapter on this model, whose effect on the spectrum is to be shown.
        top: leading singular vectors in which new directions are looked for.
        epsilon: |cosine| below which a direction is new.
        allow_bin: read pickled .bin files, as weights only.
        device: where to compute.
        progress: given what is being done, returns what is called as it goes on.

    Returns:
        The document that is in spectrum.json.

    Raises:
        SpectuneError: an argument that does not fit, no such checkpoint, or nothing in it to measure.
    """
    checked_device(device)
    _check(low, high, rank, ranks, method, top, epsilon)
    out = Path(out)
    inputs = [name for name in (model, compare, adapter) if name is not None]
    check_run_folder(out, inputs, "values-*.jsonl", ("spectrum.json", "spectrum.html", "overrides.yaml"))
    opened = open_checkpoint(model, targets, exclude, allow_bin=allow_bin)
    another = None if compare is None else open_checkpoint(compare, targets, exclude, allow_bin=allow_bin)
    if adapter is not None:
        match_layers(Adapter.load(adapter), opened)  # what cannot be is told before hours of decompositions
    spectra = _measure(opened, out, device, progress)
    options: dict[str, Any] = {"low": low, "high": high, "rank": rank, "ranks": ranks}
    document = describe(spectra, **options)
    other = None
    if another is not None:
        theirs = _measure(another, out, device, progress)
        document.compare = compared(document, spectra, theirs, **options)
        other = (document.compare, theirs.values)
    if adapter is not None:
        tell = progress("adapter") if progress else None
        measured = spectra.checkpoint._replace(matrices=spectra.measured())
        about: dict[str, Any] = {"top": top, "epsilon": epsilon}
        found, skipped = collect_movement(measured, Path(adapter), out, **about, device=device, progress=tell)
        document.adapter = moved(spectra, found, folder=str(adapter), skipped=skipped, **about)
    _write(document, spectra, other, out, method)
    return document


def _check(low: float, high: float, rank: int, ranks: tuple[int, int], method: str, top: int, epsilon: float) -> None:
    if not 0 < low < high < float("inf"):
        raise SpectuneError(f"the range must be two numbers, 0 < low < high, not {low:g} and {high:g}")
    if not 1 <= ranks[0] <= rank <= ranks[1]:
        raise SpectuneError(f"the ranks must be 1 <= least <= mean <= greatest, not {ranks[0]}, {rank} and {ranks[1]}")
    if top < 1 or not 0 < epsilon <= 1:
        raise SpectuneError(f"top must be at least 1 and epsilon in (0, 1], not {top} and {epsilon:g}")
    _with_rank(method, ranks[0])


def _with_rank(method: str, rank: int) -> str:
    """Return a method's text with this rank.

    Raises:
        SpectuneError: no such method, or one without a rank.
    """
    text = f"{method}{',' if ':' in method else ':'}rank={rank}"
    return to_text(parse(text))


def _measure(checkpoint: Checkpoint, out: Path, device: str, progress: Callable[[str], Progress] | None) -> Spectra:
    tell = progress(checkpoint.model) if progress else None
    values, problems = collect(checkpoint, out, device=device, progress=tell)
    return Spectra(checkpoint, values, problems)


def _write(document: Document, spectra: Spectra, other: Other | None, out: Path, method: str) -> None:
    advice, files = document.recommendation, {}
    patterns = _patterns(spectra, list(advice.ranks))
    advice.without_override = len(advice.ranks) - len(patterns)
    (out / "overrides.yaml").unlink(missing_ok=True)
    if patterns:
        files["overrides"] = out / "overrides.yaml"
        advice.command = f"spectune train {shlex.quote(str(files['overrides']))} data=DATA output=FOLDER"
        text = overrides_yaml(document.model, advice, patterns, method)
        write_atomically(files["overrides"], lambda to: to.write_text(text, encoding="utf-8"))
    files |= {"page": out / "spectrum.html", "picture": out / "spectrum.png", "json": out / "spectrum.json"}
    document.files = {name: str(path) for name, path in files.items()}
    write_png(document, spectra.values, files["picture"], other)
    html = spectrum_page(document, spectra.values, other)
    write_atomically(files["page"], lambda to: to.write_text(html, encoding="utf-8"))
    text = json.dumps(document.model_dump(exclude_unset=True), indent=1, allow_nan=False) + "\n"
    write_atomically(files["json"], lambda to: to.write_text(text, encoding="utf-8"))


def _patterns(spectra: Spectra, modules: list[str]) -> dict[str, str]:
    """Return the pattern of each layer that the model has, as far as that is known, under the checkpoint's name.

    transformers gives some layers other names than their checkpoint, and fuses some.
    """
    if spectra.checkpoint.format == "gguf":  # whose names are its own
        return {}
    patterns, layers = override_names(modules), _layers(spectra.checkpoint.folder)
    if layers is None:
        return patterns
    ends = Counter(".".join(parts[i:]) for name in layers for parts in [name.split(".")] for i in range(len(parts)))
    return {module: pattern for module, pattern in patterns.items() if ends[pattern] == 1}


def _layers(folder: Path) -> list[str] | None:
    """Return the linear layers of the model that transformers makes of a folder's config, None where it makes none."""
    if not (folder / "config.json").is_file():
        return None
    try:
        with torch.device("meta"), quiet():
            config = transformers.AutoConfig.from_pretrained(folder)
            return list(resolve(auto_class(config).from_config(config), parse("lora:rank=1")))
    except Exception:  # whatever a strange config makes of transformers
        return None


def overrides_yaml(model: str, advice: Advice, patterns: Mapping[str, str], method: str) -> str:
    """Return a file for `spectune train` that gives each layer its recommended rank.

    Args:
        model: what to train.
        advice: the document's "recommendation".
        patterns: by which `overrides` finds each layer.
        method: the method, without its rank.
    """
    ranks = advice.ranks
    settings = {
        "model": model,
        "method": _with_rank(method, max(1, round(advice.uniform_rank or 1))),
        "overrides": {pattern: _with_rank(method, ranks[module]) for module, pattern in patterns.items()},
    }
    head = f"# {advice.command}\n# The rank of a layer is {advice.rule}.\n"
    return head + yaml.safe_dump(settings, sort_keys=False, width=200)
