"""The files of a checkpoint: which there are, and whether they are the ones that were written."""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Console

from spectune.errors import SpectuneError
from spectune.reading import read_json, sha256

STATE = "adapter_state.safetensors"
OPTIMIZER, SCHEDULER, TRAINER = "optimizer.pt", "scheduler.pt", "trainer_state.json"
MANIFEST = "checkpoint.json"  # written last: the SHA-256 of every other file


def checkpoints(output: Path, console: Console | None = None) -> list[Path]:
    """Return the whole checkpoints of a run folder, the last one last, and say which are not.

    Args:
        output: the folder.
        console: where to say so.
    """
    found: dict[int, Path] = {}
    for path in output.glob("*checkpoint-*"):
        named = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if named and _is_whole(path):
            found[int(named[1])] = path
        elif console is not None and (named or re.fullmatch(r"\.checkpoint-\d+\.partial", path.name)):
            console.print(f"{path.name} was not written to its end and is left out", style="yellow", highlight=False)
    return [found[step] for step in sorted(found)]


def _is_whole(checkpoint: Path) -> bool:
    rngs = {path.name for path in checkpoint.glob("rng_state*.pth")}
    of_each = {f"rng_state_{number}.pth" for number in range(len(rngs))}
    files = all((checkpoint / name).is_file() for name in (STATE, OPTIMIZER, SCHEDULER, TRAINER, MANIFEST))
    return files and bool(rngs) and rngs in ({"rng_state.pth"}, of_each)


def check_files(checkpoint: Path) -> None:
    """Raise unless a checkpoint holds the files that were written, byte for byte.

    Raises:
        SpectuneError: it does not.
    """
    try:
        written = read_json(checkpoint / MANIFEST)["sha256"]
        found = digests(checkpoint)
        changed = sorted(name for name in written.keys() | found.keys() if written.get(name) != found.get(name))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(str(checkpoint), error) from None
    if changed:
        raise SpectuneError(
            f"{checkpoint} is damaged ({changed[0]} is not the file that was written); delete it to go on from the one "
            "before"
        )


def digests(checkpoint: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a checkpoint but the manifest."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {p.relative_to(checkpoint).as_posix(): sha256(p) for p in files}


def damaged(checkpoint: str, error: Exception) -> SpectuneError:
    """Return what to raise of a checkpoint that cannot be read."""
    return SpectuneError(f"{checkpoint} is damaged ({error}); delete it to go on from the one before")
