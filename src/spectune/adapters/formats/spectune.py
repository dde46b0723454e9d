"""Adapters as folders, in spectune's own format."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from spectune.adapters import fingerprint
from spectune.adapters.contents import Contents
from spectune.adapters.folder import CONFIG, WEIGHTS, Source, as_metadata, read_config, read_more, read_tensors
from spectune.adapters.formats.bilingual import VERSION as BILINGUAL
from spectune.adapters.formats.bilingual import in_peft_words, own_names, own_words
from spectune.adapters.terms import LayerUpdate, Term, WholeTerm, needs_basis
from spectune.errors import SpectuneError, nearest
from spectune.layers.attention import IN
from spectune.layers.factors import Base
from spectune.layers.kinds import KINDS, LINEAR
from spectune.layers.projections import Rows
from spectune.methods import Method, from_fields
from spectune.reading import SIDE
from spectune.storage import Entry

FORMAT_VERSION = 1
_WHOLE = "modules"  # there only where the adapter has modules other than linear layers
_EXPERTS = "experts"  # of a layer whose weight is a part of a tensor, where it is
_ROWS = (
    "rows"  # of a layer whose weight is some rows of a fused layer's: where they start, how many, of how many, times
)
_KIND = "kind"  # of a layer that is no linear one, and the axes of its kernel, where it is
_STAYS = "basis_stays"  # of a term whose basis was made of another weight than the base's, where it is
_KEYS = ("library_name", "format_version", "base_model_name_or_path", "error", "methods", "layers")


def contents(adapter: Contents, *, embed: bool = False) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Return the config, the tensors and the metadata of an adapter's folder in this format."""
    if embed:
        adapter.complete()
    tensors: dict[str, Tensor] = {}
    methods: list[dict[str, Any]] = []
    layers: dict[str, Any] = {}
    for name in adapter.layers:
        base = adapter.base_sketch(name)
        if base is not None:
            tensors[f"{name}.base"] = base
        layer, terms = adapter.layers[name], []
        for i, term in enumerate(layer.terms):
            described = term.method.fields()
            if described not in methods:
                methods.append(described)
            terms.append({"method": methods.index(described), "weight": term.weight})
            terms[-1] |= {_STAYS: True} if term.stays else {}
            tensors |= {f"{name}.{i}.{key}": value for key, value in term.trained.items()}
            if embed or term.stays or term.hangs_on_rounding:
                tensors |= {f"{name}.{i}.basis.{key}": value for key, value in (term.basis or {}).items()}
            sketch = term.sketched(layer.weight)
            if sketch is not None:
                tensors[f"{name}.{i}.sketch"] = sketch
        layers[name] = {"shape": list(layer.shape), "conv1d": layer.conv1d, "terms": terms}
        layers[name] |= {_EXPERTS: layer.experts} if layer.experts else {}
        layers[name] |= {} if layer.rows is None else {_ROWS: list(layer.rows)}
        layers[name] |= {} if layer.kind == LINEAR else {_KIND: [layer.kind, *layer.kernel]}
    modules = {}
    for name, parts in adapter.modules.items():
        modules[name] = [_describe_whole(term) for term in parts]
        tensors |= {f"{name}.{i}.whole.{key}": value for i, t in enumerate(parts) for key, value in t.tensors.items()}
    config = {
        "library_name": "spectune",
        "format_version": FORMAT_VERSION,
        "base_model_name_or_path": adapter.base_model,
        "error": adapter.error,
        "methods": methods,
        "layers": layers,
        **({_WHOLE: modules} if modules else {}),
    }
    return *in_peft_words(config, tensors, adapter), as_metadata(
        adapter.labels, adapter.architecture, {}, adapter.quantize
    )


def _describe_whole(term: WholeTerm) -> dict[str, Any]:
    return {
        "weight": term.weight,
        "tensors": sorted(term.tensors),
        "rows": None if term.rows is None else [*term.rows],
        "complete": term.complete,
    }


