"""Random models of real shapes, and random factors in the place of decompositions where only time is measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from gpu.part import Place
from spectune.spectral import SVD, OneSided, Request

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA_3_8B: dict[str, Any] = {  # its blocks; the vocabulary has no part in them
    "vocab_size": 128,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
SMOLLM2_135M: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def blocks(place: Place, **changes: Any) -> Any:
    """Return the blocks of a Llama without an output embedding, frozen, in training mode."""
    return _made(LlamaModel, place, {**place.of(LLAMA_3_8B, TINY), **changes}).train()


def small(place: Place, dtype: torch.dtype | None = None, **changes: Any) -> Any:
    """Return a whole SmolLM2-135M, frozen, in evaluation mode."""
    return _made(LlamaForCausalLM, place, {**place.of(SMOLLM2_135M, TINY), **changes}, dtype).eval()


def _made(kind: Any, place: Place, settings: dict[str, Any], dtype: torch.dtype | None = None) -> Any:
    config = LlamaConfig(**settings, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device(place.device):
        model = kind(config)
    return model.to(dtype or place.of(torch.bfloat16, torch.float32)).requires_grad_(False)


@contextmanager
def made_up_decompositions() -> Iterator[None]:
    """Within the context `adapt` gets random factors of the right shapes: they take as long to multiply by."""
    with patch("spectune.model.install.decompose_each", _made_up):
        yield


def _made_up(weights: Mapping[str, Tensor], request: Request, **_: Any) -> Iterator[tuple[str, SVD | OneSided]]:
    return ((name, _factors(weight, request)) for name, weight in weights.items())


def _factors(weight: Tensor, request: Request) -> SVD | OneSided:
    out, into = weight.shape
    rank = request.rank or min(out, into)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=weight.device) / math.sqrt(max(shape))

    S = torch.linspace(2.0, 1.0, rank, device=weight.device)
    left, right = drawn(out, rank), drawn(rank, into)
    return OneSided(left, right, S) if request.kind == "one_sided" else SVD(left, S, right)
