"""Base models loaded by name, with their tokenizers, and adapters bound to theirs."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import transformers
from transformers.models.auto import modeling_auto

from spectune.bases.classifiers import load_classifier
from spectune.bases.devices import checked_device, resolve_dtype
from spectune.bases.embedded import EMBEDDED
from spectune.bases.places import model_path
from spectune.bases.quantizing import pack_the_rest, quantization
from spectune.bases.quiet import quiet
from spectune.errors import SpectuneError, first_line, need
from spectune.layers.packed import keep_odd_layouts, unpack_new_heads
from spectune.model.lifecycle import QUANTIZE
from spectune.reading import read_json

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    from spectune.adapters.adapter import Adapter

_MOST = {  # by a part of a number's name in a config
    "layers?$|depths?$|blocks?$|layer_types": 2_000,
    "experts": 10_000,
    "heads?$|groups?$": 100_000,
    "vocab|size|dim|width|channels|rank|d_model|d_ff|d_kv|labels": 1 << 26,
}
BIN = "SPECTUNE_BIN"  # in the environment, 1 where pickled checkpoints may be read


def check_config(config: PreTrainedConfig, name: str | os.PathLike[str]) -> None:
    """Raise for a model of more layers, experts or rows than any has: to build it would not end.

    Raises:
        SpectuneError: it is one.
    """
    stack: list[tuple[str, object]] = [("config.json", config.to_dict())]
    while stack:
        key, value = stack.pop()
        if isinstance(value, dict):
            stack += [(str(inner), item) for inner, item in value.items()]
        elif isinstance(value, (list, tuple)):
            stack += [(key, item) for item in value[:1000]]
        elif isinstance(value, int) and not isinstance(value, bool):
            most = next((most for word, most in _MOST.items() if re.search(word, key)), 1 << 62)
            if not -most <= value <= most:
                raise SpectuneError(f"{os.fspath(name)!r} cannot be loaded as a model: its {key} is {value!r:.40}")


class Outline(NamedTuple):
    """A base model without its weights.

    Args:
        config: of the checkpoint.
        generation_config: of the checkpoint.
    """

    config: PreTrainedConfig
    generation_config: GenerationConfig | None


def load_tokenizer(
    name: str | os.PathLike[str], *, trust_remote_code: bool = False
) -> tuple[Outline, PreTrainedTokenizerBase]:
    """Load what a base model is without its weights, and its tokenizer.

    Args:
        name: as for `load_base`.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        SpectuneError: an unknown name, or a folder that holds no model.
    """
    path = model_path(name)
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            tokenizer = _tokenizer(path, trust_remote_code)
            check_config(config, name)
            try:
                generation = transformers.GenerationConfig.from_pretrained(path)
            except OSError:  # not every checkpoint has one
                generation = transformers.GenerationConfig.from_model_config(config)
    except SpectuneError:
        raise
    except Exception as error:  # whatever a broken folder makes of transformers
        raise _unloadable(name, error) from error
    return Outline(config, generation), tokenizer


def _tokenizer(path: str | os.PathLike[str], trust_remote_code: bool) -> PreTrainedTokenizerBase:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    tokenizer("a")  # settings of another kind than they should be are found when they are used
    return tokenizer


def _unloadable(name: str | os.PathLike[str], error: Exception) -> SpectuneError:
    return SpectuneError(f"{os.fspath(name)!r} cannot be loaded as a model: {first_line(error)[:300]}")


def load_base(
    name: str | os.PathLike[str],
    dtype: str | torch.dtype | None = None,
    *,
    device: str | torch.device | None = None,
    labels: Sequence[str] | None = None,
    new_head: bool = False,
    quantize: str | None = None,
    trust_remote_code: bool = False,
    allow_bin: bool = False,
    **kwargs: object,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model and its tokenizer.

    Args:
        name: "smollm2-135m" or "minilm-l6" (embedded), a local folder, or a hub id.
        dtype: "fp32", "bf16", "fp16", or None for bf16 where it is fast and fp32 elsewhere.
        device: where to; None keeps it on the CPU.
        labels: load it as a classifier of texts into these; a head that the checkpoint lacks is zero, and `adapt`
            trains it in full.  One name is a number to predict; `Adapter.labels` say whether several may be right.
        new_head: with labels, a head of their own where the checkpoint has one for as many labels by other names.
        quantize: "nf4" (4 bits, with doubly quantized scales) or "int8": pack the linear layers by bitsandbytes, all
            but the output embedding, as they are loaded. `dtype` is what the rest is held in, and computed in.
            "nf4:rank=16,refine=5" holds a part of each weight of that rank beside what is packed (`pack_the_rest`).
        trust_remote_code: run code that comes with the checkpoint.
        allow_bin: read pickled weights where there are no others, with torch's loader for weights only; so does
            $SPECTUNE_BIN=1.
        kwargs: for `from_pretrained`.

    Returns:
        The model (a causal language model where the checkpoint is one, an encoder-decoder or encoder otherwise; or a
        classifier), in evaluation mode, and the tokenizer.

    Raises:
        SpectuneError: an unknown name, a folder that holds no model or a pickled one alone, or bitsandbytes is missing.
    """
    device = None if device is None else checked_device(device)  # before anything is loaded
    wanted = resolve_dtype(dtype, device or "cpu")
    packed = quantization(quantize, wanted, device)
    path = model_path(name, wanted)
    if not (allow_bin or os.environ.get(BIN) == "1" or "gguf_file" in kwargs):
        _check_not_pickled(Path(path))
        kwargs = {"use_safetensors": True, **kwargs}
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            tokenizer = _tokenizer(path, trust_remote_code)
            check_config(config, name)
            options = {"dtype": wanted, "trust_remote_code": trust_remote_code, **packed, **kwargs}
            if quantize is not None and (own := getattr(config, "quantization_config", None)) is not None:
                raise SpectuneError(f"{os.fspath(name)!r} is quantized already ({_kind(own)}): leave quantize out")
            if labels is not None:
                model = load_classifier(path, config, tokenizer, labels, options, new_head)
            else:
                model = auto_class(config).from_pretrained(path, **options)
    except (SpectuneError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a broken folder makes of transformers
        raise _unloadable(name, error) from error
    if os.fspath(name) in EMBEDDED:
        model.config._name_or_path = os.fspath(name)
    model.eval()
    pack_the_rest(model, quantize, wanted, device)
    unpack_new_heads(model)
    keep_odd_layouts(model)
    if quantize is not None:
        setattr(model, QUANTIZE, quantize)
    return (model if device is None or packed else cast(Any, model).to(device)), tokenizer


def _check_not_pickled(folder: Path) -> None:
    pickled = sorted(folder.glob("pytorch_model*.bin")) if folder.is_dir() else []
    if pickled and not any(folder.glob("*.safetensors")):
        raise SpectuneError(
            f"{pickled[0]} is a pickled checkpoint without safetensors beside it: convert it, or allow it with "
            "`spectune --bin ...` or allow_bin=True (it is loaded as weights only)"
        )


def _kind(quantization_config: object) -> str:
    told = quantization_config if isinstance(quantization_config, dict) else vars(quantization_config)
    return str(getattr(told.get("quant_method"), "value", told.get("quant_method")))


def base_name(adapter: Adapter, given: str | None = None) -> str:
    """Return the name of an adapter's base model, or the one that is given.

    Raises:
        SpectuneError: neither is known.
    """
    name = given or adapter.base_model
    if not name:
        raise SpectuneError("the adapter does not say which base it belongs to; name it with --base")
    return name


def bind_to_base(adapter: Adapter, given: str | None = None, *, check: bool = True) -> Adapter:
    """Give an adapter the weights of its base, loaded by name, where its update cannot be had without them."""
    if all(adapter.self_contained(name) for name in adapter.layers):
        return adapter
    name = base_name(adapter, given)
    if is_of_diffusers(name):
        return adapter.bind(_of_diffusers(name), check=check)
    model, _ = load_base(name, "fp32", labels=adapter.labels, new_head=True)
    return adapter.bind(model, check=check)


def is_of_diffusers(name: str) -> bool:
    """Whether a folder holds a component of a diffusers pipeline."""
    config = Path(name) / "config.json"
    return config.is_file() and isinstance(found := read_json(config), dict) and "_class_name" in found


def _of_diffusers(folder: str) -> Any:
    need("diffusers", f"the model in {folder}")
    return import_module("diffusers").AutoModel.from_pretrained(folder)


def auto_class(config: PreTrainedConfig) -> type[_BaseAutoModelClass]:
    if config.is_encoder_decoder:
        return transformers.AutoModelForSeq2SeqLM
    architectures = getattr(config, "architectures", None) or []
    kind: Any = config.model_type  # any text; the tables' keys are literals
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(kind)
    if causal is not None and (causal in architectures or (not architectures and masked is None)):
        return transformers.AutoModelForCausalLM
    if any(a.endswith("ForSequenceClassification") for a in architectures):
        return transformers.AutoModelForSequenceClassification
    return transformers.AutoModel
