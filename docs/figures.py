"""Fill in what docs/methods says in numbers: options from the code, figures from benchmarks/results.

Between `<!-- options -->`, `<!-- figures -->` or `<!-- study -->` and its `<!-- end -->` everything is written anew.

    python docs/figures.py
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import spectune
from spectune.methods import METHODS, Method, parse, to_text
from spectune.pages.units import gigabytes

DOCS = Path(__file__).parent
BENCHMARKS = DOCS.parent / "benchmarks"
MODEL = "smollm2-135m"


def options(method: type[Method]) -> str:
    """Return the table of a method's fields, their defaults, and what its docstring says of them."""
    arguments = inspect.cleandoc(method.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    said = {m[1]: " ".join(m[2].split()) for m in re.finditer(r"^    (\w+): (.*(?:\n     .*)*)", arguments, re.M)}
    lines = ["| option | default | is |", "|---|---|---|"]
    for field in dataclasses.fields(method):
        value = getattr(method(), field.name)
        shown = to_text(value) if isinstance(value, Method) else value
        lines.append(f"| `{field.name}` | `{shown}` | {said.get(field.name, '')} |")
    return "\n".join(lines)


def results() -> tuple[Callable[[str], Any], Callable[..., str]]:
    """Return what reads benchmarks' results by processor, and what writes the worst and the best of them."""
    sys.path.insert(0, str(BENCHMARKS))
    from _machine import saved, spread

    return saved, spread


def timed() -> dict[str, str]:
    """Return the methods that benchmarks/train_step.py runs, by the name that its results have."""
    sys.path.insert(0, str(BENCHMARKS))
    from train_step import OURS

    return OURS


def figures(method: type[Method]) -> str:
    """Return the measured figures of a method's variants on the embedded decoder."""
    saved, spread = results()
    step, start = saved("train_step"), saved("plan")
    steps = {to_text(parse(text)): name for name, text in timed().items() if parse(text).name == method.name}
    started: dict[str, dict[str, float]] = {}
    for where, run in start.items():
        for text, row in run["results"].get(f"setup {MODEL} fp32", {}).items():
            if parse(text).name == method.name:
                started.setdefault(to_text(parse(text)), {})[where] = row["measured"]
    lines = ["| | trained | adapter file | start-up | step, fp32 | step, bf16 |", "|---|---|---|---|---|---|"]
    for text in dict.fromkeys([method.name, *steps, *started]):
        (row,) = spectune.plan(MODEL, [text], measured=False, precisions=["fp32"], batch_size=1, length=8).rows
        cells = [f"`{text}`", f"{row['trainable_parameters']:,}", gigabytes(row["adapter_bytes"])]
        cells.append(spread(started.get(text, {}), "{:.2g} s".format))
        for dtype in ("fp32", "bf16"):
            key = f"{steps.get(text)} {dtype}"
            at = {where: run["results"].get(key, {}).get("step_over_floor") for where, run in step.items()}
            cells.append(spread(at, "{:.2f}".format))
        lines.append(f"| {' | '.join(cells)} |")
    about = [
        f"SmolLM2-135M, all {row['layers']} linear layers but the output embedding. Trained values and the file are "
        "exact. Start-up: adapting, no decomposition cached (`benchmarks/plan.py`). Step: over the frozen model's "
        "forward and gradient to its embeddings (`benchmarks/train_step.py`)."
    ]
    for found, what in ((step, "step"), (start, "start-up")):
        for run in found.values():
            machine = run["machine"]
            threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
            about.append(f"{what.capitalize()} on {machine['processor']}, {threads}.")
    if len(step) > 1 or len(start) > 1:
        about.append("Two figures are the worst and the best of the processors.")
    note = textwrap.fill(" ".join(about) + " Empty: not measured.", 120, break_on_hyphens=False)
    return "\n".join([*lines, "", note])


def study(method: type[Method]) -> str:
    """Return what the study found of a method, for each of its tasks; nothing where there is no study yet."""
    lines = []
    sys.path.insert(0, str(BENCHMARKS / "study"))
    from claims import reports

    for report in reports().values():
        for entry in report["methods"]:
            if not entry["ran"] or entry["method"] in ("base", "full") or parse(entry["method"]).name != method.name:
                continue
            value, percent = entry["metric"], report["percent"]
            measure = f"{report['metric'].replace('_', ' ')}{', %' if percent else ''}"
            numbers = [v and 100 * v if percent else v for v in (value["mean"], value["low"], value["high"])]
            spread = "" if numbers[1] is None else f" ({numbers[1]:.3g} to {numbers[2]:.3g})"
            lr = f"{entry['lr']:g}"
            cells = [report["label"], f"`{entry['method']}`", lr, measure, f"{numbers[0]:.3g}{spread}"]
            lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        return ""
    return "\n".join(["| task | method | lr | measure | mean (95% interval) |", "|---|---|---|---|---|", *lines])


def choice() -> str:
    """Return what the study found of all methods, on the tasks that count."""
    sys.path.insert(0, str(BENCHMARKS / "study"))
    from claims import apart, reports, why_not

    counted = [report for report in reports().values() if why_not(report) is None]
    rows: dict[str, dict[str, Any]] = {}
    for report in counted:
        for entry in report["methods"]:
            if entry["ran"] and entry["method"] != "base":
                rows.setdefault(entry["method"], {})[report["label"]] = (
                    entry,
                    report,
                    bool(apart(report, entry["method"])),
                )
    measures = [
        f"{r['label']}: {r['metric'].replace('_', ' ')}{', %' if r['percent'] else ', less is better'} (lr)"
        for r in counted
    ]
    lines = [f"| method | trained values | {' | '.join(measures)} |", f"|---|---|{'---|' * len(counted)}"]
    for method, found in sorted(rows.items(), key=lambda row: -_trained(row[1])):
        counts = dict.fromkeys(f"{n:,.0f}" for entry, _, _ in found.values() if (n := entry["trainable_parameters"]))
        values = " / ".join(counts)
        cells = [_measured(*found[report["label"]]) if report["label"] in found else "" for report in counted]
        lines.append(f"| `{method}` | {values} | {' | '.join(cells)} |")
    note = (
        "Trained values differ by the model, and by a task's labels. In brackets the learning rate. *fell apart*: at "
        "some seed."
    )
    return "\n".join([*lines, "", textwrap.fill(note, 120)])


def _trained(found: dict[str, Any]) -> float:
    return max(entry["trainable_parameters"] or 0 for entry, _, _ in found.values())


def _measured(entry: Any, report: Any, apart: bool) -> str:
    mean = entry["metric"]["mean"]
    shown = f"{100 * mean:.1f}" if report["percent"] else f"{mean:.3f}"
    return f"{shown} ({entry['lr']:g}){', *fell apart*' if apart else ''}"


def first_hour() -> str:
    """Return what came of ten data files with all defaults, where any of them has run."""
    saved, _ = results()
    lines = []
    for where, run in saved("first_hour").items():
        for name, file in run["files"].items():
            cells = [name, file["what"], file["model"], str(file["max_steps"])]
            if "refused" in file:
                lines.append(f"| {' | '.join(cells)} | {file['refused']} | {where} |")
                continue
            moved = (f"{key} {file['before'][key]:.3f} to {file['after'][key]:.3f}" for key in file["before"])
            lines.append(f"| {' | '.join(cells)} | {', '.join(moved)} | {where} |")
    head = ["| file | holds | model | steps | held out, base to adapter | machine |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *lines]) if lines else ""


def filled(text: str, method: type[Method]) -> str:
    """Return a page of a method with its marked places written anew."""
    for name, make in (("options", options), ("figures", figures), ("study", study)):
        text = put(text, name, make(method))
    return text


def put(text: str, name: str, made: str) -> str:
    """Return a text in which something stands at a marked place."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.S)
    return pattern.sub(lambda m: f"{m[1]}\n{made}\n\n{m[2]}" if made else f"{m[1]}{m[2]}", text)


def main() -> None:
    for name, method in METHODS.items():
        path = DOCS / "methods" / f"{name}.md"
        path.write_text(filled(path.read_text(encoding="utf-8"), method), encoding="utf-8")
    for name, mark, make in (("choosing.md", "choice", choice), ("training.md", "first hour", first_hour)):
        path = DOCS / name
        path.write_text(put(path.read_text(encoding="utf-8"), mark, make()), encoding="utf-8")


if __name__ == "__main__":
    main()
