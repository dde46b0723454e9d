"""The results of a comparison as one document: of each method its numbers and intervals, and in words what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from spectune.compare.config import SHARES
from spectune.compare.report.command import train_command
from spectune.compare.report.model import Difference, Document, Failure, Paired, Trial
from spectune.compare.report.outcomes import Outcomes, at, failure, right_of, seconds_of, table_of
from spectune.compare.report.soundness import uncounted
from spectune.compare.report.statistics import crossed_difference, holm, paired_difference, record_difference
from spectune.compare.report.verdict import adapts, answer, cheapest, resolution
from spectune.compare.trial import Result

SIGNIFICANT = 0.05


def document(header: Mapping[str, Any], finals: Sequence[Result], searches: Sequence[Result]) -> Document:
    """Return the document.

    Args:
        header: what was compared, on what and how; it stays in the document as it is.
        finals: results of the runs that count, one for each method and seed.
        searches: results of the runs that the learning rates were chosen by.

    Raises:
        SpectuneError: scipy is missing.
    """
    metric = header["metric"]
    found = Outcomes(metric, bool(header["greater_is_better"]), finals, searches, header.get("searched_by"))
    rows = found.rows()
    start = found.start(rows)
    found.mark_fallen(rows, start)
    made = Document(
        **{
            **header,
            "percent": metric in SHARES,
            "gap_of": found.gap_of,
            "searched_by": found.searched_by,
            "start": start,
            "forgetting_of": next(
                (r["general"]["name"] for rs in found.sound.values() for r in rs if r.get("general")), None
            ),
            "methods": rows,
            "failures": [
                Failure(kind=r["kind"], method=r["method"], lr=r.get("lr"), seed=r.get("seed"), error=error)
                for r in found.all
                if (error := failure(r, metric))
            ],
            "trials": [_trial(r, metric, found.searched_by) for r in [*found.searches, *found.finals]],
            "seconds": sum(map(seconds_of, found.all)),
        }
    )
    _compare(made, found.sound)
    made.uncounted = _uncounted(made)
    made.best = made.methods[0].method if made.methods and made.methods[0].ran else None
    made.recommended = _recommended(made)
    for row in made.methods:
        row.train_command = train_command(made, row)
    made.train_command = next((row.train_command for row in made.methods if row.method == made.recommended), None)
    made.answer = answer(made)
    return made


def _uncounted(made: Document) -> Literal["floor", "ceiling"] | None:
    rows = [row for row in made.ran if adapts(row)]
    if not rows:
        return None
    share, greater = made.metric in SHARES, made.greater_is_better
    return uncounted(rows[0].value.mean, made.start, resolution(made), greater=greater, share=share)


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
    tables = [table_of([r for r in rs if r["seed"] in seeds], metric) for rs in (runs, others)]
    if len(seeds) > 1 and tables[0] and tables[1] and len(tables[0][0]) == len(tables[1][0]):
        both = crossed_difference(tables[0], tables[1])
        if both.p is not None:
            return Difference(**both._asdict(), over="both", seeds=len(seeds))
    found = paired_difference([ours[s] for s in seeds], [theirs[s] for s in seeds])
    if found.p is None and over_records is not None:
        return Difference(**over_records.model_dump(), over="records", seeds=len(seeds))
    return Difference(**found._asdict(), over="seeds", seeds=len(seeds))


def _over_records(runs: Sequence[Result], others: Sequence[Result], metric: str) -> Paired | None:
    """Return a paired bootstrap over test records, each record's mean over the seeds that both have."""
    ours, theirs = ({r["seed"]: right_of(r, metric) for r in rs} for rs in (runs, others))
    pairs = [(a, b) for s, a in ours.items() if a and (b := theirs.get(s))]
    if not pairs or len({len(right) for pair in pairs for right in pair}) != 1:
        return None
    a, b = np.mean([pair[0] for pair in pairs], axis=0), np.mean([pair[1] for pair in pairs], axis=0)
    return Paired(**record_difference(a, b)._asdict())


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
        validation=at(result, "validation", searched_by),
        test=at(result, "test", metric),
        right="".join(map(str, result["right"])) if result.get("right") else None,
        seconds=seconds_of(result),
    )
