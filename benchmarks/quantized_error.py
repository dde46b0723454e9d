"""What 4 bits (NF4) lose of a base, alone and with a low-rank part of each weight beside, by its rank.

SmolLM2-135M in fp32, the linear layers but the output embedding.  error: ||W - W~||_F / ||W||_F over all of them.
kl: of the answers, mean over the tokens of this repository's README, in nats, base to packed base.  bits: of a weight,
L and R in 16 bits included.  seconds: of packing.

    python benchmarks/quantized_error.py [--ranks 16 64] [--refine 0 5]
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from _machine import save
from spectune.bases.loading import load_base
from spectune.bases.quantizing import pack_the_rest
from spectune.layers.modules import effective_weight, linear_layers
from spectune.layers.packed import is_packed

_TOKENS, _WINDOW = 256, 256
_NF4 = 4 + 8 / 64 + 32 / 64 / 256  # bits: scales of 64 values in 8 bits, and of 256 of these in 32


def _logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits.log_softmax(-1).flatten(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--refine", type=int, nargs="+", default=[0, 5])
    options = parser.parse_args()
    base, tokenizer = load_base("smollm2-135m", "fp32")
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[0, :_TOKENS]
    ids = ids[: len(ids) // _WINDOW * _WINDOW].view(-1, _WINDOW)
    wanted, weights = _logits(base, ids), {n: effective_weight(layer) for n, layer in linear_layers(base).items()}
    rows = []
    for text in ["nf4", *(f"nf4:rank={r},refine={k}" for r in options.ranks for k in options.refine)]:
        began = time.perf_counter()
        if text == "nf4":
            model: Any = load_base("smollm2-135m", "fp32", quantize=text)[0]
        else:
            model = copy.deepcopy(base)
            pack_the_rest(model, text, torch.float32, None)
        seconds = time.perf_counter() - began
        lost = size = beside = count = 0.0
        for name, layer in linear_layers(model).items():
            if is_packed(layer):
                W = weights[name].detach()
                lost += float((W - effective_weight(layer)).square().sum())
                size += float(W.square().sum())
                count += W.numel()
                beside += sum(
                    t.numel() for t in (getattr(layer, "left", None), getattr(layer, "right", None)) if t is not None
                )
        kl = float((wanted.exp() * (wanted - _logits(model, ids))).sum(-1).mean())
        rows.append(
            {
                "quantize": text,
                "error": (lost / size) ** 0.5,
                "kl": kl,
                "bits": _NF4 + 16 * beside / count,
                "seconds": seconds,
            }
        )
        print(rows[-1], flush=True)
    print(save("quantized_error", {"tokens": ids.numel(), "rows": rows}))


if __name__ == "__main__":
    main()
