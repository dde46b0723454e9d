"""What is stored with an adapter's weights besides the tensors: labels, the model's class, sketches of the base."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spectune.adapters.folder import WEIGHTS, Source, Unwritten
from spectune.adapters.labels import PROBLEMS, SEVERAL, Labels
from spectune.reading import open_tensors, parse_json, parsed


class More(NamedTuple):
    """What is stored with an adapter's weights besides the tensors, as far as it is there.

    Args:
        labels: of a classifier's head, and how they are read.
        architecture: the model's class and its module.
        base: the sketches of the base's weights, by layer.
        quantize: how the base was packed.
    """

    labels: Labels | None = None
    architecture: tuple[str, str] | None = None
    base: Mapping[str, Tensor] = {}
    quantize: str | None = None


def read_more(path: Source) -> More:
    """Return what is stored with an adapter's weights besides the tensors."""
    if isinstance(path, Unwritten):
        metadata = path.more
    elif (path / WEIGHTS).exists():
        with open_tensors(path / WEIGHTS) as opened:
            metadata = opened.metadata() or {}
    else:
        return More()
    from spectune.adapters.schema import Stored  # pydantic, which adapters on a model go without

    where = str(path / WEIGHTS)
    given = {key: parse_json(metadata[key], f"{key!r} in {where}") for key in Stored.model_fields if key in metadata}
    found = parsed(Stored, given, where)
    problem = next((each for each in found.problem_type[:1] if each in PROBLEMS), None)
    labels = None if found.labels is None else Labels(found.labels, problem)
    architecture = (found.architecture[0], found.architecture[1]) if found.architecture else None
    return More(labels, architecture, found.base, *found.quantize[:1])


def as_metadata(
    labels: Sequence[str] | None,
    architecture: Sequence[str] | None,
    base: Mapping[str, Tensor],
    quantize: str | None = None,
) -> dict[str, str]:
    """Return what `read_more` reads, as texts."""
    found: dict[str, object] = {"labels": labels, "architecture": architecture}
    found["quantize"] = None if quantize is None else [quantize]
    if isinstance(labels, Labels) and labels.problem == SEVERAL:  # the others are known by the number of labels
        found["problem_type"] = [labels.problem]
    codes = {}
    for name, sketch in base.items():
        values = torch.zeros(sketch.shape) if sketch.is_meta else sketch
        codes[name] = base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()
    found["base"] = codes or None
    return {key: json.dumps(value) for key, value in found.items() if value is not None}
