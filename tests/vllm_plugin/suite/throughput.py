"""Tokens a second in vLLM with as many adapters as rows in a batch: SVF by the plug-in, vLLM's own LoRA, the base.

Run by `run.py --throughput` in an environment with vLLM, in one process with one thread.  The three take turns in one
engine; medians are kept, by the processor's time, of which other programs take nothing.  `SPECTUNE_VLLM_BASES=int8`
does it with singular vectors in 8 bits.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import spectune
from serve import engine, make_base, move

HERE = Path(__file__).parent
KINDS = {"svf": "svf", "lora, rank 16": "lora:rank=16"}
PROMPT, LENGTH = [5, 6, 7, 8, 9, 10, 11, 12], 16


def adapters(model: Any, folder: Path, method: str, count: int) -> list[Path]:
    """Write so many adapters of a method."""
    spectune.adapt(model, method, name="one")
    found = []
    for i in range(count):
        move(model, "one", 0.02)
        spectune.extract(model, "one").save(folder / f"{i}")
        found.append(folder / f"{i}")
    spectune.detach(model)
    return found


def timed(llm: Any, requests: list[Any], rows: int) -> float:
    """Return the tokens of a batch in a second of the processor's time."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True, detokenize=False)
    start = time.process_time()
    llm.generate([{"prompt_token_ids": PROMPT}] * rows, sampling, lora_request=requests, use_tqdm=False)
    return rows * LENGTH / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    from vllm.lora.request import LoRARequest

    from spectune.pages.about import describe

    most = max(args.counts)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = make_base(folder / "base", width=512, layers=4)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        requests: dict[str, list[Any]] = {"base": [None] * most}
        for number, (kind, method) in enumerate(KINDS.items()):
            paths = adapters(model, folder / f"{number}", method, most)
            first = 1 + number * most
            requests[kind] = [LoRARequest(f"{number}-{i}", first + i, str(path)) for i, path in enumerate(paths)]
        llm = engine(base, max_loras=most, max_cpu_loras=2 * most, max_num_seqs=most, max_num_batched_tokens=4096)
        rates: dict[str, dict[str, float]] = {}
        for rows in args.counts:
            for kind in requests:  # loads what is not loaded
                timed(llm, requests[kind][:rows], rows)
            runs = [{kind: timed(llm, of[:rows], rows) for kind, of in requests.items()} for _ in range(args.rounds)]
            rates[str(rows)] = {kind: round(statistics.median(run[kind] for run in runs), 1) for kind in requests}
            print(rows, rates[str(rows)], flush=True)
    with contextlib.suppress(AttributeError):
        llm.llm_engine.engine_core.shutdown()
    told = {"machine": describe(), "rows_and_adapters": rates}
    path = HERE / "throughput.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    bases = os.environ.get("SPECTUNE_VLLM_BASES", "model")
    path.write_text(json.dumps({**before, bases: told}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
