"""LoRA as a GGUF file, for llama.cpp and what is built on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from spectune.adapters.contents import Contents
from spectune.adapters.formats.plain import loras_of
from spectune.errors import SpectuneError, nearest
from spectune.storage import publish, temporary_beside

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FILE = "adapter.gguf"
# architectures by transformers' model type, and whether llama.cpp holds the rows of queries and keys in another order
_ARCHITECTURES = {
    **dict.fromkeys(("llama", "mistral", "granite", "smollm3"), True),
    **dict.fromkeys(("qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "gpt2", "olmo2", "starcoder2"), False),
}
_NAMES = {"mistral": "llama", "gemma3_text": "gemma3"}  # elsewhere transformers' is llama.cpp's


def save_gguf(adapter: Contents, path: Path, config: PreTrainedConfig) -> Path:
    """Write an adapter of LoRAs as the file that llama.cpp's `--lora` reads.

    The file has one alpha, which llama.cpp divides by each tensor's rank: s is in B, and alpha the rank, so that the
    LoRAs must be of one.  B's rows are in the order in which llama.cpp holds W's.

    Args:
        adapter: the adapter.
        path: the folder.
        config: of the base model.

    Raises:
        SpectuneError: an architecture or a layer that is not known, or a part of the adapter that the file cannot hold.
    """
    import gguf

    kind = config.model_type
    if kind not in _ARCHITECTURES:
        raise SpectuneError(
            f"GGUF files of LoRAs are known for {', '.join(sorted(_ARCHITECTURES))}, and not for "
            f"{kind!r}{nearest(kind, _ARCHITECTURES)}: merge the adapter (--format merged) and convert the model"
        )
    loras = loras_of(adapter, "llama.cpp")
    named = _names(kind, int(config.num_hidden_layers))
    ranks = {len(lora.A) for lora in loras.values()}
    assert len(ranks) == 1, ranks  # filled up by whoever asks

    def write(file: Path) -> None:
        writer = gguf.GGUFWriter(file, _NAMES.get(kind, kind))
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(next(iter(ranks))))
        if adapter.base_model:
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, adapter.base_model)
        for name, lora in loras.items():
            key, B = named(name), lora.B
            if _ARCHITECTURES[kind] and name.endswith((".q_proj", ".k_proj")):
                B = _reordered(B, config, name.endswith(".k_proj"))
            writer.add_tensor(f"{key}.weight.lora_a", lora.A.float().contiguous().numpy())
            writer.add_tensor(f"{key}.weight.lora_b", B.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_beside(path, folder=True) as folder:
        write(folder / FILE)
        publish(folder, path)
    return path


def _names(kind: str, blocks: int) -> Callable[[str], str]:
    import gguf

    architecture = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == _NAMES.get(kind, kind))
    known = gguf.get_tensor_name_map(architecture, blocks)

    def named(name: str) -> str:
        key = known.get_name(name) or known.get_name(name.removeprefix("model."))
        if key is None:
            raise SpectuneError(f"llama.cpp has no name for {name!r}: leave it out, or merge it (--format merged)")
        return key

    return named


def _reordered(B: Tensor, config: Any, of_keys: bool) -> Tensor:
    """Return the rows of a query's or a key's B as llama.cpp has them: a head's two halves by turns, for rotations."""
    heads = config.num_attention_heads
    heads = (getattr(config, "num_key_value_heads", None) or heads) if of_keys else heads
    return B.view(heads, 2, len(B) // heads // 2, B.shape[1]).transpose(1, 2).reshape(B.shape)
