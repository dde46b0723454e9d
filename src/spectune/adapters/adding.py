"""Sums of what adapters do to a layer, in as few terms as hold them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from spectune.adapters import fingerprint
from spectune.adapters.terms import LayerUpdate, Term, lora_term
from spectune.errors import SpectuneError
from spectune.methods.lora import LoRA


def add_layers(name: str, ours: LayerUpdate, theirs: LayerUpdate) -> LayerUpdate:
    """Return the sum of two updates of one layer.

    Raises:
        SpectuneError: they differ in shape, or are known to belong to different weights.
    """
    if ours.shape != theirs.shape:
        raise SpectuneError(f"the adapters differ in the shape of {name!r}: {ours.shape} and {theirs.shape}")
    weights = [layer.weight for layer in (ours, theirs) if layer.weight is not None]
    # both are bound to one model: the same memory needs no sketch, which would read all of it
    one = len(weights) == 2 and weights[0].data_ptr() == weights[1].data_ptr()
    bases = [] if one else [base for layer in (ours, theirs) if (base := layer.base()) is not None]
    if len(bases) == 2 and not fingerprint.same_weight(*bases):
        raise SpectuneError(f"the adapters belong to different bases: {name!r} is another weight in each")
    return replace(
        ours,
        terms=collect([*ours.terms, *theirs.terms]),
        held=next((layer.held for layer in (ours, theirs) if layer.weight is not None), None),
        base_sketch=bases[0] if bases else ours.base_sketch,
    )


def collect(terms: Iterable[Term]) -> tuple[Term, ...]:
    """Join the terms that one term can hold: over the same basis coefficients add, and LoRA stacks its factors."""
    alike: defaultdict[object, list[tuple[Term, Mapping[str, Tensor]]]] = defaultdict(list)
    loras: list[Term] = []
    others: list[Term] = []
    for term in terms:
        if isinstance(term.method, LoRA):
            loras.append(term)
            continue
        # a sum of many adapters and its inverse are to be themselves again to the last bit of float32
        in_double = {k: v.double() for k, v in term.trained.items()}
        coefficients = None if term.stays else term.method.coefficients({**(term.basis or {}), **in_double})
        if coefficients is None:
            others.append(term)
        else:
            plain, _ = term.method.from_coefficients(coefficients)
            alike[plain].append((term, coefficients))
    joined = [_sum_of_coefficients(pairs) for pairs in alike.values()]
    return (*joined, *_sum_of_loras(loras), *others)


def _sum_of_loras(terms: list[Term]) -> list[Term]:
    """Return one LoRA with the factors of all side by side."""
    if len(terms) < 2:
        return terms
    scales = [t.weight * cast(LoRA, t.method).scale for t in terms]
    left = torch.cat([t.trained["B"] * scale for t, scale in zip(terms, scales, strict=True)], dim=1)
    return [lora_term(left, torch.cat([t.trained["A"] for t in terms], dim=0))]


def _sum_of_coefficients(pairs: list[tuple[Term, Mapping[str, Tensor]]]) -> Term:
    """Return the one term that sums terms over the same basis, given the coefficients of each."""
    terms = [term for term, _ in pairs]
    total = {key: cast(Tensor, sum(t.weight * c[key] for t, c in pairs)) for key in pairs[0][1]}
    method, trained = terms[0].method.from_coefficients(total)
    sketches = [term.sketch for term in terms if term.sketch is not None]
    return Term(
        method,
        {key: value.float() for key, value in trained.items()},
        basis=next((term.basis for term in terms if term.basis is not None), None),
        sketch=fingerprint.combine(sketches, [t.weight for t in terms]) if len(sketches) == len(terms) else None,
    )
