"""Adapters as folders, in spectune's own format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from spectune.adapters import fingerprint
from spectune.adapters.contents import Contents
from spectune.adapters.folder import CONFIG, WEIGHTS, Source, read_config, read_tensors
from spectune.adapters.formats.bilingual import VERSION as BILINGUAL
from spectune.adapters.formats.bilingual import in_peft_words, own_names
from spectune.adapters.metadata import as_metadata, read_more
from spectune.adapters.terms import LayerUpdate, Term, WholeTerm, needs_basis
from spectune.errors import SpectuneError, nearest
from spectune.layers.factors import Base
from spectune.layers.kinds import LINEAR
from spectune.layers.projections import Rows
from spectune.methods import Method, from_fields
from spectune.reading import parsed

if TYPE_CHECKING:
    from spectune.adapters.schema import LayerEntry, WholeEntry

FORMAT_VERSION = 1
_WHOLE = "modules"  # there only where the adapter has modules other than linear layers
_EXPERTS = "experts"  # of a layer whose weight is a part of a tensor, where it is
_ROWS = (
    "rows"  # of a layer whose weight is some rows of a fused layer's: where they start, how many, of how many, times
)
_KIND = "kind"  # of a layer that is no linear one, and the axes of its kernel, where it is
_STAYS = "basis_stays"  # of a term whose basis was made of another weight than the base's, where it is


def contents(adapter: Contents, *, embed: bool = False) -> tuple[dict[str, object], dict[str, Tensor], dict[str, str]]:
    """Return the config, the tensors and the metadata of an adapter's folder in this format."""
    if embed:
        adapter.complete()
    tensors: dict[str, Tensor] = {}
    methods: list[dict[str, object]] = []
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


def _describe_whole(term: WholeTerm) -> dict[str, object]:
    return {
        "weight": term.weight,
        "tensors": sorted(term.tensors),
        "rows": None if term.rows is None else [*term.rows],
        "complete": term.complete,
    }


def load(path: Source) -> Contents:
    """Read an adapter's folder in this format."""
    from spectune.adapters.schema import AdapterConfig  # pydantic, which adapters on a model go without

    found = read_config(path)
    version = found.get("format_version", FORMAT_VERSION)
    if type(version) is not int or version not in (FORMAT_VERSION, BILINGUAL):
        raise SpectuneError(
            f"{path / CONFIG} has format version {version!r:.20}; this release reads up to {BILINGUAL}: update spectune"
        )
    bilingual = version == BILINGUAL
    own = {key: found[key] for key in AdapterConfig.model_fields if key in found} if bilingual else found
    config = parsed(AdapterConfig, own, str(path / CONFIG))
    methods = [_method(fields, path) for fields in config.methods]
    for name, layer in config.layers.items():
        if (most := max(term.method for term in layer.terms)) >= len(methods):
            raise SpectuneError(f"{name!r} in {path / CONFIG} has method {most}, and there are {len(methods)}")
    tensors, whole = read_tensors(path, found), config.modules or {}
    if bilingual:
        tensors, whole = own_names(tensors, found, config, path / CONFIG)
    layers = {name: _layer(name, layer, methods, tensors, path / WEIGHTS) for name, layer in config.layers.items()}
    modules = {name: _whole_terms(name, terms, tensors, path / WEIGHTS) for name, terms in whole.items()}
    if tensors:
        raise SpectuneError(f"{path / WEIGHTS} has a tensor that its config does not speak of: {min(tensors)!r}")
    labels, architecture, _, quantize = read_more(path)
    base, error = config.base_model_name_or_path, config.error
    return Contents(layers, base, error, labels, modules, architecture, quantize=quantize)


def _whole_terms(
    name: str, terms: Sequence[WholeEntry], tensors: dict[str, Tensor], where: Path
) -> tuple[WholeTerm, ...]:
    """Return what a config and the weights say of a module that the adapter brings whole."""
    found = []
    for i, entry in enumerate(terms):
        prefix, rows = f"{name}.{i}.whole", entry.rows
        if any(f"{prefix}.{key}" not in tensors for key in entry.tensors):
            raise SpectuneError(f"{where} lacks tensors of {name!r} that its config speaks of")
        own = {key: tensors.pop(f"{prefix}.{key}") for key in dict.fromkeys(entry.tensors)}
        if rows is not None and (own.keys() != {"weight"} or not _are_rows(rows, own["weight"])):
            raise SpectuneError(f"the config's rows of {name!r} do not fit the tensor in {where} that they are rows of")
        found.append(WholeTerm(own, float(entry.weight), None if rows is None else tuple(rows), entry.complete))
    return tuple(found)


def _are_rows(rows: list[int], tensor: Tensor) -> bool:
    return rows == sorted(set(rows)) and tensor.dim() == 2 and len(rows) == len(tensor)


def _method(fields: Mapping[str, object], path: Source) -> Method:
    try:
        return from_fields(fields)
    except (SpectuneError, TypeError, AttributeError, OverflowError) as error:
        raise SpectuneError(f"a method in {path / CONFIG} is not understood: {error}") from None


def _layer(
    name: str, entry: LayerEntry, methods: Sequence[Method], tensors: dict[str, Tensor], where: Path
) -> LayerUpdate:
    terms, (out_features, in_features) = [], entry.shape
    for i, described in enumerate(entry.terms):
        method, stays = methods[described.method], described.basis_stays
        prefix, shapes = f"{name}.{i}", method.shapes(out_features, in_features)
        trained = {key: _take(tensors, f"{prefix}.{key}", shape, where) for key, shape in shapes.items()}
        frozen = [key for key in tensors if key.startswith(f"{prefix}.basis.")]
        basis = {key.removeprefix(f"{prefix}.basis."): tensors.pop(key) for key in frozen}
        sketch = _take(tensors, f"{prefix}.sketch", fingerprint.UPDATE_SHAPE, where, optional=True)
        if stays and not basis:
            raise SpectuneError(f"{where} lacks the basis of {prefix!r} that its config speaks of")
        term = Term(method, trained, float(described.weight), basis or None, sketch, stays)
        if basis and not _fits(term, out_features, in_features):
            raise SpectuneError(f"the stored basis of {prefix!r} in {where} does not fit the layer; get it again")
        terms.append(term)
    base = _take(tensors, f"{name}.base", fingerprint.WEIGHT_SHAPE, where, optional=True)
    rows, (kind, *kernel) = Rows(*entry.rows) if entry.rows else None, entry.kind
    more = entry.experts, rows, kind, tuple(kernel)
    return LayerUpdate((out_features, in_features), tuple(terms), entry.conv1d, None, base, *more)


def _fits(term: Term, out_features: int, in_features: int) -> bool:
    """Whether a term's stored basis makes an update of the right shape."""
    tensors = term.tensors()
    indices = [t for t in tensors.values() if not t.is_floating_point()]
    if not needs_basis(term.method) or any(
        t.dtype != torch.int64 or (t.numel() and not 0 <= t.min() <= t.max() < min(out_features, in_features))
        for t in indices
    ):
        return False
    base = Base(lambda: torch.zeros(1, out_features), lambda R: torch.zeros(out_features, R.shape[0]))
    try:
        f = term.method.factors(tensors)
        if (f.left.shape[0], f.right.shape[1]) != (out_features, in_features):
            return False
        if not (f.left.is_floating_point() and f.right.is_floating_point()):
            return False
        return term.method.respond(tensors, torch.zeros(1, in_features), base, False).shape == (1, out_features)
    except (KeyError, IndexError, RuntimeError, TypeError, ValueError):
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
