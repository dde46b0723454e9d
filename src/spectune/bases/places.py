"""Where a base model lies: an embedded one converted once and cached, a folder that was looked at, or the hub."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from spectune.adapters.folder import CONFIG
from spectune.bases.embedded import EMBEDDED, package_file
from spectune.bases.quiet import quiet
from spectune.errors import SpectuneError, nearest, need
from spectune.home import cache_dir
from spectune.layers.stored import is_beside
from spectune.reading import BASE_JSON_BYTES, check_file, open_tensors
from spectune.spectral import weight_map

_READ = ("*.json", "*.jinja", "*/*.jinja", "*.model", "vocab.txt", "merges.txt")  # by transformers, whole


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
