"""PEFT's adapter format: LoRA and DoRA both ways, AdaLoRA and converted PiSSA in."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from spectune.adapters import fingerprint
from spectune.adapters.contents import Contents
from spectune.adapters.folder import CONFIG, WEIGHTS, read_config, read_labels, read_tensors, write_folder
from spectune.adapters.terms import LayerUpdate, Term
from spectune.errors import SpectuneError
from spectune.methods.base import Method
from spectune.methods.dora import DoRA
from spectune.methods.head import Head
from spectune.methods.lora import LoRA
from spectune.patterns import MOST_PATTERNS, matches_end
from spectune.storage import Entry

_PREFIX = "base_model.model."
_TENSORS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_A": "A",
    "lora_B": "B",
    "lora_E": "E",
    "ranknum": "ranknum",
    "base_layer.weight": "base",  # PEFT adds the weight of an adapted output embedding
}
_WHOLE = {"H": "weight", "h": "bias"}  # of a head
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that subtract from W
_NOT_HELD = (  # settings under which the layer's answer is no longer W x + s B A x
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "megatron_config",
)


def is_peft(adapter: Contents) -> bool:
    """Whether PEFT's LoRA format holds the adapter as it is."""
    terms = [term for layer in adapter.layers.values() for term in layer.terms]
    alone = len(terms) == len(adapter.layers) and all(term.weight == 1.0 for term in terms)
    terms = [term for term in terms if not term.method.replaces]
    if not terms or not alone or not all(_is_lora(term.method) for term in terms):
        return False
    return len({(isinstance(t.method, DoRA), _lora(t.method).rslora, _lora(t.method).dropout) for t in terms}) == 1


def _is_lora(method: Method) -> bool:
    return isinstance(method, LoRA) or (isinstance(method, DoRA) and isinstance(method.inner, LoRA))


def _lora(method: Any) -> LoRA:
    return method.inner if isinstance(method, DoRA) else method  # type: ignore[return-value]


def save_peft(adapter: Contents, path: Path) -> Path:
    """Write an adapter for which `is_peft` holds, key for key as PEFT writes it."""
    return write_folder(path, *peft_contents(adapter), adapter.labels)


