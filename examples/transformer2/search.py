"""The cross-entropy method against gradient steps: the same shots, library and task, quality and time.

    python examples/transformer2/search.py runs/transformer2/svf

Takes the folder that evidence.py left.  For each task and each kind of grouping both searches start from the uniform
mixture; what they found is judged by the log-likelihood of held-out answers, which neither has seen.  With one thread
(OMP_NUM_THREADS=1) seconds are the processor's.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from evidence import kept, say
from tasks import TASKS, records

import spectune
from spectune import FewShot, Library
from spectune.planning.probe import clock
from spectune.storage import write_atomically
from spectune.transformer2.pool import Pool
from spectune.transformer2.shots import as_shot, population_likelihood

SEARCHES: dict[str, dict[str, Any]] = {
    "cem": {"search": "cem"},
    "gradient": {"search": "gradient", "lr": 0.1},
}


def compare(pool: Pool, tokenizer: Any, options: dict[str, Any], shots: list[Any], held: list[Any]) -> dict[str, Any]:
    """Run one search and return what it found, and the held-out log-likelihood a token under it."""
    start = clock()
    found = FewShot(records(shots), **options).find(pool, tokenizer)
    seconds = clock() - start
    judged = population_likelihood(pool, [found.mixture()], [as_shot(r, tokenizer) for r in records(held)])
    summary = found.summary()
    rest = {k: v for k, v in summary.items() if k != "weights"}
    return {**rest, "seconds": seconds, "held_out": float(judged[0])}


def main() -> None:
    """Compare, task by task, keeping what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where evidence.py left its library and data")
    parser.add_argument("--tasks", nargs="+", default=["longer-sums", "products"], choices=list(TASKS))
    parser.add_argument("--by", nargs="+", default=["global", "layer", "projection"])
    parser.add_argument("--shots", type=int, default=10)
    parser.add_argument("--held", type=int, default=64)
    parser.add_argument("--population", type=int, default=32)
    parser.add_argument("--elites", type=int, default=6)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--gradient-steps", type=int, default=20)
    parser.add_argument("--dtype", default="bf16")
    given = parser.parse_args()
    model, tokenizer = spectune.load_base("smollm2-135m", given.dtype)
    pool = Pool(model, Library.open(given.folder / "library"))
    torch.manual_seed(0)
    rows = []
    for task in given.tasks:
        pairs = json.loads((given.folder / "data" / f"{task}.json").read_text(encoding="utf-8"))
        shots, held = pairs[: given.shots], pairs[given.shots : given.shots + given.held]
        start: dict[str, float] = {n: 1 / len(pool.library) for n in pool.library.names}
        judged = [as_shot(record, tokenizer) for record in records(held)]
        at_start = float(population_likelihood(pool, [start], judged)[0])
        for by in given.by:
            for name, options in SEARCHES.items():
                chosen = {**options, "by": by, "population": given.population, "elites": given.elites}
                chosen["iterations"] = given.generations if name == "cem" else given.gradient_steps
                path = given.folder / "search" / f"{task}.{by}.{name}.json"
                result = kept(path, partial(compare, pool, tokenizer, chosen, shots, held))
                rows.append({"task": task, "by": by, "search": name, "uniform_held_out": at_start, **result})
                say(f"{task} by {by}, {name}: {result['score']:.3f} on shots, {result['held_out']:.3f} held out")
    text = json.dumps(rows, indent=1) + "\n"
    write_atomically(given.folder / "search.json", lambda path: path.write_text(text, encoding="utf-8"))
    print("| task | by | search | shots | held out (uniform) | evaluations | seconds |\n|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['task']} | {row['by']} | {row['search']} | {row['score']:.3f} | {row['held_out']:.3f} "
            f"({row['uniform_held_out']:.3f}) | {row['evaluations']} | {row['seconds']:.0f} |"
        )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
