"""The order of trials: a race for each method's learning rate, then its runs over seeds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from spectune.compare.bench import Bench
from spectune.compare.candidates import BASE, FULL, rate
from spectune.compare.config import OF_RECORDS, SHARES, CompareConfig
from spectune.compare.looks import Report
from spectune.compare.parts import FOLDS
from spectune.compare.power import MOST_SEEDS, Spread, seeds_for, spread, told
from spectune.compare.race import Key, Look, Race, Run, Runs
from spectune.compare.trial import Result, Results, Trial
from spectune.errors import SpectuneError

_WAIT = 0.5  # seconds between looks at what other workers have done
_SEARCH_SEED = 10**6  # from the comparison's own: another order of the data than those that are judged, however many
_EDGE = 10  # steps of the ladder from a method's own rate: a factor of 300, as far as a search goes
_TOLD = 0.02  # of a share: the difference whose price is said where none is asked for
Tell = Callable[[Result], None]


class Round(NamedTuple):
    """Runs of a race that were chosen together; none where it is over.

    Args:
        before: all that were chosen earlier.
        trials: of this round, by their place on the ladder and the number of their seed.
    """

    before: Runs
    trials: dict[Key, Trial]


class Study:
    """Which trials there are, given the results so far: the same whoever ran them, and in whatever order they ended.

    Args:
        config: the comparison.
        methods: what is compared; the first that trains is the pilot, by whose runs `detect` is answered, and whose
            steps set the time where that is `equal`.
        results: where results are.
    """

    def __init__(self, config: CompareConfig, methods: list[str], results: Results) -> None:
        self.config, self.methods, self.results = config, methods, results
        self.race = Race(config.lrs, config.search, config.warmup, -_EDGE, _EDGE, FOLDS)
        self.pilot = next((method for method in methods if method != BASE), None)
        self._raced: dict[str, list[Round]] = {}  # of which only the last may lack results
        self._chosen: dict[str, float | None] = {}

    def pending(self) -> list[Trial]:
        """Return the trials that can run now and have no result, in order; none when all is done."""
        return [trial for method in self.methods for trial in self._pending(method)]

    def _pending(self, method: str) -> list[Trial]:
        for stage in (self.timed, self.starts, self.searches, self.finals):
            missing = [trial for trial, result in stage(method) if result is None]
            if missing:
                return missing
        return []

    def count(self) -> tuple[int, int]:
        """Return how many trials are done, and how many there will be as far as one can see."""
        done = total = 0
        for method in self.methods:
            finals = self.finals(method)
            known = [*self.timed(method), *self.starts(method), *self.searches(method), *finals]
            done += sum(result is not None for _, result in known)
            total += len(known) + (0 if finals else self.seeds())
        return done, total

    def _with_results(self, trials: Iterable[Trial]) -> list[tuple[Trial, Result | None]]:
        return [(trial, self.results.get(trial)) for trial in trials]

    # the time of a step, where time is what is equal

    def timed(self, method: str) -> list[tuple[Trial, Result | None]]:
        """Return the runs that say how long a step of the pilot and of a method takes, where that matters."""
        if self.config.equal != "time" or method == BASE:
            return []
        both = dict.fromkeys((self.pilot or method, method))
        return self._with_results(Trial(m, rate(self.config, m), self.config.seed, "time") for m in both)

    def _is_timed(self, method: str) -> bool:
        return all(result is not None and result["error"] is None for _, result in self.timed(method))

    def _steps(self, method: str) -> int | None:
        """Return in how many steps a method takes the pilot's time; None for the comparison's own number."""
        found = [result for _, result in self.timed(method) if result is not None]
        if not found:
            return None
        return max(1, round(found[0]["whole"] * found[0]["step_seconds"] / found[-1]["step_seconds"]))

    # the race for a learning rate

    def starts(self, method: str) -> list[tuple[Trial, Result | None]]:
        """Return the trial that measures at which rate a method's search begins, with its result, where one is to."""
        if self.config.start == "own" or method in (BASE, FULL):
            return []
        return self._with_results([Trial(method, None, self.config.seed + _SEARCH_SEED, "start")])

    def _is_ready(self, method: str) -> bool:
        """Whether a method's search, or its run at the one rate there is, can begin."""
        return self._is_timed(method) and all(result is not None for _, result in self.starts(method))

    def _measured(self, method: str) -> float | None:
        """Return the rate at which a method's search begins, where one was measured."""
        return next((result.get("start") for _, result in self.starts(method) if result is not None), None)

    def _rate(self, method: str, place: int = 0) -> float | None:
        """Return the rate at a place of a method's ladder; where none could be measured, around the method's own."""
        return rate(self.config, method, place, self._measured(method))

    def _race(self, method: str) -> Race:
        return replace(self.race, measured=self._measured(method) is not None)

    def searches(self, method: str) -> list[tuple[Trial, Result | None]]:
        """Return the trials of a method's learning rates, with their results."""
        return self._with_results(trial for one in self._rounds(method) for trial in one.trials.values())

    def _rounds(self, method: str) -> list[Round]:
        """Return the rounds of a method's race as far as the results go."""
        if method == BASE or self.config.lrs == 1 or not self._is_ready(method):
            return []
        rounds = self._raced.setdefault(method, [])
        seen: Runs = {}
        while not rounds or rounds[-1].trials:
            if rounds:
                ended = {key: self.results.get(trial) for key, trial in rounds[-1].trials.items()}
                if None in ended.values():
                    break
                seen = {**rounds[-1].before, **{key: run_of(result) for key, result in ended.items() if result}}
            rounds.append(Round(seen, {key: self._search(method, *key) for key in self._race(method).next(seen)}))
        return rounds

    def _search(self, method: str, place: int, seed: int) -> Trial:
        lr = self._rate(method, place)
        return Trial(method, lr, self.config.seed + _SEARCH_SEED + seed, "search", self._steps(method))

    def stops(self, trial: Trial) -> Report:
        """Return what says at each look whether a run of a race is over, by the runs that were chosen before it."""
        for one in self._rounds(trial.method):
            for key, other in one.trials.items():
                if other == trial:
                    return partial(self.race.stops, one.before, key)
        return lambda looks: False

    def best_rate(self, method: str) -> float | None:
        """Return the learning rate of a method that trains: what its race chose, or the first where none is searched.

        None where the search is not over, or no rate ran to its end.
        """
        if self.config.lrs == 1:
            return self._rate(method) if self._is_ready(method) else None
        rounds = self._rounds(method)
        if method not in self._chosen and rounds and not rounds[-1].trials:
            best = self._race(method).best(rounds[-1].before)
            self._chosen[method] = None if best is None else self._rate(method, best)
        return self._chosen.get(method)

    # the runs that count

    def finals(self, method: str) -> list[tuple[Trial, Result | None]]:
        """Return a method's runs over seeds, with their results; none before its learning rate is known."""
        return self._judged(method, self.seeds())

    def _judged(self, method: str, count: int) -> list[tuple[Trial, Result | None]]:
        lr = None if method == BASE else self.best_rate(method)
        if lr is None and method != BASE:
            return []
        seeds = range(self.config.seed, self.config.seed + count)
        return self._with_results(Trial(method, lr, seed, "final", self._steps(method)) for seed in seeds)

    def _asked_for(self) -> int:
        """Return the seeds that were asked for; two at least where they are to say how many more there must be."""
        return self.config.seeds if self.config.detect is None else max(2, self.config.seeds)

    def seeds(self) -> int:
        """Return how many seeds each method runs with: more than asked for where the difference to detect needs it."""
        asked, difference = self._asked_for(), self.config.difference
        if difference is None or not (runs := self._piloted()):
            return asked
        needed = seeds_for(self._spread(runs), difference, runs[0]["records"])
        return max(asked, min(needed or MOST_SEEDS, MOST_SEEDS))

    def told(self) -> str | None:
        """Return in a sentence what can be told by the pilot's runs; None before they ended, or where they failed."""
        runs, percent = self._piloted(), self.config.measure in SHARES
        if not runs:
            return None
        wanted = self.config.difference or (_TOLD if percent else math.inf)
        return told(self._spread(runs), self.seeds(), runs[0]["records"], wanted, percent=percent, pilot=self.pilot)

    def _piloted(self) -> list[Result]:
        """Return the pilot's runs over the seeds that were asked for, once all ended; none where fewer than two did."""
        if self.pilot is None:
            return []
        runs = [result for _, result in self._judged(self.pilot, self._asked_for())]
        ended = [result for result in runs if result is not None and result["error"] is None]
        return [] if None in runs or len(ended) < 2 else ended

    def _spread(self, runs: Sequence[Result]) -> Spread:
        right = [run["right"] for run in runs] if self.config.measure in OF_RECORDS else None
        return spread([run["test"][self.config.measure] for run in runs], right)


