"""The results of a comparison as one document: of each method its numbers and intervals, and in words what they say."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from spectune.compare.config import LESS, SHARES
from spectune.compare.report.command import train_command
from spectune.compare.report.model import (
    Difference,
    Document,
    Failure,
    Mean,
    MethodRow,
    Paired,
    SearchPoint,
    Sensitivity,
    Trial,
)
from spectune.compare.report.soundness import fell_apart, uncounted, width
from spectune.compare.report.statistics import (
    crossed_difference,
    crossed_interval,
    holm,
    mean_interval,
    paired_difference,
    record_difference,
)
from spectune.compare.report.verdict import adapts, answer, cheapest, resolution
from spectune.compare.trial import Result
from spectune.methods import METHODS

SIGNIFICANT = 0.05
_NAMES = {"full": "full fine-tuning", "lora_xs": "LoRA-XS"}
_MEDIANS = ("trainable_parameters", "adapter_bytes", "setup_seconds", "step_seconds", "peak_bytes", "tokens_per_second")


def document(header: Mapping[str, Any], finals: Sequence[Result], searches: Sequence[Result]) -> Document:
    """Return the document.

    Args:
        header: what was compared, on what and how; it stays in the document as it is.
        finals: results of the runs that count, one for each method and seed.
        searches: results of the runs that the learning rates were chosen by.

    Raises:
        SpectuneError: scipy is missing.
    """
    metric, sign = header["metric"], 1 if header["greater_is_better"] else -1
    finals, searches = [_finite(r) for r in finals], [_finite(r) for r in searches]
    sound: defaultdict[str, list[Result]] = defaultdict(list)
    for result in finals:
        if not _failure(result, metric):
            sound[result["method"]].append(result)
    gap_of = metric if all(_at(r, "train", metric) is not None for rs in sound.values() for r in rs) else "loss"
    searched_by = header.get("searched_by") or (
        metric if all(_at(r, "validation", metric) is not None for r in searches if not r.get("error")) else "loss"
    )
    start = _start(finals, metric)
    methods = list(dict.fromkeys(result["method"] for result in [*finals, *searches]))
    labels = _labels(methods)
    rows = []
    for method in methods:
        runs = sorted(sound[method], key=lambda r: r["seed"])
        tried = [r for r in searches if r["method"] == method]
        rows.append(
            MethodRow(
                method=method,
                label=labels[method],
                seeds=[r["seed"] for r in runs],
                ran=bool(runs),
                cost_seconds=sum(_seconds(r) for r in [*finals, *searches] if r["method"] == method),
                **_measured(runs, metric, gap_of),
                search=_tried(tried, searched_by),
                edge=_edge(tried, runs),
                sensitivity=_sensitivity(tried, searched_by, _start(tried, searched_by)),
            )
        )
    rows.sort(key=lambda row: -sign * row.value.mean if row.ran else math.inf)
    if start is None:  # replies are not looked at before the first step
        untrained = (row.value.mean for row in rows if row.ran and row.method == "base" and not row.parameters)
        start = next(untrained, None)
    for row in rows:
        if row.ran:
            values = dict(zip(row.seeds, row.value.values, strict=True))
            table = _table(sound[row.method], metric)
            count = len(table[0]) if table else None
            row.fell_apart = fell_apart(values, start, rows[0].value.mean, greater=sign > 0, records=count)
    made = Document(
        **{
            **header,
            "percent": metric in SHARES,
            "gap_of": gap_of,
            "searched_by": searched_by,
            "start": start,
            "forgetting_of": next(
                (r["general"]["name"] for rs in sound.values() for r in rs if r.get("general")), None
            ),
            "methods": rows,
            "failures": [
                Failure(**{key: r.get(key) for key in ("kind", "method", "lr", "seed")}, error=error)
                for r in [*finals, *searches]
                if (error := _failure(r, metric))
            ],
            "trials": [_trial(r, metric, searched_by) for r in [*searches, *finals]],
            "seconds": sum(_seconds(r) for r in [*finals, *searches]),
        }
    )
    _compare(made, sound)
    made.uncounted = _uncounted(made)
    made.best = made.methods[0].method if made.methods and made.methods[0].ran else None
    made.recommended = _recommended(made)
    for row in made.methods:
        row.train_command = train_command(made, row)
    made.train_command = next((row.train_command for row in made.methods if row.method == made.recommended), None)
    made.answer = answer(made)
    return made


def _measured(runs: Sequence[Result], metric: str, gap_of: str) -> dict[str, Any]:
    """Return a method's numbers over its runs."""
    forgotten = [r["general"]["after"] - r["general"]["before"] if r.get("general") else None for r in runs]
    gaps = [_minus(_at(r, "train", gap_of), _at(r, "test", gap_of)) for r in runs]
    floors = [r["step_seconds"] / r["floor_seconds"] for r in runs if r.get("step_seconds") and r.get("floor_seconds")]
    return {
        "lr": runs[0].get("lr") if runs else None,
        "steps": max((r["steps"] for r in runs if r.get("steps") is not None), default=None),
        "metric": _metric(runs, metric),
        "loss": _interval([_at(r, "test", "loss") for r in runs]),
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


def _uncounted(made: Document) -> Literal["floor", "ceiling"] | None:
    rows = [row for row in made.ran if adapts(row)]
    if not rows:
        return None
    share, greater = made.metric in SHARES, made.greater_is_better
    return uncounted(rows[0].value.mean, made.start, resolution(made), greater=greater, share=share)


def _sensitivity(tried: Sequence[Result], key: str, start: float | None) -> Sensitivity | None:
    """Return the width of the good rates by the runs that came to their end."""
    ended = [(r["lr"], _at(r, "validation", key)) for r in tried if not r.get("error") and not r.get("pruned")]
    points = [(lr, value) for lr, value in ended if lr is not None and value is not None]
    found = width(points, start, greater=key not in LESS, share=key in SHARES)
    return None if found is None else Sensitivity(**found._asdict())


def _tried(tried: Sequence[Result], searched_by: str) -> list[SearchPoint]:
    """Return the learning rates tried, in order."""
    keys = ("lr", "seed", "steps", "pruned", "error")
    points = [SearchPoint(**{k: r.get(k) for k in keys}, value=_at(r, "validation", searched_by)) for r in tried]
    return sorted(points, key=lambda point: point.lr or 0)


def _edge(tried: Sequence[Result], runs: Sequence[Result]) -> Literal["lowest", "highest"] | None:
    """Return at which end of the learning rates tried the chosen one lies, if at one."""
    lr, rates = (runs[0].get("lr") if runs else None), sorted(r.get("lr") or 0 for r in tried)
    if len(rates) < 2 or lr is None:
        return None
    return "highest" if lr == rates[-1] else "lowest" if lr == rates[0] else None


def _compare(made: Document, sound: Mapping[str, Sequence[Result]]) -> None:
    """Add to every row its difference to the baseline, and to the best row."""
    rows = made.ran
    baseline = next((row.method for row in rows if row.method == made.baseline), None)
    made.baseline_ran = baseline is not None
    for row in rows:
        if baseline is not None and row.method != baseline:
            pair = sound[row.method], sound[baseline]
            row.over_records = _over_records(*pair, made.metric)
            row.difference = _difference(*pair, made.metric, row.over_records)
        if row is not rows[0]:
            pair = sound[row.method], sound[rows[0].method]
            row.to_best = _difference(*pair, made.metric, _over_records(*pair, made.metric))
    whole = baseline is not None and not next(row for row in rows if row.method == baseline).fell_apart
    counted = [row for row in rows if whole and not row.fell_apart]
    tested = [(d, d.p) for row in counted if (d := row.difference) is not None and d.p is not None]
    for (difference, _), corrected in zip(tested, holm([p for _, p in tested]), strict=True):
        difference.corrected_p = corrected
        difference.beyond_chance = corrected < SIGNIFICANT
    made.tested = len(tested)


def _difference(
    runs: Sequence[Result], others: Sequence[Result], metric: str, over_records: Paired | None
) -> Difference | None:
    """Return the difference between two methods, judged over seeds and records together.

    Over seeds alone where a metric is not of single records, and over records alone where seeds have no spread.
    """
    ours, theirs = ({r["seed"]: r["test"][metric] for r in rs} for rs in (runs, others))
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    tables = [_table([r for r in rs if r["seed"] in seeds], metric) for rs in (runs, others)]
    if len(seeds) > 1 and tables[0] and tables[1] and len(tables[0][0]) == len(tables[1][0]):
        both = crossed_difference(tables[0], tables[1])
        if both.p is not None:
            return Difference(**both._asdict(), over="both", seeds=len(seeds))
    found = paired_difference([ours[s] for s in seeds], [theirs[s] for s in seeds])
    if found.p is None and over_records is not None:
        return Difference(**over_records.model_dump(), over="records", seeds=len(seeds))
    return Difference(**found._asdict(), over="seeds", seeds=len(seeds))


def _table(runs: Sequence[Result], metric: str) -> list[Sequence[int]] | None:
    """Return by seed which records were answered right, where the metric is their share."""
    rows = [_right(run, metric) for run in sorted(runs, key=lambda run: run["seed"])]
    found = [row for row in rows if row]
    return found if found and len(found) == len(rows) and len({len(row) for row in found}) == 1 else None


def _over_records(runs: Sequence[Result], others: Sequence[Result], metric: str) -> Paired | None:
    """Return a paired bootstrap over test records, each record's mean over the seeds that both have."""
    ours, theirs = ({r["seed"]: _right(r, metric) for r in rs} for rs in (runs, others))
    pairs = [(a, b) for s, a in ours.items() if a and (b := theirs.get(s))]
    if not pairs or len({len(right) for pair in pairs for right in pair}) != 1:
        return None
    a, b = np.mean([pair[0] for pair in pairs], axis=0), np.mean([pair[1] for pair in pairs], axis=0)
    return Paired(**record_difference(a, b)._asdict())


def _right(result: Result, metric: str) -> Sequence[int] | None:
    """Return which records were answered right, where the metric is their share."""
    right, value = result.get("right"), _at(result, "test", metric)
    return right if right and value is not None and abs(sum(right) / len(right) - value) < 1e-4 else None


def _recommended(made: Document) -> str | None:
    """Return the best method ahead of the baseline, else the cheapest in the best one's interval, of those trained.

    None where nothing was learned.
    """
    if made.uncounted == "floor":
        return None
    sign = 1 if made.greater_is_better else -1
    for row in made.methods:
        ahead = row.difference and row.difference.beyond_chance and sign * row.difference.mean > 0
        if ahead and adapts(row):
            return row.method
    found = cheapest(made)
    if found is not None:
        return found.method
    return next((row.method for row in made.ran if adapts(row) and not row.fell_apart), None)


def _trial(result: Result, metric: str, searched_by: str) -> Trial:
    keys = ("kind", "method", "lr", "seed", "steps", "pruned", "error")
    return Trial(
        **{key: result[key] for key in keys if key in result},
        validation=_at(result, "validation", searched_by),
        test=_at(result, "test", metric),
        right="".join(map(str, result["right"])) if result.get("right") else None,
        seconds=_seconds(result),
    )


def _failure(result: Result, metric: str) -> str | None:
    if result.get("error"):
        return str(result["error"])
    if result["kind"] == "final" and _at(result, "test", metric) is None:
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
    found, table = _interval([_at(r, "test", metric) for r in runs]), _table(runs, metric)
    if found is None or table is None or len(table) < 2:
        return found
    return Mean(**{**found.model_dump(), **crossed_interval(table)._asdict(), "mean": found.mean, "over": "both"})


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def _at(result: Result, part: str, key: str) -> float | None:
    return (result.get(part) or {}).get(key)


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _seconds(result: Result) -> float:
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
