"""What this machine has, and whether each method works on it: a document for a bug report."""

from __future__ import annotations

import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import psutil
import torch
import torch.nn.functional as F

from spectune.bases.devices import default_device, fast_bf16
from spectune.bases.embedded import EMBEDDED
from spectune.home import cache_dir
from spectune.methods import METHODS, parse
from spectune.model.adapting import adapt
from spectune.model.lifecycle import detach
from spectune.spectral import cache

_PACKAGES = ("spectune", "torch", "transformers", "accelerate", "datasets", "trl", "safetensors", "huggingface_hub")
_EXTRAS = {
    "demo": ("sentencepiece", "google.protobuf"),
    "rl": ("reasoning_gym",),
    "compare": ("scipy",),
    "ray": ("ray",),
    "serve": ("fastapi", "uvicorn"),
    "peft": ("peft",),
    "kernels": ("triton",),
    "lm-evaluation-harness": ("lm_eval",),
}
_STEPS = 3


def examine(tell: Callable[[int, int, str], None] = lambda done, total, what: None) -> dict[str, object]:
    """Return versions, devices, what is installed of the extras, and a short test of every method.

    Args:
        tell: called with how many tests are done, of how many, and the next one's name.
    """
    device = default_device()
    tests = []
    with _no_cache():
        for done, name in enumerate(METHODS):
            tell(done, len(METHODS), name)
            tests.append(_test(name, device))
    extras = {name: _missing(packages) for name, packages in _EXTRAS.items()}
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "machine": {
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "processors": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory": psutil.virtual_memory().total,
        },
        "devices": _devices(),
        "device": str(device),
        "fast_bf16": fast_bf16(device),
        "kernels": _kernels(),
        "extras": {name: "installed" if not gone else f"lacks {', '.join(gone)}" for name, gone in extras.items()},
        "models": {name: _version(embedded.package) for name, embedded in EMBEDDED.items()},
        "caches": {"home": str(cache_dir()), "decompositions": str(cache.directory() or "off")},
        "tests": tests,
        "works": all(test["works"] for test in tests),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _missing(packages: tuple[str, ...]) -> list[str]:
    def there(name: str) -> bool:
        try:
            return find_spec(name) is not None
        except (ImportError, ValueError):
            return False

    return [name for name in packages if not there(name)]


def _devices() -> list[dict[str, object]]:
    found: list[dict[str, object]] = [{"name": "cpu", "what": platform.processor() or platform.machine()}]
    for i in range(torch.cuda.device_count()) if torch.cuda.is_available() else ():
        about = torch.cuda.get_device_properties(i)
        capability = f"{about.major}.{about.minor}"
        found.append({"name": f"cuda:{i}", "what": about.name, "memory": about.total_memory, "capability": capability})
    if torch.backends.mps.is_available():
        found.append({"name": "mps", "what": "Apple"})
    return found


def _kernels() -> str:
    if find_spec("triton") is None:
        return "PyTorch's products (triton is not installed)"
    return "Triton on CUDA" if torch.cuda.is_available() else "PyTorch's products (Triton needs a CUDA device)"


@contextmanager
def _no_cache() -> Iterator[None]:
    before = os.environ.get("SPECTUNE_CACHE")
    os.environ["SPECTUNE_CACHE"] = "off"  # so that the test computes, and writes nothing
    try:
        yield
    finally:
        if before is None:
            del os.environ["SPECTUNE_CACHE"]
        else:
            os.environ["SPECTUNE_CACHE"] = before


def _test(name: str, device: torch.device) -> dict[str, object]:
    """Adapt a small model by a method, train it for a few steps and take the adapter off again."""
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():  # a run of three steps is too short for a schedule, and that is well
            warnings.simplefilter("ignore")
            why = _wrong(name, device)
    except Exception as error:  # whatever is broken here is what is asked for
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return {"method": name, "works": why is None, "seconds": round(time.perf_counter() - start, 2), "why": why}


def _wrong(name: str, device: torch.device) -> str | None:
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(48, 32), torch.nn.GELU(), torch.nn.Linear(32, 48)).to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 6)
    x, y = (torch.randn(64, 48, generator=generator).to(device) for _ in range(2))
    with torch.no_grad():
        before = model(x)
    method = parse(name)
    small = f"{name}:rank=4" if getattr(method, "rank", 0) and name != "dora" else name
    adapt(model, small)
    with torch.no_grad():
        drift = float((model(x) - before).abs().max())
    if not drift < 1e-3:
        return f"the adapter changes the model by {drift:.2g} before it is trained"
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=method.learning_rate)
    losses = []
    for _ in range(_STEPS):
        loss = F.mse_loss(model(x), y)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        losses.append(float(F.mse_loss(model(x), y)))
    if not losses[-1] < losses[0]:
        return f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f} in {_STEPS} steps"
    detach(model)
    with torch.no_grad():
        if not torch.equal(model(x), before):
            return "the model is not what it was after the adapter was taken off"
    return None


def text_of(document: Mapping[str, Any]) -> str:
    """Return what to paste into a bug report."""
    gigabytes = document["machine"]["memory"] / 1e9
    lines = [f"{name:<16} {version or 'not installed'}" for name, version in document["versions"].items()]
    machine = document["machine"]
    lines += [f"{'system':<16} {machine['system']}"]
    lines += [f"{'processors':<16} {machine['processors']} ({machine['threads']} threads, {gigabytes:.0f} GB)"]
    for device in document["devices"]:
        more = f", {device['memory'] / 1e9:.0f} GB, {device['capability']}" if "memory" in device else ""
        lines.append(f"{device['name']:<16} {device['what']}{more}")
    lines += [f"{'computes on':<16} {document['device']}, {'bf16' if document['fast_bf16'] else 'fp32'}"]
    lines += [f"{'kernels':<16} {document['kernels']}"]
    lines += [f"{name:<16} {said}" for name, said in document["extras"].items() if len(name) < 16]
    lines += [f"{name:<16} {version or 'not installed'}" for name, version in document["models"].items()]
    lines += [f"{name:<16} {place}" for name, place in document["caches"].items()]
    for test in document["tests"]:
        said = f"works ({test['seconds']:.2f} s)" if test["works"] else f"FAILS: {test['why']}"
        lines.append(f"{test['method']:<16} {said}")
    return "\n".join(lines)
