"""Replies to held-out prompts, beside the answers that the data has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import unwrap
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console
from transformers import TrainerCallback

from spectune.bases.generation import Reply, generate
from spectune.bases.prompts import text_of
from spectune.errors import SpectuneError
from spectune.training.data.messages import is_learned
from spectune.training.data.records import Record, form

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerControl, TrainerState, TrainingArguments

_SHOWN = 300  # characters of a text
_REPLY = 40  # tokens, of a reply in training
_in_training: Callable[..., list[Reply]] = unwrap(generate)  # not in inference mode, whose tensors no step can use


class Asked(NamedTuple):
    """A prompt of the data.

    Args:
        prompt: text, or messages.
        answer: what the data says.
        raw: whether the text is continued as it is, without a chat template.
    """

    prompt: object
    answer: str
    raw: bool


def asked(records: Sequence[Record], count: int) -> list[Asked]:
    """Return the first prompts that records have, each once; a text alone is none."""
    found: dict[str, Asked] = {}  # by prompt
    for record in records:
        if len(found) == count:
            break
        if (one := _asked(record)) is not None:
            found.setdefault(repr(one.prompt), one)
    return list(found.values())


def _asked(record: Record) -> Asked | None:
    kind = form(record)
    if kind == "messages":
        turns = record["messages"]
        last = max((i for i, message in enumerate(turns) if is_learned(message)), default=0)
        return Asked(list(turns[:last]), text_of(turns[last]), False) if last and not record.get("tools") else None
    prompt = record.get("prompt")
    answer = record.get("completion", record.get("chosen"))
    if not prompt or not answer or record.get("tools"):
        return None
    if isinstance(prompt, str):
        return Asked(prompt, answer, True)
    return Asked(list(prompt), text_of(answer[-1]), False)


def replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Asked],
    max_new_tokens: int,
    fused: bool = True,
    replying: Callable[..., list[Reply]] = generate,
) -> list[str]:
    """Return the model's likeliest reply to each prompt."""
    found: list[str] = []
    for each in prompts:
        settings = {"max_new_tokens": max_new_tokens, "raw": each.raw, "fused": fused}
        try:
            found.append(replying(model, tokenizer, [each.prompt], **settings)[0].text)
        except SpectuneError as error:  # longer than the context, say
            found.append(f"({error})")
    return found


def spoken(prompt: Any) -> str:
    """Return a prompt as text, of a conversation the last message."""
    return prompt if isinstance(prompt, str) else text_of(prompt[-1])


def short(text: str, limit: int = _SHOWN) -> str:
    """Return a text in one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


class ReplyLog(TrainerCallback):
    """Show what the model replies to a few held-out prompts whenever it is evaluated.

    Args:
        prompts: to reply to.
        tokenizer: the model's.
        console: where to.
    """

    def __init__(self, prompts: Sequence[Asked], tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
        self._prompts, self._tokenizer, self._console = prompts, tokenizer, console
        self._last: int | None = None

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **kwargs: object,
    ) -> None:
        """Reply, once a step."""
        if self._last == state.global_step:
            return
        self._last = state.global_step
        was = model.training
        model.eval()
        with torch.no_grad():
            said = replies(model, self._tokenizer, self._prompts, _REPLY, False, _in_training)
        model.train(was)
        when = "before training" if state.global_step == 0 else f"step {state.global_step}"
        for each, reply in zip(self._prompts, said, strict=True):
            for name, text in ((when, spoken(each.prompt)), ("data", each.answer), ("model", reply)):
                self._console.print(
                    f"{name:>15}  {short(text, 100)}", style="dim", markup=False, highlight=False, soft_wrap=True
                )
