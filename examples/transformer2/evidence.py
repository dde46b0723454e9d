"""Does choosing and mixing adapters work?  Four adapters on SmolLM2-135M, six tasks, every strategy, with intervals.

    python examples/transformer2/evidence.py                         SVF
    python examples/transformer2/evidence.py --method lora:rank=8    the same with another method
    python examples/transformer2/evidence.py --addition --method svft:pattern=banded,width=8     a + b alone
    python examples/transformer2/evidence.py --quick                 everything tiny, to see that it runs

Every adapter and every measured cell is kept in the output folder: run it again and it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from intervals import difference, wilson
from rich.console import Console
from tasks import TASKS, Parts, Task, parts, records

import spectune
from spectune import FewShot, Library, Transformer2
from spectune.adapters.folder import CONFIG
from spectune.bases.generation import generate
from spectune.storage import write_atomically
from spectune.training.config import load_config
from spectune.training.run import train_model
from spectune.transformer2.classifier import Classifier
from spectune.transformer2.pool import Pool
from spectune.transformer2.strategies import make_strategy
from spectune.transformer2.train_classifier import train_classifier

TRAINED = [name for name, task in TASKS.items() if task.steps]
BATCH = 32  # prompts answered at once
MIXES = [(1.0, 0.0), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0.0, 1.0), (0.75, 0.75), (1.0, 1.0)]  # of a and b
PAIRS = [("sums", "sentiment"), ("sums", "pirate")]


@dataclass
class Setting:
    """What is measured, and where it is kept."""

    out: Path
    method: str
    dtype: str
    held: int
    shots: int
    population: int
    elites: int
    iterations: int
    plot: int
    steps: float
    classifier: str


def say(text: str) -> None:
    """Print progress with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def kept(path: Path, make: Any) -> Any:
    """Return a JSON document from a file, made and written if it is not there."""
    if not path.exists():
        document = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document)
        write_atomically(path, lambda to: to.write_text(text, encoding="utf-8"))
    return json.loads(path.read_text(encoding="utf-8"))


def train(setting: Setting, task: Task, data: Parts, model: Any, tokenizer: Any) -> Path:
    """Train a task's adapter with spectune's trainer, unless it is there, and return its folder."""
    folder = setting.out / "adapters" / task.name
    if (folder / CONFIG).exists():
        return folder
    steps = max(2, round(task.steps * setting.steps))
    say(f"training {task.name}: {steps} steps of {task.batch}")
    values = {"model": "smollm2-135m", "data": task.name, "output": str(folder), "method": setting.method}
    values |= {"max_steps": steps, "batch_size": task.batch, "overwrite": "true", "save_steps": 1 << 20}
    config = load_config(None, [f"{key}={value}" for key, value in values.items()])
    start = time.perf_counter()
    result = train_model(config, model, tokenizer, records(data.train), [], Console(stderr=True))
    spectune.detach(model, "default")
    model.requires_grad_(False)
    say(f"trained {task.name} in {time.perf_counter() - start:.0f} s, {result.tokens_per_second:.0f} tokens/s")
    return folder


def build(setting: Setting, data: dict[str, Parts], model: Any, tokenizer: Any, names: Sequence[str]) -> Library:
    """Return the library of the trained adapters, with their training prompts."""
    library = Library(setting.out / "library")
    for name in names:
        folder = train(setting, TASKS[name], data[name], model, tokenizer)
        if name not in library:
            library.add(name, folder, TASKS[name].description, [prompt for prompt, _ in data[name].train])
    return library


def with_classifier(setting: Setting, library: Library, model: Any, tokenizer: Any) -> None:
    """Train the library's classifier, unless it is there."""
    if not (library.path / "classifier" / "classifier.json").exists():
        say("training the classifier")
        classifier = train_classifier(Pool(model, library), tokenizer, setting.classifier, console=Console(stderr=True))
        say(f"classifier on its own held-out prompts: {dict(classifier.report)}")


