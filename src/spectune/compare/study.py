"""The order of trials: a learning rate for each method by successive halving, then its runs over seeds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from spectune.compare.bench import Bench
from spectune.compare.candidates import further, grid
from spectune.compare.config import LESS, CompareConfig
from spectune.compare.trial import Result, Results, Trial
from spectune.errors import SpectuneError

_WAIT = 0.5  # seconds between looks at what other workers have done
_SEARCH_SEED = 10**6  # from the comparison's own: another order of the data than those that are judged, however many
Tell = Callable[[Result], None]


class Study:
    """Which trials there are, given the results so far.

    Args:
        config: the comparison.
        methods: what is compared.
        results: where results are.
    """

    def __init__(self, config: CompareConfig, methods: list[str], results: Results) -> None:
        self.config, self.methods, self.results = config, methods, results

    def pending(self) -> list[Trial]:
        """Return the trials that can run now and have no result, in order; none when all is done."""
        return [trial for method in self.methods for trial in self._pending(method)]

    def _pending(self, method: str) -> list[Trial]:
        searches = self.searches(method)
        missing = [trial for trial, result in searches if result is None]
        if missing:
            return missing
        return [trial for trial, result in self.finals(method) if result is None]

    def searches(self, method: str) -> list[tuple[Trial, Result | None]]:
        """Return the trials of a method's learning rates, with their results."""
        tried: dict[float, Result | None] = {}
        wanted = grid(self.config, method)
        while wanted:
            tried |= {lr: self.results.get(self._search(method, lr)) for lr in wanted}
            best = None if None in tried.values() else best_lr(tried, self.config)
            more = None if best is None else further(self.config, method, list(tried), best)
            wanted = [] if more is None else [more]
        return [(self._search(method, lr), result) for lr, result in tried.items()]

    def finals(self, method: str) -> list[tuple[Trial, Result | None]]:
        """Return a method's runs over seeds, with their results; none before its learning rate is known."""
        lr = None
        if grid(self.config, method):
            tried = {trial.lr: result for trial, result in self.searches(method)}
            if None in tried.values():
                return []
            lr = best_lr(tried, self.config)
            if lr is None:
                return []
        seeds = range(self.config.seed, self.config.seed + self.config.seeds)
        trials = [Trial(method, lr, seed, "final") for seed in seeds]
        return [(trial, self.results.get(trial)) for trial in trials]

    def count(self) -> tuple[int, int]:
        """Return how many trials are done, and how many there will be as far as one can see."""
        done = total = 0
        for method in self.methods:
            searches, finals = self.searches(method), self.finals(method)
            done += sum(result is not None for _, result in [*searches, *finals])
            total += len(searches) + (len(finals) or self.config.seeds)
        return done, total

    def _search(self, method: str, lr: float) -> Trial:
        return Trial(method, lr, self.config.seed + _SEARCH_SEED, "search")

    def pruner(self, trial: Trial) -> Callable[[int, Mapping[str, float]], bool]:
        """Return what says at each rung whether a learning rate's loss falls behind those already tried."""
        study = optuna.create_study(
            direction="minimize",  # the loss, which says something of early rungs, where a metric has not moved
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
        )
        space: dict[str, BaseDistribution] = {"lr": FloatDistribution(1e-12, 1e6, log=True)}
        for other, result in self.searches(trial.method):
            if result is not None and result["error"] is None and other != trial:
                study.add_trial(
                    create_trial(
                        state=TrialState.PRUNED if result["pruned"] else TrialState.COMPLETE,
                        value=result["validation"]["loss"],
                        params={"lr": other.lr},
                        distributions=space,
                        intermediate_values={int(rung): v for rung, v in result["rungs"].items()},
                        system_attrs=result["optuna"],
                    )
                )
        study.enqueue_trial({"lr": trial.lr})
        own = study.ask(space)

        def stop(rung: int, measures: Mapping[str, float]) -> bool:
            own.report(measures["loss"], rung)
            return own.should_prune()

        self._asked = own
        return stop

    def reported(self) -> Result:
        """Return what the pruner needs to know of the trial that was asked for last."""
        frozen = self._asked.study.trials[self._asked.number]
        attributes = {k: v for k, v in frozen.system_attrs.items() if k.startswith("completed_rung")}
        return {"rungs": {str(k): v for k, v in frozen.intermediate_values.items()}, "optuna": attributes}


def best_lr(tried: Mapping[Any, Result | None], config: CompareConfig) -> float | None:
    """Return the learning rate with the best metric at the end, the lower loss deciding ties; None where none ended."""
    sound = {lr: r for lr, r in tried.items() if r is not None and r["error"] is None and not r["pruned"]}
    if not sound:
        return None
    key, sign = config.searched_by, 1 if config.searched_by in LESS else -1
    return min(sound, key=lambda lr: (sign * sound[lr]["validation"][key], sound[lr]["validation"]["loss"]))


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
            if trial.kind == "final":
                result = {**about, **bench.run(trial)}
            else:
                stop = study.pruner(trial)
                result = {**about, **bench.run(trial, stop), **study.reported()}
            study.results.done(trial)
            return result
        except (SpectuneError, RuntimeError, MemoryError, ValueError) as failed:
            error = " ".join(str(failed).split()) or type(failed).__name__
        except KeyboardInterrupt:  # stopped, and not killed
            study.results.done(trial)
            raise
    study.results.done(trial)
    return {**about, "error": error, "pruned": False, "history": [], "seconds": time.perf_counter() - start}
