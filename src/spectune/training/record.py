"""What a run folder says of its run: the configuration, the data's fingerprint, the versions, a model card."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from spectune.adapters.files import write_atomically
from spectune.errors import SpectuneError
from spectune.training.config import TrainConfig
from spectune.training.data import Record

# a resumed run would not be the same run with another of these
_MEANING = ("task", "model", "data", "eval_data", "held_out", "method", "targets", "exclude", "overrides")
_MEANING += ("batch_size", "accumulate", "max_length", "completion_only", "seed", "dtype")
_MEANING += ("beta", "dpo_loss", "label_smoothing", "columns")
_INCIDENTAL = ("output", "resume", "overwrite", "log_steps", "report_to", "trust_remote_code", "device")


def write_run(config: TrainConfig, output: Path, records: Sequence[Record], more: Mapping[str, str]) -> None:
    """Write config.yaml, run.json, README.md, a model card with the usual metadata, and a task's files."""
    output.mkdir(parents=True, exist_ok=True)
    packages = ("spectune", "torch", "transformers", "safetensors")
    run = {
        "data": {"examples": len(records), "sha256": _digest(records)},
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
    }
    front = {"base_model": config.model, "library_name": "spectune", "tags": ["spectune", config.parsed_method().name]}
    card = (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# An adapter for {config.model}\n\n"
        f"Trained with `{config.method}` on {len(records)} examples; the settings are in `config.yaml`.\n\n"
        f"    spectune {'classify' if config.task == 'classify' else 'chat'} {config.model} -a {output.name}\n"
    )
    files = {
        "config.yaml": yaml.safe_dump(config.model_dump(), sort_keys=False),
        "run.json": json.dumps(run, indent=2) + "\n",
        "README.md": card,
        **more,
    }
    for name, text in files.items():
        write_atomically(output / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))


def read_run(output: Path) -> Mapping[str, Any]:
    """Return the configuration that a run folder holds.

    Raises:
        SpectuneError: there is none that can be read.
    """
    try:
        return yaml.safe_load((output / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise SpectuneError(f"cannot read {output / 'config.yaml'} of the run to resume: {error}") from None


def changed(before: Mapping[str, Any], config: TrainConfig) -> tuple[list[str], list[str]]:
    """Return the keys that changed and make it another run, and the others that changed."""
    now = config.model_dump()
    keys = [key for key in now if key not in _INCIDENTAL and before.get(key) != now[key]]
    return [key for key in keys if key in _MEANING], [key for key in keys if key not in _MEANING]


def _digest(records: Sequence[Record]) -> str:
    return hashlib.sha256(json.dumps(list(records), sort_keys=True).encode()).hexdigest()
