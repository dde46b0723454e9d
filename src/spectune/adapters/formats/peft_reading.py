"""Adapters in PEFT's format, from folders whose every key is understood or refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from spectune.adapters import fingerprint
from spectune.adapters.contents import Contents
from spectune.adapters.folder import CONFIG, PICKLED, WEIGHTS, Source, read_bin, read_config, read_tensors
from spectune.adapters.formats import peft_experts, peft_kinds
from spectune.adapters.formats.dialect import PREFIX
from spectune.adapters.metadata import read_more
from spectune.adapters.terms import ADDED_BIAS, LayerUpdate, Term, WholeTerm
from spectune.errors import SpectuneError
from spectune.layers.attention import IN
from spectune.layers.kinds import LINEAR, kind_named
from spectune.methods.base import Method
from spectune.methods.dora import DoRA
from spectune.methods.lora import LoRA
from spectune.patterns import matches_end
from spectune.reading import parsed

if TYPE_CHECKING:
    from spectune.adapters.schema import PeftConfig, TokenRows


_TENSORS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_A": "A",
    "lora_B": "B",
    "lora_embedding_A": "embedding_A",
    "lora_embedding_B": "embedding_B",
    "lora_E": "E",
    "ranknum": "ranknum",
    "base_layer.weight": "base",  # PEFT adds the weight of an adapted output embedding
    "base_layer.bias": "base_bias",
    "lora_B.bias": "bias",
}
TOKENS = "token_adapter.trainable_tokens_delta"
_EMPTY = (None, False, [], {}, "none")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that subtract from W
_STARTS = ("true", "false", "none", "gaussian", "eva", "orthogonal")  # those that leave W alone
VERSION = "0.21"  # of PEFT, whose keys these are

# keys that do not change what a layer answers, and those that are read here; a file may have others if they are empty
_HARMLESS = {
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("runtime_config", "megatron_core", "qalora_group_size", "target_r", "tinit", "tfinal", "deltaT", "beta1"),
    *("beta2", "orth_reg_weight", "total_step"),
}
_READ = {
    *("peft_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "init_r"),
    *("use_rslora", "modules_to_save", "init_lora_weights", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias"),
    *("trainable_token_indices", "target_parameters", "ensure_weight_tying"),
}


def lora_of(method: Method) -> LoRA:
    return cast(LoRA, method.inner if isinstance(method, DoRA) else method)


def load_peft(path: Source, *, allow_bin: bool = False) -> Contents:
    """See `Adapter.from_peft`."""
    from spectune.adapters.schema import PeftConfig  # pydantic, which adapters on a model go without

    found, where = read_config(path), str(path / CONFIG)
    kind = found.get("peft_type")
    if kind not in ("LORA", "ADALORA"):
        raise SpectuneError(f"{path} is a PEFT adapter of type {kind!r}; LORA and ADALORA can be read")
    _check_config(found, path)
    config = parsed(PeftConfig, found, where)
    grouped: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, dict[str, Tensor]] = {}
    listed = config.modules_to_save or []
    for key, tensor in _without_wrapped(_read(path, found, allow_bin), found, path).items():
        name, part = _split(key, path, listed)
        parts = (rest if part.startswith(_OWN) else grouped).setdefault(name, {})
        if part.removeprefix(_OWN) in parts:
            raise SpectuneError(f"{path / WEIGHTS} has two tensors for one part of {name!r}, the second {key!r}")
        parts[part.removeprefix(_OWN)] = tensor
    if found.get("ensure_weight_tying") and (listed or any("embedding_A" in parts for parts in grouped.values())):
        raise SpectuneError(
            f"{path} was saved by PEFT with ensure_weight_tying=True and holds once what two tied layers have: merge "
            "it in PEFT (merge_and_unload), or train it without ensure_weight_tying"
        )
    read = _adalora if kind == "ADALORA" else _plain
    ours = peft_kinds.ours(grouped)
    more = read_more(path)
    names = more.architecture or config.model_class()
    expert_layers = _experts(grouped, config, str(names[0]), path)
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, parts in grouped.items():
        grouped[name], of_kind, kernel = peft_kinds.plain(name, parts)
        kinds[name] = of_kind, kernel
    terms = {
        name: read(peft_kinds.module_of(name), parts, config, path)
        for name, parts in grouped.items()
        if parts.keys() & {"A", "B"}
    }
    conv1d, sketches = bool(config.fan_in_fan_out), more.base
    layers = {}
    for name, term in terms.items():
        own, of_kind = ours.get(name, (name, kinds[name][0]))
        if term is not None:
            term = term.scaled(peft_kinds.factor(name, config.peft_version, where))
            layers[own] = _layer(term, grouped[name], conv1d, sketches.get(own), of_kind, kinds[name][1])
    layers |= {n: replace(layer, base_sketch=sketches.get(n)) for n, layer in expert_layers.items()}
    modules = {name: _whole_term(name, parts, listed, config, path) for name, parts in rest.items()}
    for name, parts in grouped.items():
        if "base_bias" in parts:
            modules[name] = WholeTerm({"bias": parts["base_bias"].float()})
        if "bias" in parts:  # of lora_B
            modules[name] = WholeTerm({ADDED_BIAS: parts["bias"].float() * _scale(layers, name, path)})
        if not parts.keys() & {"A", "B"} and "base" in parts:
            modules[name] = WholeTerm({"weight": parts["base"].float()}, complete=True)
    if not layers:
        raise SpectuneError(f"{path / WEIGHTS} has no update")
    architecture = tuple(names) if len(names) == 2 and all(type(name) is str for name in names) else None
    held = {name: (term,) for name, term in modules.items()}
    known = {"architecture": architecture, "groups": listed, "quantize": more.quantize}
    return Contents(layers, config.base_model_name_or_path, labels=more.labels, modules=held, **known)


def _experts(
    grouped: dict[str, dict[str, Tensor]], config: PeftConfig, model_class: str, path: Source
) -> dict[str, LayerUpdate]:
    """Take the experts out of an adapter's tensors, and return the layer of each."""
    swapped = peft_experts.is_swapped(Contents({}, architecture=(model_class, "")))
    layers: dict[str, LayerUpdate] = {}
    for module, (owner, key) in peft_experts.unstacked(grouped, config.target_parameters or []).items():
        parts, name = grouped.pop(module), f"{owner}.{key}"
        if parts.keys() != {"A", "B"}:
            raise SpectuneError(f"{path / WEIGHTS} has other tensors of {name!r} than lora_A and lora_B")
        rank = int(_pattern(config.rank_pattern, name, config.r, path))
        pairs = list(peft_experts.experts_of(name, parts["A"], parts["B"], rank, swapped, str(path / WEIGHTS)))
        for number, (A, B) in enumerate(pairs):
            term = _plain(name, {"A": A, "B": B}, config, path)
            assert term is not None
            layers[f"{owner}.{number}.{key}"] = LayerUpdate((len(B), A.shape[1]), (term,), experts=len(pairs))
    return layers


