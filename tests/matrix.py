"""The suite with the oldest and the newest releases of what spectune stands on: `make test-matrix`.

Each variant is an environment of its own that holds the named releases, and sees the development environment for the
rest.  Releases of torch come as CPU builds from PyTorch's own index; where a release cannot be had, that is said, and
the variant runs with the torch there is.

    python tests/matrix.py                          # every variant, all of the suite
    python tests/matrix.py oldest -- tests/model    # one, and a part of it
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCH = "https://download.pytorch.org/whl/cpu"
TELL = (
    "import torch, transformers, trl, peft\nfor m in torch, transformers, trl, peft: print(m.__name__, m.__version__)"
)
VARIANTS = {  # those that pyproject.toml allows
    "oldest": ["torch==2.6.0", "transformers==5.0.0", "trl==1.0.0", "peft==0.20.0"],
    "oldest but torch": ["transformers==5.0.0", "trl==1.0.0", "peft==0.20.0"],
    "newest": ["torch", "transformers<5.24", "trl", "peft<0.22"],
}


def pip(python: Path, *arguments: str) -> bool:
    """Have an environment's pip install something, and return whether it could."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=False).returncode == 0


def environment(name: str, wanted: list[str]) -> tuple[Path, list[str]]:
    """Return the Python of an environment with these releases, and those that could not be had."""
    folder = ROOT / ".matrix" / name.replace(" ", "-")
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    (own,) = (folder / "lib").glob("python3*/site-packages")
    (own / "development.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT / 'src'}\n")
    torch = [one for one in wanted if one.startswith("torch")]
    missing = [one for one in torch if not pip(python, "--index-url", TORCH, one)]
    rest = [one for one in wanted if one not in torch]  # with what they need in another version than there is
    missing += [] if pip(python, *rest) else rest
    return python, missing


def main() -> None:
    """Run the variants that are named, or all, with what follows `--` for pytest."""
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    names, tests = given[:end], given[end + 1 :]
    failed = []
    for name in names or VARIANTS:
        python, missing = environment(name, VARIANTS[name])
        for one in missing:
            print(f"{name}: {one} cannot be installed here", flush=True)
        settings = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        subprocess.run([python, "-c", TELL], env=settings, check=False)
        done = subprocess.run(
            [python, "-m", "pytest", "-q", *(tests or ["tests"])], cwd=ROOT, env=settings, check=False
        )
        failed += [name] if done.returncode else []
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
