"""Base against adapter, on what a run held out and on prompts of one's own: a document, and a page of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor

from spectune.adapters.adapter import Adapter
from spectune.bases.classifiers import Prediction, classify, label_names
from spectune.bases.devices import checked_device
from spectune.bases.loading import load_base
from spectune.errors import SpectuneError, nearest, need
from spectune.model.adapting import attach
from spectune.model.fusing import fused_where_it_pays
from spectune.model.routing import activate
from spectune.pages.html import Column, page, paragraphs, table, tiles
from spectune.progress import Bar, Counted
from spectune.storage import write_atomically
from spectune.training.config import TrainConfig, load_config
from spectune.training.data.records import Record
from spectune.training.data.targets import told
from spectune.training.preparing import token_limit
from spectune.training.record import digest, read_run
from spectune.training.replies import Asked, asked, replies, short, spoken
from spectune.training.tasks import Task, make_task
from spectune.training.trainer.totals import Totals

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NAME = "run"
_LESS = ("mse", "mae", "kl", "reward_bad", "reward_rejected")  # measures of which less is better, beside losses
SIDES = ("base", "adapter")


def evaluate(
    run: Path,
    prompts: Sequence[str] = (),
    *,
    data: str | None = None,
    examples: int = 4,
    max_new_tokens: int = 80,
    tasks: Sequence[str] = (),
    device: str | None = None,
    console: Console | None = None,
) -> dict[str, object]:
    """Return what the base and the base with a run's adapter answer and measure, as a document for JSON.

    Args:
        run: its folder.
        prompts: of one's own.
        data: to measure on, instead of what the run held out.
        examples: of that data, how many are shown with both answers.
        max_new_tokens: of a reply.
        tasks: of lm-evaluation-harness, where that is installed.
        device: to compute on, the run's own if not given.
        console: shows how far it is.

    Raises:
        SpectuneError: no such run, data that cannot be read, or tasks without the package.
    """
    harness: Any = need("lm_eval", "an evaluation with tasks of lm-evaluation-harness") if tasks else None
    console = console or Console(quiet=True)
    config = _config(run, data, device)
    adapter = Adapter.load(run)
    task = make_task(config)
    learned, held = task.read()
    notes = [*_changed(run, chain(learned, held), data)]
    held = learned if data is not None else held
    if data is not None and adapter.labels:
        options = {"labels": adapter.labels, "new_head": True, "trust_remote_code": config.trust_remote_code}
        options["quantize"] = config.quantize
        place = checked_device(config.device)
        model, tokenizer = load_base(config.model, config.dtype, device=place, **options)
    else:
        model, tokenizer = task.load(learned, held)
    attach(model, adapter, _NAME)
    document: dict[str, Any] = {"run": str(run), "model": config.model, "method": config.method, "task": config.task}
    document |= {"records": len(held), "measures": {}, "replies": [], "harness": {}, "notes": notes}
    if not held:
        notes.append("nothing was held out: give data to measure on, --data FILE")
    elif config.task == "reinforce":
        notes.append("rewards are measured by `spectune train`, at its end; here are replies")
    else:
        document["measures"] = {side: _measures(task, model, tokenizer, held, side, console) for side in SIDES}
    shown = asked(held, examples) if config.task != "classify" else []
    shown += [Asked(prompt, "", False) for prompt in prompts]
    if config.task == "classify":
        document["replies"] = _labels(model, tokenizer, held[:examples], prompts)
    elif shown:
        document["replies"] = _replies(model, tokenizer, shown, max_new_tokens, config.fused, console)
    for side in SIDES if harness is not None else ():
        activate(model, _chosen(side))
        document["harness"][side] = _harness(harness, model, tokenizer, tasks)
    return document


def _harness(
    harness: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str]
) -> dict[str, object]:
    models = need("lm_eval.models.huggingface", "an evaluation with tasks of lm-evaluation-harness", "lm_eval")
    wrapped = models.HFLM(pretrained=model, tokenizer=tokenizer)
    found = harness.simple_evaluate(model=wrapped, tasks=list(tasks))
    return {name: dict(values) for name, values in found["results"].items()}


def _config(run: Path, data: str | None, device: str | None) -> TrainConfig:
    path = run / "config.yaml"
    if not run.is_dir():
        beside = [place.name for place in run.parent.iterdir()] if run.parent.is_dir() else []
        raise SpectuneError(f"there is no folder {run}{nearest(run.name, beside)}")
    if not path.is_file():
        raise SpectuneError(f"{run} is not the folder of a run: it has no config.yaml; `spectune train` makes one")
    more = (
        [f"data={data}", "eval_data=null", "eval_split=null", "held_out=0", "max_eval_samples=null"]
        if data is not None
        else []
    )
    more += [f"device={device}"] if device is not None else []
    return load_config(path, [*more, "resume=false", "adapter=null"])


def _changed(run: Path, records: Iterable[Record], data: str | None) -> list[str]:
    if data is not None or read_run(run)["digest"] == digest(records):
        return []
    return ["the data is not what the run was trained on any more: held-out records may have been learned"]


def _chosen(side: str) -> str | None:
    return _NAME if side == "adapter" else None


@torch.no_grad()
def _measures(
    task: Task,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held: Sequence[Record],
    side: str,
    console: Console,
) -> dict[str, float]:
    """Return the task's measures, as its evaluation in training has them."""
    activate(model, _chosen(side))
    limit, size = token_limit(task.config, model), task.config.batch_size
    examples = task.encode(Counted(held, console, "held-out records to tokens"), model, tokenizer, limit).examples
    collate = task.collator(model, tokenizer)
    totals = Totals(task.gathered)
    starts = range(0, len(examples), size)
    with fused_where_it_pays(model, len(starts) * 8, allowed=task.config.fused):
        for start in Bar(console, f"measuring the {side}").over(starts, each=1):
            batch = collate(examples[start : start + size])
            batch = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            totals.add(task.sums(model, batch))
    return task.metrics(totals.of_all())


