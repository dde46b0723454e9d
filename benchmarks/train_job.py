"""A whole training job against TRL's SFTTrainer with PEFT, both as they come: tokens a second and peak memory.

LoRA r 16 on the seven projections of SmolLM2-135M, short chat pairs from film dialogue, batches of 8 in the same
order, loss on the replies.  The chat template begins each with a system prompt, which Spectune computes once a batch;
a third side, `apart`, is Spectune without that.  Each side runs in a process of its own; memory is its peak above what
imported libraries take.  Sides take turns, `--rounds` times, and the medians are kept.

    python benchmarks/train_job.py [--dtype fp32 bf16] [--steps 12] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from _machine import save

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH = 8


class Peak:
    """Sample this process's resident memory, above what it was at the start."""

    def __enter__(self) -> Peak:
        import psutil

        process = psutil.Process()
        self._start, self.bytes, self._stop = process.memory_info().rss, 0, threading.Event()

        def sample() -> None:
            while not self._stop.wait(0.01):
                self.bytes = max(self.bytes, process.memory_info().rss - self._start)

        self._thread = threading.Thread(target=sample)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


def pairs(count: int) -> list[dict[str, Any]]:
    """Return exchanges of film dialogue of ordinary length as conversations of two turns."""
    from spectune.bases import sources

    turns = [(a.strip(), b.strip()) for a, b in sources.dialogue() if 20 < len(a) < 200 and 20 < len(b) < 200]
    return [
        {"prompt": [{"role": "user", "content": a}], "completion": [{"role": "assistant", "content": b}]}
        for a, b in turns[:count]
    ]


def apart(data: str, dtype: str, steps: int) -> dict[str, Any]:
    from spectune.training.data.packing import Packer

    Packer._attends_to_shared = lambda *_: False  # type: ignore[method-assign]
    return ours(data, dtype, steps)


def ours(data: str, dtype: str, steps: int) -> dict[str, Any]:
    import peft  # noqa: F401 - so that both sides start from the same imports
    import trl  # noqa: F401

    from spectune.training.config import load_config
    from spectune.training.run import train

    with Peak() as peak, tempfile.TemporaryDirectory() as output:
        settings = {"model": "smollm2-135m", "data": data, "output": output, "dtype": dtype, "max_steps": steps}
        settings |= {"method": "lora:rank=16,alpha=32", "batch_size": BATCH, "lr": 1e-4, "held_out": 0}
        settings |= {"schedule": "constant", "warmup": 0, "seed": 42, "save_steps": 10**6}
        result = train(load_config(None, [f"{key}={value}" for key, value in settings.items()]))
    losses = [line["loss"] for line in result.history if "loss" in line]
    return {"tokens": result.tokens_per_second * result.seconds, "seconds": result.seconds, "losses": losses} | {
        "peak_bytes": peak.bytes
    }


def theirs(data: str, dtype: str, steps: int) -> dict[str, Any]:
    import datasets
    import peft
    import torch
    import trl

    import spectune  # noqa: F401
    from spectune.bases.loading import load_base

    with Peak() as peak, tempfile.TemporaryDirectory() as output:
        model, tokenizer = load_base("smollm2-135m", dtype)
        low: dict[str, Any] = {} if dtype == "bf16" else {"bf16": False}
        arguments = trl.SFTConfig(
            output_dir=output,
            per_device_train_batch_size=BATCH,
            max_steps=steps,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.accelerator.is_available(),
            seed=42,
            disable_tqdm=True,
            **low,
        )
        trainer = trl.SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=datasets.load_dataset("json", data_files=data, split="train"),
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(r=16, lora_alpha=32, target_modules=SEVEN),
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    history = trainer.state.log_history
    tokens = max(line.get("num_tokens", 0) for line in history)
    losses = [line["loss"] for line in history if "loss" in line]
    return {"tokens": tokens, "seconds": seconds, "losses": losses, "peak_bytes": peak.bytes}


def run(side: str, data: str, dtype: str, steps: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", side, "--data", data, "--dtype", dtype, "--steps", str(steps)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    parser.add_argument("--name", default="train_job", help="of the file in results/")
    arguments = parser.parse_args()
    if arguments.side:
        side = {"ours": ours, "apart": apart, "theirs": theirs}[arguments.side]
        print("\n" + json.dumps(side(arguments.data, arguments.dtype[0], arguments.steps)))
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "pairs.jsonl"
        data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs(2000)), encoding="utf-8")
        for dtype in arguments.dtype:
            runs: dict[str, list[dict[str, Any]]] = {"ours": [], "apart": [], "theirs": []}
            for _ in range(arguments.rounds):
                for side, found in runs.items():
                    found.append(run(side, str(data), dtype, arguments.steps))
            figures: dict[str, Any] = {}
            for side, found in runs.items():
                figures[side] = {
                    "tokens": round(found[0]["tokens"]),
                    "tokens_per_second": round(statistics.median(r["tokens"] / r["seconds"] for r in found), 1),
                    "peak_mib": round(statistics.median(r["peak_bytes"] for r in found) / 2**20),
                    "losses": [round(loss, 3) for loss in found[0]["losses"]],
                }
            them = figures["theirs"]
            for side, end in (("ours", ""), ("apart", "_apart")):
                us = figures[side]
                figures[f"speed_ratio{end}"] = round(us["tokens_per_second"] / them["tokens_per_second"], 2)
                figures[f"memory_ratio{end}"] = round(us["peak_mib"] / them["peak_mib"], 2)
            results[dtype] = figures
            print(dtype, json.dumps(figures), flush=True)
    save(arguments.name, {"steps": arguments.steps, "rounds": arguments.rounds, "results": results})


if __name__ == "__main__":
    main()
