"""What L and R take in vLLM's plug-in and how far answers are off, in the model's dtype and in 8 bits; without vLLM.

SVF and LoRA-XS r 16 over the seven projections of blocks of SmolLM2-135M in bf16; error is |y - exact| / |exact| of the
update's part of an answer, the exact one in float64 over the exact singular vectors, the median over layers; bytes are
over W's.

    python benchmarks/vllm_bases.py [--blocks 0 10 20] [--name vllm_bases]
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

import spectune
from _machine import save
from spectune.adapters.terms import Term
from spectune.vllm.cores import Bound, shares_of

METHODS = ("svf", "lora_xs:rank=16")


def measure(layer: Any, dtype: torch.dtype) -> dict[str, float]:
    """Return error and bytes of one layer's only update, by how L and R are kept."""
    update = next(iter(layer.adapters["default"]))
    basis = {name: t.detach().float() for name, t in layer.bases[update.basis_key].tensors().items()}
    trained = {name: t.detach().float() for name, t in update.trained().items()}
    (share,) = shares_of("layer", (Term(update.method, trained, 1.0, basis),)).values()
    x = torch.randn(32, layer.in_features).to(dtype)
    exact = x.double() @ update.method.factors({k: v.double() for k, v in (basis | trained).items()}).dense().mT
    found, same = {}, lambda matrix: matrix
    for kind, eight_bits in (("model", False), ("int8", True)):
        bound = Bound(share, 1, slice(None), torch.empty(0, dtype=dtype), same, same, eight_bits=eight_bits)
        bound.set(0, share)
        y = torch.zeros(32, layer.out_features, dtype=torch.float64)
        bound.add(x, y, torch.zeros(32, dtype=torch.long))
        found[f"error, {kind}"] = float((y - exact).norm() / exact.norm())
        found[f"bytes, {kind}"] = (bound.left.bytes + bound.right.bytes) / (layer.weight.numel() * dtype.itemsize)
    return found


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 10, 20])
    parser.add_argument("--name", default="vllm_bases")
    given = parser.parse_args()
    torch.manual_seed(0)
    results = {}
    for method in METHODS:
        model, _ = spectune.load_base("smollm2-135m", "bf16")
        model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in given.blocks)
        spectune.adapt(model, method)
        layers = [module for module in model.modules() if hasattr(module, "adapters")]
        with torch.no_grad():
            for layer in layers:
                for parameter in layer.adapters.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
        each = [measure(layer, torch.bfloat16) for layer in layers]
        results[method] = {key: round(statistics.median(one[key] for one in each), 4) for key in each[0]}
        print(method, results[method])
    save(given.name, {"blocks": given.blocks, "results": results})


if __name__ == "__main__":
    main()
