"""The embedded models' spectra, the picture of docs/spectrum.md, and the memory it takes: python benchmarks/spectrum.py

Memory is the peak of a fresh process above what it held after its imports and a small matrix, for synthetic checkpoints
of known shapes, in units of the largest matrix in float32 (Linux).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from _machine import forget_peak, resident, save
from spectune.spectrum.checkpoint import open_checkpoint
from spectune.spectrum.collect import collect
from spectune.spectrum.run import report

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "spectrum.png"
MODELS = ("smollm2-135m", "minilm-l6")
COUNT = 3
CASES = {  # (out, in), dtype
    "square, fp32": ((3072, 3072), torch.float32),
    "square, bf16": ((3072, 3072), torch.bfloat16),
    "tall, fp32": ((6144, 1536), torch.float32),
    "tall, bf16": ((6144, 1536), torch.bfloat16),
    "wide, fp32": ((1536, 6144), torch.float32),
}


def child(folder: str) -> None:
    """Measure a checkpoint and print what it took above a small one."""
    with tempfile.TemporaryDirectory() as scratch:
        collect(open_checkpoint(folder, ["warm"]), Path(scratch))
        forget_peak()
        before, start = resident("VmRSS"), time.perf_counter()
        collect(open_checkpoint(folder, exclude=["warm"]), Path(scratch))
        print(json.dumps({"bytes": resident("VmHWM") - before, "seconds": time.perf_counter() - start}))


def memory() -> dict[str, dict[str, float]]:
    """Return the peaks of all cases."""
    rows = {}
    for name, (shape, dtype) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            held = {f"layers.{i}.weight": torch.randn(shape).to(dtype) for i in range(COUNT)}
            save_file({"warm.weight": torch.randn(64, 64)} | held, Path(folder) / "model.safetensors")
            del held
            command = [sys.executable, __file__, "--child", folder]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        largest = 4 * shape[0] * shape[1]
        rows[name] = {
            "shape": list(shape),
            "matrices": COUNT,
            "largest_mib": round(largest / 2**20, 1),
            "peak_mib": round(found["bytes"] / 2**20, 1),
            "ratio": round(found["bytes"] / largest, 2),
            "seconds": round(found["seconds"], 2),
        }
        print(name, rows[name], flush=True)
    return rows


def spectra() -> dict[str, dict[str, object]]:
    """Return the embedded models' key figures, and draw the first one's picture."""
    found = {}
    for model in MODELS:
        with tempfile.TemporaryDirectory() as out:
            start = time.perf_counter()
            document = report(model, out)
            seconds = time.perf_counter() - start
            if model == MODELS[0]:
                PICTURE.parent.mkdir(exist_ok=True)
                shutil.copyfile(Path(out) / "spectrum.png", PICTURE)
        found[model] = document.model_dump(include={"answer", "summary", "kinds"}) | {"seconds": round(seconds, 1)}
        found[model]["uniform_rank"] = document.recommendation.uniform_rank
        print(model, *document.answer, sep="\n  ", flush=True)
    return found


def main() -> None:
    """Run everything and keep it in results/spectrum.<processor>.json."""
    if "--child" in sys.argv:
        child(sys.argv[-1])
        return
    save("spectrum", {"memory": memory(), "models": spectra()})


if __name__ == "__main__":
    main()
