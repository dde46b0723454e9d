"""Weights that a transformers model ties, and what it says of them once they are no longer one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch.nn as nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pairs = dict[str, str]  # of parameters, by name: the tied one, and the one that it is


class Ties(NamedTuple):
    """What a transformers model says of its tied weights: by name, by its configuration's flag, and those in it too."""

    keys: Any
    flag: Any
    all_keys: Any


def transformers_models(model: nn.Module) -> list[PreTrainedModel]:
    """Return a model and the models in it that are transformers'."""
    # by what is asked of them, so that merging a model of other libraries does not import transformers
    found = [module for module in model.modules() if hasattr(type(module), "get_expanded_tied_weights_keys")]
    return cast("list[PreTrainedModel]", found)


def tied_pairs(model: nn.Module) -> list[tuple[PreTrainedModel, Pairs]]:
    """Return the pairs of parameters that each transformers model ties and that are one now."""
    found = []
    for part in transformers_models(model):
        pairs = part.get_expanded_tied_weights_keys(all_submodels=False)
        found.append((part, {a: b for a, b in pairs.items() if are_one(part, a, b)}))
    return found


def are_one(part: nn.Module, first: str, second: str) -> bool:
    """Whether two names are of one parameter."""
    parameters = dict(part.named_parameters(remove_duplicate=False))
    return first in parameters and parameters[first] is parameters.get(second)


def untie(
    ties: list[tuple[PreTrainedModel, Pairs]], stay_one: Callable[[PreTrainedModel, str, str], bool]
) -> list[tuple[PreTrainedModel, Ties]]:
    """Have transformers models tie no more what is no longer one, and all else as before.

    Where a pair stays tied the configuration's flag stays as well, since it stands for all pairs; a checkpoint that
    holds both parameters of a pair is loaded without tying them.

    Args:
        ties: what was tied, of `tied_pairs`.
        stay_one: whether a pair of a model is one still.

    Returns:
        What the models that were changed said before, for `say_of_ties`.
    """
    left = [{a: b for a, b in pairs.items() if stay_one(part, a, b)} for part, pairs in ties]
    in_use = {id(part.config) for (part, _), remaining in zip(ties, left, strict=True) if remaining}
    changed = []
    for (part, pairs), remaining in zip(ties, left, strict=True):
        if remaining == pairs:
            continue
        before = Ties(part._tied_weights_keys, part.config.tie_word_embeddings, dict(part.all_tied_weights_keys))
        kept = {a: b for a, b in before.all_keys.items() if a not in pairs or a in remaining}
        say_of_ties(part, Ties(remaining, before.flag and id(part.config) in in_use, kept))
        changed.append((part, before))
    # a model around others lists their pairs too, and what those have in common with it is undone from the last
    return changed[::-1]


def say_of_ties(part: Any, ties: Ties) -> None:
    """Have a transformers model say this of its tied weights."""
    part._tied_weights_keys, part.all_tied_weights_keys = ties.keys, ties.all_keys
    part.config.tie_word_embeddings = ties.flag
