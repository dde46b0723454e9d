"""Run Spectune on a GPU: one command, at most 8 minutes, no network, random weights of real shapes.

    make gpu [PYTHON=python3] [GPU="--only steps"]      which is, with the packages that docs/training.md names:
    PYTHONPATH=src python benchmarks/gpu/run.py [--only PART ...] [--again] [--out FOLDER] [--minutes 8] [--tiny]

Parts run one after the other, each in a process and a share of the time of its own: what breaks one leaves the others
alone.  Every part keeps its rows in FOLDER/gpu_<part>.<card>.json as they come; the next run goes on with what is
missing or failed, unless `--again`.  The exit code is 1 if anything is wrong.  Without a GPU, or with `--tiny`, the
same runs on the CPU, in this process, with sizes that take seconds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "src")]
if str(HERE) in sys.path:  # where Python puts a script's own folder, whose names are those of other modules
    sys.path.remove(str(HERE))

import torch  # noqa: E402

from _machine import RESULTS, processor  # noqa: E402
from gpu.part import Part, Place, is_wrong, read  # noqa: E402

PARTS = {"correctness": 125, "steps": 95, "decompositions": 70, "many": 90, "job": 60, "kernels": 25}  # seconds of 465
GRACE = 15.0  # seconds more that a process has for the row that it is at


def main(given: list[str] | None = None) -> int:
    """Run the parts, print a table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--again", action="store_true", help="forget what an earlier run found")
    parser.add_argument("--out", type=Path, help="folder for the results; benchmarks/results unless tiny")
    parser.add_argument("--minutes", type=float, default=8.0, help="in all")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, in seconds; without a GPU always")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # when the process of one part is to be done
    options = parser.parse_args(given)
    tiny = options.tiny or not torch.cuda.is_available()
    place = Place(torch.device("cpu" if tiny else "cuda"), tiny)
    if options.until is not None:
        return run(options.only[0], options.out, place, options.until - time.time(), options.again)
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or (Path(folder) if tiny else RESULTS)
        end = time.monotonic() + 60 * options.minutes - GRACE
        for name in options.only:
            rest = sum(PARTS[later] for later in options.only[options.only.index(name) :])
            share = (end - time.monotonic()) * PARTS[name] / rest  # what a part leaves goes to those that follow
            print(f"{name}:", flush=True)
            if tiny:
                run(name, out, place, share, options.again)
            else:
                start(name, out, share, options.again)
        return told({name: read(path_of(name, out, tiny)) for name in options.only}, out)


def path_of(name: str, out: Path, tiny: bool) -> Path:
    """Return the file of a part's rows."""
    return out / f"gpu_{'tiny_' if tiny else ''}{name}.{_processor()}.json"


_processor = cache(processor)


def run(name: str, out: Path, place: Place, seconds: float, again: bool) -> int:
    """Run a part in this process."""
    part = Part(path_of(name, out, place.tiny), place, seconds, again)
    part.rows.pop("the part", None)
    try:
        importlib.import_module(f"gpu.{name}").measure(part)
    except Exception as error:  # what no row was made of
        broken = error

        def fail() -> dict[str, Any]:
            raise broken

        part._end = time.monotonic() + 1.0
        part.row("the part", fail)
    part.save()
    return int(any(map(is_wrong, part.rows.values())))


def start(name: str, out: Path, seconds: float, again: bool) -> None:
    """Run a part in a process of its own, and note if that came to no good end."""
    command = [sys.executable, str(HERE / "run.py"), "--only", name, "--out", str(out)]
    command += ["--until", str(time.time() + seconds), *(["--again"] if again else [])]
    try:
        code = subprocess.run(command, timeout=seconds + GRACE, check=False).returncode
        reason = None if code in (0, 1) else f"its process ended with code {code}"
    except subprocess.TimeoutExpired:
        reason = "its process was ended when its time was over"
    if reason is not None:
        path = path_of(name, out, False)
        found = read(path)
        found.setdefault("rows", {})["the part"] = {"error": reason}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def told(parts: dict[str, dict[str, Any]], out: Path) -> int:
    """Print what was found, and return the exit code."""
    code = 0
    print()
    for name, found in parts.items():
        rows = found.get("rows", {})
        wrong = {key: row for key, row in rows.items() if is_wrong(row)}
        skipped: dict[str, int] = {}
        for row in rows.values():
            if "skipped" in row:
                skipped[row["skipped"]] = skipped.get(row["skipped"], 0) + 1
        done = len(rows) - len(wrong) - sum(skipped.values())
        print(f"{name}: {done} of {len(rows)} rows, {len(wrong)} wrong, {sum(skipped.values())} skipped")
        for line in importlib.import_module(f"gpu.{name}").table(rows):
            print(f"  {line}")
        for reason, times in skipped.items():
            print(f"  skipped, {times}: {reason}")
        for key, row in wrong.items():
            figures = {k: v for k, v in row.items() if k not in ("traceback", "took_s")}
            print(f"  WRONG {key}: {row.get('error') or json.dumps(figures)}"[:400])
        code = 1 if wrong or not rows else code
    print(f"\nresults: {out}")
    return code


if __name__ == "__main__":
    sys.exit(main())
