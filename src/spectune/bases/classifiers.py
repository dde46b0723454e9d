"""Classifiers of texts: a base with a head for some labels, and its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.layers.modules import is_linear
from spectune.model.fresh import FRESH
from spectune.model.fusing import fused_where_it_pays

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class Prediction(NamedTuple):
    """What a classifier says of one text.

    Args:
        label: the likeliest.
        probabilities: of every label.
    """

    label: str
    probabilities: dict[str, float]


def load_classifier(
    path: str,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    options: dict[str, object],
    new_head: bool = False,
) -> PreTrainedModel:
    """Load a checkpoint with a classification head; one that it lacks, or has for other labels, is zero and marked.

    A head is kept where its labels are the same but for case, or where numbers from 0 count as many.

    Args:
        path: what `from_pretrained` takes.
        config: the checkpoint's.
        tokenizer: its tokenizer, which gets a token to pad with if it has none.
        labels: in the order of the logits; the checkpoint's own order where it has the same ones.
        options: for `from_pretrained`.
        new_head: give it a head of its own where the checkpoint has one for as many labels by other names.

    Raises:
        SpectuneError: the checkpoint has such a head, and a new one is not asked for.
    """
    import transformers

    known = [label for _, label in sorted((config.id2label or {}).items())]
    names = _by_known(known, labels)
    same, names = names is not None, names or list(labels)
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        path,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **options,
    )
    missing = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    fresh = dict.fromkeys(n.rpartition(".")[0] for n, _ in model.named_parameters() if n in missing)
    inner = f"{model.base_model_prefix}."
    has_head = any(not n.startswith(inner) and n not in missing for n, _ in model.named_parameters())
    if not same and not new_head and has_head and len(known) == len(names):
        raise SpectuneError(
            f"the head of {path} tells apart {', '.join(known)}, and the labels are {', '.join(names)}: name them "
            "alike, in any case or as numbers from 0 in its order, or ask for a head of their own with new_head=True "
            "(new_head: true in a run)"
        )
    if not same:  # a head for other labels, which may be as many
        linears = [(n, m) for n, m in model.named_modules() if is_linear(m) and not n.startswith(inner)]
        fresh |= {n: None for n, m in linears if m.weight.shape[0] == len(names)}
    for name in fresh:
        layer = model.get_submodule(name)
        if is_linear(layer):
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.zero_()
        setattr(layer, FRESH, True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.config.pad_token_id = model.config.get_text_config().pad_token_id
    return model


def _by_known(known: Sequence[str], labels: Sequence[str]) -> list[str] | None:
    """Return labels in the order of those that a checkpoint knows, or None where they are not the same."""
    if len(known) != len(labels):
        return None
    for plain in (str, _plain):
        ours = {plain(label): label for label in labels}
        if len(ours) == len(labels) and ours.keys() == {plain(label) for label in known}:
            return [ours[plain(label)] for label in known]
    if sorted(labels) == sorted(map(str, range(len(labels)))):
        return sorted(labels, key=int)
    return None


def _plain(label: str) -> str:
    return "".join(c for c in label.casefold() if c.isalnum())


def label_names(model: PreTrainedModel) -> list[str]:
    """Return a classifier's labels in the order of its logits.

    Raises:
        SpectuneError: the model is no classifier.
    """
    if not type(model).__name__.endswith("ForSequenceClassification"):
        raise SpectuneError(f"{type(model).__name__} is not a classifier of texts: load it with labels=[...]")
    return [str(label) for _, label in sorted((model.config.id2label or {}).items())]


def tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, pair: str | None, limit: int
) -> tuple[dict[str, list[int]], bool]:
    """Return a classifier's input for one text or pair, and whether it was cut to `limit` tokens."""
    tokens = dict(tokenizer(text, pair, verbose=False))
    if len(tokens["input_ids"]) <= limit:
        return tokens, False
    return dict(tokenizer(text, pair, truncation=True, max_length=limit)), True


def context(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> int:
    """Return how many tokens a classifier takes, or the limit if that is less."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():  # RoBERTa's begin behind the token to pad with
        if positions is not None and name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            positions -= 0 if module.padding_idx is None else module.padding_idx + 1
            break
    return min(n for n in (limit, positions, tokenizer.model_max_length) if n is not None)


def pad(tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Return rows as one batch, padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    filler = {"input_ids": tokenizer.pad_token_id}
    return {
        key: torch.tensor([[*row[key], *[filler.get(key, 0)] * (longest - len(row[key]))] for row in rows])
        for key in rows[0]
    }


@torch.inference_mode()
def classify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    batch_size: int = 32,
    fused: bool = True,
) -> list[Prediction]:
    """Return a classifier's label for each text, with the probability of every label.

    Args:
        model: a classifier, with or without adapters.
        tokenizer: its tokenizer.
        texts: the texts; what is beyond the model's context is cut off.
        pairs: a second text for each.
        batch_size: texts in a forward pass, which are of about the same length.
        fused: answer from merged weights beside the base's, where that is faster (`spectune.fused`).

    Raises:
        SpectuneError: the model is no classifier, or there are not as many pairs as texts.
    """
    names = label_names(model)
    if pairs is not None and len(pairs) != len(texts):
        raise SpectuneError(f"there are {len(texts)} texts and {len(pairs)} second texts; give one for each")
    limit = context(model, tokenizer)
    rows = [tokenize(tokenizer, text, pairs[i] if pairs else None, limit)[0] for i, text in enumerate(texts)]
    for text, row in zip(texts, rows, strict=True):
        if not row["input_ids"]:
            raise SpectuneError(f"the text {text!r} has no token to classify")
    found: dict[int, Prediction] = {}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    with fused_where_it_pays(model, sum(len(row["input_ids"]) for row in rows) / 64, allowed=fused):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = {k: v.to(model.device) for k, v in pad(tokenizer, [rows[i] for i in chosen]).items()}
            for i, p in zip(chosen, model(**batch).logits.float().softmax(-1).tolist(), strict=True):
                found[i] = Prediction(names[p.index(max(p))], dict(zip(names, p, strict=True)))
    return [found[i] for i in range(len(rows))]
