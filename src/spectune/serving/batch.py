"""Rows that a model answers together: they join when their prompts are read, and leave when they end."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from spectune.bases.generation import cache_key, last_logits, left_padded
from spectune.errors import SpectuneError
from spectune.layers.whole import parts_of
from spectune.model.routing import route
from spectune.serving.cache import RowCache, check_cache
from spectune.serving.prefixes import BLOCK, Prefixes, laid_out
from spectune.serving.sampling import Logprobs, Sampler, Sampling
from spectune.serving.text import TextStream
from spectune.speed.laid_out import LaidWeight
from spectune.speed.laid_out import laid_out as laid_out_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(eq=False)
class Row:
    """One reply that is being written.

    Args:
        prompt: the tokens before it.
        sampler: chooses its tokens.
        text: turns them into text.
        limit: of its tokens.
        ends: tokens that end it.
        mixture: adapters on the model with a weight each, or one for each layer; none is the base.
        origin: the same for those that read a text alike, whatever their names on the model are.

    Attributes:
        cached: tokens of the prompt that were read before.
        tokens: of the reply so far.
        told: of the tokens, what was not delivered yet.
    """

    prompt: list[int]
    sampler: Sampler
    text: TextStream
    limit: int
    ends: frozenset[int] = frozenset()
    mixture: Mapping[str, object] = field(default_factory=dict)
    origin: Hashable = frozenset()
    cached: int = 0
    tokens: list[int] = field(default_factory=list)
    told: list[Logprobs] = field(default_factory=list)

    @property
    def most(self) -> int:
        """Tokens that the row may come to have, its prompt included."""
        return len(self.prompt) + self.limit

    def take(self, logits: Tensor | None, token: int | None = None) -> tuple[str, str | None]:
        """Take the next token, chosen by logits or given; return the text that is certain, and why the row ends."""
        if token is None:
            assert logits is not None
            token, told = self.sampler.choose(logits, self.tokens)
            self.told += [] if told is None else [told]
        self.tokens.append(token)
        if token in self.ends:
            return self.text.end(), "stop"
        text = self.text.add(token)
        if self.text.stopped:
            return text, "stop"
        if len(self.tokens) >= self.limit:
            text += self.text.end()
            return text, "length"
        return text, None


class Batch:
    """The rows of a model that are being answered, each with a mixture of adapters of its own.

    Args:
        model: a causal language model.
        prefixes: keeps what was read; None keeps nothing.
        lays_out: lay weights out for the processor's products, which takes their memory once more.

    Raises:
        SpectuneError: a model whose texts cannot join a batch.
    """

    def __init__(self, model: PreTrainedModel, prefixes: Prefixes | None = None, *, lays_out: bool = False) -> None:
        if not (hasattr(model, "can_generate") and model.can_generate()) or model.config.is_encoder_decoder:
            raise SpectuneError(f"{type(model).__name__} is no model that goes on with a text, which is what is served")
        check_cache(model)
        self.model, self.rows, self.prefixes = model, list[Row](), prefixes
        self._cache = RowCache()
        self._last, self._cache_key = last_logits(model), cache_key(model)
        self._positions = "position_ids" in inspect.signature(model.forward).parameters
        self._routed = ExitStack()
        self._routes: list[Mapping[str, object]] | None = None  # those of the context that is open
        self._lays_out = lays_out
        self._laid: ExitStack | None = None  # the context within which the weights are laid out
        self._laid_weights: dict[int, LaidWeight] = {}  # also between two of these
        self._stacks: dict[object, object] = {}
        self._stacks_of_prompts: dict[object, object] = {}

    @property
    def bytes(self) -> int:
        """Bytes of keys and values that are held."""
        return self._cache.bytes

    def close(self) -> None:
        """Leave the contexts of the rows, so that adapters may come and go."""
        self._routed.close()
        self._routes = None
        if self._laid is not None:
            self._laid.close()
        self._laid = None
        self._stacks.clear()
        self._stacks_of_prompts.clear()

    @torch.inference_mode()
    def join(self, prompts: Prompts, wanted: Sequence[int] | None = None) -> None:
        """Add rows whose prompts are read: all, or those that are wanted."""
        places = range(len(prompts.rows)) if wanted is None else wanted
        rows = [prompts.rows[i] for i in places]
        self._cache.join(prompts.cache, places, [len(row.prompt) for row in rows])
        self.rows += rows

    @torch.inference_mode()
    def keep_prompts(self, prompts: Prompts) -> None:
        """Keep what was read of prompts for others that begin alike."""
        if self.prefixes is None:
            return
        layers: list[Any] = prompts.cache.layers
        for place, row in enumerate(prompts.rows):
            if not row.tokens:  # it failed
                continue
            begin = prompts.mask.shape[1] - len(row.prompt)

            def read(a: int, b: int, place: int = place, begin: int = begin) -> list[Tensor]:
                of = (place, slice(None), slice(begin + a, begin + b))
                return [held[of] for layer in layers for held in (layer.keys, layer.values)]

            self.prefixes.keep(row.origin, row.prompt, read)

    @torch.inference_mode()
    def keep_row(self, row: Row) -> None:
        """Keep what was read and said in a row, for whom goes on with it."""
        if self.prefixes is None:
            return
        place = self.rows.index(row)
        tokens = [*row.prompt, *row.tokens][: self._cache.lengths[place]]
        self.prefixes.keep(row.origin, tokens, lambda a, b: self._cache.of(place, a, b))

    @torch.inference_mode()
    def leave(self, row: Row) -> None:
        """Take a row out."""
        place = self.rows.index(row)
        self._cache.leave(place)
        self.rows[place] = self.rows[-1]
        self.rows.pop()

    def clear(self) -> None:
        """Take all rows out."""
        self.close()
        self._cache.clear()
        self.rows = []

    @torch.inference_mode()
    def step(self) -> Tensor:
        """Return logits (rows x vocabulary, float32) of the token after each row's last one."""
        mixtures = [row.mixture for row in self.rows]
        # the context stays open from step to step, since to enter one costs a look at every layer
        if self._routes != mixtures:
            self._routed.close()
            self._routes = None
            self._routed.enter_context(self._answering(mixtures, self._stacks))
            self._routes = mixtures
        self._cache.begin_step()
        logits = self._forward([row.tokens[-1:] for row in self.rows], self._cache.mask(), self._cache)
        self._cache.end_step()
        return logits

    @torch.inference_mode()
    def culprits(self) -> list[tuple[Row, Exception]]:
        """Return the rows that cannot be answered alone, after a step that failed."""
        self.close()
        found = []
        # with a cache of its own, so that a row that can be answered goes on as if nobody had asked
        for place, row in enumerate(self.rows):
            cache = self._cache.__deepcopy__({})
            cache.batch_select_indices(torch.tensor([place], device=self.model.device))
            try:
                with self._answering([row.mixture], {}):
                    self._forward([row.tokens[-1:]], cache.mask(), cache)
            except Exception as error:
                found.append((row, error))
        return found

    @torch.inference_mode()
    def read(self, prompts: Prompts, columns: int) -> Tensor | None:
        """Read some columns of prompts; return logits (rows x vocabulary) after the last of them."""
        begin, end = prompts.read, min(prompts.read + columns, prompts.mask.shape[1])
        with self._answering([row.mixture for row in prompts.rows], self._stacks_of_prompts):
            ids = prompts.ids[:, begin - prompts.known : end - prompts.known]
            logits = self._forward(ids, prompts.mask[:, :end], prompts.cache)
        prompts.read = end
        return logits if end == prompts.mask.shape[1] else None

    def _forward(self, ids: object, mask: Tensor, cache: object) -> Tensor:
        device = self.model.device
        ids, mask = torch.as_tensor(ids, device=device), mask.to(device)
        given: dict[str, object] = {"attention_mask": mask, self._cache_key: cache, "use_cache": True, **self._last}
        if self._positions:
            # rows are padded on the left: a token's position is how many of its own come before it
            given["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        return self.model(input_ids=ids, **given).logits[:, -1].float()

    @contextmanager
    def _answering(self, mixtures: Sequence[Mapping[str, Any]], stacks: dict[Any, Any]) -> Iterator[None]:
        if self._lays_out and self._laid is None:
            self._laid = ExitStack()
            self._laid.enter_context(laid_out_weights(self.model, known=self._laid_weights))
        if not parts_of(self.model):
            yield
            return
        with route(self.model, [mixture or None for mixture in mixtures], stacks=stacks):
            yield


class Prompts:
    """Rows whose prompts are being read, together.

    Of each row as many columns are read as the one needs of which the least is known; what comes before them is known
    of all, so that nothing lies between the two.

    Args:
        rows: the rows.
        pad: a token to pad with.
        prefixes: what was read before.

    Attributes:
        known: columns that were read before.
        read: columns that are read by now.
    """

    @torch.inference_mode()
    def __init__(self, rows: Sequence[Row], pad: int, prefixes: Prefixes | None = None) -> None:
        self.rows = list(rows)
        found = [[] if prefixes is None else prefixes.find(row.origin, row.prompt) for row in rows]
        # all rows read equally many columns: the one of which the least is known says how many, and the others read
        # some again
        own = max(len(row.prompt) - BLOCK * len(blocks) for row, blocks in zip(rows, found, strict=True))
        for row in rows:
            row.cached = max(0, len(row.prompt) - own)
        self.known = self.read = max(row.cached for row in rows)
        self.ids, _ = left_padded([row.prompt[row.cached :] for row in rows], pad, "cpu")
        lengths = torch.tensor([len(row.prompt) for row in rows])[:, None]
        columns = self.known + self.ids.shape[1]
        self.mask = (torch.arange(columns) >= columns - lengths).long()
        self.cache = DynamicCache()
        if self.known and prefixes is not None:
            prefixes.hits += sum(row.cached for row in rows)
            held = laid_out(found, [row.cached for row in rows], self.known)
            for layer, (keys, values) in enumerate(zip(held[::2], held[1::2], strict=True)):
                self.cache.update(keys, values, layer)


def unread(row: Row, prefixes: Prefixes | None) -> int:
    """Return how many tokens of a row's prompt have to be read."""
    return len(row.prompt) - (0 if prefixes is None else BLOCK * len(prefixes.find(row.origin, row.prompt)))


@torch.inference_mode()
def check_joining(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Raise unless rows that join a batch are answered as each is alone; return the bytes that a token's keys take.

    Raises:
        SpectuneError: they are not, and the model cannot be served.
    """
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    drawn = torch.Generator().manual_seed(0)
    # two rows at once and one that joins later, of different lengths, so that padding, joining and going on are all
    # in it
    texts = [torch.randint(min(3, vocabulary - 1), vocabulary, (n,), generator=drawn).tolist() for n in (9, 5, 7)]
    rows = [_row_of(text[:-2], model, tokenizer) for text in texts]
    batch = Batch(model)
    together = torch.empty(0)
    for joining in (rows[:2], rows[2:]):
        prompts = Prompts(joining, 0)
        while batch.read(prompts, 2) is None:
            pass
        batch.join(prompts)
        for row, text in zip(batch.rows, texts, strict=False):
            row.tokens.append(text[len(row.prompt) + len(row.tokens)])
        together = batch.step()
    size = batch._cache.bytes_of_a_token
    batch.clear()
    tolerance = 0.02 if next(model.parameters()).dtype == torch.float32 else 0.1
    for row, logits in zip(rows, together, strict=True):
        ids = torch.tensor([[*row.prompt, *row.tokens]], device=model.device)
        alone = model(input_ids=ids, use_cache=False).logits[0, -1].float()
        if not (logits - alone).abs().max() <= tolerance * alone.abs().max():
            raise SpectuneError(
                f"{type(model).__name__} answers a text in a batch otherwise than alone, so that requests cannot share "
                "one; `spectune generate` answers with it"
            )
    return size


def _row_of(prompt: list[int], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Row:
    return Row(prompt, Sampler(model, Sampling(temperature=0), prompt), TextStream(tokenizer, prompt), 2)
