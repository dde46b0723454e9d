"""A whole model with an update folded in, as a folder that is there whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from spectune.adapters.destination import MERGED
from spectune.model.merging import merge
from spectune.storage import collect_temporaries, publish, telling_of_full_disks, temporary_beside

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write_merged(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, base: str, adapter: Path
) -> None:
    """Merge a model's adapter into it and write the model with its tokenizer, in place of what the folder held.

    Args:
        model: with the adapter on it.
        tokenizer: of the model.
        out: the folder.
        base: the model's name, to be noted.
        adapter: the adapter's folder, to be noted.

    Raises:
        SpectuneError: it cannot be written; what was there is as it was.
    """
    merge(model, keep=False)
    with telling_of_full_disks(out, "what was there is as it was"):
        out.parent.mkdir(parents=True, exist_ok=True)
        collect_temporaries(out.parent)
        with temporary_beside(out, folder=True) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            text = json.dumps({"library_name": "spectune", "base_model": base, "adapter": adapter.name}, indent=1)
            (folder / MERGED).write_text(text + "\n", encoding="utf-8")
            publish(folder, out)
