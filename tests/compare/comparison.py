"""Results of a comparison that never ran, drawn so that they look like one that did."""

import numpy as np

# method: accuracy, parameters, step seconds, peak bytes, lr
METHODS = {
    "base": (0.612, 0, None, 180e6, None),
    "full": (0.871, 22_713_984, 0.31, 520e6, 5e-5),
    "lora": (0.868, 663_552, 0.148, 231e6, 1e-3),
    "svf": (0.864, 13_824, 0.121, 214e6, 3.2e-2),
    "svft": (0.861, 14_592, 0.139, 243e6, 3.2e-2),
    "svft:pattern=banded,width=8": (0.874, 234_144, 0.163, 247e6, 1e-2),
    "pissa": (0.882, 663_552, 0.151, 233e6, 3.2e-4),
    "milora": (0.858, 663_552, 0.150, 233e6, 1e-3),
    "lora_xs": (0.843, 18_432, 0.133, 224e6, 1e-2),
    "dora": (0.870, 677_376, 0.176, 262e6, 1e-3),
    "dora:inner=pissa": (0.879, 677_376, 0.181, 264e6, 3.2e-4),
    "adalora": (0.851, 995_616, 0.204, 239e6, 3.2e-3),
}
RECORDS, STEPS = 400, 120
# that a report writes
FILES = ["report.html", "report.json", "report.csv", "runs.csv", "pareto.png", "pareto.svg", "curves.png", "curves.svg"]


def final(method, seed, rng, accuracy, spread=0.003):
    """Return one run that counts."""
    _, parameters, step, peak, lr = METHODS.get(method, METHODS["lora"])
    right = np.zeros(RECORDS, int)
    right[: round(RECORDS * float(accuracy + spread * rng.standard_normal()))] = 1
    right = np.random.default_rng(7).permutation(right)  # the same records are hard for all
    flips = rng.choice(RECORDS, 10, replace=False)
    right[flips[:5]], right[flips[5:]] = right[flips[5:]].copy(), right[flips[:5]].copy()
    value = float(right.mean())
    loss = 1.2 - value + 0.004 * float(rng.standard_normal())
    history = [{"step": s, "loss": 0.9 * 0.985**s + 0.3, "learning_rate": 1e-3} for s in range(1, STEPS + 1, 10)]
    history += [
        {"step": s, "eval_loss": loss + 0.5 * 0.96**s, "eval_accuracy": value - 0.25 * 0.96**s}
        for s in (30, 60, 90, 120)
    ]
    if method == "base":
        step, history = None, [{"step": 0, "eval_loss": loss, "eval_accuracy": value}]
    return {
        "kind": "final", "method": method, "lr": lr, "seed": seed, "steps": STEPS if step else 0,
        "validation": {"loss": loss, "accuracy": value - 0.005},
        "test": {"loss": loss, "accuracy": value, "macro_f1": value - 0.01},
        "train": {"loss": loss - 0.1, "accuracy": value + 0.06, "macro_f1": value + 0.05},
        "right": right.tolist(),
        "general": {"name": "drift of hidden states", "before": 0.0, "after": 0.05 + parameters / 3e8},
        "trainable_parameters": parameters, "adapter_bytes": 4 * parameters + 9_000,
        "setup_seconds": 0.2 if method in ("lora", "base") else 2.4,
        "train_seconds": STEPS * (step or 0.0), "step_seconds": step, "floor_seconds": 0.11, "peak_bytes": peak,
        "tokens_per_second": 900 / step if step else None, "history": history, "pruned": False, "error": None,
    }  # fmt: skip


def search(method, place, rng, count=5):
    """Return the run at one of the learning rates tried; `place` counts from the one that is best."""
    accuracy, *_, lr = METHODS.get(method, METHODS["lora"])
    pruned = abs(place) > 1
    value = accuracy - 0.02 * place**2 + 0.003 * float(rng.standard_normal())
    return {
        "kind": "search", "method": method, "lr": float(f"{lr * 10 ** (place / 2):.2g}"), "seed": 3,
        "steps": 60 if pruned else STEPS, "validation": {"loss": 1.2 - value, "accuracy": value}, "test": None,
        "train": None, "right": None, "general": None, "setup_seconds": 0.3, "train_seconds": 9.0,
        "history": [], "pruned": pruned, "error": None,
    }  # fmt: skip


def failed(method, kind="final", seed=0, error="the loss is not finite at step 17; a lower lr may help"):
    """Return a run that came to nothing."""
    return {"kind": kind, "method": method, "lr": 0.1, "seed": seed, "steps": 17, "error": error}


HEADER = {
    "label": "minilm-l6 on movie sentiment", "model": "minilm-l6", "data": "movies.jsonl", "task": "classify",
    "metric": "accuracy", "greater_is_better": True, "baseline": "lora", "seeds": [0, 1, 2], "steps": STEPS,
    "batch_size": 16, "split": {"train": 800, "validation": 200, "test": RECORDS}, "budget": None,
    "general": "python-docs",
    "machine": {"processor": "Some CPU", "cores": 2, "threads": 2, "memory_gib": 15.6, "accelerator": None,
                "system": "Linux x86_64"},
    "versions": {"python": "3.11.2", "spectune": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    "date": "2026-11-25",
    "config": "model: minilm-l6\ndata: movies.jsonl\ntask: classify\nbatch_size: 16\nmax_length: 64\n"
              "targets: [query, value]\nmethods: [base, full, lora]\nseeds: 3\n",
    "command": "spectune compare compare.yaml",
    "notes": ["svft:pattern=top_k is left out: it cannot be made as small as 100k parameters"],
}  # fmt: skip


def results(seeds=(0, 1, 2), methods=tuple(METHODS), seed=0, **accuracies):
    """Return the finals and searches of a comparison; the highest rate of svf is its best, at an edge."""
    rng = np.random.default_rng(seed)
    finals = [
        final(m, s, rng, accuracies.get(m, METHODS.get(m, METHODS["lora"])[0]), 0.0 if m == "base" else 0.003)
        for m in methods
        for s in seeds
    ]
    searches = []
    for method in methods:
        if method != "base":
            places = range(-4, 1) if method == "svf" else range(-2, 3)
            searches += [search(method, place, rng) for place in places]
    return finals, searches


def whole():
    """Return twelve methods at three seeds, another that failed, and learning rates dropped and diverged."""
    finals, searches = results()
    searches.append(failed("pissa", "search", 3))
    return HEADER, [*finals, failed("vera")], searches
