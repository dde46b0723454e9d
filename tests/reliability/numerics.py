"""Decompositions and methods over any shape, dtype, rank, spectrum and scale: `python -m reliability.numerics 10000`.

Everything is compared with NumPy's SVD of the same numbers in float64, and with W + dW written out.
"""

from __future__ import annotations

import collections
import random
import sys
import tempfile
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import spectune
from spectral.spectra import orthonormal
from spectune import Adapter, SpectuneError
from spectune.spectral import one_sided, svd

METHODS = ("lora:rank={r}", "svf", "svf:parametrization=sigmoid", "svft", "svft:pattern=banded,width=2")
METHODS += ("svft:pattern=random,width=1", "pissa:rank={r}", "milora:rank={r}", "lora_xs:rank={r}", "vera:rank={r}")
METHODS += ("adalora:rank={r}", "dora:rank={r}", "dora:inner=svf", "dora:inner=pissa,rank={r}")
DTYPES = {torch.float64: 1e-10, torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float16: 3e-6}  # of W, once raised
SPECTRA = ("normal", "power law", "equal", "clusters", "geometric", "of low rank", "sparse", "one large", "zero")


def matrix(draw: random.Random) -> Tensor:
    """Return a matrix of some shape, spectrum, scale and dtype."""
    m, n = (max(1, round(2 ** draw.uniform(0, 6.6))) for _ in range(2))
    k, seed, kind = min(m, n), draw.randrange(1 << 30), draw.choice(SPECTRA)
    drawn = torch.Generator().manual_seed(seed)
    if kind in ("normal", "sparse", "one large"):
        W = torch.randn(m, n, generator=drawn, dtype=torch.float64)
        if kind == "sparse":
            W *= torch.rand(m, n, generator=drawn) < 0.2
        if kind == "one large":
            W.view(-1)[seed % W.numel()] = 1e5
    else:
        at = torch.arange(k, dtype=torch.float64)
        S = {
            "power law": (at + 1) ** -draw.uniform(0.3, 2),
            "equal": torch.ones(k, dtype=torch.float64),
            "clusters": torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)[(3 * at / k).long()],
            "geometric": 10 ** (-draw.uniform(1, 12) * at / k),
            "of low rank": (at < draw.randint(1, k)).double(),
            "zero": torch.zeros(k, dtype=torch.float64),
        }[kind]
        W = (orthonormal(m, k, seed) * S) @ orthonormal(n, k, seed + 1).mT
    dtype = draw.choice(list(DTYPES))
    scale = {torch.float64: 60.0, torch.float32: 25.0, torch.bfloat16: 25.0, torch.float16: 1.0}[dtype]
    largest = torch.finfo(dtype).max
    return (W * 10 ** draw.uniform(-scale, scale)).clamp(-largest, largest).to(dtype)


def near(found: Tensor, wanted: Tensor, bound: float, what: str) -> None:
    """Raise unless two tensors differ by a bound at most."""
    error = float((found.double() - wanted).abs().max()) if wanted.numel() else 0.0
    assert error <= bound, f"{what}: off by {error:.3g}, allowed {bound:.3g}"


def decomposition(draw: random.Random) -> None:
    """Check one decomposition of one matrix."""
    W = matrix(draw)
    eps = DTYPES[W.dtype]
    exact = W.double()
    m, n = W.shape
    k = min(m, n)
    size = float(exact.abs().max()) or 1.0  # so that nothing is out of NumPy's range
    S = torch.from_numpy(np.linalg.svd((exact / size).numpy(), compute_uv=False)) * size
    largest = float(S[0])
    floor = eps * largest + 1e-44
    which = draw.choice(["full", "top", "bottom", "one_sided"])
    if which == "one_sided":
        L, R, found = one_sided(W)
        near(L.double() @ R.double(), exact, 2 * floor, f"one-sided {m} x {n} {W.dtype}")
        near(found, S, max(floor, 2e-8 * largest), "values, one-sided")  # of W^T W: the root of float64's rounding
        return
    rank = k if which == "full" else draw.randint(1, k)
    U, found, Vh = svd(W, None if which == "full" else rank, which)  # type: ignore[arg-type]
    part = S[k - rank :] if which == "bottom" else S[:rank]
    told = f"{which} {rank} of {m} x {n} {W.dtype}"
    near(found, part, max(floor, 0 if which == "full" else 5e-3 * float(part[0])), f"values, {told}")
    for side in (U.mT, Vh):
        near(side.double() @ side.double().mT, torch.eye(rank, dtype=torch.float64), 2e-5, f"orthonormal, {told}")
    if which == "full":
        near((U.double() * found.double()) @ Vh.double(), exact, 2 * floor, told)
    inside = float(((exact / size) @ Vh.double().mT).square().sum())
    best = float((part / size).square().sum())
    slack = 1e-3 * best + rank * (10 * eps) ** 2 * float((S[0] / size).square())
    assert (best - inside if which != "bottom" else inside - best) <= slack, f"span, {told}: {inside} and {best}"


def method(draw: random.Random) -> None:
    """Check one method on one layer: forward, merged, and saved and loaded, against W + dW written out."""
    W = matrix(draw)
    while not 1e-3 < float(W.abs().max()) < 1e3:  # where float32's own range is not in question
        W = matrix(draw)
    W = W if W.dtype == torch.float64 else W.float()
    out_features, in_features = W.shape
    layer = nn.Linear(in_features, out_features, dtype=W.dtype)
    layer.weight.data.copy_(W)
    model: Any = nn.Sequential(layer).eval()
    text = draw.choice(METHODS).format(r=draw.randint(1, min(W.shape)))
    spectune.adapt(model, text)
    drawn = torch.Generator().manual_seed(draw.randrange(1 << 30))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=drawn).to(parameter)
    adapter = spectune.extract(model)
    x = torch.randn(3, in_features, generator=drawn).to(W.dtype)
    new = W.double() + adapter.delta("0").double()
    wanted = x.double() @ new.mT + layer.bias.detach().double()
    products = x.double().abs() @ (W.double().abs() + adapter.delta("0").double().abs()).mT
    bound = 2e-5 * (1 + float(products.max()))
    y = model(x).detach()
    near(y, wanted, bound, f"forward of {text} on {tuple(W.shape)}")
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(folder)
        again = Adapter.load(folder)
    spectune.detach(model)
    spectune.attach(model, again)
    near(model(x).detach(), y.double(), bound, f"{text}, saved and loaded")
    spectune.merge(model)
    near(model(x).detach(), wanted, 2 * bound, f"{text}, merged")


def case(draw: random.Random) -> str:
    """Check one thing and return what it was; or "refused" where a sentence says why."""
    one = draw.choice([decomposition, decomposition, decomposition, method])
    try:
        one(draw)
    except SpectuneError as error:
        return f"{one.__name__} refused: {str(error)[:60]}"
    return one.__name__


def main() -> None:
    """Check as many cases as the argument says, from a seed on."""
    count, first = (int(text) for text in (*sys.argv[1:], "0")[:2])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    outcomes: collections.Counter[str] = collections.Counter()
    for seed in range(first, first + count):
        try:
            outcomes[case(random.Random(seed))] += 1
        except AssertionError as error:
            outcomes["WRONG"] += 1
            print(f"seed {seed}: {error}", flush=True)
    for outcome, times in outcomes.most_common():
        print(f"{times} {outcome}")


if __name__ == "__main__":
    main()
