"""The results of a comparison's trials, sorted by method, and each method's numbers over its runs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from spectune.compare.config import LESS, SHARES
from spectune.compare.report.model import Mean, MethodRow, SearchPoint, Sensitivity
from spectune.compare.report.soundness import fell_apart, width
from spectune.compare.report.statistics import crossed_interval, mean_interval
from spectune.compare.trial import Result
from spectune.methods import METHODS

_NAMES = {"full": "full fine-tuning", "lora_xs": "LoRA-XS"}
_MEDIANS = ("trainable_parameters", "adapter_bytes", "setup_seconds", "step_seconds", "peak_bytes", "tokens_per_second")


class Outcomes:
    """What the trials came to.

    Args:
        metric: what methods are judged by on the test.
        greater: whether more of it is better.
        finals: results of the runs that count.
        searches: results of the runs that the learning rates were chosen by, and of those that say where to begin.
        searched_by: the measure that they were chosen by; by default the metric where all of them have it, or the loss.

    Attributes:
        sound: the finals that came to their end, by method.
        gap_of: the measure whose gap between training and test is shown.
    """

    def __init__(
        self,
        metric: str,
        greater: bool,
        finals: Sequence[Result],
        searches: Sequence[Result],
        searched_by: str | None = None,
    ) -> None:
        self.metric, self.greater = metric, greater
        self.finals = [_finite(r) for r in finals]
        self.starts = [_finite(r) for r in searches if r["kind"] == "start"]
        self.searches = [_finite(r) for r in searches if r["kind"] != "start"]
        self.sound: defaultdict[str, list[Result]] = defaultdict(list)
        for result in self.finals:
            if not failure(result, metric):
                self.sound[result["method"]].append(result)
        trained = [at(r, "train", metric) for rs in self.sound.values() for r in rs]
        self.gap_of = "loss" if None in trained else metric
        validated = [at(r, "validation", metric) for r in self.searches if not r.get("error")]
        self.searched_by = searched_by or ("loss" if None in validated else metric)

    @property
    def all(self) -> list[Result]:
        """The finals, the searches, and what says where those begin."""
        return [*self.finals, *self.searches, *self.starts]

    def rows(self) -> list[MethodRow]:
        """Return a row for each method, the best first and those that did not run last."""
        methods = list(dict.fromkeys(result["method"] for result in self.all))
        labels = _labels(methods)
        rows = [self._row(method, labels[method]) for method in methods]
        sign = 1 if self.greater else -1
        return sorted(rows, key=lambda row: -sign * row.value.mean if row.ran else math.inf)

    def _row(self, method: str, label: str) -> MethodRow:
        runs = sorted(self.sound[method], key=lambda r: r["seed"])
        tried = [r for r in self.searches if r["method"] == method]
        return MethodRow(
            method=method,
            label=label,
            seeds=[r["seed"] for r in runs],
            ran=bool(runs),
            cost_seconds=sum(seconds_of(r) for r in self.all if r["method"] == method),
            **_measured(runs, self.metric, self.gap_of),
            search=_tried(tried, self.searched_by),
            edge=_edge(tried, runs),
            sensitivity=_sensitivity(tried, self.searched_by, _start(tried, self.searched_by)),
        )

    def start(self, rows: Sequence[MethodRow]) -> float | None:
        """Return the metric before any step."""
        start = _start(self.finals, self.metric)
        if start is None:  # replies are not looked at before the first step
            untrained = (row.value.mean for row in rows if row.ran and row.method == "base" and not row.parameters)
            return next(untrained, None)
        return start

    def mark_fallen(self, rows: Sequence[MethodRow], start: float | None) -> None:
        """Note in each row the seeds that fell apart, beside what the best row came to."""
        for row in rows:
            if row.ran:
                values = dict(zip(row.seeds, row.value.values, strict=True))
                table = table_of(self.sound[row.method], self.metric)
                count = len(table[0]) if table else None
                row.fell_apart = fell_apart(values, start, rows[0].value.mean, greater=self.greater, records=count)


def _measured(runs: Sequence[Result], metric: str, gap_of: str) -> dict[str, Any]:
    """Return a method's numbers over its runs."""
    forgotten = [_minus(at(r, "general", "after"), at(r, "general", "before")) for r in runs]
    gaps = [_minus(at(r, "train", gap_of), at(r, "test", gap_of)) for r in runs]
    floors = [r["step_seconds"] / r["floor_seconds"] for r in runs if r.get("step_seconds") and r.get("floor_seconds")]
    return {
        "lr": runs[0].get("lr") if runs else None,
        "steps": max((r["steps"] for r in runs if r.get("steps") is not None), default=None),
        "metric": _metric(runs, metric),
        "loss": _interval([at(r, "test", "loss") for r in runs]),
        "gap": _interval(gaps),
        "forgetting": _interval(forgotten),
        **{key: _median([r.get(key) for r in runs]) for key in _MEDIANS},
        "step_over_floor": _median(floors),
        "curves": {key: _curve(runs, key) for key in sorted({k for r in runs for k in _held_out(r)})},
    }


