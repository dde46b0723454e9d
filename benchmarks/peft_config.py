"""One method by way of `spectune.adapt` and by way of PEFT: the start, warm from the cache, and a training step.

SmolLM2-135M, all 210 linears.  Sides take turns, PEFT's own LoRA among them, and the median of the ratios of one round
is kept.

    python benchmarks/peft_config.py [--dtype fp32] [--batch 4] [--rounds 5] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import peft

import spectune
import spectune.peft as ours
from _machine import save
from spectune.planning.probe import clock
from train_step import SEVEN, batch, seconds, train_step

PAIRS: dict[str, tuple[str, Any]] = {
    "SVF": ("svf", lambda: ours.SVFConfig(factored=True)),
    "SVFT banded 8": ("svft:pattern=banded,width=8", lambda: ours.SVFTConfig(pattern="banded", factored=True)),
    "MiLoRA": ("milora:rank=16,dropout=0.0", lambda: ours.MiLoRAConfig(r=16, lora_dropout=0.0)),
    "LoRA-XS": ("lora_xs:rank=16", lambda: ours.LoRAXSConfig(r=16)),
}


def base(dtype: str) -> Any:
    return spectune.load_base("smollm2-135m", dtype)[0]


def started(make: Any, dtype: str) -> tuple[Any, float]:
    """Return a model with its adapter and the seconds that putting it on took, base not included."""
    model = base(dtype)
    begin = clock()
    return make(model), clock() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[])
    asked = parser.parse_args()
    inputs, results = batch(asked.batch), {}
    for name, (method, config) in PAIRS.items():
        if asked.only and name not in asked.only:
            continue
        sides = {
            "adapt": lambda model, method=method: spectune.adapt(model, method, factored=True),
            "peft": lambda model, config=config: peft.get_peft_model(model, config()),
        }
        started(sides["adapt"], asked.dtype)  # the cache has the decompositions from here on
        models, starts = {}, {}
        for side, make in sides.items():
            models[side], starts[side] = started(make, asked.dtype)
        lora = peft.get_peft_model(base(asked.dtype), peft.LoraConfig(r=16, lora_alpha=32, target_modules=SEVEN))
        steps = {side: train_step(model, inputs) for side, model in {**models, "lora": lora}.items()}
        for step in steps.values():
            step()
        rounds = [{side: seconds(step) for side, step in steps.items()} for _ in range(asked.rounds)]
        results[name] = {
            "step_peft_over_adapt": round(statistics.median(r["peft"] / r["adapt"] for r in rounds), 3),
            "step_over_peft_lora": round(statistics.median(r["peft"] / r["lora"] for r in rounds), 3),
            "start_seconds": {side: round(value, 3) for side, value in starts.items()},
        }
        print(f"{name:16s} {results[name]}", flush=True)
        about = {"dtype": asked.dtype, "batch": asked.batch, "rounds": asked.rounds, "peft": peft.__version__}
        save("peft_config", {**about, "results": results})


if __name__ == "__main__":
    main()
