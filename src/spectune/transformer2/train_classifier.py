"""Training a library's classifier from its adapters' example prompts."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.model.lifecycle import detach
from spectune.model.names import adapter_names
from spectune.training.config import load_config
from spectune.training.run import train_model
from spectune.transformer2.calibration import Calibration, best, calibrate, calibration_error
from spectune.transformer2.classifier import Classifier, Kind, base_sketches, hidden_states
from spectune.transformer2.labels import answer_text, labelling_prompt
from spectune.transformer2.library import NONE, Library
from spectune.transformer2.pool import Pool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LEAST = 10  # example prompts of an adapter
_NAME = "default"  # of the adapter that trains
_PENALTY = 1.0  # on the squared weights of the regression, beside the sum of the losses


class Labelled(NamedTuple):
    """Prompts with the indices of their labels."""

    prompts: list[str]
    labels: list[int]

    @property
    def targets(self) -> Tensor:
        """The labels as a tensor."""
        return torch.tensor(self.labels)


class Split(NamedTuple):
    """Prompts to learn from, to calibrate with, and to report on; none is in two of them."""

    learn: Labelled
    calibrate: Labelled
    report: Labelled


def split_prompts(library: Library, none: Sequence[str], held: float, seed: int) -> tuple[list[str], Split]:
    """Return the labels, and every label's prompts in three parts: half of the held-out share calibrates, half reports.

    Repeated prompts count once, and those of several adapters, which have no one label, not at all.

    Raises:
        SpectuneError: an adapter with too few prompts, or one label alone.
    """
    by_label = {name: list(dict.fromkeys(library.prompts(name))) for name in library.names}
    if none:
        by_label[NONE] = list(dict.fromkeys(none))
    if len(by_label) < 2:
        raise SpectuneError(
            f"a classifier needs two labels and the library {str(library.path)!r} has one adapter: add another, or "
            "give prompts that are for none"
        )
    owners = Counter(prompt for prompts in by_label.values() for prompt in prompts)
    parts = [Labelled([], []) for _ in range(3)]
    for index, (label, prompts) in enumerate(by_label.items()):
        own = [prompt for prompt in prompts if owners[prompt] == 1 and prompt.strip()]
        if len(own) < _LEAST:
            raise SpectuneError(
                f"{label!r} has {len(own)} example prompts of its own and a classifier needs at least {_LEAST}: add "
                "the adapter with the prompts it was trained on (--prompts)"
            )
        random.Random(f"{seed}-{label}").shuffle(own)
        each = max(2, round(len(own) * held / 2))
        for part, chosen in zip(parts, (own[2 * each :], own[:each], own[each : 2 * each]), strict=True):
            part.prompts.extend(chosen)
            part.labels.extend([index] * len(chosen))
    return list(by_label), Split(*parts)


def train_classifier(
    pool: Pool,
    tokenizer: PreTrainedTokenizerBase,
    kind: Kind = "hidden",
    *,
    none: Sequence[str] = (),
    held: float = 0.3,
    layer: int | None = None,
    method: str = "svf",
    lr: float | None = None,
    epochs: float = 3.0,
    seed: int = 0,
    console: Console | None = None,
) -> Classifier:
    """Train and calibrate a classifier on the example prompts of a library's adapters, and save it in the library.

    Args:
        pool: the library on its model.
        tokenizer: the model's.
        kind: "hidden": a multinomial logistic regression on the base's mean hidden state, trained in seconds.
            "adapter": an adapter that answers with the label, the paper's.
        none: prompts that are for no adapter; with them "none" is a label of its own.
        held: share of each label's prompts that is held out, half to calibrate and half to report on.
        layer: the hidden state; two thirds of the way up if not given.
        method: of the adapter.
        lr: its learning rate.
        epochs: passes over the prompts.
        seed: of the split and of the training.
        console: where progress goes.

    Raises:
        SpectuneError: an adapter with too few prompts, one label alone, or a value out of range.
    """
    if kind not in ("hidden", "adapter"):
        raise SpectuneError(f"kind must be hidden or adapter, not {kind!r}")
    if not 0 < held < 0.9:
        raise SpectuneError(f"held must be between 0 and 0.9, not {held!r}")
    labels, split = split_prompts(pool.library, none, held, seed)
    depth = getattr(pool.model.config, "num_hidden_layers", 1)
    read: int = -(-2 * depth // 3) if layer is None else layer
    if not 0 <= read <= depth:
        raise SpectuneError(f"layer must be from 0 to {depth}, not {read}")
    classifier = Classifier(kind, tuple(labels), Calibration(1.0, 0.0), read, base_sketches(pool))
    if kind == "hidden":
        pool.activate(None)
        states = hidden_states(pool.model, tokenizer, split.learn.prompts, read)
        fitted = logistic_regression(states, split.learn.targets, len(labels))
        classifier = replace(classifier, tensors={**classifier.tensors, **fitted})
    else:
        adapter = _train_adapter(pool, tokenizer, labels, split, method, lr, epochs, seed, console)
        classifier = replace(classifier, adapter=adapter)
    index = labels.index(NONE) if NONE in labels else None
    logits = classifier.logits(pool, tokenizer, split.calibrate.prompts)
    chosen = calibrate(logits, split.calibrate.targets, index)
    logits = classifier.logits(pool, tokenizer, split.report.prompts)
    report = _report(logits, split, chosen, index)
    classifier = replace(classifier, calibration=chosen, report=report)
    classifier.save(pool.library)
    pool.close()
    return classifier


def logistic_regression(states: Tensor, targets: Tensor, labels: int) -> dict[str, Tensor]:
    """Fit a multinomial logistic regression by L-BFGS, every label counting the same: sum of losses + ||W||^2 / 2.

    Args:
        states: (prompts x hidden).
        targets: the labels (prompts).
        labels: how many labels there are.
    """
    mean, scale = states.mean(0), states.std(0).clamp(min=1e-6)
    features = (states - mean) / scale
    weight = torch.zeros(labels, states.shape[1], requires_grad=True)
    bias = torch.zeros(labels, requires_grad=True)
    share = len(targets) / (labels * torch.bincount(targets, minlength=labels).clamp(min=1))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = features @ weight.mT + bias
        losses = F.cross_entropy(logits, targets, reduction="none") * share[targets]
        loss = (losses.sum() + 0.5 * _PENALTY * weight.square().sum()) / len(targets)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return {"mean": mean, "scale": scale, "weight": weight.detach(), "bias": bias.detach()}


def _train_adapter(
    pool: Pool,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    split: Split,
    method: str,
    lr: float | None,
    epochs: float,
    seed: int,
    console: Console | None,
) -> object:
    def records(part: Labelled) -> list[dict[str, object]]:
        return [_record(pool.library, tokenizer, p, labels[i]) for p, i in zip(part.prompts, part.labels, strict=True)]

    pool.close()
    if _NAME in adapter_names(pool.model):
        raise SpectuneError(f"the model carries an adapter {_NAME!r}, the name that training needs: detach it first")
    with tempfile.TemporaryDirectory(prefix="spectune-classifier-") as folder:
        name = str(getattr(pool.model.config, "_name_or_path", "") or "the base")
        settings = {"model": name, "data": "(example prompts)", "output": str(Path(folder) / "run"), "method": method}
        settings |= {"epochs": epochs, "seed": seed, "lr": "null" if lr is None else lr, "save_steps": 1 << 30}
        config = load_config(None, [f"{key}={value}" for key, value in settings.items()])
        try:
            result = train_model(config, pool.model, tokenizer, records(split.learn), records(split.calibrate), console)
        finally:
            pool.model.eval()
            if _NAME in adapter_names(pool.model):
                detach(pool.model, _NAME)
    return result.adapter


def _record(library: Library, tokenizer: PreTrainedTokenizerBase, prompt: str, label: str) -> dict[str, object]:
    question, answer = labelling_prompt(library, prompt, descriptions=False), answer_text(label)
    if getattr(tokenizer, "chat_template", None):
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    return {"prompt": question, "completion": answer}


def _report(logits: Tensor, split: Split, chosen: Calibration, none: int | None) -> dict[str, object]:
    """Return what held-out prompts that chose nothing say of the classifier."""
    confidence, label = best(logits / chosen.temperature, none)
    targets = split.report.targets
    own = torch.ones_like(targets, dtype=torch.bool) if none is None else targets != none
    answered = (confidence >= chosen.threshold) & (confidence > 0)
    report = {
        "learned_from": len(split.learn.prompts),
        "calibrated_on": len(split.calibrate.prompts),
        "held_out": len(split.report.prompts),
        "accuracy": float(((label == targets) & answered)[own].float().mean()),
        "accuracy_without_threshold": float((label == targets)[own].float().mean()),
        "none": float((~answered)[own].float().mean()),
        "calibration_error": calibration_error(confidence[own], (label == targets)[own]),
    }
    if none is not None:
        report["none_recognised"] = float((~answered)[~own].float().mean())
    return report