def _check_config(config: Mapping[str, object], path: Source) -> None:
    """Raise for what may change a layer's answer and is not known here."""
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGES_BASE):
        raise SpectuneError(
            f"{path} was saved by PEFT with init_lora_weights={start!r} and without conversion, so that it only works "
            "on a base that PEFT changed; save it with path_initial_model_for_weight_conversion and load that"
        )
    strange = {k: v for k, v in config.items() if k not in _READ | _HARMLESS and v not in _EMPTY}
    if config.get("bias") not in (None, "none", "lora_only", "all"):
        strange["bias"] = config["bias"]
    if start not in _STARTS:
        strange["init_lora_weights"] = start
    for key, value in strange.items():
        version = config.get("peft_version") or "of an unknown version"
        raise SpectuneError(
            f"{path} was saved by PEFT {version} with {key}={value!r:.60}, which no adapter here holds (known are the "
            f"keys of PEFT {VERSION})"
        )


def _read(path: Source, config: Mapping[str, object], allow_bin: bool) -> dict[str, Tensor]:
    if isinstance(path, Path) and not (path / WEIGHTS).exists() and (path / PICKLED).exists():
        if not allow_bin:
            raise SpectuneError(
                f"{path} has {PICKLED}, a pickle, and no {WEIGHTS}: if you trust it, Adapter.from_peft(path, "
                "allow_bin=True) reads its tensors and nothing else"
            )
        return read_bin(path)
    return read_tensors(path, config)


def _without_wrapped(tensors: Mapping[str, Tensor], config: Mapping[str, object], path: Source) -> dict[str, Tensor]:
    """Return tensors without the biases that PEFT writes twice where it trains all of them and modules whole.

    It writes that of the module that is trained whole by the module's name, and again as the wrapper's around it has
    them: of what is trained, and of the original, which no longer answers.
    """
    found = dict(tensors)
    if config.get("bias") != "all" or not config.get("modules_to_save"):
        return found
    for key in tensors:
        if key.endswith("bias") and ".original_module." in key:
            del found[key]
        elif key.endswith("bias") and ".modules_to_save." in key:
            module, _, rest = key.partition(".modules_to_save.")
            own = [f"{module}.{name}" for name in (rest, rest.partition(".")[2]) if f"{module}.{name}" in tensors]
            if not own or not torch.equal(found.pop(key), tensors[own[0]]):
                raise SpectuneError(f"{path / WEIGHTS} has {key!r} and, by the module's own name, another bias or none")
    return found


