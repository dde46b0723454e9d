"""The article's claims against the study's results: a table and a picture, from results/*/report.json.

    python benchmarks/study/claims.py

Writes results/claims.md, results/study.png and the part of README.md that shows them.  A claim that one method is
better than another is tested on every task by the paired differences over seeds, corrected for the number of tasks
(Holm): supported where some task shows it and none the opposite, refuted the other way round, mixed with both,
undecided with neither.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spectune.compare.statistics import holm, paired_difference

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SVF, SVFT, LORA, XS = "svf", "svft:pattern=banded", "lora:rank=16", "lora_xs:rank=16"
PISSA, MILORA, FULL = "pissa:rank=16", "milora:rank=16", "full"
LEVEL = 0.05
ALT = "The metric of each task over the number of trained parameters, method by method, with 95% intervals"


def reports() -> dict[str, Any]:
    """Return the report of each task that has one."""
    paths = sorted((HERE / "results").glob("*/report.json"))
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def row(report: Any, method: str) -> Any:
    """Return a method's row, or None where it did not run."""
    return next((row for row in report["methods"] if row["method"] == method and row["ran"]), None)


def ratio(found: dict[str, Any], method: str, other: str) -> str:
    """Return how many times fewer parameters a method trains, by model, new heads included."""
    said = {}
    for report in found.values():
        pair = [row(report, name) for name in (other, method)]
        if all(pair):
            counts = [each["trainable_parameters"] for each in pair]
            said.setdefault(report["model"], f"{counts[0] / counts[1]:.0f}x on {report['model']}")
    return ", ".join(said.values())


def versus(found: dict[str, Any], method: str, other: str) -> tuple[str, str]:
    """Return whether a method is better than another, and its differences by task (the better the larger)."""
    tests = []
    for task, report in found.items():
        pair = [row(report, name) for name in (method, other)]
        if not all(pair) or not pair[0]["metric"]["values"]:
            continue
        sign = 1 if report["greater_is_better"] else -1
        values = [[sign * value for value in each["metric"]["values"]] for each in pair]
        if len(values[0]) != len(values[1]):
            continue
        tests.append((task, report, paired_difference(*values)))
    corrected = iter(holm([test.p for _, _, test in tests if test.p is not None]))
    ahead = behind = 0
    said = []
    for task, report, test in tests:
        sure = test.p is not None and next(corrected) < LEVEL
        ahead += sure and test.mean > 0
        behind += sure and test.mean < 0
        scale, unit = (100, " points") if report["percent"] else (1, "")
        interval = "" if test.low is None else f" ({scale * test.low:+.2g} to {scale * test.high:+.2g})"
        said.append(f"{task} {scale * test.mean:+.2g}{unit}{interval}{'*' if sure else ''}")
    verdict = "mixed" if ahead and behind else "supported" if ahead else "refuted" if behind else "undecided"
    return verdict, "; ".join(said)


def overfits(found: dict[str, Any]) -> str:
    """Return the gaps between training and test of full fine-tuning and LoRA."""
    said = []
    for task, report in found.items():
        pair = [row(report, name) for name in (FULL, LORA)]
        if all(pair) and all(each["gap"] for each in pair):
            scale, unit = (100, " points") if report["gap_of"] != "loss" else (1, "")
            gaps = [f"{scale * each['gap']['mean']:.2g}" for each in pair]
            said.append(f"{task} {gaps[0]} against {gaps[1]}{unit}")
    return "; ".join(said)


def addition() -> tuple[str, str]:
    """Return what the sum of two adapters does, from the evidence of examples/transformer2."""
    path = ROOT / "examples/transformer2/results/svf.json"
    if not path.is_file():
        return "undecided", "examples/transformer2 has not been run"
    mixing = json.loads(path.read_text(encoding="utf-8"))["mixing"]
    said, kept = [], []
    for name, cell in mixing.items():
        pair, _, task = name.partition(" on ")
        by = {tuple(weights): accuracy for weights, accuracy in zip(cell["weights"], cell["accuracy"], strict=True)}
        alone = by[1.0, 0.0] if pair.partition("+")[0] == task else by[0.0, 1.0]
        together = by[1.0, 1.0]
        kept.append(together >= alone - 0.05)
        said.append(f"{pair} on {task} {together:.0%} ({task} alone {alone:.0%})")
    verdict = "supported" if all(kept) else "mixed" if any(kept) else "refuted"
    return verdict, "; ".join(said)


