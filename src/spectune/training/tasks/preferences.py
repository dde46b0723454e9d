"""What tasks that learn from preferences share: log-probabilities of answers, by the model and by its base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from spectune.model.routing import base_alone
from spectune.speed.shapes import IGNORE
from spectune.training.data.encoding import Example
from spectune.training.data.packing import Packer
from spectune.training.tasks.base import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Preferences(Task):
    """A task whose loss is of log p/p0 of whole answers, with p0 the base: the model with its adapters switched off."""

    dropout: ClassVar[bool] = False
    reference: PreTrainedModel | None = None  # another model as p0, where the base's own weights train

    def reference_of(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], count: int) -> Tensor:
        """Return the base's log-probabilities of a batch's answers (examples), without gradients."""
        base = self.reference or getattr(model, "module", model)
        with base_alone(base, compared=True), torch.no_grad():
            return log_probabilities(base, inputs, count)


def batch_of(packer: Packer, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Return examples as a batch, in which "targets" are the learned tokens and "owners" the examples they are of."""
    batch = packer(examples)
    targets = batch.pop("labels")
    if len(targets) == len(examples):
        owners = torch.arange(len(examples))[:, None].expand_as(targets).contiguous()
    else:
        lengths = torch.tensor([sum(example.supervised[1:]) for example in examples])
        owners = torch.arange(len(examples)).repeat_interleave(lengths)[None]
    return {**batch, "targets": targets, "owners": owners}


def log_probabilities(model: PreTrainedModel, inputs: Mapping[str, Tensor], count: int) -> Tensor:
    """Return the log-probability of the answer of each example of a batch (examples).

    Args:
        model: whose.
        inputs: as `batch_of` makes them.
        count: of the examples.
    """
    given = {key: value for key, value in inputs.items() if key not in ("targets", "owners")}
    targets, owners = inputs["targets"], inputs["owners"]
    logits = model(**given, use_cache=False).logits.float().flatten(0, -2)
    each = -F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="none")
    return each.new_zeros(count).index_add(0, owners.flatten(), each)
