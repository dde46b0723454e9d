"""Two passes behind one call: the first chooses what answers, the second answers."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

import transformers

from spectune.bases.generation import Message, generate
from spectune.bases.places import model_path
from spectune.bases.prompts import text_of
from spectune.bases.quiet import quiet
from spectune.errors import SpectuneError
from spectune.transformer2.classifier import CONFIG, FOLDER
from spectune.transformer2.few_shot import FewShot
from spectune.transformer2.library import Library
from spectune.transformer2.mix import Mix
from spectune.transformer2.pool import Mixture, Pool
from spectune.transformer2.search import Progress
from spectune.transformer2.strategies import Decision, Strategy, make_strategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Answer(NamedTuple):
    """A reply, and what gave it.

    Args:
        text: the reply.
        tokens: its tokens up to the first end of text.
        decision: the label and the weights of the adapters that answered.
    """

    text: str
    tokens: list[int]
    decision: Decision


class Transformer2:
    """A model that answers each prompt with the adapters of a library that suit it (arXiv 2501.06252).

    Args:
        model: the base, a causal language model; the library's adapters come and go on it.
        library: the library or its folder.
        strategy: "prompt": the base labels the prompt.  "classifier": the library's classifier does.  `FewShot(shots)`
            finds a mixture for a task, which then answers everything; a `Mix` or `{"pirate": 0.7, "sums": 0.3}` is one
            that is known; or an object with `choose(prompts)`.
        tokenizer: the model's; read from where the model was loaded if not given.
        max_bytes: of adapters kept in memory.
        progress: of a search, called as progress(iteration, iterations, best score).

    Raises:
        SpectuneError: an empty library, one for another base, or a strategy that cannot be had.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        library: Library | str | PathLike[str],
        *,
        strategy: str | FewShot | Mix | Mixture | Strategy = "prompt",
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_bytes: int = 1 << 30,
        progress: Progress | None = None,
    ) -> None:
        self.library = library if isinstance(library, Library) else Library.open(library)
        self.model = model
        self.tokenizer = tokenizer if tokenizer is not None else _tokenizer(model)
        self.pool = Pool(model, self.library, max_bytes)
        with self.pool.restoring():
            self.strategy = make_strategy(strategy, self.pool, self.tokenizer, progress)

    def choose(self, prompts: Sequence[str | Sequence[Message]]) -> list[Decision]:
        """Return what is to answer each prompt; of a conversation the last message of the user decides."""
        with self.pool.restoring():
            return self.strategy.choose([_asked(prompt) for prompt in prompts])

    def generate(
        self,
        prompts: Sequence[str | Sequence[Message]],
        *,
        decisions: Sequence[Decision] | None = None,
        **settings: Any,
    ) -> list[Answer]:
        """Return a reply to each prompt, all in one batch, each by what was chosen for it.

        Args:
            prompts: texts or conversations.
            decisions: what `choose` returned for them, if it was asked already.
            settings: as for `spectune.bases.generation.generate`: max_new_tokens, temperature, streamer, ...

        Raises:
            SpectuneError: no prompts, another number of decisions, or a prompt longer than the model's context.
        """
        if isinstance(prompts, str) or not len(prompts):
            raise SpectuneError("generate takes a list of prompts, at least one")
        decisions = self.choose(prompts) if decisions is None else decisions
        if len(decisions) != len(prompts):
            raise SpectuneError(f"{len(decisions)} decisions were given for {len(prompts)} prompts: give one for each")
        rows = [decision.weights for decision in decisions]
        with self.pool.restoring():
            if all(row == rows[0] for row in rows):
                self.pool.activate(rows[0])
                replies = generate(self.model, self.tokenizer, prompts, **settings)
            else:
                with self.pool.route(rows):
                    replies = generate(self.model, self.tokenizer, prompts, **settings)
        return [Answer(*reply, decision) for reply, decision in zip(replies, decisions, strict=True)]

    def close(self) -> None:
        """Take the library's adapters off the model."""
        self.pool.close()


def default_strategy(library: Library) -> str:
    """Return "classifier" where the library has one, else "prompt"."""
    return "classifier" if (library.path / FOLDER / CONFIG).exists() else "prompt"


def _asked(prompt: str | Sequence[Message]) -> str:
    if isinstance(prompt, str):
        return prompt
    return next((text_of(m) for m in reversed(prompt) if m["role"] == "user"), "")


def _tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    try:
        with quiet():
            return transformers.AutoTokenizer.from_pretrained(model_path(name or ""))
    except (OSError, ValueError) as error:
        raise SpectuneError(f"the model does not say where its tokenizer is ({error}): give tokenizer=") from None
