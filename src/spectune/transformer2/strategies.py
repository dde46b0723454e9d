"""Which adapters answer a prompt: chosen by the base, by a classifier, or fixed beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from spectune.errors import SpectuneError
from spectune.transformer2.calibration import best
from spectune.transformer2.classifier import Classifier
from spectune.transformer2.few_shot import FewShot
from spectune.transformer2.labels import prompt_scores
from spectune.transformer2.library import NONE
from spectune.transformer2.mix import Mix
from spectune.transformer2.pool import Mixture, Pool
from spectune.transformer2.search import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Decision(NamedTuple):
    """What answers a prompt.

    Args:
        label: an adapter's name, "none" for the base alone, or "mixture".
        weights: the weight of each adapter that answers; none for the base alone.
        confidence: the probability of the label, where the strategy has one.
        scores: the probability of every label.
    """

    label: str
    weights: Mixture
    confidence: float | None = None
    scores: Mapping[str, float] = {}


class Strategy(Protocol):
    """Chooses what answers each prompt."""

    def choose(self, prompts: Sequence[str]) -> list[Decision]:
        """Return a decision for each prompt."""
        ...


class PromptStrategy:
    """The base model labels the prompt among the library's names and "none", which is the base alone."""

    def __init__(self, pool: Pool, tokenizer: PreTrainedTokenizerBase) -> None:
        self.pool, self.tokenizer = pool, tokenizer
        self._bias: Tensor | None = None
        self._asked: list[tuple[str, str]] = []  # what the bias is of

    def choose(self, prompts: Sequence[str]) -> list[Decision]:
        """Return the likeliest label of each prompt."""
        self.pool.activate(None)
        asked = [(record.name, record.description) for record in self.pool.library.records]
        if asked != self._asked:  # adapters came or went
            self._asked, self._bias = asked, None
        scores, self._bias = prompt_scores(self.pool.model, self.tokenizer, self.pool.library, prompts, self._bias)
        labels = [*self.pool.library.names, NONE]
        return [
            _decision(labels[int(row.argmax())], float(row.max()), dict(zip(labels, row.tolist(), strict=True)))
            for row in scores.softmax(-1)
        ]


class ClassifierStrategy:
    """The library's classifier labels the prompt; below its threshold the base alone answers."""

    def __init__(self, pool: Pool, tokenizer: PreTrainedTokenizerBase, classifier: Classifier | None = None) -> None:
        self.pool, self.tokenizer = pool, tokenizer
        self.classifier = classifier or Classifier.load(pool.library)
        self.classifier.check(pool.library, pool.model)

    def choose(self, prompts: Sequence[str]) -> list[Decision]:
        """Return the label of each prompt, "none" where its probability is below the threshold."""
        labels, chosen = self.classifier.labels, self.classifier.calibration
        none = labels.index(NONE) if NONE in labels else None
        logits = self.classifier.logits(self.pool, self.tokenizer, prompts) / chosen.temperature
        confidence, index = best(logits, none)
        decisions = []
        for row, sure, i in zip(logits.softmax(-1), confidence.tolist(), index.tolist(), strict=True):
            given = sure > 0 and sure >= chosen.threshold
            scores = dict(zip(labels, row.tolist(), strict=True))
            label = labels[i] if given else NONE
            decisions.append(_decision(label, scores.get(label), scores))
        return decisions


class Fixed:
    """One mixture answers every prompt.

    Args:
        weights: the weight of each adapter, or for each layer.
    """

    def __init__(self, weights: Mixture) -> None:
        self.weights = dict(weights)

    def choose(self, prompts: Sequence[str]) -> list[Decision]:
        """Return the mixture for each prompt."""
        label = "mixture" if len(self.weights) > 1 else next(iter(self.weights), NONE)
        return [Decision(label, self.weights) for _ in prompts]


def make_strategy(
    strategy: str | FewShot | Mix | Mixture | Strategy,
    pool: Pool,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress | None = None,
) -> Strategy:
    """Return a strategy by name, by what it is to find, or by the mixture it is.

    Raises:
        SpectuneError: an unknown name, adapters that the library does not have, or what the strategy raises.
    """
    if isinstance(strategy, FewShot):
        strategy = strategy.find(pool, tokenizer, progress)
    if isinstance(strategy, Mix):
        strategy = strategy.mixture()
    if isinstance(strategy, Mapping):
        for name in strategy:
            pool.library.record(name)
        return Fixed(strategy)
    if strategy == "prompt":
        return PromptStrategy(pool, tokenizer)
    if strategy == "classifier":
        return ClassifierStrategy(pool, tokenizer)
    if isinstance(strategy, str):
        raise SpectuneError(f"strategy must be 'prompt', 'classifier', a mixture or FewShot(shots), not {strategy!r}")
    return strategy


def _decision(label: str, confidence: float | None, scores: Mapping[str, float]) -> Decision:
    return Decision(label, {} if label == NONE else {label: 1.0}, confidence, scores)
