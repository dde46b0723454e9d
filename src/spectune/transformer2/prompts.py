"""Examples and prompts from the files that adapters are trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectune.errors import SpectuneError
from spectune.training.config import TrainConfig
from spectune.training.data import read
from spectune.training.tasks import make_task


def read_records(path: str | Path) -> list[Mapping[str, Any]]:
    """Return the records of a file of examples.

    Raises:
        SpectuneError: a file that cannot be read, or a record of another form.
    """
    values: dict[str, Any] = {"model": "", "data": str(path), "output": ""}
    return read(path, make_task(TrainConfig(**values)))


def read_prompts(path: str | Path) -> list[str]:
    """Return the prompts of training data, or the lines of a text file.

    Raises:
        SpectuneError: a file that cannot be read or holds none.
    """
    if Path(path).suffix != ".txt":
        return [prompt_of(record) for record in read_records(path)]
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SpectuneError(f"cannot read {path}: {error}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise SpectuneError(f"{path} holds no prompts")
    return prompts


def prompt_of(record: Mapping[str, Any]) -> str:
    """Return what the user asks in a record: the last user's message before the last reply, the prompt, or the text."""
    messages = record.get("messages", record.get("prompt", record.get("text")))
    if isinstance(messages, str):
        return messages
    return next((m["content"] for m in reversed(messages or []) if m["role"] == "user"), "")
