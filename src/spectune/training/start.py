"""A run's first configuration, from its data and model alone: each setting with the reason for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from spectune.bases.loading import auto_class, load_tokenizer
from spectune.errors import SpectuneError
from spectune.methods import parse
from spectune.storage import write_atomically
from spectune.training.config import TrainConfig, load_config
from spectune.training.data.detect import detect
from spectune.training.defaults import sentence
from spectune.training.tasks import make_task


class Setting(NamedTuple):
    """One line of the file.

    Args:
        key: of the configuration.
        value: for it.
        reason: for it.
    """

    key: str
    value: object
    reason: str


class Start(NamedTuple):
    """What was found.

    Args:
        settings: in the order of the file.
        notes: what a user should know of the data.
        summary: the data and what follows from it, in a sentence.
        config: the same as `settings`, checked.
    """

    settings: list[Setting]
    notes: list[str]
    summary: str
    config: TrainConfig


def propose(data: str, model: str, pairs: Sequence[str] = (), *, trust_remote_code: bool = False) -> Start:
    """Return settings for a run that learns data, as `train` would choose them itself.

    Args:
        data: a file, a pattern, or a data set's folder or id.
        model: embedded name, local folder or hub id.
        pairs: key=value that win over what is chosen.
        trust_remote_code: run code that comes with the model.

    Raises:
        SpectuneError: data or a model that cannot be read, or data with nothing to learn.
    """
    given = {pair.partition("=")[0].strip() for pair in pairs}
    outline, tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    place = str(Path(data).resolve()) if Path(data).exists() else data
    asked = {pair.partition("=")[0].strip(): pair.partition("=")[2] for pair in pairs}
    generates = "CausalLM" in auto_class(outline.config).__name__ and asked.get("task") != "classify"
    found = detect(data, generates=generates, config=asked.get("data_config"), split=asked.get("data_split"))
    presets: dict[str, Any] = {"model": model, "data": place, "task": found.task}
    presets |= {"output": str(Path("runs", _name(data)).resolve())}
    presets |= {"columns": found.columns} if found.columns and not {"task", "columns"} & given else {}
    presets |= {"trust_remote_code": True} if trust_remote_code else {}
    config = load_config(None, list(pairs), **presets)
    task = make_task(config)
    records, held = task.read()
    task.measure(records, outline, tokenizer)
    labels = {str(record["label"]) for record in records} if config.task == "classify" else set()
    if len(labels) == 1 and len(records) > 1:
        raise SpectuneError(f"all records have the label {next(iter(labels))!r}: there is nothing to tell apart")
    settled = task.config
    apart = 0 if settled.evaluation() is not None else len(held)
    summary = sentence(settled, task.choices, len(records) + apart, len(records))
    reasons = {choice.key: choice.reason for choice in task.choices}
    reasons |= {"task": found.reason, "columns": "the data's names for what the task takes"}
    reasons |= {"problem_type": "what the labels are"}
    reasons |= {"output": "the adapter, its log and its checkpoints; give it to `spectune eval` and `spectune chat`"}
    reasons |= dict.fromkeys(given, "as given")
    method = parse(settled.method)
    reasons.setdefault("method", "others: `spectune methods`; all of them on this data: `spectune compare`")
    order = ["model", "data", "output", "task", "columns", "method", "lr", "batch_size", "epochs", "max_steps"]
    order += ["max_length", "held_out", "eval_steps"]
    order += sorted(settled.model_fields_set - set(order))
    shown = [key for key in order if key in settled.model_fields_set or key == "method"]
    settings = [Setting(key, getattr(settled, key), reasons.get(key, "")) for key in shown]
    if "lr" not in settled.model_fields_set:
        why = f"{method.name}'s own is {method.learning_rate:g}; auto measures one on this model and data"
        settings.insert(shown.index("method") + 1, Setting("lr", None, why))
    return Start(settings, task.notes, summary, settled)


def _name(data: str) -> str:
    """Return the name of data without its folder and endings."""
    name = Path(data.rstrip("/")).name
    for _ in Path(name).suffixes:
        name = Path(name).stem
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name).strip("-") or "run"


def text_of(start: Start, command: str) -> str:
    """Return the file: a line for each setting, with its reason above it.

    Args:
        start: what it holds.
        command: that asked for it.
    """
    lines = [f"# {command}", f"# {start.summary}", ""]
    for key, value, reason in start.settings:
        lines += [f"# {reason}"] if reason else []
        lines += [f"# {key}: auto"] if value is None else [_line(key, value)]
    return "\n".join(lines) + "\n"


def _line(key: str, value: object) -> str:
    shown = yaml.safe_dump([value], default_flow_style=True, width=100_000, allow_unicode=True).strip()
    return f"{key}: {shown[1:-1]}"


def write(start: Start, path: Path, command: str) -> None:
    """Write the file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = text_of(start, command)
    write_atomically(path, lambda place: place.write_text(text, encoding="utf-8"))
