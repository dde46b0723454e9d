"""What a comparison comes to, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spectune.compare.report.model import Difference, Document, MethodRow
from spectune.training.curve import spoken


def amount(value: float, percent: bool) -> str:
    """Return a value of the metric as it is read: a percentage, or a number."""
    return f"{100 * value:.1f}%" if percent else f"{value:.3f}"


def apart(value: float, percent: bool, form: str = "") -> str:
    """Return a difference of the metric as it is read: percentage points, or a number."""
    return f"{100 * value:{form}.1f} points" if percent else f"{value:{form}.3f}"


def count(number: float, noun: str) -> str:
    """Return a number and its noun, in the plural where it must be."""
    return f"{number:,.0f} {noun}{'' if number == 1 else 's'}"


def few(number: float) -> str:
    """Return a count of parameters in three digits."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def probability(p: float) -> str:
    """Return a p-value as it is read."""
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"


def cheapest(document: Document) -> MethodRow | None:
    """Return the method that trains fewest parameters among those whose mean is within the best one's interval.

    With one seed, which has no interval: among those that the test records do not tell from the best.  None where
    nothing says which these are, or none of them trains more than a new head.
    """
    ran = [row for row in document.methods if row.ran]
    found = [row for row in ran if adapts(row) and not row.fell_apart and _near_best(row, ran[0])]
    if not ran or (ran[0].value.ends is None and not any(_near_best(row, ran[0]) for row in ran[1:])):
        return None
    return min(found, key=lambda row: row.parameters, default=None)


def adapts(row: MethodRow) -> bool:
    """Return whether a row's method trains more than a new head."""
    return bool(row.parameters) and row.method != "base"


def _near_best(row: MethodRow, best: MethodRow) -> bool:
    interval = best.value
    if row is best:
        return True
    if interval.ends is not None:
        return interval.holds(row.value.mean)
    to_best = row.to_best
    return to_best is not None and to_best.holds(0)


def answer(document: Document) -> list[str]:
    """Return the verdict and what it leaves open, a sentence each.

    Args:
        document: but for "answer".
    """
    ran = [row for row in document.methods if row.ran]
    failed = [row for row in document.methods if not row.ran]
    if not ran:
        reasons = "; ".join(sorted({failure.error for failure in document.failures}))
        return [f"No method ran to its end, so there is nothing to compare{': ' if reasons else ''}{reasons}."]
    sentences = [_uncounted(document, ran), _verdict(document, ran), _apart(document, ran)]
    sentences += [_economy(document, ran), _untrained(document, ran), _steady(document, ran)]
    sentences += [_unpaired(document, ran), _resolution(document, ran)]
    if failed:
        sentences.append(
            f"{_names(failed)} failed in every run, and {'is' if len(failed) == 1 else 'are'} in no picture."
        )
    return [s[0].upper() + s[1:] if s.startswith(("base ", "full ")) else s for s in sentences if s]


def _verdict(document: Document, ran: Sequence[MethodRow]) -> str:
    best, percent, metric = ran[0], document.percent, spoken(document.metric)
    reached = f"{metric} {amount(best.value.mean, percent)}{_interval(best, percent)}"
    if len(ran) == 1:
        return f"{best.label} reached a test {reached}; no other method ran, so there is nothing to compare it with."
    superlative = "highest" if document.greater_is_better else "lowest"
    if not document.baseline_ran:
        name = document.baseline
        why = f"{name} failed" if any(r.method == name for r in document.methods) else f"{name} is not among them"
        why = why if name else "none was compared"
        return f"{best.label} has the {superlative} test {reached}; there is no baseline to test it against ({why})."
    baseline = next(row for row in ran if row.method == document.baseline)
    others = [row for row in ran if row is not baseline]
    ahead, behind = _beyond(document, others, 1), _beyond(document, others, -1)
    name, seeds = baseline.label, count(max(len(row.seeds) for row in ran), "seed")
    if ahead:
        first = ahead[0]
        more = f"; so {'is' if len(ahead) == 2 else 'are'} {_names(ahead[1:])}" if len(ahead) > 1 else ""
        return f"{first.label} is ahead of {name} by {_judged(first.difference, percent)}{more}."
    if not document.tested:
        return (
            f"{best.label} has the {superlative} test {reached}, but with {seeds} nothing says whether its "
            f"difference from {name} is more than chance."
        )
    over_seeds = any(row.difference and row.difference.over != "records" for row in others)
    judged_by = "at " + seeds if over_seeds else "on these records"
    if best is baseline and len(behind) == len(others):
        return f"{name} is ahead of every other method beyond chance {judged_by}."
    if not behind:
        return f"No method differs from {name} beyond chance {judged_by}."
    return f"No method is ahead of {name} beyond chance {judged_by}; {_names(behind)} {_verb(behind)} behind it."


def _economy(document: Document, ran: Sequence[MethodRow]) -> str:
    found, best = cheapest(document), ran[0]
    if found is None or len(ran) == 1:
        return ""
    parameters, percent = few(found.parameters), document.percent
    within = "within the interval of the best" if best.value.ends is not None else "not told from the best"
    if found is best and all(r.parameters >= found.parameters for r in ran if adapts(r)):
        return f"The best, {best.label}, is also the one that trains fewest parameters, {parameters}."
    if found is best:
        return f"Nothing cheaper than {best.label} ({parameters} trained parameters) comes {within}."
    value, top = (amount(row.value.mean, percent) for row in (found, best))
    return (
        f"The cheapest {within} ({best.label}, {top}) is {found.label}: {value} with {parameters} trained "
        f"parameters{_ratio(best, found)}."
    )


def _ratio(best: MethodRow, found: MethodRow) -> str:
    ratio = best.parameters / found.parameters
    return f", {ratio:.0f} times fewer" if ratio >= 1.5 else ""


