"""The article's claims against the study's results: a table and a picture, from results/*/report.json and grid/*.jsonl.

    python benchmarks/study/claims.py

Writes results/claims.md, results/study.png, the part of docs/study.md that shows them and the verdicts in README.md
(run.py does this at its end).

* A task that tasks.py takes counts by its report, and where it has none by its grid: each method at the rate whose
  runs were best on the validation folds, in the mean over all seeds.
* That one method is better than another, or overfits more (the gap between training and test), is tested on every task
  by the paired differences over the seeds at which both ran, and over the test records where a report has them,
  corrected for the number of tasks (Holm): supported where some task shows it and none the opposite, refuted the other
  way round, undecided with neither or both.
* That a method is no worse than another is a claim of equivalence with a margin stated here, 2 points (0.02 of a loss):
  supported where on every task the interval lies above the margin, refuted where on some it lies below, else undecided.
* A task counts where it can tell methods apart: its best is neither at the floor nor at the ceiling, by how small a
  difference it could have told.  A method that fell apart at some seed does not count on that task.
* That it needs some number of times fewer parameters is supported from two thirds of that number on, however many more.
* That adapters add is supported where each pair's sum keeps both skills within 5 points, refuted where none does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grid import GRID, PLANS, Plan, lines
from marked import put
from regret import best_place, metric_of, surfaces
from tasks import taken

from spectune.compare.config import LESS
from spectune.compare.report.soundness import fell_apart, uncounted
from spectune.compare.report.statistics import Difference, crossed_difference, holm, mean_interval, paired_difference
from spectune.methods import parse, to_text

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SVF, SVFT, LORA, XS = "svf", "svft:pattern=banded", "lora:rank=16", "lora_xs:rank=16"
PISSA, MILORA, FULL = "pissa:rank=16", "milora:rank=16", "full"
_RECORDS = 1000  # of a grid's task
LEVEL = 0.05
MARGIN = 0.02  # of a share, and of a loss: what is less is no difference
ALT = "The metric of each task over the number of trained parameters, method by method, with 95% intervals"


def reports() -> dict[str, Any]:
    """Return what there is of each task that is taken: its report, or what its grid says."""
    found = written()
    return found | grids(list(found))


def written() -> dict[str, Any]:
    """Return the report of each task that has one, and not those of runs with other settings."""
    paths = {name: HERE / "results" / name / "report.json" for name in sorted(taken())}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()}


def grids(found: Sequence[str]) -> dict[str, Any]:
    """Return the tasks that have a grid and no report, as reports.

    Args:
        found: tasks that have one.
    """
    named = [(name, plan) for name, plan in PLANS.items() if name in taken() and name not in found]
    made = {name: _of_grid(name, plan) for name, plan in named}
    return {name: report for name, report in made.items() if report is not None}


def _of_grid(name: str, plan: Plan) -> Any:
    held, metric = lines(GRID / f"{name}.jsonl"), metric_of(plan)
    whole = surfaces(plan, held)
    if not whole:
        return None
    sign, seeds = -1 if metric in LESS else 1, list(range(plan.seeds))
    tests, rows = {}, []
    for given, surface in whole.items():
        method = given if given == FULL else to_text(parse(given))  # as reports have it, without its defaults
        place = best_place(surface)
        tests[method] = [surface.tests[place, seed] for seed in seeds]
        interval = mean_interval(tests[method])
        ends = [interval.mean, *sorted(sign * end for end in (interval.low, interval.high) if end is not None)]
        measured = {"mean": sign * ends[0], "low": None, "high": None, "values": [sign * v for v in tests[method]]}
        if len(ends) > 1:
            measured |= {"low": ends[1], "high": ends[2]}
        rows.append({"method": method, "ran": True, "label": method, "seeds": seeds, "metric": measured, "gap": None})
        rows[-1] |= {"trainable_parameters": trained_values(plan, method), "difference": None}
        rows[-1] |= {"lr": next(line["lr"] for line in held if (line["method"], line["place"]) == (given, place))}
    for row in rows:
        if row["method"] != LORA:
            row["difference"] = paired_difference(tests[row["method"]], tests[LORA])._asdict()
    starts = [run.start for surface in whole.values() for run in surface.runs.values() if np.isfinite(run.start)]
    return {
        "methods": sorted(rows, key=lambda row: -sign * row["metric"]["mean"]),
        "label": f"{plan.keys['model']} on {name}",
        "model": plan.keys["model"],
        "metric": metric,
        "percent": metric not in LESS,
        "greater_is_better": metric not in LESS,
        "gap_of": metric,
        "seeds": seeds,
        "start": sign * float(np.median(starts)),
        "split": {"test": round(plan.keys["test"] * _RECORDS)},
        "steps": plan.keys["max_steps"],
        "batch_size": plan.keys["batch_size"],
        "trials": [],
        "runs": len(held),
    }


def trained_values(plan: Plan, method: str) -> int | None:
    """Return how many values a method trains of a decoder that replies; what a new head has is in reports alone."""
    if plan.keys["task"] != "sft" or method == FULL:
        return None
    from transformers import AutoConfig, AutoModelForCausalLM

    from spectune.bases.places import model_path
    from spectune.model.targets import resolve

    config = AutoConfig.from_pretrained(model_path(plan.keys["model"]))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = resolve(model, method).items()
    shapes = [m.shapes(*model.get_submodule(layer).weight.shape).values() for layer, m in layers]
    return sum(math.prod(shape) for each in shapes for shape in each)


def why_not(report: Any) -> str | None:
    """Return why a task does not count, floor or ceiling; None where it does."""
    rows = [row for row in report["methods"] if row["ran"] and row["method"] != "base"]
    ends = [d for row in rows if (d := row["difference"]) and d["low"] is not None and d["high"] > d["low"]]
    halves = sorted((d["high"] - d["low"]) / 2 for d in ends)
    least, best = halves[len(halves) // 2] if halves else None, rows[0]["metric"]["mean"]
    if least is not None and report["percent"] and all(row["metric"].get("over", "seeds") == "seeds" for row in rows):
        # intervals over seeds alone leave out what so few records add
        least = max(least, 1.96 * (2 * best * (1 - best) / report["split"]["test"]) ** 0.5)
    return uncounted(best, start(report), least, greater=report["greater_is_better"], share=report["percent"])


def start(report: Any) -> float | None:
    """Return the metric before any step, or of the base where the report does not say."""
    base = row(report, "base")
    return report.get("start") or (None if base is None else base["metric"]["mean"])


def apart(report: Any, method: str) -> list[int]:
    """Return the seeds at which a method fell apart."""
    each = row(report, method)
    if each is None or len(each["seeds"]) != len(each["metric"]["values"]):
        return []
    values = dict(zip(each["seeds"], each["metric"]["values"], strict=True))
    best = next(row["metric"]["mean"] for row in report["methods"] if row["ran"])
    records = report["split"]["test"] if report["percent"] else None
    return fell_apart(values, start(report), best, greater=report["greater_is_better"], records=records)


def difference(report: Any, method: str, other: str, of: str) -> Difference | None:
    """Return how much more a method has of a measure than another, the better the larger; None where none says it."""
    pair = [row(report, name) for name in (method, other)]
    if not all(each and each[of] for each in pair):
        return None
    if any(len(each["seeds"]) != len(each[of]["values"]) for each in pair):  # which seed lacks it is not said
        return None
    by_seed = [dict(zip(each["seeds"], each[of]["values"], strict=True)) for each in pair]
    seeds = [seed for seed in by_seed[0] if seed in by_seed[1]]
    falls = report["gap_of"] == "loss" if of == "gap" else not report["greater_is_better"]
    tables = [_right(report, name, seeds) for name in (method, other)] if of == "metric" else [None, None]
    if len(seeds) > 1 and all(tables):
        return crossed_difference(*tables)
    values = [[-each[seed] if falls else each[seed] for seed in seeds] for each in by_seed]
    return paired_difference(*values) if seeds else None


def _right(report: Any, method: str, seeds: list[int]) -> Any:
    """Return by seed whether each test record was answered right, where the metric is their share."""
    if report["metric"] not in ("accuracy", "exact_match"):
        return None
    finals = [t for t in report["trials"] if t["kind"] == "final" and t["method"] == method]
    by_seed = {trial["seed"]: trial.get("right") for trial in finals}
    rows = [by_seed.get(seed) for seed in seeds]
    return [[int(bit) for bit in bits] for bits in rows] if all(rows) else None


def row(report: Any, method: str) -> Any:
    """Return a method's row, or None where it did not run."""
    return next((row for row in report["methods"] if row["method"] == method and row["ran"]), None)


