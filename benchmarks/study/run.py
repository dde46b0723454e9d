"""The study: every method on the tasks that tasks.py takes, and what it says of the article's claims.

    python benchmarks/study/run.py                          every task, what has no result yet, and the reports
    python benchmarks/study/run.py film-reviews             one task
    python benchmarks/study/run.py film-reviews max_steps=9 with other settings, in a folder of their own

Trials are kept in runs/study, so that a stopped study goes on; reports go to benchmarks/study/results.  At the end
claims.py writes what the reports say of the claims, here and in README.md, and docs/figures.py the methods' pages.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tasks import CANDIDATES, RUNS, data_of, taken

from spectune.compare.config import CompareConfig
from spectune.training.config import load_config

HERE = Path(__file__).parent
METHODS = [
    *("base", "full", "lora:rank=16", "svf", "svft:pattern=banded,width=8", "pissa:rank=16", "milora:rank=16"),
    *("lora_xs:rank=16", "dora:rank=16", "adalora:rank=16"),
]
FEWER = METHODS[:-2]  # those of the claims, on a decoder, whose runs take minutes
FEWEST = [FEWER[i] for i in (0, 1, 2, 3, 7)]  # and on one whose runs go on until their loss stops falling


def settings(name: str, given: list[str]) -> CompareConfig:
    """Return the comparison of a task, whose data is then there."""
    folder = RUNS / "-".join([name, *(pair.replace("=", "") for pair in given)])
    keys = CANDIDATES[name][1]
    longer = FEWEST if keys.get("until") == "plateau" else FEWER
    methods = METHODS if keys.get("task") == "classify" else longer
    fixed = {"data": str(data_of(name)), "output": str(folder), "methods": methods, "baseline": "lora:rank=16"}
    return load_config(None, given, CompareConfig, **{**keys, **fixed})


def main() -> None:
    """Run the tasks that are asked for, and copy their reports."""
    from spectune.compare.run import compare

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK or KEY=VALUE", help=", ".join(taken()))
    given = parser.parse_args().tasks
    pairs = [text for text in given if "=" in text]
    for name in [text for text in given if "=" not in text] or taken():
        config = settings(name, pairs)
        document = compare(config, say)
        results = HERE / "results" / Path(config.output).name
        results.mkdir(parents=True, exist_ok=True)
        for path in Path(config.output).glob("report.*"):
            shutil.copy(path, results)
        for picture in ("pareto.png", "curves.png"):
            if (Path(config.output) / picture).is_file():
                shutil.copy(Path(config.output) / picture, results)
        print(json.dumps({"task": name, "answer": document.answer}, indent=1))
    for script in (HERE / "claims.py", HERE.parent.parent / "docs/figures.py"):
        subprocess.run([sys.executable, script], check=True)


def say(done: int, total: int, last: str) -> None:
    """Print progress with the time."""
    print(f"{time.strftime('%H:%M:%S')} {done}/{total} {last}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
