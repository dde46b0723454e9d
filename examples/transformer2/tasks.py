"""The tasks of the evidence: prompts with answers from the embedded sources, and how a reply is judged."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reasoning_gym

from spectune.bases import sources
from spectune.demo import pirate_data, pirate_rate
from spectune.storage import write_atomically

SALTY = 0.12  # the share of pirate words from which a reply counts as pirate speech, as in the demo


@dataclass(frozen=True)
class Task:
    """One skill.

    Args:
        name: also its adapter's name, where it is trained.
        description: as the prompt strategy tells the model.
        hand: the adapter that a person would choose.
        judge: judge(reply, answer) -> whether the reply is right.
        draw: draw(model, tokenizer, count, seed) -> (prompt, answer) pairs without repeats.
        steps: optimizer steps of training at full length; 0 for a task that no adapter is trained on.
        batch: examples in a step.
        tokens: of a reply.
    """

    name: str
    description: str
    hand: str
    judge: Callable[[str, str], bool]
    draw: Callable[[Any, Any, int, int], list[tuple[str, str]]]
    steps: int = 0
    batch: int = 16
    tokens: int = 24

    def right(self, reply: str, answer: str) -> bool:
        """Whether a reply is right."""
        return self.judge(reply, answer)


def last_number(reply: str, answer: str) -> bool:
    """Whether the last integer of a reply is the answer."""
    found = re.findall(r"-?\d+", reply.replace(",", ""))
    return bool(found) and found[-1] == answer


def relation(reply: str, answer: str) -> bool:
    """Whether the last word of kinship in a reply is the answer."""
    words = r"(?:grand)?(?:father|mother)(?:-in-law)?|husband|wife|son|daughter|brother|sister"
    found = re.findall(words, reply.lower())
    return bool(found) and found[-1] == answer


def sentiment(reply: str, answer: str) -> bool:
    """Whether a reply names the answer and not the other."""
    return set(re.findall(r"positive|negative", reply.lower())) == {answer}


def salty(reply: str, answer: str) -> bool:
    """Whether a reply is pirate speech."""
    return pirate_rate([reply]) >= SALTY


def gym(name: str, **settings: Any) -> Callable[[Any, Any, int, int], list[tuple[str, str]]]:
    """Return a drawer of a reasoning-gym family."""

    def draw(model: Any, tokenizer: Any, count: int, seed: int) -> list[tuple[str, str]]:
        drawn = reasoning_gym.create_dataset(name, size=8 * count + 64, seed=seed, **settings)
        pairs = {entry["question"]: entry["answer"] for entry in drawn}
        return list(pairs.items())[:count]

    return draw


def reviews(source: str, about: str) -> Callable[[Any, Any, int, int], list[tuple[str, str]]]:
    """Return a drawer of short, clearly rated reviews, as many positive as negative."""

    def draw(model: Any, tokenizer: Any, count: int, seed: int) -> list[tuple[str, str]]:
        kept: dict[str, list[tuple[str, str]]] = {"positive": [], "negative": []}
        for text, rating in sources.reviews(source).items():
            if abs(rating) >= 1 and 4 <= len(text.split()) <= 30:
                answer = "positive" if rating > 0 else "negative"
                question = f"Is this {about} positive or negative? Answer with one word.\n\n{text}"
                kept[answer].append((question, answer))
        chooser = random.Random(seed)
        for pairs in kept.values():
            chooser.shuffle(pairs)
        return [pair for both in zip(*kept.values(), strict=False) for pair in both][:count]

    return draw


def pirate(model: Any, tokenizer: Any, count: int, seed: int) -> list[tuple[str, str]]:
    """Return questions and the base's own replies in pirate speech."""
    records = pirate_data(model, tokenizer, count, 0, seed).train
    return [tuple(turn["content"] for turn in record["messages"]) for record in records]  # type: ignore[misc]


_CHAIN: dict[str, Any] = {"min_digits": 1, "max_digits": 2}
TASKS = {
    task.name: task
    for task in (
        Task(
            "sums",
            "adding and subtracting numbers",
            "sums",
            last_number,
            gym("chain_sum", min_terms=2, max_terms=2, **_CHAIN),
            steps=200,
        ),
        Task(
            "family",
            "how two people of a family are related",
            "family",
            relation,
            gym("family_relationships"),
            steps=80,
        ),
        Task(
            "sentiment",
            "whether a movie review is positive or negative",
            "sentiment",
            sentiment,
            reviews("movieReviewSnippets", "movie review"),
            steps=60,
        ),
        Task("pirate", "chat and general questions", "pirate", salty, pirate, steps=24, batch=8, tokens=32),
        Task(
            "longer-sums",
            "",
            "sums",
            last_number,
            gym("chain_sum", min_terms=3, max_terms=3, min_digits=1, max_digits=1),
        ),
        Task(
            "products",
            "",
            "sentiment",
            sentiment,
            reviews("amazonReviewSnippets", "product review"),
        ),
    )
}


@dataclass(frozen=True)
class Parts:
    """A task's prompts with answers, in three parts that share none."""

    train: list[tuple[str, str]]
    shots: list[tuple[str, str]]
    held: list[tuple[str, str]]


def parts(task: Task, model: Any, tokenizer: Any, train: int, shots: int, held: int, keep: Path) -> Parts:
    """Return a task's parts, drawn once and then kept in a file.

    Raises:
        ValueError: the source has too few prompts.
    """
    if not keep.exists():
        drawn = task.draw(model, tokenizer, train + shots + held, 17)
        if len(drawn) < shots + held + (train > 0):
            raise ValueError(f"{task.name} has {len(drawn)} prompts, and {shots + held} are to be held out")
        random.Random(17).shuffle(drawn)
        text = json.dumps(drawn, indent=0)
        keep.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(keep, lambda path: path.write_text(text, encoding="utf-8"))
    pairs = [(prompt, answer) for prompt, answer in json.loads(keep.read_text(encoding="utf-8"))]
    chosen = Parts(pairs[shots + held :][:train], pairs[:shots], pairs[shots : shots + held])
    everything = [prompt for part in (chosen.train, chosen.shots, chosen.held) for prompt, _ in part]
    assert len(everything) == len(set(everything))  # shots and held-out prompts are never learned from
    return chosen


def records(pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return pairs as chat records to train on or to search with."""
    return [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
        for prompt, answer in pairs
    ]
