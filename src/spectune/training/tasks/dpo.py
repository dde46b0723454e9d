"""Direct preference optimization (arXiv 2305.18290), against the base with the adapter switched off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spectune.bases.prompts import stop_tokens
from spectune.bases.tokens import Asking, answered, padding
from spectune.errors import SpectuneError
from spectune.speed.shapes import IGNORE
from spectune.training.data.encoding import Encoded, Encoder, Example
from spectune.training.data.formats import parts_of
from spectune.training.data.messages import kinds_of, message_problem
from spectune.training.data.packing import Packer
from spectune.training.data.records import Record
from spectune.training.data.store import stored
from spectune.training.options import DpoOptions, TaskOptions
from spectune.training.tasks.base import Collator
from spectune.training.tasks.preferences import Preferences, batch_of, log_probabilities

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Pair(NamedTuple):
    """Two continuations of one prompt; the loss is on the continuations."""

    chosen: Example
    rejected: Example


class Dpo(Preferences):
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

    @property
    def options(self) -> DpoOptions:
        """The task's own part of the configuration."""
        assert isinstance(self.config, DpoOptions)  # or it was made for another task
        return self.config

    def problem(self, record: Record) -> str | None:
        keys = [key for key in ("prompt", "chosen", "rejected") if key in record]
        if not {"chosen", "rejected"} <= set(keys):
            other = "; task: kto learns from single answers" if {"completion", "label"} <= record.keys() else ""
            return f"has the keys {', '.join(map(repr, record)) or 'none'}; it needs {self.forms}{other}"
        if all(isinstance(record[key], str) for key in keys):
            return None
        if not all(isinstance(record[key], list) for key in keys):
            return f"{', '.join(keys)} must all be text, or all be lists of messages; {kinds_of(record, keys)}"
        for key in ("chosen", "rejected"):
            problem = message_problem([*record.get("prompt", ()), *record[key]])
            if problem is not None:
                return f"{key}: {problem}"
        return None

    def encode(
        self, records: Sequence[Record], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limit: int
    ) -> Encoded:
        pairs, cut, encoder = [], 0, Encoder(tokenizer, stop_tokens(model, tokenizer))
        store = stored(encoder, records, "dpo", lambda record: _pair(record, encoder))
        for chosen, rejected in store:
            pair = Pair(chosen, rejected)
            cut += any(len(example.tokens) > limit for example in pair)
            pair = Pair(*(Example(e.tokens[:limit], e.supervised[:limit]) for e in pair))
            if all(any(e.supervised[1:]) for e in pair) and pair.chosen.tokens != pair.rejected.tokens:
                pairs.append(pair)
        if not pairs:
            raise SpectuneError(
                f"no pair has a chosen and another rejected completion within max_length={limit}; raise it, or check "
                "the data"
            )
        return Encoded(pairs, cut, len(records) - len(pairs), store.notes)

    def examples(self, record: Record, encoder: Encoder) -> list[Example]:
        return answered(encoder.tokenizer, _pair(record, encoder))

    def collator(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Collator:
        packer = Packer(model, padding(tokenizer))

        def collate(pairs: Sequence[Pair]) -> dict[str, Tensor]:
            examples = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
            return {**batch_of(packer, examples), "labels": torch.zeros(len(pairs), dtype=torch.long)}

        return collate

    def sums(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        count = len(inputs.pop("labels"))
        targets, owners = inputs["targets"], inputs["owners"]
        reference = self.reference_of(model, inputs, 2 * count)  # first, so that no activations wait for it
        ratios = log_probabilities(model, inputs, 2 * count) - reference
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


def _pair(record: Record, encoder: Encoder) -> Asking[list[Example]]:
    """Ask for and return the examples of what is chosen and of what is rejected."""
    prompt, *both = parts_of(record)
    if isinstance(prompt, str):
        one, other = both
        return [(yield from encoder.completed(prompt, one)), (yield from encoder.completed(prompt, other))]
    options = {key: record[key] for key in ("tools", "chat_template_kwargs") if record.get(key) is not None}
    found = []
    for turns in both:
        found.append((yield from encoder.asking_one({"prompt": prompt, "completion": turns, **options})))
    return found
