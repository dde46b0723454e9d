"""What each method comes to at each rate of the grid, and how wide the range of good rates is: for docs/study.md.

What the searches of the study's reports saw of rates goes beside it, for those whose runs end by their loss.

    python benchmarks/study/sensitivity.py

Means are over the seeds, of the test.  Methods whose grid is not whole yet are left out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from claims import ends_by_loss, written
from grid import GRID, PLANS, Plan, lines
from marked import put
from regret import Surface, metric_of, surfaces

from spectune.compare.config import LESS, SHARES
from spectune.compare.report.soundness import Width, width

PAGE = GRID.parents[2] / "docs" / "study.md"
_APART = 1 / 3  # of the best's gain: a seed that far below its rate's best has fallen apart


class Row(NamedTuple):
    """A method on a task.

    Args:
        means: by place, more is better.
        apart: places at which some seed fell apart.
        rates: by place.
        wide: the width of the good rates.
    """

    means: dict[int, float]
    apart: set[int]
    rates: dict[int, float]
    wide: Width | None


def row_of(surface: Surface, rates: dict[int, float], plan: Plan) -> Row:
    """Return what a whole grid of a method says."""
    share = metric_of(plan) not in LESS
    starts = [run.start for run in surface.runs.values() if np.isfinite(run.start)]
    gain = max(surface.truth.values()) - float(np.median(starts))
    apart = set()
    for place in surface.truth:
        own = [surface.tests[place, seed] for seed in range(surface.seeds)]
        if max(own) - min(own) > _APART * gain and min(own) < max(surface.truth.values()) - _APART * gain:
            apart.add(place)
    tried = [(rates[place], value) for (place, _), value in surface.tests.items()]
    return Row(surface.truth, apart, rates, width(tried, float(np.median(starts)), greater=True, share=share))


def table(task: str, plan: Plan) -> str:
    """Return the table of a task, or nothing where no method's grid is whole."""
    held = lines(GRID / f"{task}.jsonl")
    metric = metric_of(plan)
    percent = metric not in LESS
    found = {}
    for method, surface in surfaces(plan, held).items():
        rates = {line["place"]: line["lr"] for line in held if line["method"] == method}
        found[method] = row_of(surface, rates, plan)
    if not found:
        return ""
    places = sorted(plan.places)
    head = ["method", "its own rate", *(f"{10 ** (place / 4):.2g}" for place in places), "best rate", "octaves"]
    text = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for method, row in sorted(found.items(), key=lambda item: -max(item[1].means.values())):
        best = max(row.means, key=lambda place: row.means[place])
        values = {p: f"{100 * mean:.1f}" if percent else f"{-mean:.3f}" for p, mean in row.means.items()}
        values[best] = f"**{values[best]}**"
        shown = [f"{values[p]}{'*' * (p in row.apart)}" for p in places]
        octaves = "" if row.wide is None else f"{row.wide.octaves:.1f}{'+' * row.wide.open}"
        text.append(
            f"| `{method}` | {row.rates[0]:.2g} | " + " | ".join(shown) + f" | {row.rates[best]:.2g} | {octaves} |"
        )
    name = f"{metric}{', %' if percent else ', less is better'}"
    keys = plan.keys
    return (
        f"**{task}** ({keys['model']}, {keys['max_steps']} steps of {keys['batch_size']}, {plan.seeds} seeds): {name}, "
        "at the method's own rate times\n\n" + "\n".join(text)
    )


def searched(task: str, report: Any) -> str:
    """Return what the races of a report saw of each rate, as means over their runs on validation data."""
    share = report["searched_by"] in SHARES  # which the report's metric may be where this is a loss
    scale, digits = (100, 1) if share else (1, 3)
    text = ["| method | chosen | on validation data, by rate |", "|---|---|---|"]
    for row in report["methods"]:
        runs: dict[float, list[float]] = {}
        for trial in report["trials"]:
            if (trial["method"], trial["kind"]) == (row["method"], "search") and not (
                trial["pruned"] or trial["error"]
            ):
                runs.setdefault(trial["lr"], []).append(trial["validation"])
        if runs:
            seen = (f"{lr:.2g}: {scale * np.mean(values):.{digits}f}" for lr, values in sorted(runs.items()))
            text.append(f"| `{row['method']}` | {row['lr']:.2g} | {', '.join(seen)} |")
    name = f"{report['searched_by']}{', %' if share else ', less is better'}"
    return (
        f"**{task}** ({report['model']}, at most {report['steps']} steps of {report['batch_size']}, until the held-out "
        f"loss stops falling): {name}\n\n" + "\n".join(text)
    )


def main() -> None:
    """Print the tables, and put them on their page."""
    made = "\n\n".join(filter(None, (table(task, plan) for task, plan in PLANS.items())))
    print(made)
    put(PAGE, "sensitivity", f"{made}\n")
    ended = {task: report for task, report in written().items() if ends_by_loss(report)}
    put(PAGE, "plateau", "\n\n".join(searched(task, report) for task, report in ended.items()) + "\n")


if __name__ == "__main__":
    main()
