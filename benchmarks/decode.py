"""A token with an adapter against one without: SmolLM2-135M, all 210 linears, ours and PEFT's, beside W and fused.

A step of decoding with a prompt in the cache, and the pass over the prompt, in batches of 1, 8 and 64 rows; and
`generate`, which takes both and what transformers does around them, W' made anew for each answer; `answers` is
`spectune generate`'s own call on that side against the base's `model.generate`.  Each side
is compared with the same model without an adapter, which shares its weights, the two taking turns; kept are the least
time of each and the median of the ratios.  `of_memory` is the part of a step of the base that reading its weights once
takes, at the speed measured here.  Rows with different adapters: `many.py`.  With one thread (OMP_NUM_THREADS=1) times
are the processor's.

    python benchmarks/decode.py [--dtype fp32 bf16] [--sides lora svf dora pissa lora_xs peft_lora peft_dora ...]
        [--rows 1 8 64] [--kinds decode prefill generate answers] [--length 16] [--tokens 48] [--layers 30] [--rounds 9]
        [--add] [--name decode]
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import peft
import torch
from transformers import DynamicCache

import spectune
from _machine import processor, save, saved
from spectune.bases.generation import cache_key
from spectune.bases.generation import generate as answer
from spectune.planning.probe import clock

OURS = {
    "lora": "lora:rank=16,alpha=32",
    "svf": "svf",
    "dora": "dora:inner=lora,rank=16,alpha=32",
    "pissa": "pissa:rank=16",
    "lora_xs": "lora_xs:rank=16",
    "svft": "svft:pattern=plain",
}
PEFTS = {"peft_lora": False, "peft_dora": True}
FUSED = tuple(f"{method}_fused" for method in OURS)
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAST = torch.tensor([-1])
MANY = 64  # rows, of which whole answers take long


def with_adapter(base: Any, side: str) -> tuple[Any, Callable[[], Any]]:
    """Return a model that shares the base's weights, with an adapter away from its start, and what to ask it within."""
    model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    if side in PEFTS:
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=SEVEN, use_dora=PEFTS[side])
        model: Any = peft.get_peft_model(model, config)
        own = [p for name, p in model.named_parameters() if "lora_" in name]
    else:
        spectune.adapt(model, OURS[side.removesuffix("_fused")])
        own = [p for name, p in model.named_parameters() if ".adapters." in name]
    with torch.no_grad():
        for parameter in own:
            parameter.add_(1e-2)  # about what training makes of it: less, and bf16 would lose a part of W + dW
    model.eval().requires_grad_(False)
    return model, partial(spectune.fused, model) if side.endswith("_fused") else nullcontext


def seconds(run: Callable[[], Any]) -> float:
    start = clock()
    run()
    return clock() - start


def in_turns(base: Callable[[], Any], side: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Return the median of the ratios, and the least time of each."""
    pairs = [(seconds(base), seconds(side)) for _ in range(rounds + 1)][1:]
    return {
        "over_base": round(statistics.median(b / a for a, b in pairs), 3),
        "least_over_least": round(min(b for _, b in pairs) / min(a for a, _ in pairs), 3),
        "base_seconds": round(min(a for a, _ in pairs), 4),
        "seconds": round(min(b for _, b in pairs), 4),
    }


def measure(base: Any, tokenizer: Any, side: str, given: Any) -> dict[str, Any]:
    """Return the times of one side, for each number of rows."""
    model, fused = with_adapter(base, side)
    found: dict[str, Any] = {}
    greedy = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": given.tokens, "min_new_tokens": given.tokens}
    for count in given.rows:
        ids = torch.randint(100, 40_000, (count, given.length), generator=torch.Generator().manual_seed(0))

        def prefill(model: Any, ids: Any = ids) -> Any:
            return lambda: model(input_ids=ids, use_cache=False, logits_to_keep=LAST)

        def decode(model: Any, ids: Any = ids) -> Any:
            cache, key = DynamicCache(), cache_key(model)
            model(input_ids=ids, **{key: cache}, logits_to_keep=LAST)

            def step() -> None:
                model(input_ids=ids[:, :1], **{key: cache}, logits_to_keep=LAST)
                cache.crop(-1)

            return step

        def generate(model: Any, ids: Any = ids, around: Any = nullcontext) -> Any:
            def answer() -> None:
                with around():
                    model.generate(ids, attention_mask=torch.ones_like(ids), logits_to_keep=LAST, **greedy)

            return answer

        times = found[str(count)] = {}
        with torch.inference_mode():
            with fused():
                if "decode" in given.kinds:
                    times["decode"] = in_turns(decode(base), decode(model), 3 * given.rounds)
                if "prefill" in given.kinds:
                    times["prefill"] = in_turns(prefill(base), prefill(model), given.rounds)
            if "answers" in given.kinds and count < MANY and side in OURS:
                texts = tokenizer.batch_decode(ids)
                model.generation_config.min_new_tokens = given.tokens

                def answers(model: Any = model, texts: Any = texts) -> Any:
                    return lambda: answer(model, tokenizer, texts, max_new_tokens=given.tokens, raw=True)

                times["answers"] = in_turns(generate(base), answers(), given.rounds // 3 + 1)
            if "generate" in given.kinds and count < MANY:
                times["generate"] = in_turns(generate(base), generate(model, around=fused), given.rounds // 3 + 1)
    return found


def bytes_a_second() -> float:
    """Return how fast memory is read."""
    buffer = torch.ones(1 << 26)
    return 4 * buffer.numel() / min(seconds(buffer.sum) for _ in range(9))


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--sides", nargs="+", default=[*OURS, *FUSED, *PEFTS])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--kinds", nargs="+", default=["decode", "prefill", "generate", "answers"])
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--add", action="store_true", help="to the file there is, of the same settings")
    parser.add_argument("--name", default="decode")
    given = parser.parse_args()
    about = {key: getattr(given, key) for key in ("length", "tokens", "layers")}
    before = saved(given.name).get(processor(), {}) if given.add else {}
    if before and any(before[key] != value for key, value in about.items()):
        parser.error("--add: the file is of a run with another length, tokens or layers")
    results: dict[str, Any] = before.get("results", {})
    for dtype in given.dtype:
        base, tokenizer = spectune.load_base("smollm2-135m", dtype)
        if given.layers:
            del base.model.layers[given.layers :]
        base.eval().requires_grad_(False)
        size = sum(p.numel() * p.itemsize for p in base.parameters())
        sides = results.setdefault(dtype, {})
        for side in given.sides:
            gc.collect()
            sides[side] = measure(base, tokenizer, side, given)
            first = sides[side].get("1", {})
            if "decode" in first:
                first["decode"]["of_memory"] = round(size / bytes_a_second() / first["decode"]["base_seconds"], 2)
            save(given.name, {**about, "results": results})
            print(dtype, side, {n: {k: v["least_over_least"] for k, v in t.items()} for n, t in sides[side].items()})


if __name__ == "__main__":
    main()
