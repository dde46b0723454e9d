"""What programs that know LoRA and nothing around it take of an adapter."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from spectune.adapters.contents import Contents
from spectune.errors import SpectuneError
from spectune.layers.kinds import LINEAR
from spectune.methods.dora import DoRA
from spectune.methods.lora import LoRA


class PlainLoRA(NamedTuple):
    """dW = B A of one layer: s is in B.

    Args:
        A: (r x in).
        B: (out x r).
        magnitude: DoRA's m (out), or None.
    """

    A: Tensor
    B: Tensor
    magnitude: Tensor | None


def loras_of(adapter: Contents, program: str, *, dora: bool = False) -> dict[str, PlainLoRA]:
    """Return the LoRAs of an adapter by layer.

    Args:
        adapter: an adapter of LoRAs, or of DoRAs around them.
        program: which is to read them, for the message.
        dora: it knows DoRA.

    Raises:
        SpectuneError: there is something else in the adapter; it is named.
    """
    found: dict[str, PlainLoRA] = {}
    for name, layer in adapter.layers.items():
        (term,) = layer.terms
        method: object = term.method
        inner: object = method.inner if isinstance(method, DoRA) else method
        if layer.experts:
            raise SpectuneError(f"{program} takes no LoRA of the experts of {name!r}: merge it (--format merged)")
        if layer.kind != LINEAR:
            raise SpectuneError(f"{program} takes LoRA of linear layers alone, and {name!r} is another: merge it")
        if not isinstance(inner, LoRA) or (inner is not method and not dora):
            what = "is a layer that was trained whole" if method.replaces else f"has {method.name}"
            raise SpectuneError(f"{name!r} {what}, and {program} takes LoRA alone: merge it (--format merged)")
        A, B = term.trained["A"], term.trained["B"] * (inner.scale * term.weight)
        found[name] = PlainLoRA(A, B, term.trained.get("magnitude"))
    if adapter.modules:
        raise SpectuneError(
            f"{min(adapter.modules)!r} was trained beside the LoRA, and {program} takes LoRA alone: merge it "
            "(--format merged)"
        )
    return found
