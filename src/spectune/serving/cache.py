"""Keys and values of a batch whose rows come and go: each ends at the same column, so that all go on together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from spectune.errors import SpectuneError
from spectune.speed.key_cache import with_spare

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RowCache(Cache):
    """The cache of a batch of rows of different lengths, aligned at their ends.

    A row is the last `lengths[row]` of the columns in use, which keeps the distances between its tokens, so that the
    windows of sliding attention hold as they do in a batch that is padded on the left; they are masks here, and nothing
    is cut off.  What lies before a row is zero: whatever another one left there, NaN included, would come back through
    a product with a weight of zero.

    Attributes:
        lengths: tokens of each row.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.lengths: list[int] = []
        self._begin = self._end = 0  # of the columns in use

    @property
    def width(self) -> int:
        """Columns in use: the length of the longest row."""
        return self._end - self._begin

    @property
    def bytes(self) -> int:
        """Bytes that are held."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._own)

    @property
    def bytes_of_a_token(self) -> int:
        """Bytes that a row takes for each of its tokens."""
        return sum(layer.keys[0, :, 0].nbytes + layer.values[0, :, 0].nbytes for layer in self._own)

    @property
    def _own(self) -> list[_RowLayer]:
        return self.layers

    def join(self, other: Cache, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Add rows of another cache, which end at its last column.

        Args:
            other: the cache.
            rows: of it.
            lengths: of these rows, in tokens.
        """
        sources: list[Any] = other.layers
        if not self.layers:
            self.layers = [_RowLayer(self, layer.keys[:0, :, :0], layer.values[:0, :, :0]) for layer in sources]
        there, longest = len(self.lengths), max(lengths)
        self._make_room(there + len(rows), max(self.width, longest))
        for row, length in enumerate(lengths):
            place = (there + row, slice(None), slice(self._end - length, self._end))
            for own, source in zip(self._own, sources, strict=True):
                own.keys[place] = source.keys[rows[row], :, -length:]
                own.values[place] = source.values[rows[row], :, -length:]
        self.lengths += lengths
        self._begin = self._end - max(self.lengths)

    def leave(self, row: int) -> None:
        """Take a row out; the last one takes its place."""
        # rows in use are the first ones without a gap, so that what a step is given is a view
        last = len(self.lengths) - 1
        for layer in self._own:
            for held in (layer.keys, layer.values):
                held[row] = held[last]
                held[last] = 0
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        self._begin = self._end - max(self.lengths, default=0)
        if not self.lengths:
            self.clear()

    def clear(self) -> None:
        """Take all rows out, and hold nothing."""
        self.layers, self.lengths, self._begin, self._end = [], [], 0, 0

    def of(self, row: int, begin: int, end: int) -> list[Tensor]:
        """Return keys and values (heads x tokens x features) of some tokens of a row, for each layer."""
        first = self._end - self.lengths[row]
        place = (row, slice(None), slice(first + begin, first + end))
        return [held[place] for layer in self._own for held in (layer.keys, layer.values)]

    def mask(self) -> Tensor:
        """Return which columns (rows x columns), the one about to be added included, are tokens of each row."""
        lengths = torch.tensor(self.lengths)[:, None]
        return (torch.arange(self.width + 1) >= self.width - lengths).long()

    def begin_step(self) -> None:
        """Have a column for one more token of each row."""
        self._make_room(len(self.lengths), self.width)

    def end_step(self) -> None:
        """Take note that each row has one more token."""
        # the longest row grows as well, so that the first column in use stays where it is
        self._end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def _make_room(self, rows: int, width: int) -> None:
        """Have room for rows of a width and one token more, those that are there at its end."""
        most, columns = self._own[0].keys.shape[0], self._own[0].keys.shape[2]
        if rows <= most and width <= self._end < columns:
            return
        # twice as many, so that rows that come one by one are not copied at each one's coming
        most = most if rows <= most else max(rows, 2 * most)
        for layer in self._own:
            layer.keys, layer.values = (self._laid_out(held, most, width) for held in (layer.keys, layer.values))
        self._begin, self._end = width - self.width, width

    def _laid_out(self, held: Tensor, rows: int, width: int) -> Tensor:
        new = held.new_zeros(rows, held.shape[1], with_spare(width), held.shape[3])
        new[: held.shape[0], :, width - self.width : width] = held[:, :, self._begin : self._end]
        return new

    def add(self, held: Tensor, states: Tensor) -> Tensor:
        """Write what a layer has of new tokens behind what is held, and return what is in use."""
        after = self._end + states.shape[2]
        held[: len(states), :, self._end : after] = states
        # a view: a step copies the states of its own tokens, and none of those before
        return held[: len(states), :, self._begin : after]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.width

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.width + query_length, 0

    def __deepcopy__(self, memo: object) -> RowCache:
        """Return a cache of the same tensors, for a trial, which is to take some of its rows."""
        other = RowCache()
        other.lengths, other._begin, other._end = list(self.lengths), self._begin, self._end
        other.layers = [_RowLayer(other, layer.keys, layer.values) for layer in self._own]
        return other

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, in memory of their own."""
        # whoever picks rows has a deep copy, which shares its tensors with the batch: these are copies, and a trial
        # writes to them alone
        self.lengths = [self.lengths[i] for i in indices.tolist()]
        for layer in self._own:
            layer.keys, layer.values = layer.keys.index_select(0, indices), layer.values.index_select(0, indices)


class _RowLayer(CacheLayerMixin):
    """One layer's keys and values (rows x heads x columns x features)."""

    is_sliding = False
    is_croppable = False

    def __init__(self, cache: RowCache, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.cache, self.is_initialized = cache, True
        self.keys: Tensor = keys
        self.values: Tensor = values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        return self.cache.add(self.keys, key_states), self.cache.add(self.values, value_states)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.get_mask_sizes(query_length, 0)

    def get_seq_length(self) -> int:
        return self.cache.width

    def get_max_length(self) -> int:
        return -1


def check_cache(model: PreTrainedModel) -> None:
    """Raise unless what a model keeps of a text are keys and values of each token, which rows can come and go with.

    Raises:
        SpectuneError: it keeps a state, or one layer's keys serve another.
    """
    for layer in DynamicCache(config=model.config.get_text_config(decoder=True)).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise SpectuneError(
                f"{type(model).__name__} keeps a {type(layer).__name__} of a text, and requests of different lengths "
                "cannot join a batch of it; `spectune generate` answers with it"
            )
