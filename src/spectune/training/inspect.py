"""What a model will see of data, and what it learns of it: a document, and a page of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from spectune.bases.loading import load_tokenizer
from spectune.bases.prompts import stop_tokens
from spectune.errors import SpectuneError
from spectune.pages.html import Column, Shown, page, paragraphs, runs, table, tiles
from spectune.storage import write_atomically
from spectune.training.config import TrainConfig
from spectune.training.data.encoding import Encoder, Example
from spectune.training.data.records import Record, of
from spectune.training.data.rows import same
from spectune.training.data.targets import summary
from spectune.training.preparing import token_limit
from spectune.training.tasks import make_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMED = 10  # records that are named where some are cut or left out


def inspect(config: TrainConfig, show: int = 3) -> dict[str, object]:
    """Return what training would see of its data, as a document for JSON.

    Args:
        config: as for training; the model's weights are not loaded.
        show: of the first records, how many are written out.

    Raises:
        SpectuneError: what cannot be read or is of another form, or a task whose data holds no answers.
    """
    if config.task == "reinforce":
        raise SpectuneError("task: reinforce draws its answers itself; its prompts can be looked at as task: sft")
    task = make_task(config)
    records, held = task.read()
    outline, tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    task.measure(records, outline, tokenizer)
    limit = token_limit(task.config, outline)
    encoder = Encoder(tokenizer, stop_tokens(outline, tokenizer))

    def examples(record: Record) -> list[Example]:
        return task.examples(record, encoder)

    learns = config.task != "classify"
    shown = [_written(record, examples(record), tokenizer, limit) for record in records[:show]]
    parts = {
        name: _part(part, examples, limit, learns) for name, part in (("training", records), ("held_out", held)) if part
    }
    learned = {same(record) for record in records}
    return {
        "data": config.data if isinstance(config.data, str) else config.model_dump()["data"],
        "model": config.model,
        "task": config.task,
        "limit": limit,
        **parts,
        "leaks": sum(same(record) in learned for record in held),
        "notes": [*task.notes, *encoder.notes()],
        "examples": shown,
    }


def _part(
    records: Sequence[Record], examples: Callable[[Record], list[Example]], limit: int, learns: bool
) -> dict[str, object]:
    lengths: list[int] = []
    learned, cut, dropped = 0, [], []
    for number, record in enumerate(records, start=1):
        where = getattr(record, "where", f"record {number}")
        with of(record):
            found = examples(record)
        for example in found:
            lengths.append(len(example.tokens))
            kept = sum(example.supervised[1:limit])
            learned += kept
            if learns and not kept:
                begins = next((i for i, s in enumerate(example.supervised) if s), None)
                why = "no token is learned" if begins is None else f"its answer begins at token {begins + 1} of {limit}"
                dropped.append({"where": where, "why": why})
            elif len(example.tokens) > limit:
                cut.append({"where": where, "tokens": len(example.tokens)})
    ordered = sorted(lengths)
    part: dict[str, object] = {
        "records": len(records),
        "examples": len(lengths),
        "tokens": sum(min(length, limit) for length in lengths),
        "learned_tokens": learned,
        "lengths": {
            "least": ordered[0],
            "median": median(ordered),
            "95%": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
            "most": ordered[-1],
        },
        "repeated": len(records) - len({same(record) for record in records}),
        "cut": len(cut),
        "dropped": len(dropped),
        "first_cut": cut[:_NAMED],
        "first_dropped": dropped[:_NAMED],
    }
    if not learns:
        part["labels"] = dict(summary(records))
    return part


def _written(
    record: Record, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, limit: int
) -> dict[str, object]:
    found = {
        "where": getattr(record, "where", None),
        "examples": [
            {
                "tokens": len(example.tokens),
                "learned": sum(example.supervised),
                "cut_at": limit if len(example.tokens) > limit else None,
                "pieces": [{"text": text, "learned": learned} for text, learned in _pieces(example, tokenizer)],
            }
            for example in examples
        ],
    }
    return {**found, "label": record["label"]} if "label" in record else found


def _pieces(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Return an example's text in stretches that are learned or not, as the tokenizer gives it back."""
    found, before, start = [], "", 0
    for end in range(1, len(example.tokens) + 1):
        if end < len(example.tokens) and example.supervised[end] == example.supervised[start]:
            continue
        text = tokenizer.decode(example.tokens[:end], clean_up_tokenization_spaces=False)
        found.append((text[len(before) :], bool(example.supervised[start])))
        before, start = text, end
    return found


def sentences(document: dict[str, Any]) -> list[str]:
    """Return what is to be known of an inspected data set, in sentences."""
    found = list(document["notes"])
    for name, key in (("training", "training"), ("held-out", "held_out")):
        part = document.get(key)
        if part is None:
            continue
        if part["cut"]:
            first = part["first_cut"][0]
            found.append(
                f"{part['cut']} {name} examples are cut to {document['limit']} tokens, the first {first['where']} "
                f"with {first['tokens']}"
            )
        if part["dropped"]:
            first = part["first_dropped"][0]
            found.append(f"{part['dropped']} {name} examples are left out, the first {first['where']}: {first['why']}")
    return found


def write_page(document: dict[str, Any], path: Path) -> None:
    """Write the page of an inspected data set."""
    parts = [
        (name, document[key]) for name, key in (("training", "training"), ("held out", "held_out")) if key in document
    ]
    columns = [Column("part"), *(Column(name, "d") for name in ("records", "examples", "tokens", "learned"))]
    columns += [Column(name, "d") for name in ("median length", "longest", "repeated", "cut", "left out")]
    rows = [
        (
            name,
            *(part[key] for key in ("records", "examples", "tokens", "learned_tokens")),
            Shown(part["lengths"]["median"], f"{part['lengths']['median']:g}"),
            part["lengths"]["most"],
            *(part[key] for key in ("repeated", "cut", "dropped")),
        )
        for name, part in parts
    ]
    examples = [
        f"<p>{escape(caption(record, example, number, len(record['examples'])))}</p>"
        + runs((piece["text"], piece["learned"]) for piece in example["pieces"])
        for record in document["examples"]
        for number, example in enumerate(record["examples"], start=1)
    ]
    first = document["training"]
    figures = [(f"{first['records']}", "records to learn from"), (f"{first['learned_tokens']}", "learned tokens")]
    figures += [(f"{document['leaks']}", "held-out records that are learned too")]
    html = page(
        f"{document['data']} for {document['model']}",
        tiles(figures),
        [
            ("Parts", table("What each part of the data holds", columns, rows)),
            ("To be known", paragraphs(sentences(document) or ["Nothing is cut, left out or repeated."])),
            ("As the model sees it", "<p>What is learned is marked.</p>" + "\n".join(examples)),
        ],
    )
    write_atomically(path, lambda place: place.write_text(html, encoding="utf-8"))


def caption(record: dict[str, object], example: dict[str, object], number: int, count: int) -> str:
    """Say which example of which record this is."""
    which = f", example {number} of {count}" if count > 1 else ""
    label = f", label {record['label']!r}" if "label" in record else ""
    cut = f", cut at {example['cut_at']}" if example["cut_at"] is not None else ""
    return f"{record['where']}{which}: {example['tokens']} tokens, {example['learned']} learned{cut}{label}"
