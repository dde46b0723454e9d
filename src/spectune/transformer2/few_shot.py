"""The few-shot strategy: mixing weights that are found on a few examples of a task."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from spectune.bases.generation import generate
from spectune.errors import SpectuneError
from spectune.training.data.records import Record
from spectune.training.tasks.reinforce.rewards import load_reward
from spectune.transformer2.mix import By, Mix, layer_groups
from spectune.transformer2.pool import Mixture, Pool
from spectune.transformer2.search import Found, Progress, cross_entropy_method, gradient_ascent
from spectune.transformer2.shots import TOKENS, Shot, as_shot, batches, mean_likelihood, population_likelihood

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Judge = Callable[[Sequence[Shot], Sequence[str]], Sequence[float]]
_LIMIT = 64  # adapters that can be mixed: a population says little about more weights


@dataclass(frozen=True)
class FewShot:
    """How to find a mixture for a task from a few examples of it.

    Args:
        shots: records with `messages`, or `prompt` and `completion`; never those that the result is judged by.
        by: one weight an adapter, or one for each of the model's blocks ("layer"), or kinds of projection.
        search: "cem", the paper's cross-entropy method, or "gradient" (for the likelihood alone).
        reward: reward(reply, record) of a greedy reply, or "module:function" of one that takes lists, as for
            `train`; None maximises the completions' log-likelihood, a token's mean for each shot.
        names: the adapters to mix; all of the library if not given.
        population: of the cross-entropy method.
        elites: of them that the next generation is drawn around.
        std: of the first generation.
        anchors: whether the uniform mixture, each adapter alone and none are tried beside the first generation.
        iterations: at most; 100 of the cross-entropy method and 30 gradient steps if not given.
        lr: of the gradient steps.
        max_new_tokens: of a reply that is rewarded.
        seed: of the draws.

    Raises:
        SpectuneError: no shots, an unknown `by` or `search`, or a gradient of a reward.
    """

    shots: Sequence[Record] = field(repr=False)
    by: By = "global"
    search: Literal["cem", "gradient"] = "cem"
    reward: Callable[[str, Record], float] | str | None = None
    names: Sequence[str] | None = None
    population: int = 32
    elites: int = 6
    std: float = 0.5
    anchors: bool = True
    iterations: int | None = None
    lr: float = 0.1
    max_new_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.shots:
            raise SpectuneError("there are no shots: give a few examples of the task, about ten")
        if self.by not in ("global", "layer", "projection"):
            raise SpectuneError(f"by must be global, layer or projection, not {self.by!r}")
        if self.search not in ("cem", "gradient"):
            raise SpectuneError(f"search must be cem or gradient, not {self.search!r}")
        if self.search == "gradient" and self.reward is not None:
            raise SpectuneError("a reward has no gradient: use search='cem', or the likelihood")
        least = {"iterations": 1, "std": 0, "lr": 0, "max_new_tokens": 1}
        for key, low in least.items():
            value = getattr(self, key)
            if value is not None and not (low <= value < float("inf") and value > 0):
                raise SpectuneError(f"{key} must be {'at least 1' if low else 'above 0'}, not {value!r}")
        if not 1 <= self.elites <= self.population:
            raise SpectuneError(f"elites must be from 1 to population ({self.population}), not {self.elites}")

    def find(self, pool: Pool, tokenizer: PreTrainedTokenizerBase, progress: Progress | None = None) -> Mix:
        """Search for the mixture.

        Args:
            pool: the library on its model.
            tokenizer: the model's.
            progress: called as progress(iteration, iterations, best score).

        Raises:
            SpectuneError: shots that all have the same completion, more adapters than can be mixed, or a reward
                that is not there or failed.
        """
        names = list(dict.fromkeys(self.names or pool.library.names))
        if len(names) > _LIMIT:
            raise SpectuneError(f"{len(names)} adapters are too many to mix (at most {_LIMIT}): name those to use")
        shots = [as_shot(record, tokenizer) for record in self.shots]
        if len(shots) > 1 and len({shot.completion.strip() for shot in shots}) == 1:
            raise SpectuneError(
                f"all {len(shots)} shots have the completion {shots[0].completion.strip()[:40]!r}, so that a mixture "
                "which always says it would win: give shots of at least two classes"
            )
        layers = dict.fromkeys(piece.layer for name in names for piece in pool.load(name).structure)
        groups = layer_groups(layers, self.by)
        kinds = list(dict.fromkeys(groups.values()))
        blank = Mix(tuple(names), self.by, groups, tuple(kinds), torch.zeros(len(kinds), len(names)))
        start = time.perf_counter()
        if self.search == "gradient":
            found = self._ascend(pool, blank, shots, progress)
        else:
            found = self._evolve(pool, tokenizer, blank, shots, progress)
        return replace(
            blank,
            weights=found.weights,
            score=float(found.score[0]),
            history=tuple(found.history),
            evaluations=found.evaluations,
            seconds=time.perf_counter() - start,
        )

    def _evolve(
        self,
        pool: Pool,
        tokenizer: PreTrainedTokenizerBase,
        blank: Mix,
        shots: Sequence[Shot],
        progress: Progress | None,
    ) -> Found:
        judge = self._judge(shots)

        def evaluate(population: Tensor) -> Tensor:
            mixtures = [blank.mixture(weights) for weights in population]
            likelihood = population_likelihood(pool, mixtures, shots)
            if judge is None:
                return likelihood[:, None]
            rewards = self._rewards(pool, tokenizer, mixtures, shots, judge)
            return torch.stack([rewards, likelihood], dim=1)

        return cross_entropy_method(
            evaluate,
            (len(blank.kinds), len(blank.names)),
            population=self.population,
            elites=self.elites,
            iterations=100 if self.iterations is None else self.iterations,
            std=self.std,
            anchors=self.anchors,
            seed=self.seed,
            progress=progress,
        )

    def _judge(self, shots: Sequence[Shot]) -> Judge | None:
        """Return the reward as a function of shots and a reply to each."""
        reward = self.reward
        if reward is None:
            return None
        if not isinstance(reward, str):
            return lambda of, replies: [reward(r, shot.record) for r, shot in zip(replies, of, strict=True)]
        loaded = load_reward(reward)
        loaded.check_columns([shot.record for shot in shots])
        return lambda of, replies: loaded([{**shot.record, "prompt": shot.given} for shot in of], replies)

    def _rewards(
        self,
        pool: Pool,
        tokenizer: PreTrainedTokenizerBase,
        mixtures: Sequence[Mixture],
        shots: Sequence[Shot],
        judge: Judge,
    ) -> Tensor:
        total = torch.zeros(len(mixtures))
        step = max(1, TOKENS // (len(mixtures) * (max(len(s.example.tokens) for s in shots) + self.max_new_tokens)))
        for start in range(0, len(shots), step):
            part = list(shots[start : start + step])
            prompts = [shot.prompt for _ in mixtures for shot in part]
            with pool.route([mixture for mixture in mixtures for _ in part]):
                replies = generate(pool.model, tokenizer, prompts, max_new_tokens=self.max_new_tokens)
            rewards = judge(part * len(mixtures), [reply.text for reply in replies])
            total += torch.tensor(rewards, dtype=torch.float32).view(len(mixtures), len(part)).sum(1)
        return total / len(shots)

    def _ascend(self, pool: Pool, blank: Mix, shots: Sequence[Shot], progress: Progress | None) -> Found:
        def objective(weights: Tensor) -> Tensor:
            total = torch.zeros(())
            for part in batches(shots, 1, pool.model.config.vocab_size):
                scores = mean_likelihood(pool, [blank.mixture(weights)], part).sum() / len(shots)
                scores.backward()
                total += scores.detach().cpu()
            return total

        with torch.enable_grad():
            return gradient_ascent(
                objective,
                (len(blank.kinds), len(blank.names)),
                iterations=30 if self.iterations is None else self.iterations,
                lr=self.lr,
                progress=progress,
            )
