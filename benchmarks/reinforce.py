"""Reinforcement learning against TRL's GRPOTrainer with PEFT, both as they come: tokens a second and peak memory.

LoRA r 16 on the seven projections of SmolLM2-135M, 8 completions of 32 tokens for each of 4 prompts, of film dialogue
behind a text of `--prompt` tokens that all begin with, no KL divergence, one step of learning on each batch.  Both
draw at temperature 1 from the same prompts in the same order.  A step is sampling, which is the call that draws the
completions, and learning, which is everything else, rewards included; the first step of each run is left out.  Each
side runs in a process of its own, in turns, and the medians are kept; memory is its peak above what imported libraries
take.  With one thread (OMP_NUM_THREADS=1) times are the processor's.

    python benchmarks/reinforce.py [--dtype fp32 bf16] [--steps 4] [--rounds 3] [--prompt 0 256] [--name reinforce]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _machine import save
from train_job import SEVEN, Peak, pairs

PROMPTS, SAMPLES, TOKENS = 4, 8, 32


def reward(completions: Sequence[Any], **_: Any) -> list[float | None]:
    """Return something that differs between completions: the part of their letters that are vowels."""
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]


class Watch:
    """Notes when sampling begins and ends, and how many tokens it draws."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.sampling: list[float] = []
        self.tokens: list[int] = []

    def around(self, call: Callable[..., Any], count: Callable[[Any], int]) -> Callable[..., Any]:
        """Return a call that is noted."""
        from spectune.planning.probe import clock

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.starts.append(start := clock())
            found = call(*args, **kwargs)
            self.sampling.append(clock() - start)
            self.tokens.append(count(found))
            return found

        return noted

    def figures(self) -> dict[str, Any]:
        """Return medians over the steps between the first and the last."""
        steps = [b - a for a, b in zip(self.starts[1:-1], self.starts[2:], strict=True)]
        sampling = self.sampling[1:-1]
        return {
            "tokens": statistics.median(self.tokens[1:-1]),
            "sampling": statistics.median(sampling),
            "learning": statistics.median(b - a for a, b in zip(sampling, steps, strict=True)),
        }


def ours(data: str, dtype: str, steps: int) -> dict[str, Any]:
    import peft  # noqa: F401 - so that both sides start from the same imports
    import trl  # noqa: F401

    from spectune.training.config import load_config
    from spectune.training.run import train
    from spectune.training.tasks.reinforce import task

    watch = Watch()
    task.sample = watch.around(task.sample, lambda groups: sum(len(c) for group in groups for c in group))
    with Peak() as peak, tempfile.TemporaryDirectory() as output:
        settings = {"task": "reinforce", "model": "smollm2-135m", "data": data, "output": output, "dtype": dtype}
        settings |= {"method": "lora:rank=16,alpha=32", "batch_size": PROMPTS, "lr": 1e-5, "held_out": 0}
        settings |= {"reward": "reinforce:reward", "samples": SAMPLES, "max_new_tokens": TOKENS, "kl": 0.0}
        settings |= {"max_steps": steps + 2, "schedule": "constant", "warmup": 0, "seed": 42, "save_steps": 10**6}
        settings |= {"normalize_rewards": True}
        train(load_config(None, [f"{key}={value}" for key, value in settings.items()]))
    return {**watch.figures(), "peak_bytes": peak.bytes}


def theirs(data: str, dtype: str, steps: int) -> dict[str, Any]:
    import datasets
    import peft
    import torch
    import trl

    from spectune.bases.loading import load_base

    watch = Watch()
    with Peak() as peak, tempfile.TemporaryDirectory() as output:
        model, tokenizer = load_base("smollm2-135m", dtype)
        low: dict[str, Any] = {} if dtype == "bf16" else {"bf16": False}
        arguments = trl.GRPOConfig(
            output_dir=output,
            per_device_train_batch_size=PROMPTS * SAMPLES,
            num_generations=SAMPLES,
            max_completion_length=TOKENS,
            temperature=1.0,
            beta=0.0,
            max_steps=steps + 2,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.accelerator.is_available(),
            seed=42,
            disable_tqdm=True,
            **low,
        )
        trainer: Any = trl.GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=arguments,
            train_dataset=datasets.load_dataset("json", data_files=data, split="train"),
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(r=16, lora_alpha=32, target_modules=SEVEN),
        )
        drawn = trainer._generate_single_turn
        trainer._generate_single_turn = watch.around(drawn, lambda found: sum(map(len, found[0])))
        trainer.train()
    return {**watch.figures(), "peak_bytes": peak.bytes}


def run(side: str, data: str, dtype: str, steps: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", side, "--data", data, "--dtype", dtype, "--steps", str(steps)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parent)
    return json.loads(done.stdout.splitlines()[-1])


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of a side's runs."""
    middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
    seconds = middle["sampling"] + middle["learning"]
    return {
        "tokens": round(middle["tokens"]),
        "sampling_seconds": round(middle["sampling"], 2),
        "learning_seconds": round(middle["learning"], 2),
        "tokens_per_second": round(middle["tokens"] / seconds, 2),
        "peak_mib": round(middle["peak_bytes"] / 2**20),
    }


def compared(us: dict[str, Any], them: dict[str, Any]) -> dict[str, float]:
    """Return our speed, of a token, and memory over theirs."""
    each = us["tokens"] / them["tokens"]
    return {
        "speed_ratio": round(us["tokens_per_second"] / them["tokens_per_second"], 2),
        "sampling_ratio": round(each * them["sampling_seconds"] / us["sampling_seconds"], 2),
        "learning_ratio": round(each * them["learning_seconds"] / us["learning_seconds"], 2),
        "memory_ratio": round(us["peak_mib"] / them["peak_mib"], 2),
    }


def prompts(begin: int) -> list[dict[str, str]]:
    """Return prompts of film dialogue, behind about so many tokens of it."""
    texts = [pair["prompt"][0]["content"] for pair in pairs(600)]
    text, words = " ".join(texts[500:]).split(), round(begin / 1.3)
    return [{"prompt": " ".join([*text[:words], f"{one} She said:"])} for one in texts[:500]]


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", nargs="+", type=int, default=[0, 256])
    parser.add_argument("--sides", nargs="+", default=["ours", "theirs"])
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    parser.add_argument("--name", default="reinforce")
    given = parser.parse_args()
    if given.side:
        side = {"ours": ours, "theirs": theirs}[given.side]
        print("\n" + json.dumps(side(given.data, given.dtype[0], given.steps)))
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for begin in given.prompt:
            data = Path(folder) / f"prompts-{begin}.jsonl"
            data.write_text("".join(json.dumps(one) + "\n" for one in prompts(begin)), encoding="utf-8")
            for dtype in given.dtype:
                runs: dict[str, list[dict[str, Any]]] = {side: [] for side in given.sides}
                for _ in range(given.rounds):
                    for side, found in runs.items():
                        found.append(run(side, str(data), dtype, given.steps))
                figures: dict[str, Any] = {side: summary(found) for side, found in runs.items()}
                if len(figures) == 2:
                    figures |= compared(figures["ours"], figures["theirs"])
                results[f"{dtype}, prompts behind {begin} tokens"] = figures
                print(dtype, begin, json.dumps(figures), flush=True)
                save(given.name, {"steps": given.steps, "rounds": given.rounds, "results": results})


if __name__ == "__main__":
    main()
