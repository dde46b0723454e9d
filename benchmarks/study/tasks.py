"""Which tasks the study has: a rule on the base alone, before any method runs.

    python benchmarks/study/tasks.py      of every candidate, what the base does; writes tasks.json

Where the base is at its ceiling no method can be better, and where it cannot do the task at all none learns it from
a thousand records: both say nothing of methods.  So a candidate is taken where the base

* of a classification, its mean states under a logistic regression, is right in at least 3 points more than the
  commonest label would be, and in at most 85% (five folds);
* of a generation with an exact check, with three solved records in front of each prompt, is right in 10 to 85% (the
  first line of what it writes);
* of a style, by loss, gains at least 0.1 nats by three records in front: there is something to be learned from them.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import reasoning_gym
import torch
from marked import put

from spectune.bases import sources
from spectune.compare.presets import question_types, rated_reviews, write_records

HERE = Path(__file__).parent
PATH = HERE / "tasks.json"
PAGE = HERE.parents[1] / "docs" / "study.md"
RUNS = Path("runs/study")
Records = list[dict[str, Any]]
ENCODER: dict[str, Any] = {
    "model": "minilm-l6",
    "task": "classify",
    "batch_size": 16,
    "max_steps": 48,
    "max_length": 64,
    "seeds": 5,
    "validation": 0.15,
    "test": 0.25,
    "dtype": "bf16",
}
DECODER: dict[str, Any] = {
    "model": "smollm2-135m",
    "batch_size": 8,
    "max_steps": 40,
    "max_length": 64,
    "seeds": 3,
    "search": 4,
    "validation": 0.08,
    "test": 0.25,
    "dtype": "bf16",
}
_SHOTS, _ASKED = 3, 200
_FLOOR, _CEILING, _ABOVE, _GAINED = 0.10, 0.85, 0.03, 0.1
_WORDS = {
    "HUM": "person",
    "LOC": "place",
    "NUM": "number",
    "DESC": "description",
    "ENTY": "thing",
    "ABBR": "short form",
}


def question_details() -> Records:
    """Return questions with what they ask for in detail, of the ten commonest kinds."""
    labels = {question.strip(): label for label, question in sources.questions() if question.strip()}
    kinds = [label for label, _ in Counter(labels.values()).most_common(10)]
    return _some([{"text": text, "label": label} for text, label in labels.items() if label in kinds], 1000)


def spam() -> Records:
    """Return messages, each once and as many of one kind as of the other: of 48 steps most would go by at 87% ham."""
    rows = {text.strip(): "spam" if spam else "ham" for text, spam in sources.messages() if text.strip()}
    records = [{"text": text, "label": label} for text, label in rows.items()]
    halves = [_some([record for record in records if record["label"] == label], 500) for label in ("ham", "spam")]
    return _some(halves[0] + halves[1], 1000)


def sums() -> Records:
    """Return sums and differences of numbers of one and two digits, such as "48 - 13 =", and their results."""
    drawn = reasoning_gym.create_dataset("chain_sum", size=4000, seed=5, min_terms=2, max_terms=2, max_digits=2)
    rows = {entry["question"].rpartition(": ")[2]: entry["answer"] for entry in drawn}
    return [_answered(question, answer) for question, answer in list(rows.items())[:1000]]


def question_words() -> Records:
    """Return questions with what they ask for as a word that is to be written."""
    asked = question_types(1000)
    return [_answered(f"{record['text']} This asks for a", _WORDS[record["label"]]) for record in asked]


def dialogue() -> Records:
    """Return pairs of lines of film dialogue."""
    pairs = [(line.strip(), reply.strip()) for line, reply in sources.dialogue()]
    kept = {a: b for a, b in pairs if 4 <= len(a.split()) <= 25 and 4 <= len(b.split()) <= 25}
    return _some([_answered(f"{a}\n", b) for a, b in kept.items()], 1000)


def _answered(prompt: str, answer: str) -> dict[str, Any]:
    return {"prompt": prompt, "completion": f" {answer}"}


def _some(records: Records, count: int) -> Records:
    random.Random(0).shuffle(records)
    return records[:count]


CANDIDATES: dict[str, tuple[Any, dict[str, Any]]] = {
    "film-reviews": (lambda: rated_reviews(1000), ENCODER),
    "product-reviews": (lambda: rated_reviews(1000, "amazonReviewSnippets"), ENCODER),
    "question-types": (lambda: question_types(1000), {**ENCODER, "max_steps": 300, "until": "plateau", "search": 5}),
    "question-details": (question_details, ENCODER),
    "spam": (spam, ENCODER),
    "question-words": (question_words, {**DECODER, "metric": "exact_match"}),
    "sums": (sums, {**DECODER, "metric": "exact_match", "max_steps": 240, "until": "plateau"}),
    "dialogue": (dialogue, {**DECODER, "metric": "loss"}),
}


def data_of(name: str) -> Path:
    """Return the file of a task's records, which is then there."""
    path = RUNS / "data" / f"{name}.jsonl"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_records(path, CANDIDATES[name][0]())
    return path