def peft_contents(adapter: Contents) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and the tensors that `save_peft` writes."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    heads = []
    for name, layer in adapter.layers.items():
        (term,) = layer.terms
        if term.method.replaces:
            heads.append(name)
            tensors |= {f"{_PREFIX}{name}.{_WHOLE[key]}": value for key, value in term.trained.items()}
            continue
        lora = _lora(term.method)
        ranks[name], alphas[name] = lora.rank, lora.alpha
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = term.trained["A"]
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = term.trained["B"]
        if "magnitude" in term.trained:
            tensors[f"{_PREFIX}{name}.lora_magnitude_vector"] = term.trained["magnitude"]
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    method = adapter.layers[next(iter(ranks))].terms[0].method
    config = {
        "alpha_pattern": {_whole(n): a for n, a in alphas.items() if a != alpha},
        "auto_mapping": None,
        "base_model_name_or_path": adapter.base_model,
        "bias": "none",
        "fan_in_fan_out": any(layer.conv1d for layer in adapter.layers.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": _lora(method).dropout,
        "modules_to_save": heads or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {_whole(n): r for n, r in ranks.items() if r != rank},
        "revision": None,
        "target_modules": _targets(list(ranks)),
        "task_type": "SEQ_CLS" if adapter.labels else None,
        "use_dora": isinstance(method, DoRA),
        "use_rslora": _lora(method).rslora,
    }
    return config, tensors


def _whole(name: str) -> str:
    """Return the pattern that PEFT matches with this module alone: a bare name would match every suffix."""
    return f"^{re.escape(name)}"


def _targets(names: list[str]) -> list[str] | str:
    """Return `target_modules`: the names, or a regex where PEFT would take one of them for a suffix of other modules.

    A name with a dot in it is specific enough; one at the top of the model, such as "0", is not.
    """
    return sorted(names) if all("." in name for name in names) else "|".join(map(re.escape, sorted(names)))


def load_peft(path: Path) -> Contents:
    """See `Adapter.from_peft`."""
    config = read_config(path)
    entry = Entry(config, str(path / CONFIG))
    kind = config.get("peft_type")
    if kind not in ("LORA", "ADALORA"):
        raise SpectuneError(f"{path} is a PEFT adapter of type {kind!r}; LORA and ADALORA can be read")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(_CHANGES_BASE):
        raise SpectuneError(
            f"{path} was saved by PEFT with init_lora_weights={start!r} and without conversion, so that it only works "
            "on a base that PEFT changed; save it with path_initial_model_for_weight_conversion and load that"
        )
    for key in ("bias", *_NOT_HELD):
        if config.get(key) not in (None, False, "none", [], {}):
            raise SpectuneError(f"{path} was saved by PEFT with {key}={config[key]!r:.60}, which no adapter here holds")
    base = entry.take("base_model_name_or_path", str, type(None))
    grouped: dict[str, dict[str, Tensor]] = {}
    whole = entry.take("modules_to_save", list, type(None)) or []
    for key, tensor in read_tensors(path, config).items():
        name, part = _split(key, path, whole)
        grouped.setdefault(name, {})[part] = tensor
    read = _adalora if kind == "ADALORA" else _plain
    terms = {
        name: _head(name, parts, path) if parts.keys() & _WHOLE.keys() else read(name, parts, entry, path)
        for name, parts in grouped.items()
    }
    conv1d = entry.take("fan_in_fan_out", bool, default=False)
    layers = {n: _layer(term, grouped[n], conv1d) for n, term in terms.items() if term is not None}
    if not layers:
        raise SpectuneError(f"{path / WEIGHTS} has no update")
    return Contents(layers, base, labels=read_labels(path))


def _split(key: str, path: Path, whole: Any) -> tuple[str, str]:
    bare = key.removeprefix(_PREFIX)
    owner, _, kind = bare.rpartition(".")
    if kind in _WHOLE.values() and any(f".{module}." in f".{bare}" for module in whole):
        return owner, "H" if kind == "weight" else "h"
    for suffix, part in _TENSORS.items():
        if bare.endswith(f".{suffix}"):
            return bare.removesuffix(f".{suffix}"), part
    raise SpectuneError(f"{path / WEIGHTS} has the tensor {key!r}, which belongs to no linear layer's LoRA")


def _layer(term: Term, parts: dict[str, Tensor], conv1d: bool) -> LayerUpdate:
    if term.method.replaces:
        return LayerUpdate(tuple(term.trained["H"].shape), (term,))  # type: ignore[arg-type]
    shape = (term.trained["B"].shape[0], term.trained["A"].shape[1])
    weight = parts.get("base")
    sketch = None if weight is None else fingerprint.sketch_weight(weight)
    return LayerUpdate(shape, (term,), conv1d, base_sketch=sketch)


def _head(name: str, parts: dict[str, Tensor], path: Path) -> Term:
    """Return the term of one of PEFT's `modules_to_save`."""
    weight, bias = parts.get("H"), parts.get("h")
    if weight is None or weight.dim() != 2 or (bias is not None and tuple(bias.shape) != (len(weight),)):
        raise SpectuneError(
            f"{path / WEIGHTS} has {name!r} whole, which is not linear; adapters here hold whole linear layers only"
        )
    return Term(Head(bias=bias is not None), {key: tensor.float() for key, tensor in parts.items()})


def _factors(name: str, parts: dict[str, Tensor], path: Path) -> tuple[Tensor, Tensor]:
    for needed in ("A", "B"):
        if needed not in parts:
            raise SpectuneError(f"{path / WEIGHTS} lacks lora_{needed} of {name!r}")
    A, B = parts["A"], parts["B"]
    if (
        B.dim() != 2
        or A.dim() != 2
        or B.shape[1] != A.shape[0]
        or not (A.is_floating_point() and B.is_floating_point())
    ):
        raise SpectuneError(
            f"lora_A ({A.dtype}, {tuple(A.shape)}) and lora_B ({B.dtype}, {tuple(B.shape)}) of {name!r} in "
            f"{path / WEIGHTS} are not two factors of a linear layer's update"
        )
    return A.float(), B.float()


def _plain(name: str, parts: dict[str, Tensor], config: Entry, path: Path) -> Term | None:
    """Return the LoRA or DoRA of one layer, with PEFT's scale: alpha / r or alpha / sqrt(r) as its config has them."""
    A, B = _factors(name, parts, path)
    if A.shape[0] == 0:
        return None
    declared, alpha = _pattern(config, "rank_pattern", name, "r"), _pattern(config, "alpha_pattern", name, "lora_alpha")
    if declared != A.shape[0]:
        raise SpectuneError(
            f"lora_A of {name!r} in {path / WEIGHTS} has rank {A.shape[0]}, and the config says {declared}"
        )
    rslora = config.take("use_rslora", bool, default=False)
    dropout = config.number("lora_dropout", default=0.0)
    trained = {"A": A, "B": B}
    if alpha <= 0:
        trained["B"] = B * (alpha / (math.sqrt(declared) if rslora else declared))
        alpha = math.sqrt(declared) if rslora else declared
    method: Method = LoRA(rank=A.shape[0], alpha=alpha, rslora=rslora, dropout=dropout)
    if config.take("use_dora", bool, default=False) != ("magnitude" in parts):
        raise SpectuneError(f"lora_magnitude_vector of {name!r} in {path / WEIGHTS} and use_dora do not go together")
    if "magnitude" in parts:
        magnitude = parts["magnitude"].float().flatten()
        if len(magnitude) != len(B):
            raise SpectuneError(f"lora_magnitude_vector of {name!r} in {path / WEIGHTS} has {len(magnitude)} rows")
        method, trained = DoRA(method), {"magnitude": magnitude, **trained}
    return Term(method, trained)


def _adalora(name: str, parts: dict[str, Tensor], config: Entry, path: Path) -> Term | None:
    """Return P diag(E) Q as a LoRA, with PEFT's scale: alpha / (initial rank + 1e-5), whatever rank is left."""
    A, B = _factors(name, parts, path)
    E = parts.get("E")
    if E is None or E.numel() != len(A):
        raise SpectuneError(f"{path / WEIGHTS} lacks lora_E of {name!r}, or it does not fit lora_A")
    E = E.float().flatten()
    kept = E != 0
    if not kept.any():
        return None
    initial = float(parts["ranknum"]) if "ranknum" in parts else config.number("init_r")
    alpha = config.number("lora_alpha")
    scale = (alpha if alpha > 0 else initial) / (initial + 1e-5)
    rank = int(kept.sum())
    trained = {"A": A[kept], "B": B[:, kept] * (E[kept] * scale)}
    return Term(LoRA(rank=rank, alpha=rank), {key: value.contiguous() for key, value in trained.items()})


def _pattern(config: Entry, patterns: str, name: str, default: str) -> Any:
    """Return the value of the first pattern that is the end of a module's name, as PEFT matches them."""
    inside = config.inside(patterns)
    if len(inside.values) > MOST_PATTERNS:
        raise SpectuneError(f"{inside.where} has {len(inside.values):,} patterns; at most {MOST_PATTERNS:,} are read")
    for pattern in inside.values:
        if matches_end(pattern, name):
            return inside.number(pattern)
    return config.number(default)
