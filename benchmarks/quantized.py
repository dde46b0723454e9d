"""A training job over a base in 4 bits (NF4) beside PEFT's QLoRA, with four methods: peak memory and time.

SmolLM2-135M, r 16 on the seven projections, short chat pairs from film dialogue, batches of 8, a process each.  PEFT's
side is transformers' recipe: bitsandbytes' NF4 with doubly quantized scales, `prepare_model_for_kbit_training`, TRL's
SFTTrainer.  Ours is `spectune train quantize=nf4`, and `quantize=nf4:rank=16` for QPiSSA; decompositions are computed,
not read from a cache.  The peak is what the process held at most (resident) from before the base is loaded, above what
imported libraries take; the base and its loading are in it.

    python benchmarks/quantized.py [--dtype bf16] [--steps 6]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _machine import save
from train_job import BATCH, SEVEN, Peak, pairs

OURS = {
    "lora": ("lora:rank=16,alpha=32", "nf4"),
    "svf": ("svf", "nf4"),
    "pissa": ("pissa:rank=16", "nf4"),
    "qpissa": ("pissa:rank=16", "nf4:rank=16"),
}
SIDES = ("peft", *OURS)


def ours(data: str, dtype: str, steps: int, method: str, quantize: str) -> dict[str, Any]:
    import peft  # noqa: F401 - so that all sides start from the same imports
    import trl  # noqa: F401

    from spectune.training.config import load_config
    from spectune.training.run import train

    with Peak() as peak, tempfile.TemporaryDirectory() as output:
        settings = {"model": "smollm2-135m", "data": data, "output": output, "dtype": dtype, "max_steps": steps}
        settings |= {"method": method, "batch_size": BATCH, "held_out": 0, "seed": 42, "save_steps": 10**6}
        result = train(load_config(None, [f"{k}={v}" for k, v in {**settings, "quantize": quantize}.items()]))
    return {"seconds": result.seconds, "peak_bytes": peak.bytes, "loss": result.history[-1]["loss"]}


def peft(data: str, dtype: str, steps: int) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    from spectune.bases.devices import resolve_dtype
    from spectune.bases.places import model_path

    with Peak() as peak, tempfile.TemporaryDirectory() as output:
        kind = resolve_dtype(dtype)
        path = model_path("smollm2-135m", kind)
        packed = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=kind
        )
        model = AutoModelForCausalLM.from_pretrained(path, dtype=kind, quantization_config=packed)
        model = prepare_model_for_kbit_training(model)
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=SEVEN, task_type="CAUSAL_LM"))
        records = [json.loads(line) for line in Path(data).read_text(encoding="utf-8").splitlines()]
        config = SFTConfig(
            output_dir=output,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-4,
            bf16=kind is torch.bfloat16,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(path)
        trainer = SFTTrainer(
            model=model, args=config, train_dataset=Dataset.from_list(records), processing_class=tokenizer
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_bytes": peak.bytes, "loss": trainer.state.log_history[-2]["loss"]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--side", choices=SIDES, help="this one alone, in this process")
    parser.add_argument("--data")
    args = parser.parse_args()
    if args.side:
        job = (args.data, args.dtype, args.steps)
        print(json.dumps(peft(*job) if args.side == "peft" else ours(*job, *OURS[args.side])))
        return
    results: dict[str, Any] = {"dtype": args.dtype, "steps": args.steps}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "pairs.jsonl"
        data.write_text("\n".join(map(json.dumps, pairs(BATCH * args.steps))), encoding="utf-8")
        for side in SIDES:
            command = [sys.executable, __file__, "--side", side, "--data", str(data)]
            command += ["--dtype", args.dtype, "--steps", str(args.steps)]
            environment = {**os.environ, "SPECTUNE_CACHE": str(Path(folder) / side)}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise SystemExit(done.stderr)
            results[side] = json.loads(done.stdout.strip().splitlines()[-1])
            print(side, results[side], flush=True)
    least = results["peft"]["peak_bytes"]
    results["peak_over_peft"] = {side: round(results[side]["peak_bytes"] / least, 3) for side in OURS}
    print(save("quantized", results))


if __name__ == "__main__":
    main()
