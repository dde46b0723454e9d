"""Classification of texts, or of pairs of texts, by encoders and decoders; and numbers that are predicted from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from spectune.adapters.labels import NUMBER, ONE, SEVERAL, Labels
from spectune.bases.classifiers import context, label_names, pad, problem_of, tokenize, tokenize_all
from spectune.bases.loading import load_base
from spectune.errors import SpectuneError
from spectune.methods.head import Head
from spectune.training import processes
from spectune.training.data import targets
from spectune.training.data.encoding import Encoded, Encoder, Example
from spectune.training.data.records import Record
from spectune.training.measures import correlation, f1, rank_correlation
from spectune.training.options import ClassifyOptions, TaskOptions
from spectune.training.tasks.base import Collator, Task
from spectune.training.trainer.trainer import AdapterTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Classify(Task):
    """One label of several: mean cross-entropy over texts; accuracy, and the mean over classes of F1.

    Any number of labels: mean binary cross-entropy over texts and labels; F1 over all labels (micro) and its mean over
    them (macro), and how often all labels of a text are right, a label being said where its probability is over a half.

    A number: mean squared error; it, the mean absolute error, and Pearson's and Spearman's correlations.

    Batches are of texts of about one length: padding is what bidirectional attention would otherwise spend its time on.
    """

    options_type: ClassVar[type[TaskOptions]] = ClassifyOptions
    forms: ClassVar[str] = "'text' and 'label', and 'text_pair' where there are two texts"
    unit = "text"
    shown = ("accuracy", "micro_f1", "pearson")
    by_length = True
    gathered = ("predictions",)
    _kinds: Mapping[int, object] = {}

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
                return f"{key} must be a string, and is {record[key]!r:.40}"
        return targets.label_problem(record["label"], self.options.problem_type)

    def look(self, records: Sequence[Record], held: Sequence[Record]) -> None:
        given = self.options.problem_type
        problem = given or targets.problem_type([*records, *held])
        targets.settle([*records, *held], problem)
        self.notes += targets.notes([*records, *held], problem, given is not None)
        if problem != ONE:
            self.config = self.config.model_copy(update={"problem_type": problem})
        self._kinds = {**targets.kinds(records, problem), **targets.kinds(held, problem)}

    def kind(self, record: Record) -> object:
        return self._kinds.get(id(record))

    def load(
        self, records: Sequence[Record], held: Sequence[Record]
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        config = self.config
        problem = self.options.problem_type or ONE
        # what is held out of the same data may have a label of several that is nowhere else
        apart = problem != SEVERAL or config.evaluation() is not None
        labels = targets.names(records if apart else [*records, *held], problem)
        if problem == NUMBER:
            if len({record["label"] for record in records}) < 2:
                raise SpectuneError(f"every label of the training data is {records[0]['label']:g}: nothing to predict")
        elif not labels:
            raise SpectuneError("every list of labels in the training data is empty; there is nothing to tell apart")
        elif len(labels) < 2:
            raise SpectuneError(f"the training data has one label only, {labels[0]!r}; there is nothing to tell apart")
        else:
            targets.check_known(held, labels)
        device = processes.load_device(config.device, config.fsdp)
        return load_base(
            config.model,
            config.dtype,
            device=device,
            labels=Labels(labels, problem),
            new_head=self.options.new_head,
            quantize=config.quantize,
            trust_remote_code=config.trust_remote_code,
        )

    def encode(
        self, records: Sequence[Record], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limit: int
    ) -> Encoded:
        names, problem = label_names(model), problem_of(model)
        if problem != NUMBER:
            targets.check_known(records, names)
        limit = context(model, tokenizer, limit)
        examples, cut = [], 0
        given = [*records]
        texts, pairs = [record["text"] for record in given], [record.get("text_pair") for record in given]
        for record, (tokens, was_cut) in zip(given, tokenize_all(tokenizer, texts, pairs, limit), strict=True):
            cut += was_cut
            if tokens["input_ids"]:
                examples.append({**tokens, "labels": _target(record["label"], names, problem)})
        if not examples:
            raise SpectuneError("every text is empty; check the data")
        return Encoded(examples, cut, len(records) - len(examples))

    def examples(self, record: Record, encoder: Encoder) -> list[Example]:
        tokens, _ = tokenize(encoder.tokenizer, record["text"], record.get("text_pair"), 1 << 30)
        return [Example(tokens["input_ids"], [False] * len(tokens["input_ids"]))]

    def collator(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Collator:
        kind = torch.long if problem_of(model) == ONE else torch.float

        def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
            rows = [{k: v for k, v in example.items() if k != "labels"} for example in examples]
            target = torch.tensor([example["labels"] for example in examples], dtype=kind)
            # the items of the loss are counted by "labels", in which a number could be the one that counts for nothing
            return {**pad(tokenizer, rows), "targets": target, "labels": torch.zeros_like(target, dtype=torch.long)}

        return collate

    def sums(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        items, target = inputs.pop("labels").numel(), inputs.pop("targets")
        logits = model(**inputs).logits.float()
        problem = problem_of(getattr(model, "module", model))
        found: dict[str, Tensor] = {"items": target.new_tensor(items, dtype=torch.long)}
        if problem == NUMBER:
            said = logits[:, 0]
            found["predictions"] = torch.stack([said.detach(), target], -1)
            return {**found, "loss": F.mse_loss(said, target, reduction="sum")}
        if problem == SEVERAL:
            said = logits > 0
            whole = (said == target.bool()).all(-1)
            counts = torch.stack([said & target.bool(), said, target.bool()]).sum(1)
            found |= {"counts": counts, "whole": whole.sum(), "texts": whole.new_tensor(len(whole), dtype=torch.long)}
            return {**found, "loss": F.binary_cross_entropy_with_logits(logits, target, reduction="sum")}
        classes = logits.shape[-1]
        confusion = torch.bincount(target * classes + logits.argmax(-1), minlength=classes**2).view(classes, classes)
        return {**found, "loss": F.cross_entropy(logits, target, reduction="sum"), "confusion": confusion}

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        loss = super().metrics(sums)
        if "predictions" in sums:
            said, there = sums["predictions"].double().unbind(-1)
            measures = {"mse": float((said - there).square().mean()), "mae": float((said - there).abs().mean())}
            measures |= {"pearson": correlation(said, there), "spearman": rank_correlation(said, there)}
            return {**loss, **measures}
        if "counts" in sums:
            counts = sums["counts"].double()
            each, together = f1(*counts), f1(*counts.sum(-1, keepdim=True))
            measures = {"micro_f1": _mean(together), "macro_f1": _mean(each)}
            return {**loss, **measures, "subset_accuracy": float(sums["whole"] / sums["texts"])}
        confusion = sums["confusion"].double()
        right = confusion.diagonal()
        measures = {"accuracy": float(right.sum() / confusion.sum())}
        return {**loss, **measures, "macro_f1": _mean(f1(right, confusion.sum(0), confusion.sum(1)))}

    def files(self, model: PreTrainedModel) -> dict[str, str]:
        return {"labels.json": json.dumps(label_names(model)) + "\n"}

    def trainer(self, **kwargs: Any) -> AdapterTrainer:
        rates = {**self.group_rates(kwargs["model"]), **(kwargs.get("group_lr") or {})}
        return super().trainer(**{**kwargs, "group_lr": rates})

    def group_rates(self, model: PreTrainedModel) -> dict[str, float]:
        trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
        return dict.fromkeys(trained & {"H", "h"}, Head.learning_rate)


def _target(label: Any, names: Sequence[str], problem: str) -> int | float | list[float]:
    if problem == NUMBER:
        return float(label)
    if problem == SEVERAL:
        there = {targets.name_of(each) for each in label}
        return [float(name in there) for name in names]
    return names.index(targets.name_of(label))


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0