def _replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    shown: Sequence[Asked],
    max_new_tokens: int,
    fused: bool,
    console: Console,
) -> list[dict[str, object]]:
    said: dict[str, list[str]] = {}
    for side in SIDES:
        activate(model, _chosen(side))
        counted = Bar(console, f"replies of the {side}").over(shown, each=1)
        said[side] = [replies(model, tokenizer, [each], max_new_tokens, fused)[0] for each in counted]
    return [
        {"prompt": spoken(each.prompt), "data": each.answer or None, "base": base, "adapter": adapted}
        for each, base, adapted in zip(shown, said["base"], said["adapter"], strict=True)
    ]


def _labels(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held: Sequence[Record], prompts: Sequence[str]
) -> list[dict[str, object]]:
    texts = [*(record["text"] for record in held), *prompts]
    pairs = [*(record.get("text_pair") for record in held), *([None] * len(prompts))]
    labels = [*(told(record["label"]) for record in held), *([None] * len(prompts))]
    label_names(model)
    rows: list[dict[str, object]] = [{"prompt": text, "data": label} for text, label in zip(texts, labels, strict=True)]
    for side in SIDES:
        activate(model, _chosen(side))
        for row, text, pair in zip(rows, texts, pairs, strict=True):
            row[side] = _in_words(classify(model, tokenizer, [text], None if pair is None else [pair])[0])
    return rows


def _in_words(found: Prediction) -> str:
    if found.value is not None:
        return f"{found.value:.3g}"
    chosen = (found.label,) if found.labels is None else found.labels
    return ", ".join(f"{label} ({found.probabilities[label]:.0%})" for label in chosen) or "none"


def better(name: str, base: float, adapted: float) -> bool:
    """Whether the adapter is better by a measure."""
    return adapted < base if name in _LESS or name.endswith("loss") else adapted > base


def verdict(document: Mapping[str, Any]) -> str:
    """Return what the measures say, in a sentence."""
    measures = document["measures"]
    if not measures:
        return "nothing was measured"
    base, adapted = measures["base"], measures["adapter"]
    name = next((name for name in base if name != "loss"), "loss")
    is_better = better(name, base[name], adapted[name])
    word = "better than" if is_better else "not better than"
    spoken_name = name.replace("_", " ")
    return (
        f"on {document['records']:,} held-out records the adapter is {word} its base: "
        f"{spoken_name} {base[name]:.3f} -> {adapted[name]:.3f}"
    )


def write_page(document: Mapping[str, Any], path: Path) -> None:
    """Write the page of an evaluation."""
    measures = document["measures"]
    rows = [
        (name.replace("_", " "), measures["base"][name], measures["adapter"][name]) for name in measures.get("base", {})
    ]
    columns = [Column("measure"), Column("base", ".3f"), Column("adapter", ".3f")]
    sections = [("Measures", table("On what was held out", columns, rows))] if rows else []
    texts = [
        tuple(short(str(reply[key] or ""), 2000) for key in ("prompt", "data", "base", "adapter"))
        for reply in document["replies"]
    ]
    if texts:
        names = [Column(name) for name in ("prompt", "data", "base", "adapter")]
        sections.append(("Side by side", table("What each answers", names, texts)))
    for side, results in document["harness"].items():
        found = [f"{task}: {values}" for task, values in results.items()]
        sections.append((f"lm-evaluation-harness, {side}", paragraphs(found)))
    if document["notes"]:
        sections.append(("To be known", paragraphs(document["notes"])))
    first = [(f"{document['records']:,}", "held-out records")]
    first += [(f"{base:.3f} → {adapted:.3f}", name) for name, base, adapted in rows]
    title = f"{document['model']} and {Path(document['run']).name}"
    html = page(title, paragraphs([verdict(document)]) + tiles(first), sections)
    write_atomically(path, lambda place: place.write_text(html, encoding="utf-8"))