def probed(name: str) -> float:
    """Return how often the base's mean state tells a record's label."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from transformers import AutoModel, AutoTokenizer

    from spectune.bases.places import model_path

    folder = model_path(CANDIDATES[name][1]["model"])
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    records, states = _records(name), []
    for start in range(0, len(records), 50):
        texts = [record["text"] for record in records[start : start + 50]]
        batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=64)
        mask = batch["attention_mask"][..., None]
        states.append((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    labels = [record["label"] for record in records]
    regression = LogisticRegression(max_iter=1000)
    return float(cross_val_score(regression, torch.cat(states).float().numpy(), labels, cv=5).mean())


def written(name: str) -> float:
    """Return how often the first line that the base writes, with solved records in front, is the answer."""
    model, tokenizer = _decoder(name)
    records = _records(name)
    right, asked = 0, records[_SHOTS:][:_ASKED]
    for start in range(0, len(asked), 20):
        some = asked[start : start + 20]
        batch = tokenizer([_front(records) + r["prompt"] for r in some], return_tensors="pt", padding=True)
        tokens = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
        lines = [text.strip().partition("\n")[0].strip() for text in tokenizer.batch_decode(tokens, True)]
        right += sum(line == record["completion"].strip() for line, record in zip(lines, some, strict=True))
    return right / len(asked)


def loss_of(name: str, shown: bool) -> float:
    """Return the base's mean loss of a token of the answers, with solved records in front or without."""
    model, tokenizer = _decoder(name)
    records = _records(name)
    total, count = 0.0, 0
    for record in records[_SHOTS:][:_ASKED]:
        prompt = tokenizer((_front(records) if shown else "") + record["prompt"], return_tensors="pt")["input_ids"]
        answer = tokenizer(record["completion"], return_tensors="pt", add_special_tokens=False)["input_ids"]
        logits = model(torch.cat([prompt, answer], 1)).logits[0, prompt.shape[1] - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits.float(), answer[0], reduction="sum"))
        count += answer.shape[1]
    return total / count


def _decoder(name: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from spectune.bases.places import model_path

    folder = model_path(CANDIDATES[name][1]["model"])
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer


def _front(records: Records) -> str:
    return "".join(f"{record['prompt']}{record['completion']}\n" for record in records[:_SHOTS])


def _records(name: str) -> Records:
    return [json.loads(line) for line in data_of(name).read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def looked_at(name: str) -> dict[str, Any]:
    """Return what the rule asks of a candidate, and whether it is taken."""
    keys = CANDIDATES[name][1]
    if keys.get("task") == "classify":
        labels = [record["label"] for record in _records(name)]
        commonest, right = max(Counter(labels).values()) / len(labels), probed(name)
        found, taken = {"commonest label": commonest, "probe": right}, commonest + _ABOVE <= right <= _CEILING
    elif keys["metric"] == "exact_match":
        right = written(name)
        found, taken = {f"right, {_SHOTS} records in front": right}, _FLOOR <= right <= _CEILING
    else:
        alone, shown = (loss_of(name, shown) for shown in (False, True))
        found, taken = {"loss": alone, f"loss, {_SHOTS} records in front": shown}, alone - shown >= _GAINED
    return {**{key: round(value, 4) for key, value in found.items()}, "taken": taken}


def taken() -> list[str]:
    """Return the tasks that the rule takes."""
    return [name for name, found in json.loads(PATH.read_text(encoding="utf-8")).items() if found["taken"]]


def main() -> None:
    """Look at every candidate."""
    found = {}
    for name in CANDIDATES:
        found[name] = looked_at(name)
        print(name, found[name], flush=True)
    PATH.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    put(PAGE, "tasks", f"{table(found)}\n")


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return what the rule asked of every candidate, as a table."""
    rows = ["| candidate | model | what the base does | taken |", "|---|---|---|---|"]
    for name, about in found.items():
        said = "; ".join(f"{what}: {_shown(value, what)}" for what, value in about.items() if what != "taken")
        rows.append(f"| {name} | {CANDIDATES[name][1]['model']} | {said} | {'yes' if about['taken'] else 'no'} |")
    return "\n".join(rows)


def _shown(value: float, what: str) -> str:
    return f"{value:.2f}" if what.startswith("loss") else f"{value:.1%}"


if __name__ == "__main__":
    main()
