"""Kahneman-Tversky optimization (arXiv 2402.01306): answers that are good or bad, each by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from spectune.bases.prompts import stop_tokens
from spectune.bases.tokens import Asking, answered, padding
from spectune.errors import SpectuneError
from spectune.training.data.common import says_yes
from spectune.training.data.encoding import Encoded, Encoder, Example
from spectune.training.data.messages import kinds_of, message_problem
from spectune.training.data.packing import Packer
from spectune.training.data.records import Record
from spectune.training.data.store import stored
from spectune.training.options import KtoOptions, TaskOptions
from spectune.training.tasks.base import Collator
from spectune.training.tasks.preferences import Preferences, batch_of, log_probabilities

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_OTHER = "other_"  # of a batch's keys: prompts with the answers of others


class Judged(NamedTuple):
    """One answer and whether it is good.

    Args:
        example: the loss is on its answer.
        other: the same prompt with the answer of another record, by which the divergence from the base is measured.
        good: whether it is desirable.
    """

    example: Example
    other: Example
    good: bool


class Kto(Preferences):
    """Mean over answers of w (1 - sigmoid(s beta (r - z))), s = 1 for good answers and -1 for bad ones.

    r = log p(answer)/p0(answer), p0 being the base: the model with its adapters switched off.  z >= 0 estimates
    KL(p || p0) as the mean of log p/p0 over a batch's prompts, each with the answer of the record after its own; no
    gradient goes through it.  w is `desirable_weight` or `undesirable_weight`.  TRL's KTOTrainer pairs records within a
    batch, so that there z depends on how batches fall.
    """

    options_type: ClassVar[type[TaskOptions]] = KtoOptions
    forms: ClassVar[str] = "'prompt', 'completion' and 'label' (true or false), both text or both lists of messages"
    unit = "answer"
    shown = ("reward_accuracy", "reward_margin")

    @property
    def options(self) -> KtoOptions:
        """The task's own part of the configuration."""
        assert isinstance(self.config, KtoOptions)  # or it was made for another task
        return self.config

    def problem(self, record: Record) -> str | None:
        if not {"prompt", "completion", "label"} <= {key for key, value in record.items() if value is not None}:
            pairs = "; task: dpo learns from pairs" if {"chosen", "rejected"} <= record.keys() else ""
            return f"has the keys {', '.join(map(repr, record)) or 'none'}; it needs {self.forms}{pairs}"
        if says_yes(record["label"]) is None:
            return f"label must be true or false, not {record['label']!r}"
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return None
        if not (isinstance(prompt, list) and isinstance(completion, list)):
            kinds = kinds_of(record, ("prompt", "completion"))
            return f"prompt and completion must both be text, or both be lists of messages; {kinds}"
        problem = message_problem([*prompt, *completion], len(prompt))
        return None if problem is None else f"completion: {problem}"

    def kind(self, record: Record) -> object:
        return says_yes(record["label"])

    def look(self, records: Sequence[Record], held: Sequence[Record]) -> None:
        good = sum(self.kind(record) is True for record in records)
        bad = len(records) - good
        if not good or not bad:
            raise SpectuneError(
                f"every answer has the label {'true' if good else 'false'}: task: kto needs both; "
                + ("task: sft learns good ones" if good else "answers that are good")
            )
        weights = self.options.desirable_weight * good / (self.options.undesirable_weight * bad)
        if not 0.75 <= weights <= 4 / 3:
            self.notes.append(
                f"{good} answers are good and {bad} are not: {weights:.2g} to 1 as they are weighted, the paper has 1 "
                f"to 1.33; undesirable_weight={good / bad:.3g} makes it 1"
            )

    def encode(
        self, records: Sequence[Record], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limit: int
    ) -> Encoded:
        found, cut, encoder = [], 0, Encoder(tokenizer, stop_tokens(model, tokenizer))
        store = stored(encoder, records, "kto", lambda record: _example(record, encoder))
        for record, (example,) in zip(records, store, strict=True):
            cut += len(example.tokens) > limit
            example = Example(example.tokens[:limit], example.supervised[:limit])
            if any(example.supervised[1:]):
                found.append((example, bool(says_yes(record["label"]))))
        if not found:
            raise SpectuneError(f"no answer has a token within max_length={limit}; raise it, or check the data")
        behind = [*found[1:], found[0]]
        judged = [
            Judged(example, _exchanged(example, other, limit), good)
            for (example, good), (other, _) in zip(found, behind, strict=True)
        ]
        return Encoded(judged, cut, len(records) - len(found), store.notes)

    def examples(self, record: Record, encoder: Encoder) -> list[Example]:
        return answered(encoder.tokenizer, _example(record, encoder))

    def collator(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Collator:
        packer = Packer(model, padding(tokenizer))

        def collate(judged: Sequence[Judged]) -> dict[str, Tensor]:
            other = batch_of(packer, [each.other for each in judged])
            return {
                **batch_of(packer, [each.example for each in judged]),
                **{_OTHER + key: value for key, value in other.items()},
                "good": torch.tensor([each.good for each in judged]),
                "labels": torch.zeros(len(judged), dtype=torch.long),
            }

        return collate

    def sums(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        count, good = len(inputs.pop("labels")), inputs.pop("good")
        own = {key: value for key, value in inputs.items() if not key.startswith(_OTHER)}
        other = {key.removeprefix(_OTHER): value for key, value in inputs.items() if key.startswith(_OTHER)}
        with torch.no_grad():
            apart = log_probabilities(model, other, count) - self.reference_of(model, other, count)
        reference = self.reference_of(model, own, count)
        ratios = log_probabilities(model, own, count) - reference
        z = apart.mean().clamp(min=0)
        beta, weights = self.options.beta, (self.options.undesirable_weight, self.options.desirable_weight)
        signs = good.to(ratios.dtype) * 2 - 1
        losses = torch.where(good, weights[1], weights[0]) * (1 - torch.sigmoid(signs * beta * (ratios - z)))
        rewards = beta * ratios.detach()
        return {
            "loss": losses.sum(),
            "items": good.new_tensor(count, dtype=torch.long),
            "reward_accuracy": (signs * (ratios.detach() - z) > 0).float().sum(),
            "good": good.sum(),
            "reward_good": rewards[good].sum(),
            "reward_bad": rewards[~good].sum(),
            "kl": apart.sum(),
        }

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        items, good = float(sums["items"]), float(sums["good"])
        chosen, rejected = float(sums["reward_good"]) / max(1, good), float(sums["reward_bad"]) / max(1, items - good)
        found = {key: float(sums[key]) / items for key in ("loss", "reward_accuracy", "kl")}
        return {**found, "reward_margin": chosen - rejected, "reward_good": chosen, "reward_bad": rejected}


def _example(record: Record, encoder: Encoder) -> Asking[list[Example]]:
    return [(yield from encoder.asking_one({key: value for key, value in record.items() if key != "label"}))]


def _exchanged(example: Example, other: Example, limit: int) -> Example:
    """Return the prompt of an example with the answer of another."""
    start, theirs = example.supervised.index(True), other.supervised.index(True)
    tokens = [*example.tokens[:start], *other.tokens[theirs:]]
    supervised = [*example.supervised[:start], *other.supervised[theirs:]]
    if start >= limit - 1:  # there is room for this answer alone
        return example
    return Example(tokens[:limit], supervised[:limit])