def load(path: Source) -> Contents:
    """Read an adapter's folder in this format."""
    found = read_config(path)
    version = Entry(found, str(path / CONFIG)).take("format_version", int, default=FORMAT_VERSION)
    if version not in (FORMAT_VERSION, BILINGUAL):
        raise SpectuneError(
            f"{path / CONFIG} has format version {version}; this release reads up to {BILINGUAL}: update spectune"
        )
    config = own_words(found) if version == BILINGUAL else found
    entry = Entry(config, str(path / CONFIG))
    entry.check_keys(*_KEYS, *((_WHOLE,) if _WHOLE in config else ()))
    if entry.take("library_name", str) != "spectune":
        raise SpectuneError(f"{path / CONFIG} has the library_name {config['library_name']!r}, which is not 'spectune'")
    methods = [_method(fields, path) for fields in entry.take("methods", list)]
    described = {name: _described(entry.inside("layers").inside(name), methods) for name in entry.take("layers", dict)}
    if not described:
        raise SpectuneError(f"{path / CONFIG} has no layers")
    base, error = entry.take("base_model_name_or_path", str, type(None)), entry.number("error")
    tensors = read_tensors(path, found)
    if version == BILINGUAL:
        tensors = own_names(tensors, found, config, path)  # which may add modules to the config
    layers = {name: _layer(name, layer, tensors, path / WEIGHTS) for name, layer in described.items()}
    inside = entry.inside(_WHOLE)
    modules = {n: _whole_terms(n, inside.take(n, list), inside.where, tensors, path / WEIGHTS) for n in inside.values}
    if tensors:
        raise SpectuneError(f"{path / WEIGHTS} has a tensor that its config does not speak of: {min(tensors)!r}")
    more = read_more(path)
    architecture = tuple(more.get("architecture") or ()) or None
    return Contents(layers, base, error, more.get("labels"), modules, architecture, quantize=more.get("quantize"))


def _whole_terms(
    name: str, terms: list[Any], where: str, tensors: dict[str, Tensor], weights: Path
) -> tuple[WholeTerm, ...]:
    """Return what a config and the weights say of a module that the adapter brings whole."""
    found = []
    for i, values in enumerate(terms):
        entry = Entry(values, f"term {i} of {name!r} in {where}")
        entry.check_keys("weight", "tensors", "rows", "complete")
        keys, rows = entry.take("tensors", list), entry.take("rows", list, type(None))
        known = [f"{name}.{i}.whole.{key}" for key in keys]
        if not keys or any(type(key) is not str for key in keys) or not all(key in tensors for key in known):
            raise SpectuneError(f"{weights} lacks tensors of {name!r} that its config speaks of")
        own = {key: tensors.pop(full) for key, full in zip(keys, known, strict=True)}
        if rows is not None and (keys != ["weight"] or not _are_rows(rows, own["weight"])):
            raise SpectuneError(f"'rows' in {entry.where} do not fit the tensor that they are rows of")
        weight, complete = float(entry.number("weight")), entry.take("complete", bool)
        found.append(WholeTerm(own, weight, None if rows is None else tuple(rows), complete))
    if not found:
        raise SpectuneError(f"{name!r} in {where} has no terms")
    return tuple(found)


def _are_rows(rows: list[Any], tensor: Tensor) -> bool:
    numbers = all(type(row) is int and 0 <= row < 2**31 for row in rows)
    return numbers and rows == sorted(set(rows)) and tensor.dim() == 2 and len(rows) == len(tensor)


def _method(fields: Any, path: Source) -> Method:
    try:
        return from_fields(fields)
    except (SpectuneError, TypeError, AttributeError, OverflowError) as error:
        raise SpectuneError(f"a method in {path / CONFIG} is not understood: {error}") from None


class _Described(NamedTuple):
    """What a config says of a layer: its shape and, for each term, the method and the weight."""

    shape: tuple[int, int]
    conv1d: bool
    experts: int
    rows: Rows | None
    kind: tuple[str, tuple[int, ...]]
    terms: list[tuple[Method, float, bool]]


def _described(entry: Entry, methods: list[Method]) -> _Described:
    entry.check_keys("shape", "conv1d", "terms", *(key for key in (_EXPERTS, _ROWS, _KIND) if key in entry.values))
    experts = entry.take(_EXPERTS, int) if _EXPERTS in entry.values else 0
    shape = entry.take("shape", list)
    if len(shape) != 2 or not all(type(n) is int and 0 < n <= SIDE for n in shape):
        raise SpectuneError(f"'shape' in {entry.where} is {shape!r:.60}, not [out, in]")
    rows = _rows(entry, shape[0]) if _ROWS in entry.values else None
    kind = _kind(entry, shape[1]) if _KIND in entry.values else (LINEAR, ())
    terms = []
    for i, values in enumerate(entry.take("terms", list)):
        term = Entry(values, f"term {i} of {entry.where}")
        term.check_keys("method", "weight", *((_STAYS,) if _STAYS in term.values else ()))
        index = term.take("method", int)
        if not 0 <= index < len(methods):
            raise SpectuneError(f"{term.where} has method {index}, and there are {len(methods)}")
        stays = _STAYS in term.values and term.take(_STAYS, bool)
        terms.append((methods[index], float(term.number("weight")), stays))
    if not terms:
        raise SpectuneError(f"{entry.where} has no terms")
    return _Described((shape[0], shape[1]), entry.take("conv1d", bool), experts, rows, kind, terms)


