"""Classification of texts, or of pairs of texts, by encoders and decoders."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from spectune.bases.classifiers import context, label_names, pad, tokenize
from spectune.bases.loading import load_base
from spectune.errors import SpectuneError
from spectune.methods.head import Head
from spectune.training import processes
from spectune.training.data.encoding import Encoded, Encoder, Example
from spectune.training.data.records import Record
from spectune.training.options import ClassifyOptions, TaskOptions
from spectune.training.tasks.base import Collator, Task
from spectune.training.trainer.trainer import AdapterTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Classify(Task):
    """Mean cross-entropy over texts; accuracy, and the mean over classes of F1.

    Batches are of texts of about one length: padding is what bidirectional attention would otherwise spend its time on.
    """

    options_type: ClassVar[type[TaskOptions]] = ClassifyOptions
    forms: ClassVar[str] = "'text' and 'label', and 'text_pair' where there are two texts"
    unit = "text"
    shown = ("accuracy",)
    by_length = True

    @property
    def options(self) -> ClassifyOptions:
        """The task's own part of the configuration."""
        assert isinstance(self.config, ClassifyOptions)  # or it was made for another task
        return self.config

    def problem(self, record: Record) -> str | None:
        if "text" not in record or "label" not in record:
            return f"has the keys {', '.join(map(repr, record)) or 'none'}; it needs {self.forms}"
        for key in ("text", "text_pair"):
            if key in record and not isinstance(record[key], str):
                return f"{key} must be a string"
        label = record["label"]
        named = isinstance(label, (str, int)) or (isinstance(label, float) and label.is_integer())
        return None if named and label != "" else f"label must be a name or a whole number, not {label!r}"

    def kind(self, record: Record) -> str:
        return _name(record["label"])

    def read(self) -> tuple[list[Record], list[Record]]:
        records, held = super().read()
        written: dict[str, set[str]] = defaultdict(set)
        for record in (*records, *held):
            written[" ".join(_name(record["label"]).split()).casefold()].add(_name(record["label"]))
        for names in written.values():
            if len(names) > 1:
                self.notes.append(
                    f"{', '.join(map(repr, sorted(names)))} are {len(names)} labels that differ in case or spaces"
                )
        return records, held

    def load(
        self, records: Sequence[Record], held: Sequence[Record]
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        config = self.config
        labels = _labels(records)
        if len(labels) < 2:
            raise SpectuneError(f"the training data has one label only, {labels[0]!r}; there is nothing to tell apart")
        _check_labels(held, labels)
        device = processes.load_device(config.device, config.fsdp)
        return load_base(
            config.model,
            config.dtype,
            device=device,
            labels=labels,
            new_head=self.options.new_head,
            quantize=config.quantize,
            trust_remote_code=config.trust_remote_code,
        )

    def encode(
        self, records: Sequence[Record], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limit: int
    ) -> Encoded:
        names = label_names(model)
        _check_labels(records, names)
        limit = context(model, tokenizer, limit)
        examples, cut = [], 0
        for record in records:
            tokens, was_cut = tokenize(tokenizer, record["text"], record.get("text_pair"), limit)
            cut += was_cut
            if tokens["input_ids"]:
                examples.append({**tokens, "labels": names.index(_name(record["label"]))})
        if not examples:
            raise SpectuneError("every text is empty; check the data")
        return Encoded(examples, cut, len(records) - len(examples))

    def examples(self, record: Record, encoder: Encoder) -> list[Example]:
        tokens, _ = tokenize(encoder.tokenizer, record["text"], record.get("text_pair"), 1 << 30)
        return [Example(tokens["input_ids"], [False] * len(tokens["input_ids"]))]

    def collator(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Collator:
        def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
            rows = [{k: v for k, v in example.items() if k != "labels"} for example in examples]
            return {**pad(tokenizer, rows), "labels": torch.tensor([example["labels"] for example in examples])}

        return collate

    def sums(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = inputs.pop("labels")
        logits = model(**inputs).logits.float()
        classes = logits.shape[-1]
        pairs = labels * classes + logits.argmax(-1)
        confusion = torch.bincount(pairs, minlength=classes**2).view(classes, classes)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return {"loss": loss, "items": labels.new_tensor(len(labels)), "confusion": confusion}

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        confusion = sums["confusion"].double()
        right = confusion.diagonal()
        there = confusion.sum(0) + confusion.sum(1)
        f1 = (2 * right / there)[there > 0]  # 2 TP / (2 TP + FP + FN), of the classes that occur
        measures = {"accuracy": float(right.sum() / confusion.sum()), "macro_f1": float(f1.mean())}
        return {**super().metrics(sums), **measures}

    def files(self, model: PreTrainedModel) -> dict[str, str]:
        return {"labels.json": json.dumps(label_names(model)) + "\n"}

    def trainer(self, **kwargs: Any) -> AdapterTrainer:
        rates = {**self.group_rates(kwargs["model"]), **(kwargs.get("group_lr") or {})}
        return super().trainer(**{**kwargs, "group_lr": rates})

    def group_rates(self, model: Any) -> dict[str, float]:
        trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
        return dict.fromkeys(trained & {"H", "h"}, Head.learning_rate)


def _name(label: object) -> str:
    return str(int(label)) if isinstance(label, float) else str(label)


def _labels(records: Sequence[Record]) -> list[str]:
    """Return the label names, numbers by size and others by the alphabet."""
    names = {_name(record["label"]) for record in records}
    numbers = all(name.removeprefix("-").isdigit() for name in names)
    return sorted(names, key=int if numbers else None)


def _check_labels(records: Sequence[Record], known: Sequence[str]) -> None:
    strange = sorted({_name(record["label"]) for record in records} - set(known))
    if strange:
        raise SpectuneError(
            f"the evaluation data has labels that the training data has not: {', '.join(strange)} (training: "
            f"{', '.join(known)}); name them alike, or give more data"
        )
