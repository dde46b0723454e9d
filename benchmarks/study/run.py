"""The study: every method on three tasks of an encoder and two of a decoder, and what it says of the article's claims.

    python benchmarks/study/run.py                        everything that has no result yet, and the reports
    python benchmarks/study/run.py film-reviews           one task
    python benchmarks/study/run.py film-reviews seeds=1   with other settings, in a folder of their own

Trials are kept in runs/study, so that a stopped study goes on; reports go to benchmarks/study/results.  At the end
claims.py writes what the reports say of the claims, here and in README.md, and docs/figures.py the methods' pages.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import reasoning_gym

from spectune.bases import sources
from spectune.compare.config import CompareConfig
from spectune.compare.presets import film_reviews, question_types, write_records
from spectune.training.config import load_config

HERE = Path(__file__).parent
RUNS = Path("runs/study")
METHODS = [
    *("base", "full", "lora:rank=16", "svf", "svft:pattern=banded,width=8", "pissa:rank=16", "milora:rank=16"),
    *("lora_xs:rank=16", "dora:rank=16", "dora:inner=pissa,rank=16", "dora:inner=svf", "adalora:rank=16"),
]
ENCODER: dict[str, Any] = {
    "model": "minilm-l6",
    "task": "classify",
    "batch_size": 16,
    "max_steps": 48,
    "max_length": 64,
    "seeds": 5,
    "lrs": 3,
    "validation": 0.1,
    "test": 0.25,
    "dtype": "bf16",
}
DECODER: dict[str, Any] = {
    "model": "smollm2-135m",
    "batch_size": 8,
    "max_steps": 40,
    "max_length": 128,
    "seeds": 3,
    "lrs": 3,
    "validation": 0.08,
    "test": 0.15,
    "dtype": "bf16",
}


def spam() -> list[dict[str, str]]:
    """Return messages, each once and as many of one kind as of the other: of 48 steps most would go by at 87% ham."""
    rows = {text.strip(): "spam" if spam else "ham" for text, spam in sources.messages() if text.strip()}
    records = [{"text": text, "label": label} for text, label in rows.items()]
    halves = [_some([record for record in records if record["label"] == label], 500) for label in ("ham", "spam")]
    return _some(halves[0] + halves[1], 1000)


def sums() -> list[dict[str, Any]]:
    """Return sums and differences of numbers of one and two digits, such as "48 - 13 =", and their results."""
    drawn = reasoning_gym.create_dataset("chain_sum", size=4000, seed=5, min_terms=2, max_terms=2, max_digits=2)
    rows = {entry["question"].rpartition(": ")[2]: entry["answer"] for entry in drawn}
    return [_answered(question, answer) for question, answer in list(rows.items())[:1000]]


def dialogue() -> list[dict[str, Any]]:
    """Return pairs of lines of film dialogue."""
    pairs = [(line.strip(), reply.strip()) for line, reply in sources.dialogue()]
    kept = {a: b for a, b in pairs if 4 <= len(a.split()) <= 25 and 4 <= len(b.split()) <= 25}
    return _some([_answered(f"{a}\n", b) for a, b in kept.items()], 1000)


def _answered(prompt: str, answer: str) -> dict[str, Any]:
    return {"prompt": prompt, "completion": f" {answer}"}


def _some(records: list[Any], count: int) -> list[Any]:
    random.Random(0).shuffle(records)
    return records[:count]


TASKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "film-reviews": (lambda: film_reviews(1000), ENCODER),
    "question-types": (lambda: question_types(1000), ENCODER),
    "spam": (spam, {**ENCODER, "metric": "macro_f1"}),
    "sums": (sums, {**DECODER, "batch_size": 16, "metric": "exact_match"}),
    "dialogue": (dialogue, {**DECODER, "metric": "loss"}),
}


def settings(name: str, given: list[str]) -> CompareConfig:
    """Return the comparison of a task, whose data is then there."""
    records, values = TASKS[name]
    folder = RUNS / "-".join([name, *(pair.replace("=", "") for pair in given)])
    data = RUNS / "data" / f"{name}.jsonl"
    if not data.is_file():
        data.parent.mkdir(parents=True, exist_ok=True)
        write_records(data, records())
    fixed = {"data": str(data), "output": str(folder), "methods": METHODS, "baseline": "lora:rank=16"}
    return load_config(None, given, CompareConfig, **{**values, **fixed})


def main() -> None:
    """Run the tasks that are asked for, and copy their reports."""
    from spectune.compare.run import compare

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK or KEY=VALUE", help=", ".join(TASKS))
    given = parser.parse_args().tasks
    pairs = [text for text in given if "=" in text]
    for name in [text for text in given if "=" not in text] or list(TASKS):
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
