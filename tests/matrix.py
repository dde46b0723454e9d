"""The suite with the oldest and the newest releases of what spectune stands on: `make test-matrix`.

Each variant is an environment of its own in .matrix that holds the named releases; "oldest" and "newest" see the
development environment for the rest.  torch comes as a CPU build from PyTorch's own index or, where that cannot be
reached, as the registry has it: with CUDA, which takes several GB and runs on a CPU as well.  Needs Python 3.11.

    python tests/matrix.py                                         # every variant, all of the suite
    python tests/matrix.py oldest -- tests/model                   # one, and a part of it
    python tests/matrix.py oldest newest -- --share 1/8 tests      # the first eighth of the files, in two
    python tests/matrix.py "gpu image"                             # `make gpu` in its tiny form, with little else
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import tomllib

from portable import ROOT, watched

TORCH = "https://download.pytorch.org/whl/cpu"
MAIN = ("torch", "transformers", "trl", "peft")
TELL = f"""from importlib.metadata import distributions
print(*sorted({{f"{{d.name}} {{d.version}}" for d in distributions() if d.name in {MAIN}}}), sep=", ")"""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = [
    PROJECT["optional-dependencies"][name] for name in ("demo", "rl", "compare", "ray", "quantized", "serve", "peft")
]
NEEDED = [one for one in sum(EXTRAS, PROJECT["dependencies"]) if not one.startswith("spectune[")]
VARIANTS = {
    # every lower bound at once, with releases of pyarrow, click and pyparsing that know numpy, typer and matplotlib
    "oldest": [*(re.sub(r">=([\w.]+).*", r"==\1", one) for one in NEEDED), "pyarrow<22", "click<8.3", "pyparsing<3.3"],
    "newest": ["--upgrade", *(one for one in NEEDED if one.startswith(MAIN))],
    # what is there where a GPU is: neither data sets, nor TRL, nor PEFT
    "gpu image": [
        "torch==2.11.0", "transformers==5.17.0", "numpy", "safetensors", "huggingface_hub", "pydantic", "typer", "rich",
        "pyyaml", "psutil", "xxhash", "regex", "filelock",
    ],
}  # fmt: skip
COMMANDS = {"gpu image": ["-W", "ignore", "benchmarks/gpu/run.py", "--tiny"]}


def pip(python: Path, *arguments: str) -> bool:
    """Have an environment's pip install something, and return whether it could."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    return subprocess.run([*command, *arguments], check=False).returncode == 0


def environment(name: str) -> Path:
    """Return the Python of a variant's environment, with what could be had of its releases."""
    folder = ROOT / ".matrix" / name.replace(" ", "-")
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    (own,) = (folder / "lib").glob("python3*/site-packages")
    seen = [str(ROOT / "src")] if name in COMMANDS else [sysconfig.get_path("purelib"), str(ROOT / "src")]
    (own / "development.pth").write_text("\n".join(seen), encoding="utf-8")
    options = [one for one in VARIANTS[name] if one.startswith("-")]
    torch, *rest = (one for one in VARIANTS[name] if one not in options)
    if not pip(python, "--retries", "0", "--index-url", TORCH, *options, torch):
        print(f"{name}: no CPU build of {torch} can be had here, so it is that of the registry, with CUDA", flush=True)
        if not pip(python, *options, torch):
            print(f"{name}: {torch} cannot be installed here: it runs with what there is", flush=True)
    if not pip(python, *options, *rest):  # with what they need in another version than there is
        print(f"{name}: {', '.join(rest)} cannot be installed together", flush=True)
    return python


def main() -> None:
    """Run the variants that are named, or all, with what follows `--` for pytest."""
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    names, tests = given[:end] or list(VARIANTS), given[end + 1 :] or ["tests"]
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    outcomes = []
    for name in names:
        python = environment(name)
        subprocess.run([python, "-c", TELL], check=False)
        command = COMMANDS.get(name, ["-m", "pytest", "-rf", "--tb", "short", *tests])
        outcomes.append(watched(name, [str(python), *command], settings))
    print("\n" + "\n".join(line for line, _ in outcomes))
    sys.exit(not all(passed for _, passed in outcomes))


if __name__ == "__main__":
    main()
