"""From what a request says to the rows that answer it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from spectune.bases.prompts import prompt_tokens, stop_tokens, uses
from spectune.errors import SpectuneError
from spectune.serving.batch import Row
from spectune.serving.protocol import MOST_REPLIES, ChatRequest, CompletionRequest, Refused, checked_messages
from spectune.serving.sampling import Sampler, Sampling
from spectune.serving.shelf import Shelf, weight_of
from spectune.serving.text import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_GREEDY = 1e-5  # temperatures below are zero
_DIGITS = 12  # of a token's number; Python makes no number of thousands


class Asked(NamedTuple):
    """What answers a request.

    Args:
        rows: the replies to each prompt, prompt by prompt.
        prompt_tokens: of all prompts.
    """

    rows: list[Row]
    prompt_tokens: int


class Reader:
    """Makes rows of requests; one thread at a time may use it.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        most_tokens: of a reply, whatever is asked for.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, most_tokens: int | None = None
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        config = model.config.get_text_config(decoder=True)
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self._vocabulary: int = config.vocab_size
        self._most = most_tokens
        self._ends = frozenset(stop_tokens(model, tokenizer))

    def chat(self, asked: ChatRequest) -> Asked:
        """Return the rows of a chat.

        Raises:
            Refused: messages that the model cannot read, or more than its context holds.
        """
        tools = asked.tools if asked.tool_choice != "none" else []
        if tools and not uses(self.tokenizer, "tools"):
            raise Refused("the model's chat template knows no tools", "tools")
        messages = checked_messages(asked.messages)
        try:
            prompt = prompt_tokens(self.tokenizer, messages, tools=tools or None, variables=asked.chat_template_kwargs)
        except SpectuneError as error:
            raise Refused(str(error), "messages") from None
        return self._rows(asked, [prompt], "messages")

    def completion(self, asked: CompletionRequest) -> Asked:
        """Return the rows of a completion.

        Raises:
            Refused: no prompts, or prompts that the model cannot read.
        """
        prompts = asked.prompts
        if not prompts or len(prompts) * asked.n > MOST_REPLIES:
            raise Refused(f"'prompt' and 'n' must make between 1 and {MOST_REPLIES} replies", "prompt")
        tokens = [prompt_tokens(self.tokenizer, p, raw=True) if isinstance(p, str) else p for p in prompts]
        for prompt in tokens:
            if any(not 0 <= token < self._vocabulary for token in prompt):
                raise Refused(
                    f"a prompt has tokens that the model has not; they go to {self._vocabulary - 1}", "prompt"
                )
        return self._rows(asked, tokens, "prompt")

    def _rows(self, asked: ChatRequest | CompletionRequest, prompts: Sequence[list[int]], param: str) -> Asked:
        sampling = self._sampling(asked)
        ends = frozenset(asked.stop_token_ids) | (frozenset() if asked.ignore_eos else self._ends)
        rows = []
        for prompt in prompts:
            limit = self._limit(asked.limit, len(prompt), param)
            for _ in range(asked.n):
                sampler = Sampler(self.model, sampling, prompt, len(rows))
                text = TextStream(self.tokenizer, prompt, asked.stops)
                rows.append(Row(prompt, sampler, text, limit, ends))
        return Asked(rows, sum(map(len, prompts)))

    def _limit(self, asked: int | None, prompt: int, param: str) -> int:
        """Return how many tokens a reply may have: what is asked for, as far as the context goes."""
        if not prompt:
            raise Refused("the prompt has no token, and a reply must have one to begin with", param)
        if self.context is not None and prompt + 1 > self.context:
            raise Refused(
                f"the prompt has {prompt} tokens and the model's context holds {self.context}; shorten the prompt",
                param,
            )
        limits = [asked, self._most, None if self.context is None else self.context - prompt]
        return min((limit for limit in limits if limit is not None), default=4096)

    def _sampling(self, asked: ChatRequest | CompletionRequest) -> Sampling:
        """Return how tokens are chosen: as the request says, else as the model's own settings for sampling."""
        own = self.model.generation_config
        samples = bool(own.do_sample)

        def value(name: str, default: object = None) -> Any:
            given = getattr(asked, name)
            if given is not None:
                return given
            ours = getattr(own, name, None) if samples else None
            return default if ours is None else ours

        bias = {}
        for token, added in asked.logit_bias.items():
            if not token.isdecimal() or len(token) > _DIGITS or int(token) >= self._vocabulary:
                raise Refused(f"'logit_bias' names {token[:20]!r}, which is no token of the model", "logit_bias")
            bias[int(token)] = added
        temperature, top_k = value("temperature", 1.0), value("top_k")
        return Sampling(
            temperature=0.0 if temperature < _GREEDY else temperature,
            top_p=value("top_p"),
            top_k=top_k if top_k and top_k > 0 else None,
            min_p=value("min_p") or None,
            seed=asked.seed,
            repetition_penalty=asked.repetition_penalty,
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            bias=bias,
            logprobs=asked.told,
        )


def weights_of(asked: ChatRequest | CompletionRequest, shelf: Shelf) -> dict[str, float] | None:
    """Return the adapters that a request asks for with a weight each; None is what a library chooses.

    Raises:
        UnknownAdapter: a name that no adapter has.
        SpectuneError: no model is named, a mixture is given twice, or weights that are no numbers.
    """
    given = dict(asked.adapter_weights)
    if asked.adapter_parameters is not None:
        ids, weights = asked.adapter_parameters.ids, asked.adapter_parameters.weights
        if not ids:
            raise Refused("'adapter_parameters' has no ids; the base alone is 'model': \"base\"", "adapter_parameters")
        if weights and len(weights) != len(ids):
            raise Refused("'adapter_parameters' has another number of weights than of ids", "adapter_parameters")
        if asked.adapter_parameters.merge_strategy != "linear" or given or len(set(ids)) < len(ids):
            raise Refused(
                "'adapter_parameters' takes each adapter once, merge_strategy 'linear', and no 'adapter_weights'",
                "adapter_parameters",
            )
        given = dict(zip(ids, weights or [1.0 / len(ids)] * len(ids), strict=True))
    if given:
        if asked.model and shelf.parse(asked.model) != {}:
            raise Refused("give the mixture as 'model' or beside 'model': \"base\", not both", "adapter_weights")
        weights = {name: weight_of(name, weight) for name, weight in given.items()}
        shelf.mixture(weights)
        return weights
    if not asked.model:
        raise Refused("'model' is not given: an adapter, a mixture such as pirate:0.7+chef:0.3, or base", "model")
    return shelf.parse(asked.model)
