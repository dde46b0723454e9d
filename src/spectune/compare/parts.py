"""The data of a comparison: what is learned from, what learning rates are chosen on, and what judges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from spectune.compare.answers import question
from spectune.compare.config import SHARES, CompareConfig
from spectune.compare.power import Spread, records_for
from spectune.errors import SpectuneError
from spectune.training.data.records import Record
from spectune.training.data.splitting import copies
from spectune.training.preparing import token_limit
from spectune.training.tasks import Task, make_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LEAST = 8  # records of validation
LEAST_TEST = 20  # six answers that differ one way are the fewest that are beyond chance; of 20, that is 30 points
FOLDS = 5  # of the validation data, at most
MOST_TEST = 0.5  # of the data, where a difference to detect sets the share
_SAMPLE = 128  # training records at most that the gap to the test is measured with
Examples = Sequence[Any]  # as the task encodes them


class Fold(NamedTuple):
    """What runs with one seed learn from and are looked at by.

    Args:
        train, validation: examples.
        sample: of `train`, on which the gap to the test is measured.
        asked: as many records as the sample has.
    """

    train: Examples
    validation: Examples
    sample: Examples
    asked: Sequence[Record]


class Parts:
    """Records in their parts: a test, and folds of the rest, each of which is held out at the seeds that are its turn.

    A run at seed s is looked at on fold s mod K, and learns from all else but the test: so a method is judged at its
    rates by K times as many validation records as one run could spare.

    Args:
        config: the comparison.

    Raises:
        SpectuneError: data that cannot be read, is too small for its parts, does not fit the metric, or cannot move it.
    """

    def __init__(self, config: CompareConfig) -> None:
        task = make_task(config)
        assert config.data is not None  # or the configuration was not checked
        self.notes: list[str] = []  # what is to be known of the way that the data was read
        records = task.records(config.data, config.data_config, config.data_split)
        test = [] if config.test_data is None else task.records(config.test_data)
        task.look(records, test)
        self.notes += task.notes
        self.config = _looked_at(config, cast(CompareConfig, task.config))
        if config.test_data is None:
            records, test = _split(task, records, self._test_share(len(records)), "test")
        else:
            _tell_leaks(records, test, self.notes.append)
        self.test = test
        self.folds, self._rest = _folds(task, records, config.validation)
        for name, part, least in (("validation", self.folds[0], LEAST), ("test", test, LEAST_TEST)):
            if len(part) < least:
                raise SpectuneError(
                    f"{name} has {len(part)} records, and says nothing below {least}: give more data or a larger share"
                )
        if self.config.measure == "exact_match":
            for record in [*records, *test]:
                question(record)
        self._check_moves()

    def _test_share(self, count: int) -> float:
        """Return the share of the test: a given one, or what the difference to detect needs, as far as can be spared.

        That is by what two methods are taken to disagree in before any has run.
        """
        config = self.config
        if config.detect is None or "test" in config.model_fields_set or config.measure not in SHARES:
            return config.test
        needed = records_for(Spread(), config.difference or 0.0, 1) or count
        share = min(max(config.test, needed / count), MOST_TEST)
        if share > config.test:
            self.notes.append(f"test={share:.2g}, for detect={config.detect:g}: the share of the data that judges")
        return share

    def _check_moves(self) -> None:
        """Raise where every answer of the test is the same, so that the metric says nothing of what was learned."""
        measure = self.config.measure
        if self.config.task == "classify" and measure != "loss":
            answers = {str(record["label"]) for record in self.test}
        elif measure == "exact_match":
            answers = {question(record)[1].strip() for record in self.test}
        else:
            return
        if len(answers) == 1:
            raise SpectuneError(
                f"each of the {len(self.test)} test records has the answer {answers.pop()!r}, so that {measure} tells "
                "no method from another: give other data or test_data"
            )

    @property
    def records(self) -> dict[str, Sequence[Record]]:
        """The records in their parts, as runs at the first seed have them."""
        return {"train": self._learned(0), "validation": self.folds[0], "test": self.test}

    def _learned(self, held: int) -> list[Record]:
        return [*self._rest, *(r for k, fold in enumerate(self.folds) if k != held for r in fold)]

    def load(self, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Return the model that a task trains on these records, and its tokenizer."""
        return task.load(self._learned(-1), self.test)

    def encode(self, task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make the examples of all records, once."""
        limit = token_limit(self.config, model)
        parts = [task.encode(part, model, tokenizer, limit) for part in (self.test, *self.folds, self._rest) if part]
        self.tested, self._held = parts[0].examples, [part.examples for part in parts[1 : 1 + len(self.folds)]]
        self._others = [example for part in parts[1 + len(self.folds) :] for example in part.examples]
        names = ["test", *["train and validation"] * (len(parts) - 1)]
        self.cut, self.dropped = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
        for name, part in zip(names, parts, strict=True):
            self.cut[name] += part.cut
            self.dropped[name] += part.dropped

    def fold(self, seed: int) -> Fold:
        """Return what runs at a seed learn from and are looked at by."""
        held = seed % len(self.folds)
        learned = [*self._others, *(e for k, part in enumerate(self._held) if k != held for e in part)]
        count = min(_SAMPLE, len(self.test), len(learned))
        sample = learned[:: len(learned) // count][:count]
        return Fold(learned, self._held[held], sample, self._learned(held)[:count])


def _folds(task: Task, records: Sequence[Record], share: float) -> tuple[list[Sequence[Record]], Sequence[Record]]:
    """Return disjoint parts of so large a share each, and the rest."""
    rest, first = _split(task, records, share, "validation")
    folds = [first]
    while len(folds) < FOLDS and len(rest) >= 2 * len(first) >= 2 * LEAST:
        try:
            rest, fold = task.split(rest, len(first) / len(rest))
        except SpectuneError:  # too few of each label are left
            break
        folds.append(fold)
    return folds, rest


def _split(task: Task, records: Sequence[Record], share: float, name: str) -> tuple[Sequence[Record], Sequence[Record]]:
    """Split records as a run does: those that are the same stay together, and labels are in both parts alike."""
    try:
        return task.split(records, share)
    except SpectuneError:
        raise SpectuneError(
            f"{len(records)} records are too few for {name}={share}: give more data or another share"
        ) from None


def _looked_at(given: CompareConfig, found: CompareConfig) -> CompareConfig:
    """Return the configuration with what the data says of it, as what kind of labels it has.

    Raises:
        SpectuneError: the metric is of another kind.
    """
    if given.measure in found.of_task().measured():
        return found
    kind = getattr(found, "problem_type", None)
    raise SpectuneError(
        f"the labels are for problem_type={kind}, which has no {given.measure}: give problem_type={kind}"
    )


def _tell_leaks(records: Sequence[Record], test: Sequence[Record], say: Callable[[str], None]) -> None:
    _, leaks = copies(records, test)
    if leaks:
        say(f"{leaks} of {len(test)} test records are in the training data too: measures will flatter")