_OWN = "own:"  # of a tensor that stands for a module's own


def _split(key: str, path: Source, whole: Any) -> tuple[str, str]:
    """Return the module that a tensor belongs to, and which of its parts it is."""
    bare = key.removeprefix(PREFIX)
    owner, _, kind = bare.rpartition(".")
    if any(f".{module}." in f".{bare}" for module in whole):
        return owner, f"{_OWN}{kind}"
    if bare.endswith(f".{TOKENS}"):
        return bare.removesuffix(f".{TOKENS}"), f"{_OWN}rows"
    for suffix, part in _TENSORS.items():
        if bare.endswith(f".{suffix}"):
            return bare.removesuffix(f".{suffix}"), part
    if owner and (kind == "bias" or (kind == "weight" and not owner.endswith(("lora_A", "lora_B")))):
        return owner, f"{_OWN}{kind}"  # a bias that trained, or an embedding that was resized
    raise SpectuneError(f"{path / WEIGHTS} has the tensor {key!r}, which belongs to no linear layer's LoRA")


def _layer(
    term: Term, parts: dict[str, Tensor], conv1d: bool, sketch: Tensor | None, kind: str, kernel: tuple[int, ...]
) -> LayerUpdate:
    shape = (term.trained["B"].shape[0], term.trained["A"].shape[1])
    weight = parts.get("base")
    if weight is not None and kind not in (LINEAR, IN) and weight.dim() > 1:
        weight = kind_named(kind).matrix(weight)
    if weight is not None and (tuple(weight.shape) != shape or not weight.is_floating_point()):
        raise SpectuneError(f"the base_layer.weight beside a LoRA of {shape} is {weight.dtype} {tuple(weight.shape)}")
    sketch = sketch if weight is None else fingerprint.sketch_weight(weight)
    return LayerUpdate(shape, (term,), conv1d and kind == LINEAR, base_sketch=sketch, kind=kind, kernel=kernel)


def _whole_term(
    name: str, parts: dict[str, Tensor], listed: Sequence[str], config: PeftConfig, path: Source
) -> WholeTerm:
    """Return one of PEFT's `modules_to_save`, a resized embedding, trained rows of one, or a bias that trained."""
    if not name or not all(parts) or any(not t.numel() for t in parts.values()):
        raise SpectuneError(f"{path / WEIGHTS} has {name!r} whole, with tensors that belong to no module")
    if "rows" in parts:
        rows = rows_of(name, config, path / CONFIG)
        values = parts["rows"].float()
        if values.dim() != 2 or len(values) != len(rows):
            raise SpectuneError(f"{path / WEIGHTS} has {len(values)} rows of {name!r}, and the config {len(rows)}")
        order = sorted(range(len(rows)), key=lambda i: rows[i])
        return WholeTerm({"weight": values[order]}, rows=tuple(rows[i] for i in order))
    if not _is_listed(name, listed) and "weight" in parts and parts["weight"].dim() != 2:
        raise SpectuneError(
            f"{path / WEIGHTS} has the tensor '{PREFIX}{name}.weight', which belongs to no linear layer's LoRA"
        )
    if parts.keys() == {"bias"} and any(f".{n}." in f".{name}." for n in listed):
        raise SpectuneError(f"{path / WEIGHTS} lacks the weight of {name!r}, which the config says is whole")
    held = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in parts.items()}
    return WholeTerm(held, complete=parts.keys() != {"bias"})


def _is_listed(name: str, listed: Sequence[str]) -> bool:
    """Whether a module is one of `modules_to_save`, or in one: PEFT takes them for ends of names, at a dot or not."""
    around = accumulate(name.split("."), lambda outer, key: f"{outer}.{key}")
    ends = tuple(str(end) for end in listed)
    return any(module.endswith(ends) for module in around)


def rows_of(name: str, config: TokenRows, where: Path) -> list[int]:
    """Return the rows of a module that trained.

    Raises:
        SpectuneError: the config does not say which.
    """
    rows = config.of(name)
    if rows is None:
        raise SpectuneError(f"trainable_token_indices in {where} do not say which rows of {name!r} are trained")
    return rows


