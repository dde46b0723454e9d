"""Decompositions against LAPACK, PEFT's initialisations and scikit-learn: python benchmarks/decompose.py [PART ...].

Parts: model (the 210 linears of SmolLM2-135M), 2048, 4096, 14336, cache, adapt; all by default.  Both sides of a row
run in turn in one process, and the medians and their ratio are kept in results/decompose.<processor>.json.  OpenMP
waits passively for both, or what else runs on the machine would slow the multi-threaded side many times over.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import gc
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from _machine import path_of, save
from spectune.spectral import Request, certificate, decompose_many, one_sided, svd

HEAD = 1 / 16  # of the triplets make the power-law head of the synthetic weights


def weight(m: int, n: int, seed: int = 0) -> Tensor:
    """Return a power-law head on a Marchenko-Pastur bulk (m x n), the bulk's edge at about 2."""
    generator = torch.Generator().manual_seed(seed)
    head = int(HEAD * min(m, n))
    W = torch.randn(m, n, generator=generator) / math.sqrt(max(m, n))
    U = torch.linalg.qr(torch.randn(m, head, generator=generator))[0]
    V = torch.linalg.qr(torch.randn(n, head, generator=generator))[0]
    return W + (U * (12 * torch.arange(1, head + 1) ** -0.6)) @ V.T


def model_weights() -> dict[str, Tensor]:
    """Return the weights of SmolLM2-135M's linears, without the output embedding."""
    import spectune

    model, _ = spectune.load_base("smollm2-135m", dtype="fp32")
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")
    }


class Table:
    """Rows of results, shown and kept as they come."""

    def __init__(self) -> None:
        path = path_of("decompose")
        self.rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else {}

    def add(self, name: str, ours: list[float], theirs: list[float], target: float | None, **more: object) -> None:
        """Keep one row; `target` is the speed-up wanted."""
        a, b = statistics.median(ours), statistics.median(theirs)
        row = {"ours_s": round(a, 4), "theirs_s": round(b, 4), "ratio": round(b / a, 2), "target": target}
        row |= {"reached": None if target is None else b / a >= target, "runs": len(ours)}
        row |= {"load": round(os.getloadavg()[0], 1)} | more
        self.rows[name] = row
        print(f"{name}: {row}", flush=True)
        self.save()

    def save(self) -> None:
        """Write the file."""
        blas = "mkl" if torch.backends.mkl.is_available() else "other"
        about = {"blas": blas, "capability": torch.backends.cpu.get_cpu_capability()}
        save("decompose", {**about, "rows": dict(sorted(self.rows.items()))})


def in_turn(*sides: Callable[[], object], runs: int) -> list[list[float]]:
    """Return the seconds of each side's runs, made in turn."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(runs):
        for side, seconds in zip(sides, times, strict=True):
            gc.collect()
            start = time.perf_counter()
            side()
            seconds.append(time.perf_counter() - start)
    return times


def lapack(weights: dict[str, Tensor]) -> None:
    """PEFT's `pissa`."""
    for W in weights.values():
        torch.linalg.svd(W, full_matrices=False)


def lowrank(weights: dict[str, Tensor], rank: int) -> None:
    """PEFT's `pissa_niter_16`."""
    for W in weights.values():
        torch.svd_lowrank(W, rank, niter=16)


def truncated(weights: dict[str, Tensor], rank: int) -> None:
    """The basis of LoRA-XS' authors."""
    from sklearn.decomposition import TruncatedSVD

    for W in weights.values():
        TruncatedSVD(rank, n_iter=10, random_state=0).fit(W.numpy())


def ours(weights: dict[str, Tensor], request: Request) -> None:
    """All of them, without the cache."""
    decompose_many(weights, request, cache=False)


def errors(W: Tensor, S: Tensor, V: Tensor, exact: Tensor) -> dict[str, float]:
    """Return the largest relative error of S (rank), and of the energy outside span V (in x rank), over the least."""
    V = torch.linalg.qr(V.double())[0]
    outside = float(W.double().square().sum()) - float((W.double() @ V).square().sum())
    least = float(exact[len(S) :].square().sum())
    values = float(((S.double() - exact[: len(S)]) / exact[: len(S)]).abs().max())
    return {"values": values, "excess": outside / least - 1}


def accuracy(weights: dict[str, Tensor], rank: int) -> dict[str, object]:
    """Return the worst errors of our top triplets and of svd_lowrank's over some weights, and the criterion met."""
    mine, theirs, met, residual = [], [], [], []
    torch.manual_seed(0)
    for W in weights.values():
        exact = torch.linalg.svdvals(W.double())
        found = svd(W, rank, "top")
        mine.append(errors(W, found.S, found.Vh.mT, exact))
        _, S, V = torch.svd_lowrank(W, rank, niter=16)
        theirs.append(errors(W, S, V, exact))
        certified = certificate(W, found)
        met.append(certified.met())
        residual.append(certified.residual)
    worst = {
        f"{side}_{key}": f"{max(r[key] for r in rows):.1e}"
        for side, rows in (("our", mine), ("their", theirs))
        for key in rows[0]
    }
    gain = min(max(r[key] for r in theirs) / max(max(r[key] for r in mine), 1e-9) for key in ("values", "excess"))
    criteria = {criterion: met.count(criterion) for criterion in dict.fromkeys(met)}
    return worst | {"error_ratio": round(gain, 1), "met": criteria, "worst_residual": f"{max(residual):.1e}"}