def fewer(found: dict[str, Any], method: str, other: str, times: float) -> tuple[str, str]:
    """Return whether a method trains so many times fewer parameters, and how many by model, new heads included."""
    ratios = {}
    for report in found.values():
        pair = [row(report, name) for name in (other, method)]
        counts = [each and each["trainable_parameters"] for each in pair]
        if all(counts):
            ratios.setdefault(report["model"], counts[0] / counts[1])
    if not ratios:
        return "undecided", "not run"
    verdict = "supported" if min(ratios.values()) >= times * 2 / 3 else "refuted"
    return verdict, ", ".join(f"{ratio:.0f}x on {model}" for model, ratio in ratios.items()) + ", at rank 16"


def versus(found: dict[str, Any], method: str, other: str, of: str = "metric") -> tuple[str, str]:
    """Return whether a method has more of a measure than another, and its differences by task.

    Args:
        found: the reports.
        method, other: the methods.
        of: "metric", the better the larger, or "gap", how much better it is on training data than on the test.
    """
    tests, said = _tests(found, method, other, of)
    corrected = iter(holm([test.p for _, test in tests if test.p is not None]))
    ahead = behind = 0
    for task, test in tests:
        sure = test.p is not None and next(corrected) < LEVEL
        ahead += sure and test.mean > 0
        behind += sure and test.mean < 0
        said[task] += "*" * sure
    verdict = "undecided" if bool(ahead) == bool(behind) else "supported" if ahead else "refuted"
    return verdict, "; ".join(said.values())


