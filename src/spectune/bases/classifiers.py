"""Classifiers of texts: a base with a head for some labels, and its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn as nn
import transformers
from torch import Tensor

from spectune.adapters.labels import NUMBER, SEVERAL, Labels
from spectune.errors import SpectuneError
from spectune.layers.modules import is_linear
from spectune.model.fresh import FRESH
from spectune.model.fusing import fused_where_it_pays

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


_AT_ONCE = 512  # texts that are tokenized together


class Prediction(NamedTuple):
    """What a classifier says of one text.

    Args:
        label: the likeliest; of a regression the name of what is predicted.
        probabilities: of every label, which add up to one only where one label is right; none of a regression.
        labels: where any number of labels may be right, those whose probability is above a half.
        value: of a regression, the number.
    """

    label: str
    probabilities: dict[str, float]
    labels: tuple[str, ...] | None = None
    value: float | None = None


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
        labels: in the order of the logits; the checkpoint's own order where it has the same ones.  `Labels` say how
            logits are read; others are one of several, or a number where there is one name.
        options: for `from_pretrained`.
        new_head: give it a head of its own where the checkpoint has one for as many labels by other names.

    Raises:
        SpectuneError: the checkpoint has such a head, and a new one is not asked for.
    """
    known = [label for _, label in sorted((config.id2label or {}).items())]
    problem = Labels(labels).problem if not isinstance(labels, Labels) else labels.problem
    names = known if problem == NUMBER and len(known) == 1 else _by_known(known, labels)
    same, names = names is not None, names or list(labels)
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        path,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        problem_type=problem,
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


def problem_of(model: PreTrainedModel) -> str:
    """Return how a classifier's logits are read: as one of the labels, as any of them, or as a number.

    Raises:
        SpectuneError: the model is no classifier, or predicts several numbers.
    """
    names, problem = label_names(model), model.config.problem_type
    if problem == NUMBER and len(names) > 1:
        raise SpectuneError(f"{type(model).__name__} predicts {len(names)} numbers at once, and only one is understood")
    return Labels(names, problem).problem


def tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, pair: str | None, limit: int
) -> tuple[dict[str, list[int]], bool]:
    """Return a classifier's input for one text or pair, and whether it was cut to `limit` tokens."""
    tokens = dict(tokenizer(text, pair, verbose=False))
    if len(tokens["input_ids"]) <= limit:
        return tokens, False
    return dict(tokenizer(text, pair, truncation=True, max_length=limit)), True


def tokenize_all(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], pairs: Sequence[str | None], limit: int
) -> list[tuple[dict[str, list[int]], bool]]:
    """Return what `tokenize` does of each of many texts, which the tokenizer gets together."""
    found: dict[int, tuple[dict[str, list[int]], bool]] = {}
    for alone in (True, False):  # a tokenizer takes texts or pairs of texts
        places = [i for i, pair in enumerate(pairs) if (pair is None) == alone]
        for start in range(0, len(places), _AT_ONCE):
            part = places[start : start + _AT_ONCE]
            second = None if alone else [cast(str, pairs[i]) for i in part]
            rows = tokenizer([texts[i] for i in part], second, verbose=False)
            for row, i in enumerate(part):
                one = {key: values[row] for key, values in rows.items()}
                found[i] = (
                    (one, False) if len(one["input_ids"]) <= limit else tokenize(tokenizer, texts[i], pairs[i], limit)
                )
    return [found[i] for i in range(len(texts))]


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
    """Return what a classifier says of each text: the probability of every label, or a number.

    Probabilities are softmax(logits) where one label is right, and sigmoid(logits) where any number of them may be
    (the model's `problem_type`); a model with one logit predicts a number.

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
    names, problem = label_names(model), problem_of(model)
    if pairs is not None and len(pairs) != len(texts):
        raise SpectuneError(f"there are {len(texts)} texts and {len(pairs)} second texts; give one for each")
    limit = context(model, tokenizer)
    rows = [row for row, _ in tokenize_all(tokenizer, texts, pairs or [None] * len(texts), limit)]
    for text, row in zip(texts, rows, strict=True):
        if not row["input_ids"]:
            raise SpectuneError(f"the text {text!r} has no token to classify")
    found: dict[int, Prediction] = {}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    with fused_where_it_pays(model, sum(len(row["input_ids"]) for row in rows) / 64, allowed=fused):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = {k: v.to(model.device) for k, v in pad(tokenizer, [rows[i] for i in chosen]).items()}
            for i, logits in zip(chosen, model(**batch).logits.float(), strict=True):
                found[i] = _prediction(logits, names, problem)
    return [found[i] for i in range(len(rows))]


def _prediction(logits: Tensor, names: Sequence[str], problem: str) -> Prediction:
    if problem == NUMBER:
        return Prediction(names[0], {}, None, float(logits[0]))
    p = (logits.sigmoid() if problem == SEVERAL else logits.softmax(-1)).tolist()
    above = tuple(name for name, share in zip(names, p, strict=True) if share > 0.5) if problem == SEVERAL else None
    return Prediction(names[p.index(max(p))], dict(zip(names, p, strict=True)), above)
