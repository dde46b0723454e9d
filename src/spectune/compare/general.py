"""What a model forgets: its loss on general text, or how far its hidden states move, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from spectune.bases.classifiers import context, pad
from spectune.bases.tokens import padding
from spectune.errors import SpectuneError
from spectune.speed.loss import cross_entropy_sum
from spectune.training.config import TrainConfig
from spectune.training.data.packing import Packer
from spectune.training.data.records import read
from spectune.training.tasks.sft import Sft, encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TEXTS, _TOKENS, _BATCH = 32, 128, 8
T = TypeVar("T")
PYTHON_DOCS = "python-docs"


class General(NamedTuple):
    """Texts that have nothing to do with the task.

    Args:
        texts: the texts.
        name: of the measure.
    """

    texts: list[str]
    name: str


def general_texts(source: str, model: PreTrainedModel) -> General:
    """Return texts to measure forgetting with.

    Args:
        source: "python-docs", or data with `text`.
        model: a causal language model, whose loss is measured, or another, whose hidden states are.

    Raises:
        SpectuneError: data that cannot be read, or without text.
    """
    if source == PYTHON_DOCS:
        from pydoc_data.topics import topics  # 700 KB of text

        paragraphs = (" ".join(part.split()) for text in topics.values() for part in text.split("\n\n"))
        texts = [text for text in paragraphs if len(text) > 300]
    else:
        values: dict[str, Any] = {"model": "", "output": "", "data": source}
        task = Sft(TrainConfig(**values))
        texts = [record["text"] for record in read(source, task) if record.get("text")]
        if not texts:
            raise SpectuneError(f"general: {source} has no text; each record needs a text")
    texts = texts[:: max(1, len(texts) // _TEXTS)][:_TEXTS]
    return General(texts, "loss on general text" if model.can_generate() else "drift of hidden states")


@torch.no_grad()
def states_or_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, general: General) -> Tensor:
    """Return the mean loss a token of a causal language model, or the mean hidden state of each text.

    Args:
        model: with or without adapter.
        tokenizer: its tokenizer.
        general: the texts.
    """
    model.eval()
    limit = context(model, tokenizer, _TOKENS)
    if model.can_generate():
        examples = encode([{"text": text} for text in general.texts], tokenizer, limit).examples
        collate = Packer(model, padding(tokenizer))
        total, items = torch.zeros(()), 0
        for batch in _parts(examples):
            inputs = {k: v.to(model.device) if hasattr(v, "to") else v for k, v in collate(batch).items()}
            labels = inputs.pop("labels")
            total += cross_entropy_sum(model, inputs, labels).cpu()
            items += int((labels >= 0).sum())
        return total / items
    found = []
    for batch in _parts(general.texts):
        rows = [dict(tokenizer(text, truncation=True, max_length=limit)) for text in batch]
        inputs = {k: v.to(model.device) for k, v in pad(tokenizer, rows).items()}
        hidden = model.base_model(**inputs)[0].float()
        mask = inputs["attention_mask"][..., None]
        found.append(((hidden * mask).sum(1) / mask.sum(1)).cpu())
    return torch.cat(found)


def forgetting(before: Tensor, after: Tensor, general: General) -> dict[str, object]:
    """Return what a result says of general text: a loss before and after, or how far 1 - cosine has come from 0."""
    if before.dim() == 0:
        pair = {"before": float(before), "after": float(after)}
    else:
        pair = {"before": 0.0, "after": float((1 - F.cosine_similarity(before, after)).mean())}
    return {"name": general.name, "items": len(general.texts), **pair}


def _parts(items: Sequence[T]) -> list[Sequence[T]]:
    return [items[i : i + _BATCH] for i in range(0, len(items), _BATCH)]
