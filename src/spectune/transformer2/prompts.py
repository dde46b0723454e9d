"""Examples and prompts from the files that adapters are trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from spectune.bases.prompts import Message, text_of
from spectune.errors import SpectuneError
from spectune.reading import TEXT_BYTES, lines_of, read_text
from spectune.training.config import TrainConfig
from spectune.training.data.messages import is_conversation
from spectune.training.data.records import Record, read
from spectune.training.tasks import Task, make_task


class _Prompts(Task):
    """What asks something, in the records of any task."""

    forms: ClassVar[str] = "'messages', 'prompt' or 'text'"

    def problem(self, record: Record) -> str | None:
        asked = _asked(record)
        if asked is None:
            return f"has the keys {', '.join(map(repr, record)) or 'none'}; it needs {self.forms}"
        if isinstance(asked, str) or is_conversation(asked):
            return None
        return "a prompt must be text, or a list of messages with role and content, both text"


def read_records(path: str | Path) -> list[Record]:
    """Return the records of a file of examples.

    Raises:
        SpectuneError: a file that cannot be read, or a record of another form.
    """
    return read(path, make_task(_config(path)))


def read_prompts(path: str | Path) -> list[str]:
    """Return the prompts of training data for any task, or the lines of a text file.

    Raises:
        SpectuneError: a file that cannot be read or holds none.
    """
    if Path(path).suffix != ".txt":
        return [prompt_of(record) for record in read(path, _Prompts(_config(path)))]
    try:
        lines = lines_of(read_text(Path(path), TEXT_BYTES))
    except FileNotFoundError:
        raise SpectuneError(f"cannot read {path}: no such file") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise SpectuneError(f"{path} holds no prompts")
    return prompts


def prompt_of(record: Record) -> str:
    """Return what the user asks in a record: the last user's message before the last reply, the prompt, or the text."""
    asked = _asked(record)
    if isinstance(asked, str):
        return asked
    return next((text_of(m) for m in reversed(asked or []) if m["role"] == "user"), "")


def _asked(record: Record) -> str | list[Message] | None:
    return next((record[key] for key in ("messages", "prompt", "text") if record.get(key) is not None), None)


def _config(path: str | Path) -> TrainConfig:
    values: dict[str, Any] = {"model": "", "data": str(path), "output": ""}
    return TrainConfig(**values)
