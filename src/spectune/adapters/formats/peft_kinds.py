"""PEFT's LoRA of convolutions, embeddings and torch's attention: names and shapes of its tensors, both ways."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from spectune.adapters.terms import LayerUpdate
from spectune.errors import SpectuneError
from spectune.layers.attention import IN
from spectune.layers.kinds import LINEAR

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
    if A is not None and B is not None and A.dim() == B.dim() > 2 and len(A) > B.shape[1]:
        raise SpectuneError(
            f"{name!r} is a LoRA on a convolution in groups, each of which PEFT answers from the channels of all: no "
            "weight in groups holds that"
        )
    if A is None or B is None or not 3 <= A.dim() <= 5 or B.dim() != A.dim() or any(n != 1 for n in B.shape[2:]):
        return found, LINEAR, ()
    return {**found, "A": A.flatten(1), "B": B.flatten(1)}, "conv", tuple(A.shape[2:])


_UNLIKE = {
    IN: "a module of attention, {!r} in it, which PEFT answers otherwise",
    "grouped conv": "a convolution in groups, {!r}, each of which PEFT answers from the channels of all",
    "embedding bag": "an EmbeddingBag, {!r}, which PEFT does not know",
}
_OUT = ".base_layer.out_proj"  # what PEFT calls the other half of a module of attention that it has put a LoRA on
_TWICE = (0, 21)  # up to this PEFT adds the update of an out_proj twice (huggingface/peft#3774), in training as well


def ours(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return the names and kinds of layers, given PEFT's names, where they are others.

    To PEFT the input projection of a module of attention is the module, and the output projection comes with it.
    """
    found: dict[str, tuple[str, str]] = {}
    for name in names:
        if name.endswith(_OUT):
            module = module_of(name)
            found |= {name: (f"{module}.out_proj", LINEAR), module: (f"{module}.{IN}", IN)}
    return found


def module_of(name: str) -> str:
    """Return the name that PEFT's patterns of ranks match for a layer, given PEFT's name of it."""
    return name.removesuffix(_OUT)


def factor(name: str, version: object, where: str) -> float:
    """Return how often PEFT adds the update of a layer, given PEFT's name of it.

    Args:
        name: the layer.
        version: of PEFT that wrote the file, as it says.
        where: the file, for the message.

    Raises:
        SpectuneError: a version of which that is not known.
    """
    if not name.endswith(_OUT):
        return 1.0
    parts = str(version).split(".")[:2]
    if not all(part.isdecimal() for part in parts) or tuple(map(int, parts)) > _TWICE:
        raise SpectuneError(
            f"{where} has a LoRA on the attention {module_of(name)!r}, whose output projection PEFT up to 0.21 updates "
            f"twice; whether {version} does is not known: merge it with that PEFT, and load the merged model"
        )
    return 2.0


def obstacle(layers: Mapping[str, LayerUpdate]) -> str | None:
    """Return what PEFT cannot hold of the kinds of layers that there are, or None."""
    for name, layer in layers.items():
        if (why := _UNLIKE.get(layer.kind)) is not None:
            return why.format(name)
    return None
