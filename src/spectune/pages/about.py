"""What a result says of the machine and the versions that it comes from, without naming the host."""

from __future__ import annotations

import datetime
import os
import platform
from importlib import metadata
from pathlib import Path

import psutil
import torch

_PACKAGES = ("spectune", "torch", "transformers", "peft", "trl", "accelerate", "safetensors", "numpy", "scipy")


def describe() -> dict[str, object]:
    """Return the processor, cores, memory, accelerator, versions and date."""
    accelerator = None
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else str(device)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "accelerator": accelerator,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    if "model name" not in known:
        return platform.machine()
    which = [f"{key.removeprefix('cpu ')} {known[key]}" for key in ("cpu family", "model") if key in known]
    return f"{known['model name']} ({', '.join(which)})" if which else known["model name"]  # names may hide what it is


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
