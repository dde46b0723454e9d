"""Each method at its own defaults and learning rate, end to end: question types on MiniLM, one run of each.

    python benchmarks/fidelity.py                 every method; results/fidelity.<processor>.json, docs/fidelity.md
    python benchmarks/fidelity.py adalora dora    these anew, beside the rows that are there

`head` is the classifier's new head alone, which every method trains as well: a method that stays at its level did
nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from _machine import path_of, save, saved, spread
from spectune.compare.presets import question_types, write_records
from spectune.methods import METHODS, parse
from spectune.training.config import TrainConfig
from spectune.training.run import train

PAGE = Path(__file__).parent.parent / "docs/fidelity.md"
VARIANTS = [
    *METHODS,
    *("svf:parametrization=sigmoid", "svft:pattern=banded", "svft:pattern=random", "svft:pattern=top_k"),
    *("svft:pattern=banded,gate=true", "dora:inner=pissa", "dora:inner=svf"),
    *("lora:dropout=0.1", "dora:dropout=0.1", "adalora:gamma=0", "adalora:penalty=sum_of_squares"),
]
STEPS, BATCH, RECORDS = 200, 16, 1000
HEAD = "head"


def run(method: str, data: Path, folder: Path) -> dict[str, Any]:
    """Train one method and return what came of it."""
    own: dict[str, Any] = {"method": method}
    if method == HEAD:  # an update of zero that does not move
        own = {"method": "lora_xs:rank=1", "group_lr": {"R": 1e-30}, "lr": 1e-3}
    config = TrainConfig(
        model="minilm-l6",
        task="classify",
        data=str(data),
        output=str(folder),
        max_steps=STEPS,
        batch_size=BATCH,
        max_length=64,
        held_out=1 / 3,
        dtype="fp32",
        save_steps=10**6,
        **own,
    )
    result = train(config, Console(quiet=True))
    norms = [line["grad_norm"] for line in result.history if "grad_norm" in line]
    trained = sum(
        v.numel() for layer in result.adapter.layers.values() for t in layer.terms for v in t.trained.values()
    )
    return {
        "lr": config.learning_rate(),
        "accuracy": result.after["accuracy"],
        "loss": result.after["loss"],
        "grad_norm": sum(norms) / len(norms) if norms else None,
        "trained": trained,
        "seconds": result.seconds,
    }


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Return the results, by processor, as the page has them: one row for a method, the worst and the best of it."""
    lines = ["| method | lr | accuracy, % | loss |", "|---|---|---|---|"]
    for name in [HEAD, *VARIANTS]:
        rows = {where: run["results"][name] for where, run in runs.items() if name in run["results"]}
        if rows:
            lr = spread({where: row["lr"] for where, row in rows.items()}, "{:.2g}".format)
            right = spread({where: 100 * row["accuracy"] for where, row in rows.items()}, "{:.1f}".format, max)
            loss = spread({where: row["loss"] for where, row in rows.items()}, "{:.3f}".format)
            lines.append(f"| `{name}` | {lr} | {right} | {loss} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for, and write results and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=[HEAD, *VARIANTS])
    chosen = parser.parse_args().methods
    path = path_of("fidelity")
    known = json.loads(path.read_text(encoding="utf-8"))["results"] if path.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "questions.jsonl"
        write_records(data, question_types(RECORDS))
        for i, method in enumerate(chosen):
            if method != HEAD:
                parse(method)
            known[method] = run(method, data, Path(folder) / str(i))
            print(method, known[method], flush=True)
            rows = {name: known[name] for name in [HEAD, *VARIANTS] if name in known}
            setting = {"steps": STEPS, "batch_size": BATCH, "records": RECORDS, "threads": 1}
            save("fidelity", {"setting": setting, "results": rows})
            if PAGE.is_file():
                before, begin, rest = PAGE.read_text(encoding="utf-8").partition("<!-- end to end -->\n")
                _, end, after = rest.partition("<!-- end -->")
                if end:
                    PAGE.write_text(f"{before}{begin}\n{table(saved('fidelity'))}\n\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
