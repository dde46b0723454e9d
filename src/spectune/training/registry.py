"""The tasks by name: those that come with spectune, those that installed packages offer, and `module:Class`."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

from pydantic.fields import FieldInfo

from spectune.errors import SpectuneError, nearest
from spectune.plugins import imported, load, offered
from spectune.training.options import ClassifyOptions, DpoOptions, KtoOptions, ReinforceOptions, SftOptions, TaskOptions

GROUP = "spectune.tasks"  # of entry points: name = "package.module:Task"


class _BuiltIn(NamedTuple):
    """A task that comes with spectune; its module, which imports the trainer and models, is imported when it runs."""

    module: str
    name: str
    options: type[TaskOptions]


_BUILT_IN = {
    "sft": _BuiltIn("spectune.training.tasks.sft", "Sft", SftOptions),
    "classify": _BuiltIn("spectune.training.tasks.classify", "Classify", ClassifyOptions),
    "dpo": _BuiltIn("spectune.training.tasks.dpo", "Dpo", DpoOptions),
    "kto": _BuiltIn("spectune.training.tasks.kto", "Kto", KtoOptions),
    "reinforce": _BuiltIn("spectune.training.tasks.reinforce.task", "Reinforce", ReinforceOptions),
}


def task_names() -> list[str]:
    """Return the names that `task` takes, besides `module:Class`."""
    return [*_BUILT_IN, *(name for name in offered(GROUP) if name not in _BUILT_IN)]


def find_task(name: str) -> Any:  # type[Task], which imports this module
    """Return the class of a task.

    Raises:
        SpectuneError: there is none of this name, or what is there is no task.
    """
    if name in _BUILT_IN:
        return getattr(import_module(_BUILT_IN[name].module), _BUILT_IN[name].name)
    if name in offered(GROUP):
        found = load(offered(GROUP)[name])
    elif ":" in name:
        found = imported(name, "task", "Class, such as tasks:Rank for a tasks.py here")
    else:
        known = task_names()
        raise SpectuneError(
            f"task: there is no task {name!r}{nearest(name, known)} (known: {', '.join(known)}; or module:Class)"
        )
    if not (isinstance(found, type) and hasattr(found, "sums") and hasattr(found, "options_type")):
        raise SpectuneError(f"task: {name!r} is {found!r:.60}, not a subclass of spectune.training.tasks.Task")
    return found


def options_of(name: str) -> type[TaskOptions]:
    """Return what a task adds to the configuration.

    Raises:
        SpectuneError: there is no such task.
    """
    return _BUILT_IN[name].options if name in _BUILT_IN else find_task(name).options_type


def owner_of(key: str) -> str | None:
    """Return the task that a key of the configuration belongs to, of those that come with spectune."""
    return next((name for name, task in _BUILT_IN.items() if key in task.options.model_fields), None)


def task_keys() -> dict[str, FieldInfo]:
    """Return the keys of all tasks that come with spectune, by name."""
    return {key: field for task in _BUILT_IN.values() for key, field in task.options.model_fields.items()}