def spectrum() -> tuple[str, str]:
    """Return the share of singular values from 0.1 to 1.1, from benchmarks/spectrum.py."""
    models = json.loads((HERE.parent / "results/spectrum.json").read_text(encoding="utf-8"))["models"]
    said = [
        f"{name}: {about['answer'][0].partition(';')[0].partition(' of the ')[0]}" for name, about in models.items()
    ]
    return "not seen here (Gemma-2 9B was not measured)", "; ".join(said)


def claims(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return each claim, the verdict, and the numbers."""
    fewer, worse = ratio(found, SVF, LORA), versus(found, SVF, LORA)
    svft, pissa, full = (versus(found, *pair) for pair in ((SVFT, SVF), (PISSA, MILORA), (FULL, LORA)))
    lora_xs = versus(found, XS, LORA)
    return [
        ("SVF needs about ten times fewer parameters than LoRA", "supported", f"{fewer}, at rank 16"),
        ("... and is no worse for it", _no_worse(worse[0]), f"SVF - LoRA: {worse[1]}"),
        ("Two SVF adapters combine by addition", *addition()),
        ("More trained values than the diagonal help (SVFT)", svft[0], f"banded SVFT - SVF: {svft[1]}"),
        ("PiSSA (top) or MiLoRA (bottom)?", _winner(pissa[0]), f"PiSSA - MiLoRA: {pissa[1]}"),
        ("LoRA-XS needs far fewer parameters", "supported", ratio(found, XS, LORA)),
        ("... and is no worse for it", _no_worse(lora_xs[0]), f"LoRA-XS - LoRA: {lora_xs[1]}"),
        ("99% of singular values lie from 0.1 to 1.1", *spectrum()),
        ("Full fine-tuning overfits", "see the gaps", f"training minus test, full against LoRA: {overfits(found)}"),
        ("Low rank may score higher than full", _low_rank(full[0]), f"full - LoRA: {full[1]}"),
    ]


def _no_worse(verdict: str) -> str:
    return {"supported": "supported (better)", "undecided": "no difference shown", "refuted": "refuted"}.get(
        verdict, verdict
    )


def _winner(verdict: str) -> str:
    return {"supported": "PiSSA", "refuted": "MiLoRA", "undecided": "no difference shown"}.get(verdict, verdict)


def _low_rank(verdict: str) -> str:
    return {"supported": "refuted", "refuted": "supported", "undecided": "no difference shown"}.get(verdict, verdict)


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw each task's metric over trained parameters, with intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(found), 3.8), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
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
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    figure.savefig(path)


def main() -> None:
    """Write the table and the picture."""
    found = reports()
    lines = ["| claim | here | numbers |", "|---|---|---|"]
    lines += [f"| {' | '.join(cells)} |" for cells in claims(found)]
    text = "\n".join(lines) + "\n\n\\* beyond chance at 0.05 after Holm's correction over the tasks\n"
    (HERE / "results/claims.md").write_text(text, encoding="utf-8")
    plot(found, HERE / "results/study.png")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    before, begin, rest = readme.partition("<!-- study -->\n")
    _, end, after = rest.partition("<!-- /study -->")
    shown = f"{setting(found)}\n\n![{ALT}](benchmarks/study/results/study.png)\n\n{text}"
    (ROOT / "README.md").write_text(before + begin + shown + end + after, encoding="utf-8")
    print(text)


def setting(found: dict[str, Any]) -> str:
    """Return sentences on what was run, where and when."""
    said = [
        f"{task} ({report['model']}, {len(report['methods'])} methods, {len(report['seeds'])} seeds, {report['steps']} "
        f"steps of {report['batch_size']}, {report['split']['test']} test records)"
        for task, report in found.items()
    ]
    about = next(iter(found.values()))
    processor = f"{about['machine']['processor']}, {about['machine']['cores']} cores"
    return (
        "The study (`python benchmarks/study/run.py`; reports in [benchmarks/study/results](benchmarks/study/results)) "
        f"ran on {processor}, torch {about['versions']['torch']}, {about['date']}: {'; '.join(said)}. A learning rate "
        "was searched for each method. The runs are short: they say which method learns much from few steps, not which "
        "is best in the end."
    )


if __name__ == "__main__":
    main()