def no_worse(found: dict[str, Any], method: str, other: str) -> tuple[str, str]:
    """Return whether a method is worse than another by no more than the margin, and its differences by task."""
    tests, said = _tests(found, method, other, "metric")
    ends = [(test.low, test.high) for _, test in tests if test.low is not None and test.high is not None]
    if any(high < -MARGIN for _, high in ends):
        verdict = "refuted"
    else:
        able = bool(ends) and len(ends) == len(tests)
        verdict = "supported" if able and all(low > -MARGIN for low, _ in ends) else "undecided"
    return verdict, "; ".join(said.values())


def _tests(
    found: dict[str, Any], method: str, other: str, of: str
) -> tuple[list[tuple[str, Difference]], dict[str, str]]:
    """Return the differences on the tasks that count, and what is said of every task."""
    tests, said = [], {}
    for task, report in found.items():
        test = difference(report, method, other, of)
        if test is None:
            continue
        percent = report["percent"] and not (of == "gap" and report["gap_of"] == "loss")
        scale, unit = (100, " points") if percent else (1, "")
        interval = "" if test.low is None else f" ({scale * test.low:+.2g} to {scale * test.high:+.2g})"
        why = why_not(report)
        fallen = [name for name in (method, other) if apart(report, name)]
        if why is None and not fallen:
            tests.append((task, test))
        reason = f"not counted: {why or f'{fallen[0]} fell apart'}, " if why or fallen else ""
        said[task] = f"{task} {reason}{scale * test.mean:+.2g}{unit}{interval}"
    return tests, said