def _untrained(document: Document, ran: Sequence[MethodRow]) -> str:
    base = next((row for row in ran if row.method == "base"), None)
    if base is None or len(ran) == 1:
        return ""
    if base is ran[0]:
        return "No method improves on the model without an adapter (base), which has the best mean."
    return "The model without an adapter (base) is no further from the best." if _near_best(base, ran[0]) else ""


def _unpaired(document: Document, ran: Sequence[MethodRow]) -> str:
    """Say which methods have no run at a seed at which the baseline has one."""
    if not document.baseline_ran:
        return ""
    alone = [row for row in ran if row.difference is None and row.method != document.baseline]
    if not alone:
        return ""
    baseline = next(row.label for row in ran if row.method == document.baseline)
    return f"{_names(alone)} and {baseline} ran at no seed together, so that nothing says how they differ."


def resolution(document: Document) -> float | None:
    """Return the median half width of the differences from the baseline; None where none has an interval."""
    ends = [row.difference.ends for row in document.ran if row.difference and row.difference.ends]
    widths = [(high - low) / 2 for low, high in ends if high > low]
    return float(np.median(widths)) if widths else None


def _uncounted(document: Document, ran: Sequence[MethodRow]) -> str:
    """Say why the task bears no verdict, where it does not."""
    best, percent = next((row for row in ran if adapts(row)), ran[0]), document.percent
    least = resolution(document)
    if document.uncounted is None or least is None:
        return ""
    reached = f"the best, {best.label}, has {amount(best.value.mean, percent)}"
    told = f"differences below {apart(least, percent)} cannot be told"
    if document.uncounted == "floor":
        start = "where it starts" if document.start is None else f"the {amount(document.start, percent)} it starts from"
        return (
            f"No method learned this task to speak of: {reached}, near {start}, and {told}; it counts for no verdict."
        )
    return f"This task is at its ceiling: {reached}, and {told}; it counts for no verdict on which is better."


def _apart(document: Document, ran: Sequence[MethodRow]) -> str:
    """Say which methods fell apart, and at which seeds."""
    said = []
    for row in ran:
        if row.fell_apart:
            values = dict(zip(row.seeds, row.value.values, strict=True))
            worst = ", ".join(f"{amount(values[seed], document.percent)} at seed {seed}" for seed in row.fell_apart)
            said.append(f"{row.label} fell apart in {len(row.fell_apart)} of {len(row.seeds)} runs ({worst})")
    return f"{'; '.join(said)}: such a mean is of two kinds of runs, and counts for no verdict." if said else ""


def _steady(document: Document, ran: Sequence[MethodRow]) -> str:
    """Say which methods work over the widest and the narrowest range of learning rates."""
    known = [(row.sensitivity, row) for row in ran if row.sensitivity and not row.fell_apart]
    if len(known) < 2:
        return ""
    ordered = sorted(known, key=lambda pair: pair[0].octaves)
    (narrow, least), (wide, most) = ordered[0], ordered[-1]
    if wide.octaves < narrow.octaves + 0.5:
        return ""
    near = "within 1 point of the best" if document.searched_by != "loss" else "about as good as the best"
    more = "at least " if wide.open else ""
    return (
        f"{most.label} takes the widest range of learning rates, {more}{wide.octaves:.1f} octaves {near}, and "
        f"{least.label} the narrowest, {narrow.octaves:.1f}."
    )


def _resolution(document: Document, ran: Sequence[MethodRow]) -> str:
    """Say how small a difference could have been seen."""
    width = resolution(document)
    if all(len(row.seeds) < 2 for row in ran):
        told = " differences are judged over test records instead" if width else " nothing says how sure a number is"
        return f"With one seed there is no interval over seeds;{told}."
    if width is None:
        return ""
    baseline = next(row.label for row in ran if row.method == document.baseline)
    return (
        f"A difference from {baseline} below about {apart(width, document.percent)} could not "
        "have been told from chance (the median half-width of the intervals, before the correction)."
    )


def _interval(row: MethodRow, percent: bool) -> str:
    interval = row.value
    if interval.ends is None:
        return " (one seed)" if len(row.seeds) == 1 else f" (the same at each of {len(row.seeds)} seeds)"
    low, high = (amount(end, percent) for end in interval.ends)
    over = count(len(row.seeds), "seed") + " and the test records" * (interval.over == "both")
    return f" (95% interval {low} to {high} over {over})"


def _judged(difference: Difference | None, percent: bool) -> str:
    """Return a difference of either sign as a lead, with its uncertainty."""
    assert difference is not None  # it was tested
    assert difference.ends is not None
    assert difference.corrected_p is not None
    sign = 1 if difference.mean >= 0 else -1
    low, high = (apart(end, percent).removesuffix(" points") for end in sorted(sign * end for end in difference.ends))
    over = " over test records" if difference.over == "records" else ""
    return (
        f"{apart(abs(difference.mean), percent)} (95% interval {low} to {high}{over}, corrected p "
        f"{probability(difference.corrected_p)})"
    )


def _beyond(document: Document, rows: Sequence[MethodRow], side: int) -> list[MethodRow]:
    """Return the rows that are ahead (1) of the baseline, or behind (-1), beyond chance."""
    sign = side if document.greater_is_better else -side
    return [row for row in rows if row.difference and row.difference.beyond_chance and sign * row.difference.mean > 0]


def _verb(rows: Sequence[MethodRow]) -> str:
    return "is" if len(rows) == 1 else "are"


def _names(rows: Sequence[MethodRow]) -> str:
    labels = [row.label for row in rows]
    return labels[0] if len(labels) == 1 else ", ".join(labels[:-1]) + " and " + labels[-1]
