"""What a run folder says of its run: the configuration, the data's fingerprint, the versions, a model card."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from spectune.errors import SpectuneError
from spectune.reading import parsed, read_json, read_yaml
from spectune.storage import write_atomically
from spectune.training import processes
from spectune.training.aliases import aliased
from spectune.training.config import PLACES, TrainConfig
from spectune.training.data.records import Record
from spectune.training.options import resumes
from spectune.training.values import in_full

# a resumed run would not be the same run with another of these, nor with another of what its task has for keys
_MEANING = ("task", "model", "data", "eval_data", "held_out", "method", "targets", "exclude", "overrides", "columns")
_MEANING += ("modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "split")
_MEANING += ("data_config", "data_split", "eval_split", "max_length", "completion_only", "seed", "dtype", "adapter")
_MEANING += ("quantize", "max_eval_samples", "streaming")  # which is held out another way
# of these one is told, and the run goes on
_TOLD = ("lr", "group_lr", "epochs", "max_steps", "schedule", "warmup", "weight_decay", "max_grad_norm", "eval_steps")
_TOLD += ("patience", "best", "save_steps", "fsdp", "factored", "fused", "gradient_checkpointing")
_STEP = (
    "batch_size",
    "gradient_accumulation_steps",
    "processes",
)  # whose product is the examples of a step, and has a meaning
_INCIDENTAL = ("output", "resume", "overwrite", "log_steps", "report_to", "trust_remote_code", "device")


def write_run(config: TrainConfig, output: Path, parts: Sequence[Sequence[Record]], more: Mapping[str, str]) -> None:
    """Write config.yaml, run.json, README.md, a model card with the usual metadata, and a task's files."""
    output.mkdir(parents=True, exist_ok=True)
    count = sum(map(len, parts))
    packages = ("spectune", "torch", "transformers", "safetensors")
    run = {
        "processes": processes.count(),
        "data": {"examples": count, "sha256": digest(chain.from_iterable(parts))},
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
    }
    front = {"base_model": config.model, "library_name": "spectune", "tags": ["spectune", config.parsed_method().name]}
    card = (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# An adapter for {config.model}\n\n"
        f"Trained with `{config.method}` on {count} examples; the settings are in `config.yaml`.\n\n"
        f"    spectune {'classify' if config.task == 'classify' else 'chat'} {config.model} -a {output.name}"
        f"{f' --quantize {config.quantize}' if config.quantize else ''}\n"
    )
    files = {
        "run.json": json.dumps(run, indent=2) + "\n",  # first: by which a folder is known as a run's
        "config.yaml": yaml.safe_dump(config.in_full(), sort_keys=False),
        "README.md": card,
        **more,
    }
    for name, text in files.items():
        write_atomically(output / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))


def read_run(output: Path) -> Mapping[str, object]:
    """Return the configuration that a run folder holds, the number of "processes" and the "digest" of its data.

    Raises:
        SpectuneError: there is none that can be read.
    """
    path = output / "config.yaml"
    config = read_yaml(path)
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise SpectuneError(f"{path} of the run to resume must hold key: value pairs")
    config = aliased(config, TrainConfig.model_fields)
    for key in ("batch_size", "gradient_accumulation_steps"):
        if type(config.get(key, 1)) is not int:
            raise SpectuneError(f"{key} in {path} is {config[key]!r:.60}, not a whole number")
    if not isinstance(config.get("group_lr") or {}, dict):
        raise SpectuneError(f"group_lr in {path} is {config['group_lr']!r:.60}, not key: value pairs")
    path = output / "run.json"
    run = parsed(_Run, read_json(path), str(path))
    return {**config, "processes": run.processes, "digest": run.data.sha256}


class _Data(BaseModel):
    sha256: str


class _Run(BaseModel):
    """What is read of a run.json."""

    processes: int
    data: _Data


def changed(before: Mapping[str, Any], config: TrainConfig) -> tuple[list[str], list[str]]:
    """Return what changed and makes it another run, and what else did."""
    now = {**config.in_full(), "processes": processes.count()}
    examples = [math.prod(int(run.get(key) or 1) for key in _STEP) for run in (before, now)]
    of_task = config.options_type.model_fields if config.options_type is not None else {}
    meaning = (*_MEANING, *(key for key, field in of_task.items() if resumes(field) == "same"))
    meaning = meaning if examples[0] == examples[1] else (*meaning, *_STEP)
    ignored = (*_INCIDENTAL, *(key for key, field in of_task.items() if resumes(field) == "ignored"))
    fields = {**TrainConfig.model_fields, **of_task}
    defaults = {key: field.get_default() for key, field in fields.items()}  # folders of earlier versions lack keys
    if set(before.get("group_lr") or ()) != set(config.group_lr):  # the optimizer has a group for each
        meaning += ("group_lr",)
    paths = {key: in_full(before[key]) for key in PLACES if key in before and before[key] != now[key]}
    then = {**defaults, **before, **paths}
    keys = [key for key in now if key not in ignored and then.get(key) != now[key]]
    named = {
        key: f"number of processes ({now[key]}, not {before.get(key)})" if key == "processes" else key for key in keys
    }
    return [named[key] for key in keys if key in meaning], [named[key] for key in keys if key not in meaning]


def digest(records: Iterable[Record]) -> str:
    """Return what tells records from others: a sum over all their columns."""
    found = hashlib.sha256(b"[")  # as of one list
    for number, record in enumerate(records):
        text = json.dumps(record, sort_keys=True, default=lambda value: str(value).partition(" at 0x")[0])
        found.update(f"{', ' * (number > 0)}{text}".encode())
    found.update(b"]")
    return found.hexdigest()
