"""Disks that are full, without inodes, read-only, forbidden, slow or gone: `cd tests && python -m reliability.disks`.

Every command that writes is run there by `spectune.cli.main`, in a child: it must say one sentence and exit with 2 (or
succeed), and what was there must be as it was (or as it was to be).  File systems of their own are small tmpfs, which
only root may mount; what a normal user may not is tried as the user 65534.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from reliability import commands, kills
from reliability.commands import COMMANDS
from spectune import cli

NOBODY = 65534


def told(write: Callable[[Path], object], place: Path, limits: Callable[[], object] = lambda: None) -> tuple[int, str]:
    """Run a command as a user does, in a child, and return its exit code and what it said on stderr."""
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            code = 99
            try:
                os.dup2(said.fileno(), 2)
                sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
                sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
                warnings.simplefilter("ignore")
                commands.run = _through_main
                limits()
                write(place)
                code = 0
            except SystemExit as ended:
                code = int(ended.code or 0)
            except BaseException as error:  # what main would never let out
                sys.stderr.write(f"Traceback: {type(error).__name__}: {error}")
            finally:
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return code, said.read().decode(errors="replace")


def _through_main(*arguments: object) -> None:
    """Run a command by main, and go on after a success alone."""
    os.environ["SPECTUNE_CACHE"] = "off"
    sys.argv = ["spectune", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as ended:
        if ended.code:
            raise


@contextlib.contextmanager
def mounted(options: str) -> Iterator[Path]:
    """Within the context have a small file system in memory.

    Raises:
        PermissionError: this user may not mount one.
    """
    place = Path(tempfile.mkdtemp())
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, check=False)
    if done.returncode:
        place.rmdir()
        raise PermissionError(done.stderr.decode())
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)
        place.rmdir()


def _fill(place: Path, left: int) -> None:
    free = os.statvfs(place)
    with contextlib.suppress(OSError), (place / "filler").open("wb") as file:
        file.write(b"\0" * max(0, free.f_bavail * free.f_frsize - left))


def _no_inodes(place: Path) -> None:
    with contextlib.suppress(OSError):
        for i in range(100_000):
            (place / f"filler-{i}").touch()


def _readonly(place: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)


def _forbidden(place: Path) -> None:
    for path in (place, *place.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)


def _as_nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def _small_files() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))


def _vanishing(at: int) -> Callable[[Path, Callable[[Path], object]], object]:
    """Return what runs a command whose folder is taken away at one of its calls."""

    def write(place: Path, operate: Callable[[Path], object]) -> object:
        with kills.interfering(at, lambda: shutil.rmtree(place, ignore_errors=True)):
            return operate(place)

    return write


def _slow(place: Path, operate: Callable[[Path], object]) -> object:
    with kills.interfering(None, lambda: None, lambda: time.sleep(0.01)):
        return operate(place)


def checked(name: str, what: str, code: int, said: str) -> str:
    """Return "done" or "refused", for a command that ended with a code and said something.

    Raises:
        AssertionError: it ended in another way, or said something else than one sentence.
    """
    where = f"{name}, {what}: exit code {code}, {said!r:.600}"
    assert code in (0, 2), where
    assert "Traceback" not in said, where
    if code == 2:
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, where
    return "refused" if code else "done"


FAST = ("export, peft", "import", "compose", "library add")
SITUATIONS = ("full", "8 KiB left", "64 KiB left", "no inodes", "read-only", "forbidden", "small files", "gone", "slow")


def tried(name: str, what: str, root: Path | None = None) -> str:
    """Try a command in a situation; return "done", "refused", or "not here" where this user cannot make it.

    Raises:
        AssertionError: it did not end well.
    """
    before, write, read = COMMANDS[f"{name}"]
    known = {_known(name, written) for written in (False, True)}
    options = {"no inodes": "nr_inodes=120", "read-only": "size=8m"}.get(what, "size=8m")
    own = what in ("full", "8 KiB left", "64 KiB left", "no inodes", "read-only")
    try:
        with mounted(options) if own else tempfile.TemporaryDirectory(dir=root) as made:
            place = Path(made)
            before(place)
            code, said = told(*_arranged(what, write, place))
            outcome = checked(name, what, code, said)
            if what == "read-only":
                subprocess.run(["mount", "-o", "remount,rw", place], check=True)
            if what == "forbidden":
                for path in (place, *place.rglob("*")):
                    path.chmod(0o755 if path.is_dir() else 0o644)
            for path in place.glob("filler*"):
                path.unlink()
            if what != "gone":
                found = read(place)
                assert found in known, f"{name}, {what}: {found} is there, not one of {known}"
            else:
                place.mkdir(exist_ok=True)
    except PermissionError:
        return "not here"
    return outcome


def _arranged(
    what: str, write: Callable[[Path], object], place: Path
) -> tuple[Callable[[Path], object], Path, Callable[[], object]]:
    """Bring a situation about, and return what `told` is to be given."""
    limits: Callable[[], object] = lambda: None  # noqa: E731
    if what == "full":
        _fill(place, 0)
    elif what.endswith("KiB left"):
        _fill(place, int(what.split()[0]) << 10)
    elif what == "no inodes":
        _no_inodes(place)
    elif what == "read-only":
        _readonly(place)
    elif what == "forbidden":
        if os.geteuid():
            raise PermissionError
        for path in (commands.inputs(), *commands.inputs().rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        _forbidden(place)
        limits = _as_nobody
    elif what == "small files":
        limits = _small_files
    elif what == "gone":
        return lambda p: _vanishing(4)(p, write), place, limits
    elif what == "slow":
        return lambda p: _slow(p, write), place, limits
    return write, place, limits


_KNOWN: dict[tuple[str, bool], str] = {}


def _known(name: str, written: bool) -> str:
    if (name, written) not in _KNOWN:
        with tempfile.TemporaryDirectory() as root:
            before, write, read = COMMANDS[name]
            before(Path(root))
            if written:
                write(Path(root))
            _KNOWN[name, written] = read(Path(root))
    return _KNOWN[name, written]


def file_in_place_of_a_folder(name: str) -> str:
    """Try a command whose place is a file."""
    _, write, _ = COMMANDS[name]
    with tempfile.TemporaryDirectory() as root:
        place = Path(root) / "file"
        place.write_text("mine")
        outcome = checked(name, "a file in place of a folder", *told(write, place))
        assert place.read_text() == "mine"
    return outcome


def every(names: Iterable[str] = COMMANDS, situations: Iterable[str] = SITUATIONS) -> dict[str, dict[str, str]]:
    """Try commands in situations, and return the outcome of each."""
    outcomes: dict[str, dict[str, str]] = {}
    for name in names:
        for what in situations:
            outcomes.setdefault(name, {})[what] = tried(name, what)
        outcomes[name]["a file in place of a folder"] = file_in_place_of_a_folder(name)
    return outcomes


def main() -> None:
    """Try every command in every situation."""
    warnings.simplefilter("ignore")
    names = sys.argv[1:] or list(COMMANDS)
    for name in names:
        print(f"{name}: {every([name])}", flush=True)


if __name__ == "__main__":
    main()
