"""Direct preference optimization (arXiv 2305.18290), against the base with the adapter switched off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spectune.bases.prompts import padding, stop_tokens
from spectune.errors import SpectuneError
from spectune.model.routing import base_alone
from spectune.speed.shapes import IGNORE
from spectune.training.data.encoding import Encoded, Encoder, Example
from spectune.training.data.formats import parts_of
from spectune.training.data.messages import message_problem
from spectune.training.data.packing import Packer
from spectune.training.data.records import Record, of
from spectune.training.options import DpoOptions, TaskOptions
from spectune.training.tasks.base import Collator, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Pair(NamedTuple):
    """Two continuations of one prompt; the loss is on the continuations."""

    chosen: Example
    rejected: Example


class Dpo(Task):
    """Mean over pairs of -log sigmoid(beta h), with h = log p(chosen)/p0(chosen) - log p(rejected)/p0(rejected).

    p0 is the base: the model itself with its adapters switched off, so that no second model is in memory.  TRL's
    DPOTrainer would load one here, since only for PEFT's models it knows how to switch adapters off, and it pads.
    Chosen and rejected lie end to end in one row where the model can, with logits at supervised positions only.

    With a share e of `label_smoothing` the loss is -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h); `hinge` is
    max(0, 1 - beta h) (arXiv 2305.10425), and `ipo` is (h - 1 / (2 beta))^2 with log-ratios a token (arXiv 2310.12036).
    """

    options_type: ClassVar[type[TaskOptions]] = DpoOptions
    forms: ClassVar[str] = (
        "'prompt', 'chosen' and 'rejected', all text or all lists of messages (the prompt may be part of both)"
    )
    unit = "pair"
    shown = ("reward_accuracy", "reward_margin")
    dropout = False
    reference: PreTrainedModel | None = None  # another model as p0, where the base's own weights train

    @property
    def options(self) -> DpoOptions:
        """The task's own part of the configuration."""
        assert isinstance(self.config, DpoOptions)  # or it was made for another task
        return self.config

    def problem(self, record: Record) -> str | None:
        keys = [key for key in ("prompt", "chosen", "rejected") if key in record]
        if not {"chosen", "rejected"} <= set(keys):
            return f"has the keys {', '.join(map(repr, record)) or 'none'}; it needs {self.forms}"
        if all(isinstance(record[key], str) for key in keys):
            return None
        if not all(isinstance(record[key], list) for key in keys):
            return f"{', '.join(keys)} must all be text, or all be lists of messages"
        for key in ("chosen", "rejected"):
            problem = message_problem([*record.get("prompt", ()), *record[key]])
            if problem is not None:
                return f"{key}: {problem}"
        return None

    def encode(
        self, records: Sequence[Record], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limit: int
    ) -> Encoded:
        pairs, cut, encoder = [], 0, Encoder(tokenizer, stop_tokens(model, tokenizer))
        for record in records:
            with of(record):
                pair = _pair(record, encoder)
            cut += any(len(example.tokens) > limit for example in pair)
            pair = Pair(*(Example(e.tokens[:limit], e.supervised[:limit]) for e in pair))
            if all(any(e.supervised[1:]) for e in pair) and pair.chosen.tokens != pair.rejected.tokens:
                pairs.append(pair)
        if not pairs:
            raise SpectuneError(
                f"no pair has a chosen and another rejected completion within max_length={limit}; raise it, or check "
                "the data"
            )
        return Encoded(pairs, cut, len(records) - len(pairs), encoder.notes())

    def examples(self, record: Record, encoder: Encoder) -> list[Example]:
        return [*_pair(record, encoder)]

    def collator(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Collator:
        packer = Packer(model, padding(tokenizer))

        def collate(pairs: Sequence[Pair]) -> dict[str, Tensor]:
            examples = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
            batch = packer(examples)
            targets = batch.pop("labels")
            if len(targets) == len(examples):
                owners = torch.arange(len(examples))[:, None].expand_as(targets).contiguous()
            else:
                lengths = torch.tensor([sum(example.supervised[1:]) for example in examples])
                owners = torch.arange(len(examples)).repeat_interleave(lengths)[None]
            return {**batch, "targets": targets, "owners": owners, "labels": torch.zeros(len(pairs), dtype=torch.long)}

        return collate

    def sums(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        count = len(inputs.pop("labels"))
        targets, owners = inputs.pop("targets"), inputs.pop("owners")

        def log_probabilities(by: PreTrainedModel) -> Tensor:
            logits = by(**inputs, use_cache=False).logits.float().flatten(0, -2)
            each = -F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="none")
            return each.new_zeros(2 * count).index_add(0, owners.flatten(), each)

        base = self.reference or getattr(model, "module", model)
        with base_alone(base, compared=True), torch.no_grad():
            reference = log_probabilities(base)
        ratios = log_probabilities(model) - reference
        chosen, rejected = ratios.chunk(2)
        if self.options.dpo_loss == "ipo":
            lengths = ratios.new_zeros(2 * count).index_add(0, owners.flatten(), (targets != IGNORE).flatten().float())
            normal = ratios / lengths
            loss = (normal[:count] - normal[count:] - 1 / (2 * self.options.beta)).square()
        else:
            h = self.options.beta * (chosen - rejected)
            smooth = self.options.label_smoothing
            loss = -(1 - smooth) * F.logsigmoid(h) - smooth * F.logsigmoid(-h)
            if self.options.dpo_loss == "hinge":
                loss = F.relu(1 - h)
        rewards = self.options.beta * ratios.detach()
        chosen, rejected = rewards.chunk(2)
        return {
            "loss": loss.sum(),
            "items": targets.new_tensor(count),
            "reward_accuracy": (chosen > rejected).float().sum(),
            "reward_margin": (chosen - rejected).sum(),
            "reward_chosen": chosen.sum(),
            "reward_rejected": rejected.sum(),
        }

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return {key: float(value / sums["items"]) for key, value in sums.items() if key != "items"}


def _pair(record: Record, encoder: Encoder) -> Pair:
    prompt, chosen, rejected = parts_of(record)
    if isinstance(prompt, str):
        return Pair(encoder.completed(prompt, chosen), encoder.completed(prompt, rejected))
    options = {key: record[key] for key in ("tools", "chat_template_kwargs") if record.get(key) is not None}
    return Pair(*(encoder.one({"prompt": prompt, "completion": turns, **options}) for turns in (chosen, rejected)))
