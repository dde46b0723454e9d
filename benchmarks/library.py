"""A thousand SVF adapters of SmolLM2-135M in one library: memory, the first use of each, activation in memory.

python benchmarks/library.py            writes results/library.<processor>.json
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import psutil
import torch

import spectune
from _machine import save
from spectune import Library
from spectune.layers.adapted import adapted_layers
from spectune.transformer2.pool import Pool


def fill(path: Path, count: int) -> None:
    """Write a library of random SVF adapters."""
    model, _ = spectune.load_base("smollm2-135m", "bf16")
    spectune.adapt(model, spectune.SVF(), name="made")
    adapter = spectune.extract(model, "made")
    spectune.detach(model, "made")
    library = Library(path)
    for i in range(count):
        for layer in adapter.layers.values():
            layer.terms[0].trained["z"].normal_(1, 0.05)
        library.add(f"a{i}", adapter)


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--activations", type=int, default=200)
    given = parser.parse_args()
    process = psutil.Process()
    with tempfile.TemporaryDirectory() as folder:
        writer = get_context("spawn").Process(target=fill, args=(Path(folder) / "library", given.count))
        writer.start()  # apart, so that its memory is not there to be used again
        writer.join()
        model, _ = spectune.load_base("smollm2-135m", "bf16")
        start = time.perf_counter()
        library = Library.open(Path(folder) / "library")
        opened = time.perf_counter() - start
        pool = Pool(model, library)
        pool.activate({"a0": 1.0})  # the bases, which all share
        before = process.memory_info().rss
        start = time.perf_counter()
        for name in library.names:
            pool.load(name)
        loading = (time.perf_counter() - start) / given.count
        held = process.memory_info().rss - before
        drawn = torch.randint(given.count, (given.activations,), generator=torch.Generator().manual_seed(0)).tolist()
        for i in range(pool.slots):
            pool.activate({f"a{i}": 1.0})  # every slot is there
        times = []
        for i in drawn:
            start = time.perf_counter()
            pool.activate({f"a{i}": 1.0})
            times.append(time.perf_counter() - start)
        assert len(adapted_layers(model)) == 210
    results = {
        "adapters": given.count,
        "bytes_in_memory": pool.bytes,
        "resident_growth_bytes": held,
        "open_seconds": opened,
        "first_use_seconds": loading,
        "activation_median_seconds": statistics.median(times),
        "activation_p99_seconds": sorted(times)[int(0.99 * len(times))],
    }
    print(results)
    print(save("library", results))


if __name__ == "__main__":
    main()
