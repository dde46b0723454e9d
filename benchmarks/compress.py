"""Three rank-16 LoRA adapters on SmolLM2-135M's 210 linears, combined to rank 16: spectune against PEFT.

Both sides get the same factors and weights in one run.  PEFT's add_weighted_adapter(combination_type="svd") takes an
SVD of each dense update; spectune works on the factors.  Errors are relative Frobenius errors over all layers against
the exact weighted sum, in float64.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import spectune
from _machine import save
from spectune.adapters.terms import LayerUpdate, Term
from spectune.layers.adapted import adapted_layers

RANK, WEIGHTS = 16, {"a": 0.7, "b": 0.5, "c": -0.3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=3, help="rounds: five runs of spectune, then one of PEFT")
    parser.add_argument("--name", default="compress", help="of the file in results/")
    options = parser.parse_args()
    adapters = {name: trained(seed) for seed, name in enumerate(WEIGHTS)}
    exact = {layer: dense(adapters, layer) for layer in adapters["a"].layers}

    def ours() -> spectune.Adapter:
        total = None
        for name, weight in WEIGHTS.items():
            part = weight * adapters[name]
            total = part if total is None else total + part
        assert total is not None
        return total.compress(RANK)

    model = peft_model(adapters)

    def theirs() -> None:
        if "sum" in model.peft_config:
            model.delete_adapter("sum")
        model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", combination_type="svd", svd_rank=RANK)

    ours()
    our_times: list[float] = []
    their_times: list[float] = []
    for _ in range(options.rounds):
        our_times += [seconds(ours) for _ in range(5)]
        their_times.append(seconds(theirs))
    compressed = ours()

    def our_delta(layer: str) -> torch.Tensor:
        (term,) = compressed.layers[layer].terms
        return term.trained["B"].double() @ term.trained["A"].double()

    our_error = error(exact, our_delta)
    modules = dict(model.base_model.model.named_modules())

    def their_delta(layer: str) -> torch.Tensor:
        module = modules[layer]
        B, A = module.lora_B["sum"].weight.detach().double(), module.lora_A["sum"].weight.detach().double()
        return module.scaling["sum"] * (B @ A)

    their_error = error(exact, their_delta)
    ours_s, theirs_s = statistics.median(our_times), statistics.median(their_times)
    results = {
        "task": "combine three rank-16 LoRA adapters (weights 0.7, 0.5, -0.3) on SmolLM2-135M to rank 16",
        "linears": len(exact),
        "spectune": {"median_s": ours_s, "times_s": our_times, "relative_error": our_error},
        "peft_add_weighted_adapter_svd": {
            "median_s": theirs_s,
            "times_s": their_times,
            "relative_error": their_error,
        },
        "times_faster": theirs_s / ours_s,
        "error_minus_peft_error": our_error - their_error,
    }
    path = save(options.name, results)
    print(f"spectune {ours_s:.3f} s, PEFT {theirs_s:.1f} s: {theirs_s / ours_s:.0f} times faster")
    print(f"relative error: spectune {our_error:.9f}, PEFT {their_error:.9f}; written to {path}")


def trained(seed: int) -> spectune.Adapter:
    """Return a LoRA of rank 16 on all 210 linears, with random factors of the sizes that training gives."""
    model, _ = spectune.load_base("smollm2-135m", "fp32")
    torch.manual_seed(seed)
    spectune.adapt(model, spectune.LoRA(rank=RANK, alpha=RANK))
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for name, parameter in layer.adapters.named_parameters():
                if name.endswith("B"):  # columns of falling size, as gradients of low rank leave them
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=drawn) * 0.8 ** torch.arange(RANK))
    adapter = spectune.extract(model)
    layers = {
        name: LayerUpdate(layer.shape, tuple(Term(t.method, t.trained) for t in layer.terms))
        for name, layer in adapter.layers.items()
    }
    return spectune.Adapter(layers, adapter.base_model)


def dense(adapters: dict[str, spectune.Adapter], layer: str) -> torch.Tensor:
    """Return the exact weighted sum of one layer's updates, float64."""
    total = torch.zeros(adapters["a"].layers[layer].shape, dtype=torch.float64)
    for name, weight in WEIGHTS.items():
        (term,) = adapters[name].layers[layer].terms
        total += weight * (term.trained["B"].double() @ term.trained["A"].double())
    return total


def error(exact: dict[str, torch.Tensor], made: Callable[[str], torch.Tensor]) -> float:
    """Return the relative Frobenius error over all layers."""
    lost = sum(float((made(layer).double() - delta).square().sum()) for layer, delta in exact.items())
    return (lost / sum(float(delta.square().sum()) for delta in exact.values())) ** 0.5


def peft_model(adapters: dict[str, spectune.Adapter]) -> Any:
    """Return the base with the same adapters in PEFT."""
    base, _ = spectune.load_base("smollm2-135m", "fp32")
    names = list(adapters["a"].layers)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=sorted({n.rpartition(".")[2] for n in names}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = get_peft_model(base, config, adapter_name="a")
        for name in list(adapters)[1:]:
            model.add_adapter(name, config)
    modules = dict(model.base_model.model.named_modules())
    with torch.no_grad():
        for name, adapter in adapters.items():
            for layer in names:
                (term,) = adapter.layers[layer].terms
                modules[layer].lora_A[name].weight.copy_(term.trained["A"])
                modules[layer].lora_B[name].weight.copy_(term.trained["B"])
    return model


def seconds(call: Callable[[], Any]) -> float:
    """Return the seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