def addition() -> tuple[str, str]:
    """Return what the sum of two adapters does, from the evidence of examples/transformer2."""
    path = ROOT / "examples/transformer2/results/svf.json"
    if not path.is_file():
        return "undecided", "examples/transformer2 has not been run"
    mixing = json.loads(path.read_text(encoding="utf-8"))["mixing"]
    said, kept = [], {}
    for name, cell in mixing.items():
        pair, _, task = name.partition(" on ")
        by = {tuple(weights): accuracy for weights, accuracy in zip(cell["weights"], cell["accuracy"], strict=True)}
        alone = by[1.0, 0.0] if pair.partition("+")[0] == task else by[0.0, 1.0]
        together = by[1.0, 1.0]
        kept.setdefault(pair, []).append(together >= alone - 0.05)
        said.append(f"{pair} on {task} {together:.0%} ({task} alone {alone:.0%})")
    pairs = [all(skills) for skills in kept.values()]
    return "supported" if all(pairs) else "undecided" if any(pairs) else "refuted", "; ".join(said)


def spectrum() -> tuple[str, str]:
    """Return the share of singular values from 0.1 to 1.1, from benchmarks/spectrum.py."""
    files = sorted((HERE.parent / "results").glob("spectrum.*.json"))  # the same to these digits on every processor
    models = json.loads(files[0].read_text(encoding="utf-8"))["models"]
    said = [
        f"{name}: {about['answer'][0].partition(';')[0].partition(' of the ')[0]}" for name, about in models.items()
    ]
    return "undecided", f"{'; '.join(said)} (the claim's Gemma-2 9B was not measured)"


