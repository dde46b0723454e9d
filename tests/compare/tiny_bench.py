"""A tiny encoder with a tokenizer, and data that it can learn to classify."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel

from spectune.compare.config import CompareConfig
from training.folder import NUMBERS, make_tokenizer

CLASSES = 2


def write_encoder(path: Path) -> None:
    """Write a two-layer BERT with 32 hidden units."""
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertModel(BertConfig(vocab_size=40, max_position_embeddings=64, initializer_range=0.2, **settings))
    model.save_pretrained(path)
    make_tokenizer(template=None).save_pretrained(path)


def write_data(path: Path) -> None:
    """Write 120 texts of three words, whose first word decides the label."""
    texts = [(a, b, c) for a in NUMBERS[:4] for b in NUMBERS for c in NUMBERS[:3]]
    rows = [{"text": " ".join(words), "label": "few" if words[0] in ("one", "two") else "many"} for words in texts]
    path.write_text("\n".join(map(json.dumps, rows)))


def config(folder: Path, output: Path, **values: Any) -> CompareConfig:
    """Return a small comparison, checked."""
    settings = {"model": str(folder / "encoder"), "data": str(folder / "data.jsonl"), "task": "classify"}
    settings |= {"output": str(output), "max_steps": 8, "batch_size": 8, "dtype": "fp32", "methods": ["lora"]}
    made = CompareConfig(**{**settings, **values})
    made.check()
    return made