def triplets(table: Table, label: str, weights: dict[str, Tensor], runs: int, targets: dict[str, float]) -> None:
    """The top 16 and 128, the bottom 64 and the one-sided factors of some weights against each peer."""
    sample = dict(list(weights.items())[:: max(1, len(weights) // 14)])
    for rank in (16, 128):
        a, b, c = in_turn(
            partial(ours, weights, Request("top", rank)),
            partial(lapack, weights),
            partial(lowrank, weights, rank),
            runs=runs,
        )
        table.add(f"{label} top {rank} / linalg.svd", a, b, targets.get(f"top {rank}"))
        table.add(f"{label} top {rank} / svd_lowrank niter 16", a, c, 1.0, **accuracy(sample, rank))
    top = Request("top", 16, certify="residual")
    a, b = in_turn(lambda: ours(weights, top), lambda: lapack(weights), runs=runs)
    table.add(f"{label} top 16, residual 1e-4 / linalg.svd", a, b, None)
    top = Request("top", 16)
    a, b = in_turn(lambda: ours(sample, top), lambda: truncated(sample, 16), runs=runs)
    table.add(f"{label} top 16 / TruncatedSVD n_iter 10", a, b, 10.0)
    bottom, one = Request("bottom", 64), Request("one_sided")
    a, b, c = in_turn(lambda: ours(weights, bottom), lambda: ours(weights, one), lambda: lapack(weights), runs=runs)
    table.add(f"{label} bottom 64 / linalg.svd", a, c, targets.get("bottom"))
    W = next(iter(weights.values()))
    exact = torch.linalg.svdvals(W.double())
    off = float((one_sided(W).S.double() - exact).abs().max() / exact[0])
    table.add(f"{label} one-sided / linalg.svd", b, c, targets.get("one-sided"), S_error=f"{off:.1e}")


def tall(table: Table) -> None:
    """A 14336 x 4096 matrix, each side once or twice: LAPACK takes a minute or more."""
    weights = {"W": weight(14336, 4096)}
    a, b, c = in_turn(
        lambda: ours(weights, Request("one_sided")),
        lambda: ours(weights, Request("top", 16)),
        lambda: lapack(weights),
        runs=1,
    )
    exact = torch.linalg.svdvals(weights["W"])
    off = float((one_sided(weights["W"]).S - exact).abs().max() / exact[0])
    table.add("14336x4096 one-sided / linalg.svd", a, c, 3.0, S_difference=f"{off:.1e}")
    table.add("14336x4096 top 16 / linalg.svd", b, c, None)


def cached(table: Table, weights: dict[str, Tensor]) -> None:
    """The second start against the first."""
    for name, request in (("one-sided", Request("one_sided")), ("top 16", Request("top", 16))):
        first, second = [], []
        for _ in range(2):
            with tempfile.TemporaryDirectory() as folder:
                for times in (first, second, second, second):
                    start = time.perf_counter()
                    found = decompose_many(weights, request, cache=folder)
                    times.append(time.perf_counter() - start)
                    del found
        table.add(f"model second start, {name} / first", second, first, 50.0)


def adapting(table: Table, runs: int) -> None:
    """`adapt` with PiSSA r 16, nothing cached, against PEFT's LoRA with random factors."""
    import peft

    import spectune

    model, _ = spectune.load_base("smollm2-135m", dtype="fp32")
    times: dict[str, list[float]] = {"ours": [], "lora": [], "pissa": []}
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["SPECTUNE_CACHE"] = folder
            start = time.perf_counter()
            spectune.adapt(model, spectune.PiSSA(rank=16))
            times["ours"].append(time.perf_counter() - start)
            spectune.detach(model)
        for kind, initial in (("lora", True), ("pissa", "pissa")):
            config = peft.LoraConfig(
                r=16, lora_alpha=16, target_modules="all-linear", init_lora_weights=initial, task_type="CAUSAL_LM"
            )
            start = time.perf_counter()
            adapted = peft.get_peft_model(model, config)
            times[kind].append(time.perf_counter() - start)
            model = adapted.unload()
    table.add("adapt PiSSA r 16 cold / PEFT LoRA", times["ours"], times["lora"], 0.5)
    table.add("adapt PiSSA r 16 cold / PEFT pissa", times["ours"], times["pissa"], 10.0)


def main() -> None:
    """Run the parts that the command line names."""
    parts = ("model", "2048", "4096", "14336", "cache", "adapt")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*parts, []], help="all by default")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    chosen = arguments.parts or parts
    table = Table()
    weights = model_weights() if {"model", "cache"} & set(chosen) else {}
    torch.linalg.svd(torch.randn(300, 300))  # BLAS and LAPACK are loaded
    if "model" in chosen:
        triplets(table, "model", weights, arguments.runs, {"top 16": 10.0, "bottom": 3.0})
    if "2048" in chosen:
        triplets(table, "2048x2048", {"W": weight(2048, 2048)}, arguments.runs, {"one-sided": 1.5})
    if "4096" in chosen:
        targets = {"top 16": 30.0, "top 128": 30.0, "bottom": 20.0, "one-sided": 1.5}
        triplets(table, "4096x4096", {"W": weight(4096, 4096)}, max(1, arguments.runs - 1), targets)
    if "14336" in chosen:
        tall(table)
    if "cache" in chosen:
        cached(table, weights)
    if "adapt" in chosen:
        adapting(table, arguments.runs)


if __name__ == "__main__":
    sys.exit(main())