def _start(results: Sequence[Result], key: str) -> float | None:
    """Return the mean of a measure over the runs before their first step; None where it was not looked at."""
    first = [line for r in results for line in r.get("history") or () if line.get("step") == 0]
    known = [line[f"eval_{key}"] for line in first if line.get(f"eval_{key}") is not None]
    return float(np.mean(known)) if known else None


def _sensitivity(tried: Sequence[Result], key: str, start: float | None) -> Sensitivity | None:
    """Return the width of the good rates by the runs that came to their end."""
    ended = [(r["lr"], at(r, "validation", key)) for r in tried if not r.get("error") and not r.get("pruned")]
    points = [(lr, value) for lr, value in ended if lr is not None and value is not None]
    found = width(points, start, greater=key not in LESS, share=key in SHARES)
    return None if found is None else Sensitivity(**found._asdict())


def _tried(tried: Sequence[Result], searched_by: str) -> list[SearchPoint]:
    """Return the learning rates tried, in order."""
    keys = ("lr", "seed", "steps", "pruned", "error")
    points = [SearchPoint(**{k: r.get(k) for k in keys}, value=at(r, "validation", searched_by)) for r in tried]
    return sorted(points, key=lambda point: point.lr or 0)


def _edge(tried: Sequence[Result], runs: Sequence[Result]) -> Literal["lowest", "highest"] | None:
    """Return at which end of the learning rates tried the chosen one lies, if at one."""
    lr, rates = (runs[0].get("lr") if runs else None), sorted({r.get("lr") or 0 for r in tried})
    if len(rates) < 2 or lr is None:
        return None
    return "highest" if lr == rates[-1] else "lowest" if lr == rates[0] else None


def table_of(runs: Sequence[Result], metric: str) -> list[Sequence[int]] | None:
    """Return by seed which records were answered right, where the metric is their share."""
    rows = [right_of(run, metric) for run in sorted(runs, key=lambda run: run["seed"])]
    found = [row for row in rows if row]
    return found if found and len(found) == len(rows) and len({len(row) for row in found}) == 1 else None


def right_of(result: Result, metric: str) -> Sequence[int] | None:
    """Return which records were answered right, where the metric is their share."""
    right, value = result.get("right"), at(result, "test", metric)
    return right if right and value is not None and abs(sum(right) / len(right) - value) < 1e-4 else None


def failure(result: Result, metric: str) -> str | None:
    """Return why a run does not count, or None."""
    if result.get("error"):
        return str(result["error"])
    if result["kind"] == "final" and at(result, "test", metric) is None:
        return f"it has no finite {metric} on the test"
    return None


def _labels(methods: Sequence[str]) -> dict[str, str]:
    """Return short names for people: SVF, DoRA pissa; the methods' own texts where two would be the same."""
    short = {}
    for method in methods:
        name, _, options = method.partition(":")
        own = _NAMES.get(name) or (METHODS[name].__name__ if name in METHODS else name)
        values = [option.partition("=")[2] if name != "lora" else option for option in options.split(",") if option]
        short[method] = " ".join([own, *values])
    unique = [label for label in short.values() if list(short.values()).count(label) == 1]
    return {method: label if label in unique else method for method, label in short.items()}


def _held_out(result: Result) -> list[str]:
    return sorted({key for line in result.get("history") or () for key in line if key.startswith("eval_")})


def _curve(runs: Sequence[Result], key: str) -> list[list[float]]:
    """Return steps and means over runs, at the steps at which every run was measured."""
    curves = [{line["step"]: line[key] for line in r.get("history") or () if line.get(key) is not None} for r in runs]
    shared = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    return [[step, float(np.mean([curve[step] for curve in curves]))] for step in shared]


def _interval(values: Sequence[float | None]) -> Mean | None:
    known = [value for value in values if value is not None]
    return Mean(**mean_interval(known)._asdict(), values=known) if known else None


def _metric(runs: Sequence[Result], metric: str) -> Mean | None:
    """Return the mean of the metric and its interval, over seeds and records where it is of single ones."""
    found, table = _interval([at(r, "test", metric) for r in runs]), table_of(runs, metric)
    if found is None or table is None or len(table) < 2:
        return found
    return Mean(**{**found.model_dump(), **crossed_interval(table)._asdict(), "mean": found.mean, "over": "both"})


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def at(result: Result, part: str, key: str) -> float | None:
    """Return a measure of a run on a part of the data; None where it was not taken."""
    return (result.get(part) or {}).get(key)


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def seconds_of(result: Result) -> float:
    """Return what a run took in all."""
    if result.get("seconds") is not None:
        return result["seconds"]
    return (result.get("setup_seconds") or 0.0) + (result.get("train_seconds") or 0.0)


def _finite(value: object) -> Any:
    """Return a result with None for every number that is not finite, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