def measure(two: Transformer2, task: Task, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Answer held-out prompts and judge the replies."""
    right, labels, start = [], [], time.perf_counter()
    for i in range(0, len(pairs), BATCH):
        part = pairs[i : i + BATCH]
        answers = two.generate([prompt for prompt, _ in part], max_new_tokens=task.tokens)
        right += [task.right(a.text, answer) for a, (_, answer) in zip(answers, part, strict=True)]
        labels += [a.decision.label for a in answers]
    return {"right": right, "labels": labels, "seconds": time.perf_counter() - start}


def few_shot(setting: Setting, task: Task, data: Parts, two: Transformer2) -> dict[str, Any]:
    """Search for a mixture on the task's shots, and keep it as an adapter too."""
    search = FewShot(
        records(data.shots), population=setting.population, elites=setting.elites, iterations=setting.iterations
    )
    found = search.find(
        two.pool,
        two.tokenizer,
        lambda done, total, score: say(f"{task.name}: iteration {done}/{total}, log-likelihood {score:.4f}"),
    )
    if found.weights.any():
        found.adapter(two.library).save(setting.out / "mixes" / task.name)
    return found.summary()


def cells(setting: Setting, data: dict[str, Parts], two: Transformer2) -> dict[str, dict[str, Any]]:
    """Measure every task by every way to answer it."""
    fixed: dict[str, Any] = {"base": {}, **{name: {name: 1.0} for name in TRAINED}}
    fixed["uniform"] = dict.fromkeys(TRAINED, 1 / len(TRAINED))
    results: dict[str, dict[str, Any]] = {}
    for name, task in TASKS.items():
        found = kept(setting.out / "mixes" / f"{name}.json", partial(few_shot, setting, task, data[name], two))
        ways = {**fixed, "prompt": "prompt", "classifier": "classifier", "few-shot": found["weights"]["all"]}
        results[name] = {}
        for way, strategy in ways.items():
            path = setting.out / "cells" / f"{name}.{way}.json"
            if not path.exists():
                two.strategy = make_strategy(strategy, two.pool, two.tokenizer)
            cell = kept(path, partial(measure, two, task, data[name].held))
            results[name][way] = cell
            say(f"{name} by {way}: {sum(cell['right']) / len(cell['right']):.1%} ({cell['seconds']:.0f} s)")
    return results


def mixing(setting: Setting, data: dict[str, Parts], two: Transformer2) -> dict[str, Any]:
    """Measure two tasks under mixtures of their two adapters, all mixtures of a prompt in one batch."""
    curves = {}
    for a, b in PAIRS:
        for name in (a, b):
            pairs = data[name].held[: setting.plot]
            make = partial(_mixing_cell, two, TASKS[name], pairs, a, b)
            cell = kept(setting.out / "cells" / f"mixing.{a}.{b}.{name}.json", make)
            curves[f"{a}+{b} on {name}"] = cell
            say(f"{name} under {a} + {b}: " + " ".join(f"{sum(r) / len(r):.0%}" for r in cell["right"]))
    return curves


def _mixing_cell(two: Transformer2, task: Task, pairs: Sequence[tuple[str, str]], a: str, b: str) -> dict[str, Any]:
    right: list[list[bool]] = [[] for _ in MIXES]
    step = max(1, BATCH // len(MIXES))
    for i in range(0, len(pairs), step):
        part = pairs[i : i + step]
        prompts = [prompt for _ in MIXES for prompt, _ in part]
        with two.pool.route([{a: u, b: v} for u, v in MIXES for _ in part]):
            replies = generate(two.model, two.tokenizer, prompts, max_new_tokens=task.tokens)
        for k in range(len(MIXES)):
            own = replies[k * len(part) : (k + 1) * len(part)]
            right[k] += [task.right(reply.text, answer) for reply, (_, answer) in zip(own, part, strict=True)]
    return {"weights": MIXES, "right": right}


def plot(curves: dict[str, Any], setting: Setting) -> Path:
    """Draw accuracy over the mixing weights, the sum a + b apart."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PAIRS), figsize=(5.5 * len(PAIRS), 4), sharey=True, squeeze=False)
    for axis, (a, b) in zip(axes[0], PAIRS, strict=True):
        for name, colour in ((a, "tab:blue"), (b, "tab:orange")):
            cell = curves[f"{a}+{b} on {name}"]
            line = [(v, r) for (u, v), r in zip(MIXES, cell["right"], strict=True) if abs(u + v - 1) < 1e-9]
            line.sort(key=lambda point: point[0])
            share = [sum(r) / len(r) for _, r in line]
            low, high = zip(*(wilson(r) for _, r in line), strict=True)
            axis.plot([v for v, _ in line], share, "o-", color=colour, label=f"{name} under (1 - w) {a} + w {b}")
            axis.fill_between([v for v, _ in line], low, high, color=colour, alpha=0.15)
            together = cell["right"][MIXES.index((1.0, 1.0))]
            axis.axhline(sum(together) / len(together), color=colour, linestyle=":", label=f"{name} under {a} + {b}")
        axis.set(xlabel="w", title=f"{a} and {b}", ylim=(0, 1.02))
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("accuracy on held-out prompts")
    figure.suptitle(f"Adapters add: {setting.method} on SmolLM2-135M")
    figure.tight_layout()
    path = setting.out / "mixing.png"
    figure.savefig(path, dpi=130)
    return path


def summarize(setting: Setting, results: dict[str, dict[str, Any]], library: Library) -> dict[str, Any]:
    """Return accuracies with intervals, how often the right adapter was chosen, and the differences claimed."""
    summary: dict[str, Any] = {"method": setting.method, "prompts": setting.held, "tasks": {}}
    for name, ways in results.items():
        right = {way: cell["right"] for way, cell in ways.items()}
        hand = TASKS[name].hand
        single = max(TRAINED, key=lambda adapter: sum(right[adapter]))
        table = {way: {"accuracy": sum(r) / len(r), "interval": wilson(r)} for way, r in right.items()}
        chosen = {
            way: sum(label == hand for label in ways[way]["labels"]) / len(ways[way]["labels"])
            for way in ("prompt", "classifier")
        }
        summary["tasks"][name] = {
            "trained_on": name in TRAINED,
            "hand": hand,
            "best_single": single,
            "accuracy": table,
            "chose_as_by_hand": chosen,
            "prompt_minus_hand": difference(right["prompt"], right[hand]),
            "classifier_minus_hand": difference(right["classifier"], right[hand]),
            "few_shot_minus_best_single": difference(right["few-shot"], right[single]),
            "few_shot_weights": json.loads((setting.out / "mixes" / f"{name}.json").read_text(encoding="utf-8"))[
                "weights"
            ]["all"],
        }
    summary["classifier"] = dict(Classifier.load(library).report)
    return summary


def table(summary: dict[str, Any]) -> str:
    """Return the summary as a Markdown table and plain sentences."""
    ways = ["base", *TRAINED, "uniform", "prompt", "classifier", "few-shot"]
    lines = [f"| task | {' | '.join(ways)} |", "|---" * (len(ways) + 1) + "|"]
    for name, task in summary["tasks"].items():
        cells = []
        for way in ways:
            low, high = task["accuracy"][way]["interval"]
            mark = "**" if way == task["hand"] else ""
            cells.append(f"{mark}{task['accuracy'][way]['accuracy']:.1%}{mark} ({low:.0%}-{high:.0%})")
        lines.append(f"| {name}{'' if task['trained_on'] else ' (unseen)'} | {' | '.join(cells)} |")
    lines += ["", "Bold: the adapter chosen by hand. In brackets: 95% intervals.", ""]
    for name, task in summary["tasks"].items():
        gap, low, high = task["classifier_minus_hand"]
        more, least, most = task["few_shot_minus_best_single"]
        chose = task["chose_as_by_hand"]
        lines.append(
            f"* {name}: the classifier chose as by hand {chose['classifier']:.1%}, the prompt strategy "
            f"{chose['prompt']:.1%}; classifier - hand {gap:+.1%} ({low:+.1%} to {high:+.1%}); few-shot - best single "
            f"({task['best_single']}) {more:+.1%} ({least:+.1%} to {most:+.1%})"
        )
    return "\n".join(lines)


def main() -> None:
    """Run everything that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="svf", help="of the four adapters: name or name:field=value,...")
    parser.add_argument("--classifier", default="hidden", choices=["hidden", "adapter"])
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--out", type=Path, help="runs/transformer2/METHOD if not given")
    parser.add_argument("--held", type=int, default=128, help="held-out prompts of a task")
    parser.add_argument("--shots", type=int, default=10)
    parser.add_argument("--population", type=int, default=32)
    parser.add_argument("--elites", type=int, default=6)
    parser.add_argument("--iterations", type=int, default=8, help="of the cross-entropy method")
    parser.add_argument("--plot", type=int, default=48, help="held-out prompts a point of the plot")
    parser.add_argument("--steps", type=float, default=1.0, help="share of the full training")
    parser.add_argument("--addition", action="store_true", help="only what the plot of the sums a + b needs")
    parser.add_argument("--quick", action="store_true", help="everything tiny: to see that it runs")
    given = vars(parser.parse_args())
    name = given["method"].replace(":", "-").replace("=", "").replace(",", "-")
    addition = given.pop("addition")
    if given.pop("quick"):
        given |= {"held": 8, "population": 6, "elites": 2, "iterations": 2, "plot": 4, "steps": 0.02}
        name += "-quick"
    given["out"] = given["out"] or Path("runs/transformer2") / name
    setting = Setting(**given)
    own = {key: value for key, value in given.items() if key != "out"}
    if kept(setting.out / "setting.json", lambda: own) != own:
        sys.exit(f"{setting.out} was made with other settings (setting.json): give another --out, or delete it")
    torch.manual_seed(0)
    start = time.perf_counter()
    model, tokenizer = spectune.load_base("smollm2-135m", setting.dtype)
    data = {}
    for name, task in TASKS.items():
        # at least enough prompts for the classifier's parts, however few steps
        count = max(24, round(task.steps * setting.steps) * task.batch) if task.steps else 0
        file = setting.out / "data" / f"{name}.json"
        data[name] = parts(task, model, tokenizer, count, setting.shots, setting.held, file)
        sizes = (len(data[name].train), len(data[name].shots), len(data[name].held))
        say(f"{name}: {sizes[0]} prompts to learn from, {sizes[1]} shots, {sizes[2]} held out")
    names = list(dict.fromkeys(name for pair in PAIRS for name in pair)) if addition else TRAINED
    library = build(setting, data, model, tokenizer, names)
    if not addition:
        with_classifier(setting, library, model, tokenizer)
    two = Transformer2(model, library, strategy={}, tokenizer=tokenizer)
    results = {} if addition else cells(setting, data, two)
    curves = mixing(setting, data, two)
    summary: dict[str, Any] = {"method": setting.method, "steps": setting.steps}
    if not addition:
        summary = summarize(setting, results, library)
        report = table(summary) + "\n"
        write_atomically(setting.out / "summary.md", lambda path: path.write_text(report, encoding="utf-8"))
        print(report)
    summary["mixing"] = {
        key: {"weights": cell["weights"], "accuracy": [sum(r) / len(r) for r in cell["right"]]}
        for key, cell in curves.items()
    }
    text = json.dumps(summary, indent=1) + "\n"
    write_atomically(setting.out / "summary.json", lambda path: path.write_text(text, encoding="utf-8"))
    say(f"{plot(curves, setting)}, {setting.out / 'summary.json'}; {time.perf_counter() - start:.0f} s in this run")


if __name__ == "__main__":
    main()
