"""Build the wheel, install it into an empty environment, and use it there as a new user would.

The environment sees the wheel and what it declares to need, followed through to the last package, and nothing else that
the development environment has: each of those packages is linked from there, which takes seconds where an installation
from a registry takes minutes and gigabytes.  WHEEL=full installs from the registry all the same.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
}  # fmt: skip
USE = """
import torch, spectune
model = torch.nn.Sequential(torch.nn.Linear(12, 8))
x = torch.randn(3, 12)
spectune.adapt(model, "svf")
with torch.no_grad():
    for p in model.parameters():
        p.add_(0.1 * p.requires_grad)
y = model(x)
spectune.extract(model).save("é adapter")
spectune.detach(model)
spectune.attach(model, spectune.Adapter.load("é adapter"))
torch.testing.assert_close(model(x), y)
print(spectune.__file__)
"""


def run(*command: object, folder: Path) -> str:
    """Return what a command prints, or end with what it complains of."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment = {**inherited, "HF_HUB_OFFLINE": "1", "SPECTUNE_HOME": str(folder / "home")}
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8", check=False
    )
    if done.returncode:
        sys.exit(f"wheel: {' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def needed(name: str, known: dict[str, metadata.Distribution], extras: frozenset[str] = frozenset()) -> None:
    """Collect a package and all that it needs, as far as they are installed."""
    key = re.sub(r"[-_.]+", "-", name).lower()
    try:
        found = known.setdefault(key, metadata.distribution(name))
    except metadata.PackageNotFoundError:  # of another platform, say
        return
    for text in found.requires or ():
        requirement = Requirement(text)
        wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in ("", *extras))
        if wanted and re.sub(r"[-_.]+", "-", requirement.name).lower() not in known:
            needed(requirement.name, known, frozenset(requirement.extras))


def link(requirements: list[str], place: Path) -> int:
    """Link the packages that these need into an environment, and return how many they are."""
    known: dict[str, metadata.Distribution] = {}
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            needed(requirement.name, known, frozenset(requirement.extras))
    for package in known.values():
        for top in {file.parts[0] for file in package.files or () if file.parts[0] != ".."}:
            if not (place / top).exists() and top != "__pycache__":
                (place / top).symlink_to(Path(str(package.locate_file(top))))
    return len(known)


def main() -> None:
    """Build, install, use."""
    with tempfile.TemporaryDirectory(prefix="a folder é ") as name:
        folder = Path(name)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        run(*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT, folder=folder)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as opened:
            inside = set(opened.namelist())
        sources = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src/spectune").rglob("*") if p.is_file()}
        missing = {p for p in sources if "__pycache__" not in p} - inside
        foreign = {p for p in inside if not p.startswith("spectune")}
        assert not missing, f"the wheel lacks {sorted(missing)}"
        assert not foreign, f"the wheel has {sorted(foreign)}"

        venv.create(folder / "env", with_pip=False)
        python = folder / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        options = ["-c", ROOT / "constraints.txt"] if os.environ.get("WHEEL") == "full" else ["--no-deps", "--no-index"]
        run(*pip, "--python", python, "install", *options, wheel, folder=folder)
        (site,) = (Path(p) for p in json.loads(run(python, "-c", _SITE, folder=folder)))
        if os.environ.get("WHEEL") != "full":
            (about,) = site.glob("spectune-*.dist-info")
            requirements = metadata.Distribution.at(about).requires or []
            print(f"wheel: {link(requirements, site)} packages linked")

        work = folder / "wörk"
        (work / "a model").mkdir(parents=True)
        (work / "a model" / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        spectune = python.with_name("spectune")
        version = run(spectune, "--version", folder=work).strip()
        assert version == wheel.name.split("-")[1], version
        planned = run(spectune, "plan", "a model", "-m", "svf", "--length", "8", "--no-measure", "--json", folder=work)
        assert json.loads(planned)["rows"][0]["method"] == "svf", planned
        assert "pissa" in run(python, "-m", "spectune", "methods", folder=work)
        used = run(python, "-c", USE, folder=work).strip()
        assert Path(used).is_relative_to(site), used
        print(f"wheel: {wheel.name} installs and runs; {len(inside)} files")


_SITE = "import json, sysconfig; print(json.dumps([sysconfig.get_path('purelib')]))"

if __name__ == "__main__":
    main()
