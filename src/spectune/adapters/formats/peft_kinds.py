"""PEFT's LoRA of convolutions and embeddings: the names and shapes of its tensors, both ways."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from spectune.adapters.terms import LINEAR, LayerUpdate
from spectune.errors import SpectuneError

_EMBEDDING = {"embedding_A": "A", "embedding_B": "B"}


def named(layer: LayerUpdate, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a LoRA's or a DoRA's tensors as PEFT names and shapes them, by what follows a layer's name."""
    A, B, magnitude = trained["A"], trained["B"], trained.get("magnitude")
    ones = (1,) * len(layer.kernel)
    if layer.kind == "embedding":
        found = {"lora_embedding_A": A, "lora_embedding_B": B}
    else:  # A is a convolution, with the layer's kernel, and B one with a kernel of one place
        A = A.unflatten(1, (-1, *layer.kernel)) if layer.kernel else A
        found = {"lora_A.weight": A, "lora_B.weight": B.reshape(*B.shape, *ones)}
    if magnitude is not None:
        shape = (1, -1, *ones) if ones else (-1,)
        found["lora_magnitude_vector"] = magnitude.reshape(shape)
    return found


def plain(name: str, parts: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str, tuple[int, ...]]:
    """Return tensors as a linear layer's LoRA has them, with the kind and the kernel of the layer that they are of.

    Raises:
        SpectuneError: shapes that are neither a linear layer's nor a convolution's.
    """
    found = {_EMBEDDING.get(part, part): tensor for part, tensor in parts.items()}
    if len(found) < len(parts):
        raise SpectuneError(f"the tensors of {name!r} are of an embedding's LoRA and of another layer's as well")
    if _EMBEDDING.keys() & parts.keys():
        return found, "embedding", ()
    A, B = found.get("A"), found.get("B")
    if A is None or B is None or not 3 <= A.dim() <= 5 or B.dim() != A.dim() or any(n != 1 for n in B.shape[2:]):
        return found, LINEAR, ()
    return {**found, "A": A.flatten(1), "B": B.flatten(1)}, "conv", tuple(A.shape[2:])