def claims(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return each claim, the verdict, and the numbers."""

    def compared(claim: str, method: str, other: str, said: str, of: str = "metric") -> tuple[str, str, str]:
        verdict, numbers = versus(found, method, other, of)
        return claim, verdict, f"{said}: {numbers}"

    def equivalent(claim: str, method: str, other: str, said: str) -> tuple[str, str, str]:
        verdict, numbers = no_worse(found, method, other)
        return claim, verdict, f"{said}: {numbers}"

    return [
        ("SVF needs about ten times fewer parameters than LoRA", *fewer(found, SVF, LORA, 10)),
        equivalent("... and is no worse for it", SVF, LORA, "SVF - LoRA"),
        ("Two SVF adapters combine by addition", *addition()),
        compared("More trained values than the diagonal help (SVFT)", SVFT, SVF, "banded SVFT - SVF"),
        compared("The top is better to train (PiSSA) than the bottom (MiLoRA)", PISSA, MILORA, "PiSSA - MiLoRA"),
        ("LoRA-XS needs far fewer parameters, at least ten times", *fewer(found, XS, LORA, 10)),
        equivalent("... and is no worse for it", XS, LORA, "LoRA-XS - LoRA"),
        ("99% of singular values lie from 0.1 to 1.1", *spectrum()),
        compared("Full fine-tuning overfits more than LoRA", FULL, LORA, "gap of full - gap of LoRA", "gap"),
        compared("Low rank may score higher than full", LORA, FULL, "LoRA - full"),
    ]


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw each task's metric over trained parameters, with intervals."""
    from matplotlib.figure import Figure

    across = min(3, len(found))
    down = -(-len(found) // across)
    figure = Figure(figsize=(4 * across, 3.6 * down + 0.8), dpi=130, layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for unused in panels[len(found) :]:
        unused.set_axis_off()
    panels = panels[: len(found)]
    methods = list(dict.fromkeys(r["method"] for report in found.values() for r in report["methods"]))
    for axes, (task, report) in zip(panels, found.items(), strict=True):
        scale = 100 if report["percent"] else 1
        for i, method in enumerate(methods):
            each = row(report, method)
            if each is None or not each["trainable_parameters"]:
                continue
            value = each["metric"]
            spread = 0 if value["low"] is None else scale * (value["high"] - value["mean"])
            style = {"color": f"C{i % 10}", "marker": "osD^vP"[i // 10 + i % 3], "markersize": 5, "capsize": 2}
            axes.errorbar(each["trainable_parameters"], scale * value["mean"], spread, label=each["label"], **style)
        axes.set_xscale("log")
        axes.set_title(f"{task}\n{report['model']}", fontsize=9)
        better = "more" if report["greater_is_better"] else "less"
        unit = ", %" if report["percent"] else ""
        axes.set_ylabel(f"{report['metric'].replace('_', ' ')}{unit} ({better} is better)", fontsize=8)
        axes.set_xlabel("trained parameters", fontsize=8)
        axes.grid(alpha=0.3)
    handles = {label: h for axes in panels for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=2 * across, fontsize=8, frameon=False
    )
    figure.savefig(path)


def main() -> None:
    """Write the table and the picture."""
    found = reports()
    lines = ["| claim | here | numbers |", "|---|---|---|"]
    lines += [f"| {' | '.join(cells)} |" for cells in claims(found)]
    note = (
        "beyond chance at 0.05 after Holm's correction over the tasks that count; above zero is better, for losses "
        f"too; no worse is by less than {100 * MARGIN:g} points ({MARGIN:g} of a loss)"
    )
    text = "\n".join(lines) + f"\n\n\\* {note}\n"
    (HERE / "results/claims.md").write_text(text, encoding="utf-8")
    plot(found, HERE / "results/study.png")
    shown = f"{setting(found)}\n\n![{ALT}](../benchmarks/study/results/study.png)\n\n{text}"
    put(ROOT / "docs/study.md", "study", shown)
    put(ROOT / "README.md", "study", f"{verdicts(claims(found))}{ended(found)}\n")
    print(text)


def verdicts(found: list[tuple[str, str, str]]) -> str:
    """Return five lines: which claims hold here, which do not, and what is open."""
    by: dict[str, list[str]] = {"supported": [], "refuted": [], "undecided": []}
    subject = ""
    for claim, verdict, _ in found:
        if not claim.startswith("..."):
            subject = claim.split()[0]
        by[verdict].append(claim.replace("... and is", f"{subject} is"))
    counts = f"Of {len(found)} claims of the article {len(by['supported'])} hold here"
    return "\n".join(
        [
            f"- {counts}, {len(by['refuted'])} do not, and {len(by['undecided'])} are open.",
            *(f"- **{verdict}**: {'; '.join(named) or 'none'}." for verdict, named in by.items()),
            "- Models are small and most runs short: [the tables](docs/study.md) say how sure each verdict is, and "
            "which tasks do not count.",
        ]
    )


def ends_by_loss(report: Any) -> bool:
    """Whether the runs of a report end where their loss stops falling, and not after some number of steps."""
    return "until: plateau" in report.get("config", "")


def ended(found: dict[str, Any]) -> str:
    """Return a line for each task whose runs end by their loss: what each method comes to."""
    text = ""
    for task, report in found.items():
        if ends_by_loss(report):
            scale, unit = (100, "%") if report["percent"] else (1, "")
            each = (
                f"{row['label']} {scale * row['metric']['mean']:.3g}{unit}" for row in report["methods"] if row["ran"]
            )
            text += f"\n- Where runs end when their loss stops falling ({task}): {', '.join(each)}."
    return text


def setting(found: dict[str, Any]) -> str:
    """Return sentences on what was run, where and when."""
    said = []
    for task, report in found.items():
        seeds, records = len(report["seeds"]), report["split"]["test"]
        steps = f"{report['steps']} steps"
        if "runs" in report:
            how = f"every rate of its grid, {report['runs']} runs"
        else:
            if ends_by_loss(report):
                steps = f"at most {steps}, until the held-out loss stops falling,"
            how = "rates by a race"
        said.append(
            f"**{task}** ({report['model']}, {len(report['methods'])} methods, {seeds} seeds, {steps} of "
            f"{report['batch_size']}, {records} test records; {how})"
        )
    ran = [report for report in found.values() if "machine" in report]
    about = max(ran, key=lambda report: report["date"])
    processor = f"{about['machine']['processor']}, {about['machine']['cores']} cores"
    return (
        "The study (`python benchmarks/study/run.py`; reports in "
        "[benchmarks/study/results](../benchmarks/study/results)) has the tasks that a rule on the base alone takes "
        "([tasks.py](../benchmarks/study/tasks.py)): the base is neither at its ceiling there nor unable. It ran on "
        f"{processor}, torch {about['versions']['torch']}, {about['date']}: {'; '.join(said)}. Runs of a fixed number "
        "of steps say which method learns much from few of them, and those that end by their loss which is best in "
        "the end."
    )


if __name__ == "__main__":
    main()
