"""The report of a comparison as an HTML page."""

from __future__ import annotations

from collections.abc import Sequence

from spectune.compare.report.figures import (
    COSTS,
    curve_keys,
    draw_curves,
    draw_pareto,
    draw_rates,
    drawn,
    front,
    searched,
)
from spectune.compare.report.model import Difference, Document, Mean, MethodRow
from spectune.compare.report.verdict import amount, apart, count, few
from spectune.pages import html as page
from spectune.pages.html import Column, Shown
from spectune.pages.pictures import as_svg
from spectune.pages.units import gigabytes
from spectune.training.curve import spoken


def report_page(document: Document) -> str:
    """Return the page.

    Args:
        document: what `spectune.compare.report.document.document` returned.
    """
    ran = [row for row in document.methods if row.ran]
    first, *rest = document.answer
    lead = page.paragraphs([first]) + _tiles(document, ran) + page.paragraphs(rest)
    if document.notes:
        lead += page.paragraphs(f"{note.rstrip('.')}." for note in document.notes)
    parts = [
        ("Train it", _winner(document)),
        ("Every method", _table(document) if ran else ""),
        ("What it costs", _pareto(document)),
        ("How it learned", _curves(document)),
        ("Learning rates", _rates(document)),
        ("What failed", _failures(document)),
        ("What each run cost", _trials(document)),
        ("How it was computed", _how(document)),
        ("To reproduce", _reproduce(document)),
    ]
    return page.page(f"Compared: {document.label}", lead, [(heading, html) for heading, html in parts if html])


def _tiles(document: Document, ran: Sequence[MethodRow]) -> str:
    pairs, percent, metric = [], document.percent, spoken(document.metric)
    by_name = {row.method: row for row in ran}
    named = {"best": document.best, "baseline": document.baseline, "recommended": document.recommended}
    if named["recommended"] in (named["best"], named["baseline"]):
        del named["recommended"]
    for role, method in named.items():
        if method in by_name and (role != "baseline" or method != document.best):
            row = by_name[method]
            cost = f", {few(row.trainable_parameters)} parameters" if row.trainable_parameters else ""
            pairs.append((amount(row.value.mean, percent), f"{role}: {row.label}{cost}"))
    failed = sum(not row.ran for row in document.methods)
    pairs.append((f"{len(ran)}", f"methods{f', and {failed} that failed' if failed else ''}; test {metric}"))
    pairs.append((f"{len(document.seeds)}", f"seed{'s' * (len(document.seeds) != 1)} each"))
    pairs.append((_span(document.seconds), f"in {count(len(document.trials), 'run')}"))
    return page.tiles(pairs)


def _winner(document: Document) -> str:
    if all(row.train_command is None for row in document.methods):
        return ""
    row = next((row for row in document.methods if row.method == document.recommended), None)
    more = [(r.label, command) for r in document.methods if (command := r.train_command) and r is not row]
    others = "".join(page.paragraphs([label]) + page.code(command) for label, command in more)
    folded = page.details("The other methods" if row else "The methods", others) if more else ""
    if row is None:
        return page.paragraphs(["Nothing here says which to train."]) + folded
    text = f"{row.label} as it was trained here, on all of the data but what spectune train holds out:"
    first = page.code(document.train_command or "")
    if document.train_command is None:
        text, first = "spectune train has no full fine-tuning; the others are below.", ""
    return page.paragraphs([text]) + first + folded


