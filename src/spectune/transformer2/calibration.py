"""Probabilities that mean what they say, and the threshold below which a classifier says "none"."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_KEPT = 0.98  # least share of the rightly labelled held-out prompts that keep their label


class Calibration(NamedTuple):
    """What a held-out set chose.

    Args:
        temperature: logits are divided by it.
        threshold: the least probability of a label that is given.
    """

    temperature: float
    threshold: float


def calibrate(logits: Tensor, targets: Tensor, none: int | None) -> Calibration:
    """Choose temperature and threshold on held-out prompts.

    The temperature minimises the cross-entropy (arXiv 1706.04599).  The threshold leaves as many strangers as it can
    without a label while nearly all prompts keep their right one.  Strangers are the prompts labelled "none", and each
    prompt with its own label taken away, which is then one for an adapter that the library does not have.

    Args:
        logits: (prompts x labels).
        targets: the right labels (prompts).
        none: the index of the label "none", if it is one.
    """
    grid = torch.logspace(-1, 1, 41)
    count, labels = logits.shape
    doubt = labels / (count + labels)  # one wrong prompt more for each label: a few right ones are no certainty
    losses = torch.stack([F.cross_entropy(logits / t, targets, label_smoothing=doubt) for t in grid])
    temperature = float(grid[losses.argmin()])
    scaled = logits / temperature
    own = torch.ones_like(targets, dtype=torch.bool) if none is None else targets != none
    confidence, label = best(scaled, none)
    kept = confidence[own & (label == targets)]
    strangers = [confidence[~own]]
    if labels - (none is not None) > 2:
        without = scaled.scatter(1, targets[:, None], float("-inf"))[own]
        strangers.append(best(without, none)[0])
    others = torch.cat(strangers)
    if not len(others):
        return Calibration(temperature, float(kept.quantile(1 - _KEPT)) if len(kept) else 0.0)
    edges = torch.cat([kept, others]).unique()
    tried = torch.cat([edges[:1], (edges[1:] + edges[:-1]) / 2])
    right = (kept[None] >= tried[:, None]).sum(1) / max(1, int(own.sum()))
    refused = (others[None] < tried[:, None]).float().mean(1)
    value = torch.where(right >= _KEPT * right.max(), right + refused, -1.0)
    return Calibration(temperature, float(tried[value.argmax()]))


def best(logits: Tensor, none: int | None) -> tuple[Tensor, Tensor]:
    """Return the probability and the index of the likeliest label that is not "none"; 0 where "none" is likelier."""
    probabilities = logits.softmax(-1)
    if none is None:
        found = probabilities.max(-1)
        return found.values, found.indices
    named = probabilities.index_fill(-1, torch.tensor([none]), -1.0).max(-1)
    return named.values * (named.values >= probabilities[:, none]), named.indices


def calibration_error(confidence: Tensor, right: Tensor, bins: int = 10) -> float:
    """Return the expected calibration error: the mean gap between confidence and accuracy over bins of confidence."""
    which = (confidence * bins).long().clamp(max=bins - 1)
    gaps = [
        (which == b).float().mean() * (confidence[which == b].mean() - right[which == b].float().mean()).abs()
        for b in range(bins)
        if (which == b).any()
    ]
    return float(torch.stack(gaps).sum()) if gaps else 0.0
