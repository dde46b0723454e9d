"""The next token of a row: as `generate` would choose it, whatever the rows beside it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        temperature: 0 takes the likeliest each time.
        top_p, top_k, min_p: what is left to draw from; None is all.
        seed: of the first row; those that follow have the numbers after it.
        repetition_penalty: as in transformers; None is the model's own.
        presence_penalty, frequency_penalty: subtracted for tokens of the reply, once or each time, as OpenAI's.
        bias: added to the logits of tokens.
        logprobs: how many of the likeliest tokens are told with each; None tells nothing.
    """

    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None


class Logprobs(NamedTuple):
    """The log probability of a token, and the likeliest tokens with theirs."""

    token: int
    logprob: float
    likeliest: list[tuple[int, float]]


class Sampler:
    """Chooses the tokens of one row.

    Args:
        model: the model, whose own settings hold where nothing else is said.
        sampling: how.
        prompt: the tokens before.
        row: which of the request's rows it is.
    """

    def __init__(self, model: PreTrainedModel, sampling: Sampling, prompt: Sequence[int], row: int = 0) -> None:
        self.sampling = sampling
        greedy = sampling.temperature == 0
        config = copy.deepcopy(model.generation_config)
        config.do_sample = not greedy
        config.num_beams = 1
        config.temperature = None if greedy else sampling.temperature
        config.top_p, config.top_k, config.min_p = sampling.top_p, sampling.top_k, sampling.min_p
        if sampling.repetition_penalty is not None:
            config.repetition_penalty = sampling.repetition_penalty
        config.max_length = config.forced_eos_token_id = None
        # private in transformers: what `generate` itself makes of a configuration, so that a reply here is one that
        # `generate` would give. Its public parts, processor by processor, would have to be kept up with
        self._processors = cast(Any, model)._get_logits_processor(config, input_ids_seq_length=len(prompt))
        self._generator = None
        if not greedy:
            self._generator = torch.Generator()
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed((sampling.seed + row) % (1 << 63))
        self._said: Counter[int] = Counter()
        self._prompt = list(prompt)
        self._penalties = bool(sampling.presence_penalty or sampling.frequency_penalty)

    @property
    def plain(self) -> bool:
        """Whether the token is the likeliest one, and nothing is to be told of it."""
        plain = self._generator is None and not self._processors and not self._penalties
        return plain and not self.sampling.bias and self.sampling.logprobs is None

    def choose(self, logits: Tensor, tokens: Sequence[int]) -> tuple[int, Logprobs | None]:
        """Return the next token.

        Args:
            logits: of the vocabulary, float32.
            tokens: of the reply so far.
        """
        scores = logits
        if self._penalties or self.sampling.bias:
            scores = self._penalized(scores, tokens)
        if self._processors:
            ids = torch.tensor([[*self._prompt, *tokens]], device=scores.device)
            scores = self._processors(ids, scores[None])[0]
        if self._generator is None:
            token = int(scores.argmax())
        else:
            probabilities = scores.softmax(-1).cpu()
            token = int(torch.multinomial(probabilities, 1, generator=self._generator))
        return token, self._told(logits, token)

    def _penalized(self, logits: Tensor, tokens: Sequence[int]) -> Tensor:
        scores = logits.clone()
        for token, added in self.sampling.bias.items():
            scores[token] += added
        if self._penalties and tokens:
            self._said[tokens[-1]] += 1
            said = torch.tensor(list(self._said), device=scores.device)
            times = torch.tensor(list(self._said.values()), dtype=scores.dtype, device=scores.device)
            scores[said] -= self.sampling.presence_penalty + self.sampling.frequency_penalty * times
        return scores

    def _told(self, logits: Tensor, token: int) -> Logprobs | None:
        count = self.sampling.logprobs
        if count is None:
            return None
        logprobs = logits.log_softmax(-1)
        values, indices = logprobs.topk(count)
        return Logprobs(token, float(logprobs[token]), list(zip(indices.tolist(), values.tolist(), strict=True)))
