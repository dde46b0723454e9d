"""What follows the data where it is not given: the one source of it for `train`, `data` and `init`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from spectune.training.config import TrainConfig

_ROUND = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)  # tokens; more than the last has to be asked for
_ENOUGH = 100  # steps that a run should have
_PASSES = 10  # at most, over few records
_LEARNED = 2.5  # forward passes that a training step on an example is worth
_SHARE = 0.1  # of a run that evaluations may take
_HELD = (16, 1000)  # records that are held out: at least, where that leaves enough, and at most
_MEASURED = 100  # records at least, of more that are held out because someone said so


class Choice(NamedTuple):
    """A setting that was chosen.

    Args:
        key: of the configuration.
        value: for it.
        said: the choice, in a few words.
        reason: for it.
    """

    key: str
    value: object
    said: str
    reason: str


C = TypeVar("C", bound=TrainConfig)


def settle(config: C, choices: Sequence[Choice]) -> C:
    """Return a configuration in which these choices are given."""
    return config.model_copy(update={choice.key: choice.value for choice in choices})


def by_count(config: TrainConfig, count: int, keys: Sequence[str], processes: int = 1, others: int = 0) -> list[Choice]:
    """Return what the number of records says: the size of a batch, the passes, what is held out, when it is measured.

    Args:
        config: whose settings that are given stay.
        count: of records; those to learn from alone, where others are for evaluation.
        keys: that may follow the data.
        processes: that share a step.
        others: records for evaluation, where these are other data.
    """
    open_ = [key for key in keys if key not in config.model_fields_set]
    found: list[Choice] = []
    batch = config.batch_size
    if "batch_size" in open_:
        batch = 4 if count < 100 else 8 if count < 20_000 else 16 if count < 100_000 else 32
        found.append(Choice("batch_size", batch, f"batch size {batch}", f"{count:,} records"))
    each = batch * config.gradient_accumulation_steps * processes
    apart = config.evaluation() is not None
    follows = "held_out" in open_ and not apart
    learned = count - (_wanted(count) if follows else 0 if apart else round(count * config.held_out))
    a_pass, epochs = math.ceil(learned / each), config.epochs
    if "epochs" in open_ and config.max_steps is None:
        epochs = _passes(a_pass)
        steps = epochs * a_pass
        why = (
            "a pass is enough" if epochs == 1 else f"so that there are about {steps:,} steps" if epochs > 3 else "usual"
        )
        found.append(Choice("epochs", epochs, f"{epochs} epoch{'s' * (epochs > 1)}", f"{count:,} records: {why}"))
    steps = config.max_steps or math.ceil(epochs * a_pass)
    evaluations = 2
    if "eval_steps" in open_ and steps >= 40 and (apart or follows or config.held_out > 0):
        every = steps // 4 + 1
        evaluations = 5
        reason = f"three times on the way through {steps:,} steps, beside before and after"
        found.append(Choice("eval_steps", every, f"measured every {every:,} steps", reason))
    elif config.eval_steps is not None:
        evaluations += steps // config.eval_steps
    if follows:
        held = _held(count, steps * each, evaluations)
        reason = f"{held:,} of {count:,} records; to measure them takes at most a tenth of the run"
        reason = "one record cannot be in two parts" if count < 2 else reason
        found.append(Choice("held_out", _share(held, count), f"{held:,} held out", reason))
        return found
    there = others if apart else round(count * config.held_out)
    most = max(_MEASURED, _in_a_tenth(steps * each, evaluations))
    if "max_eval_samples" in open_ and there > most:
        reason = f"of {there:,} held-out records, the same each time: to measure them takes at most a tenth of the run"
        found.append(Choice("max_eval_samples", most, f"{most:,} of {there:,} held-out records measured", reason))
    return found


def _passes(a_pass: int) -> int:
    """Return passes of so many steps: three, more where steps would be few, fewer where they are many."""
    if a_pass >= 2000:
        return 1
    if a_pass >= 1000:
        return 2
    return min(_PASSES, max(3, math.ceil(_ENOUGH / max(1, a_pass))))


def _held(count: int, learned: int, evaluations: int) -> int:
    """Return how many of so many records to hold out, where examples are learned so often and evaluated so often."""
    least = min(_HELD[0], count // 5)
    return min(_wanted(count), max(least, _in_a_tenth(learned, evaluations))) or int(count > 1)


def _in_a_tenth(learned: int, evaluations: int) -> int:
    """Return how many examples so many evaluations can each take, in a tenth of a run that learns so many."""
    return int(_LEARNED * learned * _SHARE / (1 - _SHARE) / evaluations)


def _wanted(count: int) -> int:
    return max(min(round(0.05 * count), _HELD[1]), min(_HELD[0], count // 5))


def _share(held: int, count: int) -> float:
    """Return the shortest share that is so many records."""
    exact = held / count
    return next((s for s in (round(exact, d) for d in range(2, 8)) if round(count * s) == held), exact)


def by_lengths(config: TrainConfig, lengths: Sequence[int], context: int, keys: Sequence[str]) -> list[Choice]:
    """Return what the lengths of some examples say: how many tokens of one are kept.

    Args:
        config: whose settings that are given stay.
        lengths: in tokens, of a sample.
        context: tokens that the model can take.
        keys: that may follow the data.
    """
    if "max_length" not in keys or "max_length" in config.model_fields_set or not lengths:
        return []
    ordered = sorted(lengths)
    most, usual = ordered[-1], ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    wanted = _up(most) if _up(most) <= 2 * _up(usual) else _up(usual)
    chosen = max(8, min(wanted, context))
    reason = f"95% of the examples have at most {usual:,} tokens, the longest {most:,}"
    if chosen < usual:
        limit = "the model takes no more" if chosen == context else "give more if memory allows"
        reason += f"; the rest of an example is cut off: {limit}"
    return [Choice("max_length", chosen, f"max_length {chosen:,}", reason)]


def _up(tokens: int) -> int:
    return next((size for size in _ROUND if size >= tokens), _ROUND[-1])


def steps_of(config: TrainConfig, learned: int, processes: int) -> int:
    """Return how many steps a run has, given the records that it learns from and the processes that share a step."""
    each = config.batch_size * config.gradient_accumulation_steps * processes
    return config.max_steps or math.ceil(math.ceil(learned / each) * config.epochs)


def sentence(config: TrainConfig, choices: Sequence[Choice], count: int, learned: int, processes: int = 1) -> str:
    """Return the choices and what they follow from, in a sentence.

    Args:
        config: with the choices.
        choices: that were made.
        count: of all records.
        learned: of them, those to learn from.
        processes: that share a step.
    """
    by_key = {choice.key: choice for choice in choices}
    lengths = by_key.get("max_length")
    said = [f"{count:,} records" + (f", {lengths.reason}" if lengths else "")]
    each = config.batch_size * config.gradient_accumulation_steps * processes
    if config.max_steps is None:
        steps = steps_of(config, learned, processes)
        passes = f"{config.epochs:g} epoch{'s' * (config.epochs != 1)} = {steps:,} steps of {each:,}"
    else:
        passes = f"{config.max_steps:,} steps of {each:,}"
    parts = [lengths.said] if lengths else []
    parts += [passes] if {"epochs", "batch_size"} & by_key.keys() else []
    parts += [by_key[key].said for key in ("held_out", "eval_steps", "max_eval_samples") if key in by_key]
    return f"{said[0]}: {', '.join(parts)}"