def _rows(entry: Entry, out_features: int) -> Rows:
    values = entry.take(_ROWS, list)
    if len(values) == 4 and all(type(n) is int and 0 <= n < 2**31 for n in values):
        rows = Rows(*values)
        if rows.start + rows.size <= rows.period and rows.size * rows.groups == out_features:
            return rows
    raise SpectuneError(
        f"'rows' in {entry.where} is {values!r:.60}, not rows of a fused layer that there are so many of"
    )


def _kind(entry: Entry, in_features: int) -> tuple[str, tuple[int, ...]]:
    values = entry.take(_KIND, list)
    name, kernel = values[0] if values else None, values[1:]
    known = name in [IN, *(kind.name for kind in KINDS)]
    sizes = len(kernel) <= 3 and all(type(n) is int and 0 < n <= SIDE for n in kernel)
    if known and sizes and in_features % math.prod(kernel) == 0:
        return str(name), tuple(kernel)
    raise SpectuneError(
        f"'kind' in {entry.where} is {values!r:.60}, not a kind of layer that is known with a kernel that fits"
    )


def _layer(name: str, described: _Described, tensors: dict[str, Tensor], where: Path) -> LayerUpdate:
    terms = []
    for i, (method, weight, stays) in enumerate(described.terms):
        prefix, shapes = f"{name}.{i}", method.shapes(*described.shape)
        trained = {key: _take(tensors, f"{prefix}.{key}", shape, where) for key, shape in shapes.items()}
        frozen = [key for key in tensors if key.startswith(f"{prefix}.basis.")]
        basis = {key.removeprefix(f"{prefix}.basis."): tensors.pop(key) for key in frozen}
        sketch = _take(tensors, f"{prefix}.sketch", fingerprint.UPDATE_SHAPE, where, optional=True)
        if stays and not basis:
            raise SpectuneError(f"{where} lacks the basis of {prefix!r} that its config speaks of")
        term = Term(method, trained, weight, basis or None, sketch, stays)
        if basis and not _fits(term, *described.shape):
            raise SpectuneError(f"the stored basis of {prefix!r} in {where} does not fit the layer; get it again")
        terms.append(term)
    base = _take(tensors, f"{name}.base", fingerprint.WEIGHT_SHAPE, where, optional=True)
    more = described.experts, described.rows, *described.kind
    return LayerUpdate(described.shape, tuple(terms), described.conv1d, None, base, *more)


def _fits(term: Term, out_features: int, in_features: int) -> bool:
    """Whether a term's stored basis makes an update of the right shape."""
    tensors = term.tensors()
    indices = [t for t in tensors.values() if not t.is_floating_point()]
    if not needs_basis(term.method) or any(
        t.numel() and not 0 <= t.min() <= t.max() < min(out_features, in_features) for t in indices
    ):
        return False
    base = Base(lambda: torch.zeros(1, out_features), lambda R: torch.zeros(out_features, R.shape[0]))
    try:
        f = term.method.factors(tensors)
        if (f.left.shape[0], f.right.shape[1]) != (out_features, in_features):
            return False
        return term.method.respond(tensors, torch.zeros(1, in_features), base, False).shape == (1, out_features)
    except (KeyError, IndexError, RuntimeError, ValueError):
        return False


@overload
def _take(tensors: dict[str, Tensor], key: str, shape: tuple[int, ...], where: Path) -> Tensor: ...
@overload
def _take(
    tensors: dict[str, Tensor], key: str, shape: tuple[int, ...], where: Path, *, optional: bool
) -> Tensor | None: ...
def _take(
    tensors: dict[str, Tensor], key: str, shape: tuple[int, ...], where: Path, *, optional: bool = False
) -> Tensor | None:
    if key not in tensors:
        if optional:
            return None
        raise SpectuneError(f"{where} lacks the tensor {key!r}{nearest(key, tensors)}")
    tensor = tensors.pop(key)
    if tuple(tensor.shape) != tuple(shape) or not tensor.is_floating_point():
        raise SpectuneError(f"{key!r} in {where} is {tensor.dtype} {tuple(tensor.shape)}, not floating point {shape}")
    return tensor
