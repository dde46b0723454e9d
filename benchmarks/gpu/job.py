"""A short `spectune train` on random data against TRL's SFTTrainer with PEFT: tokens a second and peak memory.

A whole SmolLM2-135M with random weights, in a folder with a tokenizer of made-up words; LoRA r 16 on all of its linear
layers, pairs of some 300 tokens, batches of 8, loss on the completions.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch

from gpu import models
from gpu.part import Part, Place, Skipped

BATCH = 8


def measure(part: Part) -> None:
    """Fill the rows of the part."""
    place = part.place
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        part.row("files", lambda: write(place, made))
        for row, method in (("Spectune", "lora:rank=16,alpha=32"), ("Spectune, SVF", "svf")):
            part.row(row, lambda method=method: ours(place, made, method), needs=place.of(10.0, 0.0))
        part.row("TRL and PEFT", lambda: theirs(place, made), needs=place.of(10.0, 0.0))


def write(place: Place, folder: Path) -> dict[str, Any]:
    """Write a model, its tokenizer and pairs of random words."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    model = models.small(place)
    words = [f"w{i}" for i in range(model.config.vocab_size - 3)]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *words])}
    tokenizer = Tokenizer(kinds.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    model.save_pretrained(folder / "model")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "model")
    draw = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(low, high)))

    longest = place.of(400, 12)
    pairs = [{"prompt": text(4, longest // 2), "completion": text(4, longest)} for _ in range(place.of(400, 24))]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return {"pairs": len(pairs), "words": len(words)}


def _files(place: Place, folder: Path) -> Path:
    if not (folder / "pairs.jsonl").is_file():  # an earlier run had this row
        write(place, folder)
    return folder


def ours(place: Place, folder: Path, method: str) -> dict[str, Any]:
    """Return the figures of `spectune train`."""
    try:
        from spectune.training.config import load_config
        from spectune.training.run import train
    except ImportError as missing:
        raise Skipped(f"{missing.name} is not installed") from None
    files = _files(place, folder)
    with tempfile.TemporaryDirectory() as output:
        settings: dict[str, Any] = {"model": files / "model", "data": files / "pairs.jsonl", "output": output}
        settings |= {"method": method, "batch_size": BATCH, "lr": 1e-4, "held_out": 0, "schedule": "constant"}
        settings |= {"warmup": 0, "save_steps": 10**6, "max_steps": place.of(20, 2), "device": place.device.type}
        settings |= {"dtype": place.of("bf16", "fp32")}
        config = load_config(None, [f"{key}={value}" for key, value in settings.items()])
        found: list[Any] = []
        peak = place.peak(lambda: found.append(train(config)))
    (result,) = found
    losses = [line["loss"] for line in result.history if "loss" in line]
    tokens = result.tokens_per_second * result.seconds
    return _figures(tokens, result.seconds, losses, peak) | {"setup_s": round(result.setup_seconds, 2)}


def theirs(place: Place, folder: Path) -> dict[str, Any]:
    """Return the figures of TRL's SFTTrainer with PEFT's LoRA."""
    try:
        import datasets
        import peft
        import trl
    except ImportError as missing:
        raise Skipped(f"{missing.name} is not installed") from None
    import time

    from transformers import AutoModelForCausalLM, AutoTokenizer

    files = _files(place, folder)
    dtype = place.of(torch.bfloat16, torch.float32)

    def run(output: str) -> tuple[Any, float]:
        model: Any = AutoModelForCausalLM.from_pretrained(files / "model", dtype=dtype)
        arguments = trl.SFTConfig(
            output_dir=output,
            per_device_train_batch_size=BATCH,
            max_steps=place.of(20, 2),
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=place.device.type == "cpu",
            bf16=not place.tiny,
            disable_tqdm=True,
        )
        trainer: Any = trl.SFTTrainer(
            model=model.to(place.device),
            args=arguments,
            train_dataset=datasets.Dataset.from_json(str(files / "pairs.jsonl"), cache_dir=output),
            processing_class=AutoTokenizer.from_pretrained(files / "model"),
            peft_config=peft.LoraConfig(r=16, lora_alpha=32, target_modules=models.SEVEN),
        )
        start = time.perf_counter()
        trainer.train()
        return trainer, time.perf_counter() - start

    found: list[Any] = []
    with tempfile.TemporaryDirectory() as output:
        peak = place.peak(lambda: found.append(run(output)))
    ((trainer, took),) = found
    history = trainer.state.log_history
    tokens = max(line.get("num_tokens", 0) for line in history)
    return _figures(tokens, took, [line["loss"] for line in history if "loss" in line], peak)


def _figures(tokens: float, seconds: float, losses: list[float], peak: int | None) -> dict[str, Any]:
    return {
        "tokens": round(tokens),
        "tokens_per_second": round(tokens / seconds, 1),
        "peak_mib": None if peak is None else round(peak / 2**20),
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
    }


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Return what is shown of the part."""
    return [
        f"{name:14s} {row['tokens_per_second']:10.1f} tokens a second, {row['peak_mib']} MiB"
        for name, row in rows.items()
        if "tokens_per_second" in row
    ]
