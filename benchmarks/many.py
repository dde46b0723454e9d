"""Many adapters in one batch against one for all rows: SmolLM2-135M, all 210 linears, ours and PEFT's `adapter_names`.

A batch of 64 rows has 1, 8 or 64 different adapters in turn, one of 256 rows has 256.  The time is compared with that
of the same batch with one adapter activated on the same side, the two taking turns; kept is the median of the ratios.
`prefill` is a pass over prompts, `decode` a pass over one more token with the prompts in the cache, both in a context
that has been entered; `first` is the prefill that enters it, as the first of a new batch does, with stacks kept from
others (PEFT has nothing to enter).  `floor_of_memory` is what reading the factors of every adapter once, at the speed
measured here, would make of a step of decoding.  With one thread (OMP_NUM_THREADS=1) times are the processor's.

    python benchmarks/many.py [--dtype fp32 bf16] [--methods svf lora_xs lora peft_lora] [--counts 1 8 64 256]
        [--rows 64] [--length 16] [--layers 30] [--rounds 5] [--decode-rounds 15] [--name many]
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any

import peft
import torch
from transformers import DynamicCache

import spectune
from _machine import save
from spectune.bases.generation import cache_key
from spectune.planning.probe import clock

METHODS = {"svf": "svf", "lora_xs": "lora_xs:rank=16", "lora": "lora:rank=16,alpha=32"}
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAST = torch.tensor([-1])  # as a number, PyTorch multiplies each row of a batch by a copy of the output embedding
Step = Callable[[dict[str, Any]], Any]


class Ours:
    """Adapters of a method on a model: `activate` for one, `route` for many."""

    def __init__(self, model: Any, method: str, count: int) -> None:
        self.model, self.stacks = model, {}
        for i in range(count):
            spectune.adapt(model, METHODS[method], name=f"a{i}")
        change(p for name, p in model.named_parameters() if ".adapters." in name)
        model.requires_grad_(False)

    def one(self) -> Any:
        spectune.activate(self.model, "a0")
        return nullcontext(self.model)

    @contextmanager
    def many(self, names: list[str]) -> Any:
        with spectune.route(self.model, names, stacks=self.stacks):
            yield self.model


class Peft:
    """LoRA adapters of PEFT on a model: `set_adapter` for one, `adapter_names` for many."""

    def __init__(self, model: Any, method: str, count: int) -> None:
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=SEVEN)
        self.model: Any = peft.get_peft_model(model, config, adapter_name="a0")
        for i in range(1, count):
            self.model.add_adapter(f"a{i}", config)
        change(p for name, p in self.model.named_parameters() if "lora_" in name)
        self.model.eval().requires_grad_(False)

    def one(self) -> Any:
        self.model.set_adapter("a0")
        return nullcontext(self.model)

    @contextmanager
    def many(self, names: list[str]) -> Any:
        yield lambda **inputs: self.model(adapter_names=names, **inputs)


def change(parameters: Any) -> None:
    """Move adapters from where they start, where some are zero."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(1e-3)


def seconds(run: Callable[[], Any]) -> float:
    start = clock()
    run()
    return clock() - start


def timed(
    side: Any, names: list[str], known: dict[str, Any], ids: torch.Tensor, rounds: int, decode_rounds: int
) -> dict[str, Any]:
    """Return the median ratios of a batch with these adapters to one with one adapter, and the times of both."""

    def prefill(model: Any) -> float:
        return seconds(lambda: model(input_ids=ids, use_cache=False, logits_to_keep=LAST))

    def decode(model: Any) -> float:
        took = seconds(lambda: model(input_ids=ids[:, :1], **known, logits_to_keep=LAST))
        for cache in known.values():
            cache.crop(-1)
        return took

    def turns(step: Callable[[Any], float], times: int) -> list[tuple[float, float, float]]:
        """Return the times with one adapter, with many on entering the context, and with many in it."""
        found = []
        for _ in range(times + 1):
            with side.one() as model:
                one = step(model)
            with side.many(names) as model:
                found.append((one, step(model), step(model)))
        return found[1:]

    def told(pairs: list[tuple[float, float]]) -> dict[str, float]:
        return {
            "many_over_one": round(statistics.median(many / one for one, many in pairs), 3),
            "one_seconds": round(statistics.median(one for one, _ in pairs), 4),
            "many_seconds": round(statistics.median(many for _, many in pairs), 4),
        }

    prompts, tokens = turns(prefill, rounds), turns(decode, decode_rounds)
    return {
        "first": told([(one, first) for one, first, _ in prompts]),
        "prefill": told([(one, many) for one, _, many in prompts]),
        "decode": told([(one, many) for one, _, many in tokens]),
    }


def bytes_a_second() -> float:
    """Return how fast memory is read."""
    buffer = torch.ones(1 << 26)
    return 4 * buffer.numel() / statistics.median(seconds(buffer.sum) for _ in range(9))


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--methods", nargs="+", default=[*METHODS, "peft_lora"])
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--decode-rounds", type=int, default=15)
    parser.add_argument("--name", default="many")
    given = parser.parse_args()
    results: dict[str, Any] = {}
    about = {key: getattr(given, key) for key in ("length", "layers", "rounds", "decode_rounds")}
    for large in sorted({count > given.rows for count in given.counts}):
        counts = [count for count in given.counts if (count > given.rows) == large]
        for dtype in given.dtype:
            for method in given.methods:
                measure(given, dtype, method, counts, results)
                save(given.name, {**about, "results": results})


def measure(given: Any, dtype: str, method: str, counts: list[int], results: dict[str, Any]) -> None:
    """Add the results of one side with so many adapters at once."""
    gc.collect()
    model, _ = spectune.load_base("smollm2-135m", dtype)
    if given.layers:
        del model.model.layers[given.layers :]
    known = {cache_key(model): DynamicCache()}  # by the model's own name for it, which PEFT's does not tell
    rows = max(given.rows, *counts)
    ids = torch.randint(100, 40_000, (rows, given.length), generator=torch.Generator().manual_seed(0))
    side = (Peft if method == "peft_lora" else Ours)(model.eval(), method, max(counts))
    with torch.no_grad():
        with side.one() as one:
            one(input_ids=ids, **known, logits_to_keep=LAST)
        slower = 4 if method == "peft_lora" and max(counts) > 64 else 1  # so many in a loop take their time
        for count in counts:
            names = [f"a{i % count}" for i in range(rows)]
            found = timed(
                side, names, known, ids, max(2, given.rounds // slower), max(3, given.decode_rounds // slower)
            )
            if method == "lora":  # the least that reading every row's own factors could cost
                size = sum(p.numel() for key, p in model.named_parameters() if ".adapters.a0." in key)
                read = (count - 1) * size * model.dtype.itemsize / bytes_a_second()
                found["decode"]["floor_of_memory"] = round(1 + read / found["decode"]["one_seconds"], 3)
            results[f"{method} {dtype} {count} of {rows}"] = found
            ratios = "  ".join(f"{kind} {value['many_over_one']:.3f}" for kind, value in found.items())
            ratios += f" (memory alone {found['decode']['floor_of_memory']:.3f})" if method == "lora" else ""
            print(f"{method:9s} {dtype} {count:3d} adapters, {rows} rows: {ratios}", flush=True)


if __name__ == "__main__":
    main()
