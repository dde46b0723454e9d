"""Run the tests as other machines would: other instruction sets, threads, orders, clocks and random numbers.

    python tests/portable.py [--share N] [VARIANT ...] [-- PYTEST ARGUMENTS]

A variant sets what the libraries read when they start, or gives options of `imitations.py`; without a name all run, one
after another, on as many processes as `make test` takes, each in another order.  With `--share N` each variant runs an
Nth of the files, the next one those that follow, so that N variants in a row run all.  What came of each is a line of a
table at the end, and the exit code is 1 if any test failed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLAIN = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
VARIANTS: dict[str, tuple[dict[str, str], list[str]]] = {
    "no vector units": (PLAIN, ["--shuffle", "1"]),
    "AVX2": (AVX2, ["--shuffle", "2"]),
    "two threads": ({"OMP_NUM_THREADS": "2"}, ["--shuffle", "3"]),
    "two threads, no vector units": ({"OMP_NUM_THREADS": "2", **PLAIN}, ["--shuffle", "4"]),
    "other sums": ({}, ["--shuffle", "5", "--other-sums"]),
    "standing clock": ({}, ["--shuffle", "6", "--standing-clock"]),
    "named encodings": ({"PYTHONWARNDEFAULTENCODING": "1"}, ["--shuffle", "7"]),
    "other seeds 1": ({}, ["--shuffle", "8", "--seeds", "1"]),
    "other seeds 2": ({}, ["--shuffle", "9", "--seeds", "2"]),
}


def watched(name: str, command: list[str], environment: dict[str, str]) -> tuple[str, bool]:
    """Run pytest as it prints; return a line that says what came of it, and whether all tests passed."""
    begin, said = time.monotonic(), []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            said.append(line)
    counts = re.findall(r"\d+ (?:passed|failed|skipped|error)", "".join(said[-3:]))
    return f"{name:30s} {', '.join(counts):40s} {(time.monotonic() - begin) / 60:5.1f} min", process.returncode == 0


def run(name: str, arguments: list[str], share: int) -> tuple[str, bool]:
    """Run the tests in a variant; return a line that says what came of it, and whether all tests passed."""
    environment, options = VARIANTS[name]
    options = [*options, *(["--share", f"{list(VARIANTS).index(name) % share + 1}/{share}"] if share > 1 else [])]
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadscope", "-rf", "--tb", "short"]
    print(f"\n== {name}: {environment} {options}", flush=True)
    return watched(name, [*command, *options, *(arguments or ["tests"])], {**os.environ, **environment})


def main() -> None:
    """Run what was asked for."""
    given, share = sys.argv[1:], 1
    if given[:1] == ["--share"]:
        share, given = int(given[1]), given[2:]
    cut = given.index("--") if "--" in given else len(given)
    names, arguments = given[:cut] or list(VARIANTS), given[cut + 1 :]
    if unknown := set(names) - VARIANTS.keys():
        sys.exit(f"there is no variant {min(unknown)!r}: there are {', '.join(VARIANTS)}")
    outcomes = [run(name, arguments, share) for name in names]
    print("\n" + "\n".join(line for line, _ in outcomes))
    sys.exit(not all(passed for _, passed in outcomes))


if __name__ == "__main__":
    main()
