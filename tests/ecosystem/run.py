"""What users bring Spectune into, tried with it: each library in an environment of its own, with a small test.

    python tests/ecosystem/run.py [NAME ...]

An environment sees the packages of the one that runs this and holds what the library adds or wants in another version;
it is kept in build/ecosystem.  What does not install is reported as that, and is no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import distributions
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LIBRARIES = {  # what is installed, by the name of the test, check_NAME.py
    "accelerate": [],
    "deepspeed": ["deepspeed"],
    "diffusers": ["diffusers"],
    "keras": ["keras", "keras-hub"],
    "lightning": ["lightning"],
    "lm_eval": ["lm-eval"],
    "sentence_transformers": ["sentence-transformers"],
    "setfit": ["setfit"],
}
SECONDS = 1800


def environment(name: str, wanted: list[str]) -> tuple[Path, str | None]:
    """Return a Python that has a library, and why it has not, if it has not."""
    folder = ROOT / "build" / "ecosystem" / name
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    done = folder / "installed.json"
    if done.exists() and json.loads(done.read_text()) == wanted:
        return python, None
    venv.create(folder, with_pip=True, clear=True)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    (Path(site) / "zz_parent.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")  # behind its own
    if wanted:
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *wanted]
        said = subprocess.run(pip, capture_output=True, text=True)
        if said.returncode:
            return python, (said.stderr.strip().splitlines() or ["pip failed"])[-1]
    done.write_text(json.dumps(wanted))
    return python, None


def versions(python: Path, wanted: list[str]) -> str:
    """Return the versions of what was installed, and of torch and transformers there."""
    told = "import sys; from importlib.metadata import version; print(*(f'{n} {version(n)}' for n in sys.argv[1:]))"
    asked = [*wanted, "torch", "transformers", "peft"]
    return subprocess.run([python, "-c", told, *asked], capture_output=True, text=True).stdout.strip()


def check(name: str) -> dict[str, str]:
    """Install a library, run its test, and return what came of it."""
    python, why = environment(name, LIBRARIES[name])
    if why is not None:
        return {"outcome": "does not install", "why": why}
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), str(HERE)])
    quiet = {
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "KERAS_BACKEND": "torch",
    }
    command = [python, "-m", "pytest", "-c", str(HERE / "pytest.ini"), "--rootdir", str(HERE), f"check_{name}.py"]
    try:
        code = subprocess.run(command, cwd=HERE, env={**os.environ, **quiet}, timeout=SECONDS).returncode
    except subprocess.TimeoutExpired:
        return {"outcome": "failed", "why": f"no end after {SECONDS} s"}
    return {"outcome": "passed" if code == 0 else "failed", "with": versions(python, LIBRARIES[name])}


def main() -> None:
    """Check what is asked for, write what came of it to build/ecosystem, and end with 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(LIBRARIES), choices=[*LIBRARIES, []], metavar="NAME")
    assert any(d.metadata["Name"] == "peft" for d in distributions()), 'pip install "spectune[peft]" first'
    outcomes = {name: check(name) for name in parser.parse_args().names}
    (ROOT / "build" / "ecosystem" / "outcomes.json").write_text(json.dumps(outcomes, indent=2) + "\n")
    for name, outcome in outcomes.items():
        print(f"{name}: {'; '.join(outcome.values())}")
    sys.exit(any(outcome["outcome"] == "failed" for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
