"""A mixture of experts: time of a training step over the floor, and of decomposing the experts.

A Qwen3-MoE of random weights with 64 experts in each block, 8 for a token.  The floor is the frozen model's forward and
its gradient with respect to the embeddings, in the implementation of experts that is faster here, which PEFT's side has
as well; ours have what transformers takes by default.  Sides take turns, and the median of each one's ratio to the
floor of the same round is kept; times are the processor's.  Decompositions of
one block's experts are timed as `adapt` takes them, in one call, and one call after the other.

    python benchmarks/experts.py [--rows 8] [--length 128] [--rounds 5] [--blocks 2] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from time import process_time
from typing import Any

import peft
import torch
import transformers as tf

import spectune
from _machine import save
from spectune.layers.modules import effective_weight, linear_layers
from spectune.spectral import Request, decompose_many

OURS = {
    "LoRA": "lora:rank=8",
    "DoRA": "dora:rank=8",
    "PiSSA": "pissa:rank=8",
    "SVF": "svf",
    "LoRA-XS": "lora_xs:rank=8",
}
IMPLEMENTATIONS = ("eager", "grouped_mm")


def made(blocks: int) -> Any:
    """Return the model, frozen."""
    torch.manual_seed(0)
    config: Any = tf.Qwen3MoeConfig(
        vocab_size=2048,
        hidden_size=512,
        moe_intermediate_size=256,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_experts=64,
        num_experts_per_tok=8,
    )
    config.head_dim = 64
    return tf.Qwen3MoeForCausalLM(config).requires_grad_(False).train()


def step(model: Any, ids: torch.Tensor) -> float:
    """Return the seconds of a forward and a backward pass, to the embeddings and whatever trains."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    start = process_time()
    model(inputs_embeds=embedded, labels=ids).loss.backward()
    took = process_time() - start
    model.zero_grad(set_to_none=True)
    return took


def sides(blocks: int, fastest: str, only: list[str]) -> dict[str, Any]:
    """Return the adapted models by name."""
    found = {}
    for name, method in OURS.items():
        if only and name not in only:
            continue
        found[name] = spectune.adapt(made(blocks), method, factored=True)
    if only and "PEFT LoRA" not in only:
        return found
    config = peft.LoraConfig(
        r=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    theirs = made(blocks)
    theirs.set_experts_implementation(fastest)
    found["PEFT LoRA"] = peft.get_peft_model(theirs, config)
    return found


def clock(run: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    start = process_time()
    run()
    return process_time() - start


def start_up(model: Any) -> dict[str, float]:
    """Return the seconds to decompose the experts of one block, together and one by one."""
    weights = {n: effective_weight(m) for n, m in linear_layers(model).items() if ".0.mlp.experts." in n}
    found = {}
    for kind, request in {"full": Request("one_sided"), "top 8": Request("top", 8)}.items():
        together = clock(lambda request=request: decompose_many(weights, request, cache=False))

        def one_by_one(request: Request = request) -> None:
            for name, weight in weights.items():
                decompose_many({name: weight}, request, cache=False)

        found |= {f"{kind}, together": together, f"{kind}, one by one": clock(one_by_one)}
    return found


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 8), ("length", 128), ("rounds", 5), ("blocks", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", nargs="*", default=[])
    asked = parser.parse_args()
    ids = torch.randint(0, 2048, (asked.rows, asked.length), generator=torch.Generator().manual_seed(0))
    floor = made(asked.blocks)
    times = {}
    for implementation in IMPLEMENTATIONS:
        floor.set_experts_implementation(implementation)
        step(floor, ids)
        times[implementation] = min(step(floor, ids) for _ in range(2))
    fastest = min(times, key=lambda name: times[name])
    floor.set_experts_implementation(fastest)
    models = sides(asked.blocks, fastest, asked.only)
    ratios: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        step(model, ids)
    for _ in range(asked.rounds):
        least = step(floor, ids)
        for name, model in models.items():
            ratios[name].append(step(model, ids) / least)
    found = {
        "floor_seconds": times,
        "over_floor": {name: round(statistics.median(values), 3) for name, values in ratios.items()},
        "start_up_seconds": {} if asked.only else start_up(floor),
        "asked": vars(asked),
        "threads": torch.get_num_threads(),
    }
    print(found)
    if not asked.only:
        save("experts", found)


if __name__ == "__main__":
    main()