def _table(document: Document) -> str:
    percent, metric, forgetting = document.percent, spoken(document.metric), document.forgetting_of
    baseline = next((r.label for r in document.methods if r.method == document.baseline), None)
    columns = [
        Column("method"),
        Column("parameters", ",.0f", "trained"),
        Column(f"test {metric}", ".3f", "mean and half of its 95% interval"),
        *([Column(f"from {baseline}", "+.3f", "mean and 95% interval of the paired difference")] if baseline else []),
        *(
            [Column("corrected p", ".2g", "of the difference, by Holm's procedure over all methods")]
            if baseline
            else []
        ),
        *([Column("forgetting", "+.3f", f"{forgetting}, after minus before")] if forgetting else []),
        Column("gap", "+.3f", f"{spoken(document.gap_of)} on training data minus on the test"),
        Column("step", ",.0f", "median milliseconds of an optimizer step"),
        Column("step / floor", ".2f", "over the frozen model's forward and gradient to its input"),
        Column("memory", ".0f", "peak memory above the loaded base; full holds a copy of it"),
        Column("start", ".2f", "seconds to prepare the model"),
        Column("file", ".0f", "what is saved"),
        Column("lr", "g", "chosen on validation"),
        Column("octaves", ".1f", "of learning rates within 1 point of the best on validation; + where it may be wider"),
        Column("cost", ".0f", "time of all its runs, search included"),
    ]
    gap_percent = percent and document.gap_of == document.metric
    rows = []
    for row in document.methods:
        if not row.ran:
            continue
        corrected = row.difference and row.difference.corrected_p
        cells = [row.method, row.trainable_parameters, _with_interval(row.value, percent)]
        if baseline:
            cells += [_difference(row.difference, percent), corrected]
        if forgetting:
            cells.append(_mean(row.forgetting))
        gap = _mean(row.gap)
        cells += [gap if gap is None or not gap_percent else Shown(gap, apart(gap, True, "+").removesuffix(" points"))]
        cells += [row.step_seconds and 1000 * row.step_seconds, row.step_over_floor]
        cells += [_size(row.peak_bytes), row.setup_seconds, _size(row.adapter_bytes), row.lr, _octaves(row)]
        rows.append([*cells, Shown(row.cost_seconds, _span(row.cost_seconds))])
    units = f"Differences of {metric} are in percentage points. " if percent else ""
    text = f"{units}A star marks what is beyond chance after the correction; step is in milliseconds, start in seconds."
    return page.paragraphs([text]) + page.table("Press a heading to sort; the best first", columns, rows)


def _octaves(row: MethodRow) -> Shown | None:
    found = row.sensitivity
    return None if found is None else Shown(found.octaves, f"{found.octaves:.1f}{'+' * found.open}")


def _with_interval(interval: Mean, percent: bool) -> Shown:
    text = amount(interval.mean, percent)
    if interval.ends is not None:
        half = (interval.ends[1] - interval.ends[0]) / 2
        text += f" ± {apart(half, percent).removesuffix(' points')}"
    return Shown(interval.mean, text)


def _difference(difference: Difference | None, percent: bool) -> Shown | None:
    if difference is None:
        return None
    text = apart(difference.mean, percent, "+").removesuffix(" points")
    if difference.ends is not None:
        low, high = (apart(end, percent, "+").removesuffix(" points") for end in difference.ends)
        text += f" ({low} to {high})"
    return Shown(difference.mean, text + " *" * bool(difference.beyond_chance))


def _pareto(document: Document) -> str:
    pictures, shown = [], set()
    for i, cost in enumerate(COSTS):
        rows = drawn(document, cost)
        if not rows:
            continue
        shown.update(row.method for row in rows)
        svg = as_svg(lambda figure, cost=cost: draw_pareto(figure, document, [cost]), (4.4, 4.0), f"p{i}")
        names = ", ".join(row.label for row in front(rows, cost, document.greater_is_better))
        alt = f"Test {spoken(document.metric)} against {cost.label}. Not beaten at their cost or less: {names}"
        pictures.append((svg, alt, f"Not beaten at their cost or less: {names}."))
    text = (
        "Filled points are the front, which the line joins: nothing that costs as much or less scores better. Bars are "
        "95% intervals. A triangle at the border stands for a method far worse than the rest."
    )
    absent = [
        f"{row.label} ({amount(row.value.mean, document.percent)})"
        for row in document.methods
        if row.ran and row.method not in shown
    ]
    if absent:
        text += f" Not in the pictures, since it trains nothing: {', '.join(absent)}."
    return page.paragraphs([text]) + page.figures(pictures, size="large") if pictures else ""


def _curves(document: Document) -> str:
    pictures = []
    for i, key in enumerate(curve_keys(document)):
        svg = as_svg(lambda figure, key=key: draw_curves(figure, document, key), (4.4, 4.2), f"c{i}")
        what = spoken(key.removeprefix("eval_"))
        pictures.append((svg, f"Validation {what} over the steps, a line a method; the table has the last values", ""))
    text = f"On validation data, the mean over {count(len(document.seeds), 'seed')}."
    return page.paragraphs([text]) + page.figures(pictures, size="large") if pictures else ""