def beforehand(config: CompareConfig, records: int) -> list[str]:
    """Return in sentences what a comparison cannot tell, as far as that is known before any run.

    Args:
        config: the comparison.
        records: of the test.
    """
    said = []
    if config.seeds == 1 and config.detect is None:
        said.append("seeds=1 says nothing of what other seeds would do: give 3 or more")
    if config.measure in OF_RECORDS:
        said.append(told(Spread(), config.seeds, records, config.difference or _TOLD, percent=True))
    return said


def run_of(result: Result) -> Run:
    """Return what a race is told of a result."""
    if result["error"] is not None:
        return Run()
    looks = tuple(
        Look(look["step"], look["value"], None if look["right"] is None else [int(digit) for digit in look["right"]])
        for look in result["looks"]
    )
    return Run(looks, ended=not result["pruned"])


def work(
    config: CompareConfig, methods: list[str], settings: str, bench: Bench | None = None, tell: Tell | None = None
) -> None:
    """Run trials until none is left, sharing them with other workers.

    Args:
        config: the comparison.
        methods: what is compared.
        settings: name of the settings.
        bench: where to run them; made if not given.
        tell: told of every trial that ended.
    """
    study = Study(config, methods, Results(Path(config.output) / "trials", settings))
    while pending := study.pending():
        ran = False
        for trial in pending:
            with study.results.claimed(trial) as mine:
                if not mine:
                    continue
                bench = bench or Bench(config)
                result = _run(study, bench, trial)
                study.results.put(trial, result)
            if tell is not None:
                tell(result)
            ran = True
            break
        if not ran:
            time.sleep(_WAIT)


def _run(study: Study, bench: Bench, trial: Trial) -> Result:
    about = {"kind": trial.kind, "method": trial.method, "lr": trial.lr, "seed": trial.seed}
    start = time.perf_counter()
    error = "the process that ran it was killed each time: was there too little memory? `spectune plan` says what fits"
    if study.results.attempt(trial):
        try:
            result = {**about, **bench.run(trial, study.stops(trial))}
            study.results.done(trial)
            return result
        except (SpectuneError, RuntimeError, MemoryError, ValueError) as failed:
            error = " ".join(str(failed).split()) or type(failed).__name__
        except KeyboardInterrupt:  # stopped, and not killed
            study.results.done(trial)
            raise
    study.results.done(trial)
    return {**about, "error": error, "pruned": False, "history": [], "seconds": time.perf_counter() - start}