def _scale(layers: dict[str, LayerUpdate], name: str, path: Source) -> float:
    method = layers[name].terms[0].method if name in layers else None
    if not isinstance(method, LoRA):
        raise SpectuneError(f"{path / WEIGHTS} has a bias of lora_B for {name!r}, which is no plain LoRA")
    return method.scale


def _factors(name: str, parts: dict[str, Tensor], path: Source) -> tuple[Tensor, Tensor]:
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


def _plain(name: str, parts: dict[str, Tensor], config: PeftConfig, path: Source) -> Term | None:
    """Return the LoRA or DoRA of one layer, with PEFT's scale: alpha / r or alpha / sqrt(r) as its config has them."""
    A, B = _factors(name, parts, path)
    if A.shape[0] == 0:
        return None
    declared = _pattern(config.rank_pattern, name, config.r, path)
    alpha = _pattern(config.alpha_pattern, name, config.lora_alpha, path)
    if declared != A.shape[0]:
        raise SpectuneError(
            f"lora_A of {name!r} in {path / WEIGHTS} has rank {A.shape[0]}, and the config says {declared}"
        )
    rslora = bool(config.use_rslora)
    trained = {"A": A, "B": B}
    if alpha <= 0:
        trained["B"] = B * (alpha / (math.sqrt(declared) if rslora else declared))
        alpha = math.sqrt(declared) if rslora else declared
    try:
        method: Method = LoRA(rank=A.shape[0], alpha=alpha, rslora=rslora, dropout=config.lora_dropout)
    except SpectuneError as error:
        raise SpectuneError(f"{name!r} in {path / CONFIG} is not understood: {error}") from None
    if bool(config.use_dora) != ("magnitude" in parts):
        raise SpectuneError(f"lora_magnitude_vector of {name!r} in {path / WEIGHTS} and use_dora do not go together")
    if "magnitude" in parts:
        magnitude = parts["magnitude"].float().flatten()
        if len(magnitude) != len(B):
            raise SpectuneError(f"lora_magnitude_vector of {name!r} in {path / WEIGHTS} has {len(magnitude)} rows")
        method, trained = DoRA(method), {"magnitude": magnitude, **trained}
    return _checked(Term(method, trained), name, path)


def _checked(term: Term, name: str, path: Source) -> Term:
    """Return a term of a LoRA whose update float32 can hold."""
    A, B = (float(term.trained[key].double().norm()) for key in "AB")
    if not A * B * lora_of(term.method).scale < torch.finfo(torch.float32).max:
        raise SpectuneError(
            f"the update of {name!r} in {path} is beyond what float32 holds, by its factors or its alpha"
        )
    return term


def _adalora(name: str, parts: dict[str, Tensor], config: PeftConfig, path: Source) -> Term | None:
    """Return P diag(E) Q as a LoRA, with PEFT's scale: alpha / (initial rank + 1e-5), whatever rank is left."""
    A, B = _factors(name, parts, path)
    E = parts.get("E")
    if E is None or E.numel() != len(A):
        raise SpectuneError(f"{path / WEIGHTS} lacks lora_E of {name!r}, or it does not fit lora_A")
    E = E.float().flatten()
    kept = E != 0
    if not kept.any():
        return None
    count = parts.get("ranknum", torch.tensor(float(config.init_r)))
    initial = float(count) if count.numel() == 1 else 0.0
    if not initial > 0:
        raise SpectuneError(f"ranknum of {name!r} in {path / WEIGHTS}, or init_r, is no rank that AdaLoRA began with")
    alpha = config.lora_alpha
    scale = (alpha if alpha > 0 else initial) / (initial + 1e-5)
    rank = int(kept.sum())
    trained = {"A": A[kept], "B": B[:, kept] * (E[kept] * scale)}
    trained = {key: value.contiguous() for key, value in trained.items()}
    return _checked(Term(LoRA(rank=rank, alpha=rank), trained), name, path)


def _pattern(patterns: Mapping[str, Any] | None, name: str, default: float, path: Source) -> float:
    """Return the value of the first pattern that is the end of a module's name, as PEFT matches them."""
    for pattern, value in (patterns or {}).items():
        try:
            found = matches_end(pattern, name)
        except SpectuneError as error:
            raise SpectuneError(f"{path / CONFIG}: {error}") from None
        if found and isinstance(value, list):
            raise SpectuneError(f"{pattern!r} in 'rank_pattern' in {path / CONFIG} is a list, which AdaLoRA alone has")
        if found:
            return value
    return default