def _rates(document: Document) -> str:
    pictures = []
    for i, row in enumerate(searched(document)):
        svg = as_svg(lambda figure, row=row: draw_rates(figure.subplots(), document, row), (2.2, 1.75), f"r{i}")
        tried = ", ".join(dict.fromkeys(f"{point.lr:g}" for point in row.search))
        pictures.append((svg, f"{row.label}: learning rates {tried}; {row.lr} was chosen", ""))
    if not pictures:
        return ""
    percent = document.percent and document.searched_by == document.metric
    texts = [
        f"Validation {spoken(document.searched_by)}{', %,' * percent} by learning rate. The filled point was "
        "chosen, the line joins the means over seeds; triangles were stopped because they fell behind, and crosses "
        "failed."
    ]
    edges = [f"{r.label} (the {r.edge}, {r.lr:g})" for r in document.methods if r.edge]
    if edges:
        texts.append(f"At an end of the rates tried, beyond which a better one may lie: {', '.join(edges)}.")
    return page.paragraphs(texts) + page.figures(pictures, size="small")


def _failures(document: Document) -> str:
    if not document.failures:
        return ""
    columns = [Column("method"), Column("why"), Column("run"), Column("lr", "g"), Column("seed", ".0f")]
    rows = [[f.method, f.error, _KINDS[f.kind], f.lr, f.seed] for f in document.failures]
    return page.table("Runs without a result", columns, rows)


_KINDS = {"start": "first learning rate", "search": "learning rate", "final": "result"}


def _trials(document: Document) -> str:
    columns = [
        Column("method"),
        Column("run"),
        Column("lr", "g"),
        Column("seed", ".0f"),
        Column("steps", ".0f"),
        Column(f"validation {spoken(document.searched_by)}", ".4f"),
        Column(f"test {spoken(document.metric)}", ".4f"),
        Column("seconds", ",.1f"),
        Column("end"),
    ]
    keys = ("lr", "seed", "steps", "validation", "test", "seconds")
    rows = [
        [
            t.method,
            _KINDS[t.kind],
            *(getattr(t, k) for k in keys),
            "failed" if t.error else "stopped" * bool(t.pruned),
        ]
        for t in document.trials
    ]
    text = f"{count(len(rows), 'run')} took {_span(document.seconds)} in all, one after another."
    table = page.table("Runs for a learning rate, then those that count", columns, rows)
    return page.paragraphs([text]) + page.details(f"Show the {count(len(rows), 'run')}", table)


def _how(document: Document) -> str:
    split, steps = document.split, document.steps
    parts = ", ".join(f"{size:,} for {name}" for name, size in split.items())
    span = f"for {steps} steps"
    rates = f"A learning rate was searched for each by validation {spoken(document.searched_by)}"
    if not any(row.search for row in document.methods):
        rates = "Each ran at its own learning rate"
    if document.until == "plateau":
        span = (
            f"until its validation loss, over a quarter of {steps} steps, fell by less than 1% of all it had fallen, "
            "or for all of them,"
        )
    if document.equal == "time":
        span = f"for as long as the baseline takes for {steps} steps,"
    return page.paragraphs(
        [
            f"Records: {parts}. Every method saw the same ones in the same order at the same seed, {span} "
            f"of {document.batch_size}. {rates}; the test chose nothing.",
            "Where the metric is of single records, intervals are over seeds and test records together (crossed random "
            "effects), else over seeds (Student's t). Differences are paired, and their p-values corrected by Holm's "
            "procedure for the number of methods; a star marks those below 0.05. Where there is one seed a paired "
            "bootstrap over test records takes its place.",
            "Gap and forgetting, times and memory are means or medians over seeds. Times hold for this machine as it "
            "was; the floor is the frozen model's forward and gradient to its input on the same batches.",
        ]
    )


def _reproduce(document: Document) -> str:
    about = {**document.machine, **document.versions, "date": document.date}
    rows = [[key.replace("_", " "), str(value)] for key, value in about.items() if value is not None]
    return (
        page.paragraphs(["compare.yaml:"])
        + page.code(document.config.rstrip())
        + page.code(document.command)
        + page.table("Machine and versions", [Column("what"), Column("is")], rows)
    )


def _size(value: float | None) -> Shown | None:
    return None if value is None else Shown(value, gigabytes(value))


def _mean(interval: Mean | None) -> float | None:
    return None if interval is None else interval.mean


def _span(seconds: float) -> str:
    """Return a time as it is read."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
