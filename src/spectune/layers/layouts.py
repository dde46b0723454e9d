"""Where the rows of a batch lie in a layer's input, told by comparing two rows together with each of them alone."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from spectune.layers.protocols import Place

SHARED = "one input without an axis of rows serves them all"
GATHERED = "its input is picked from the batch by what the rows hold"
MIXED = "its input for a row depends on the rows beside it, or on chance"
SEVERAL = "it is called several times, with the rows in different places"
UNTRIED = "it had no part in the forward pass that rows were told apart by"


class Layout(NamedTuple):
    """The axis of a tensor along which the rows of a batch lie.

    Args:
        axis: the axis.
        minor: slice i * rows + row of the axis belongs to a row; otherwise row * slices + i.
        several: a row has more than one slice.
    """

    axis: int = 0
    minor: bool = False
    several: bool = False

    @property
    def in_front(self) -> bool:
        """Whether rows come first, each with its slices side by side."""
        return self.axis == 0 and not self.minor

    def front(self, x: Tensor, rows: int) -> Tensor:
        """Return x with the rows in front."""
        x = x.movedim(self.axis, 0)
        return x.unflatten(0, (-1, rows)).transpose(0, 1).flatten(0, 1) if self.minor else x

    def back(self, x: Tensor, rows: int) -> Tensor:
        """Return what `front` made as it was."""
        if self.minor:
            x = x.unflatten(0, (rows, -1)).transpose(0, 1).flatten(0, 1)
        return x.movedim(0, self.axis).contiguous()  # as a linear layer's output is

    def take(self, x: Tensor, rows: int, wanted: Tensor) -> Tensor:
        """Return the slices of `wanted` (indices of rows) among those of all `rows`."""
        return self._split(x, rows).index_select(self._at, wanted).flatten(self.axis, self.axis + 1)

    def join(self, parts: Sequence[Tensor], counts: Sequence[int], order: Tensor) -> Tensor:
        """Return parts of `counts` rows side by side, their rows taken in an order."""
        split = [self._split(part, count) for part, count in zip(parts, counts, strict=True)]
        return torch.cat(split, self._at).index_select(self._at, order).flatten(self.axis, self.axis + 1)

    def _split(self, x: Tensor, rows: int) -> Tensor:
        each = x.shape[self.axis] // rows
        return x.unflatten(self.axis, (each, rows) if self.minor else (rows, each))

    @property
    def _at(self) -> int:
        return self.axis + self.minor


class Seen(NamedTuple):
    """What is kept of a tensor to compare it with another.

    Args:
        shape: its shape, without the features.
        values: a number for each of its slices.
        size: the norm of the largest slice, which these numbers are of the size of, but for chance.
    """

    shape: tuple[int, ...]
    values: Tensor
    size: float = 0.0

    @classmethod
    def of(cls, x: Tensor, *, features: bool = False) -> Seen:
        """Look at a tensor; with `features` its last axis is no axis of slices."""
        x = x.detach()
        values = x
        if x.dim() > features and x.is_floating_point() and x.shape[-1:] != (1,):
            with torch.no_grad():
                # a number for each slice, instead of the slice: a random projection differs wherever two slices do, but
                # for chance
                probe = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(0))
                values = (x.float() * probe.to(x.device)).sum(-1) if features or x.dim() > 1 else x.float()
        elif features:
            values = x.float().sum(-1)
        return cls(tuple(x.shape[:-1] if features else x.shape), values.clone(), _largest_norm(x))


def _largest_norm(x: Tensor) -> float:
    """Return the norm of the largest slice along the last axis, of what is finite in it; 0.0 for other than floats."""
    if not x.is_floating_point() or not x.numel() or x.is_meta:
        return 0.0
    x = x.double().nan_to_num(0.0, 0.0, 0.0)  # as masks hold -inf, or numbers whose squares are none of 32 bits
    return float((x.norm(dim=-1) if x.dim() > 1 else x.abs()).max())


def where(both: Seen, alone: Sequence[Seen], tolerance: float) -> Layout | str:
    """Return where the two rows of a batch lie in a tensor, or why that cannot be said.

    Args:
        both: the tensor that two rows together gave.
        alone: what each gave by itself.
        tolerance: difference of numbers that rounding may make, as a part of the largest slice's norm: a number itself
            may be small by chance, which of one slice, as in decoding, is all that there is.
    """
    if alone[0].shape != alone[1].shape or len(both.shape) != len(alone[0].shape):
        return GATHERED
    each = alone[0].shape
    grown = [axis for axis, (n, m) in enumerate(zip(both.shape, each, strict=True)) if n != m]
    if not grown:
        return SHARED if all(_close(both.values, one.values, tolerance * one.size) for one in alone) else MIXED
    axis = grown[0]
    if len(grown) > 1 or both.shape[axis] != 2 * each[axis] or axis >= both.values.dim():
        return GATHERED
    for minor in (False, True):
        layout = Layout(axis, minor, each[axis] > 1)
        rows = layout._split(both.values, 2).unbind(layout._at)
        if all(_close(row, one.values, tolerance * one.size) for row, one in zip(rows, alone, strict=True)):
            return layout
    return MIXED


def _close(a: Tensor, b: Tensor, most: float) -> bool:
    if not a.numel() or not a.is_floating_point():
        return torch.equal(a, b)
    # masks hold -inf, and the difference of two of them is no number
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite):
        return False
    a, b = a[finite], b[finite]
    return not b.numel() or bool((a - b).abs().max() <= most)


Path = tuple[Hashable, ...]  # to a value within sequences and mappings: their keys


class Plan(NamedTuple):
    """Where rows lie in what a module takes and gives, by the path to each tensor; None is a tensor without any."""

    taken: Mapping[Path, Layout | None]
    given: Mapping[Path, Layout]


class Layouts:
    """What is known of a model's layers.

    Attributes:
        places: by layer and number of axes, where rows lie in its input, or why that cannot be said.
        plans: modules that can answer some rows alone, and how, by the structure of what they are called with.
        apart: for a layer without rows of its own, the module around it that answers them apart.
        names: of the layers.
        shown: layers of the modules that were tried.
        tried: structures of calls that were tried.
        entrances: modules that were called from outside.
        failure: why the last try failed.
    """

    def __init__(self) -> None:
        self.places: dict[tuple[Place, int], Layout | str] = {}
        self.plans: dict[nn.Module, dict[object, Plan]] = {}
        self.apart: dict[Place, nn.Module] = {}
        self.names: dict[Place, str] = {}
        self.shown: set[Place] = set()
        self.tried: set[object] = set()
        self.entrances: set[nn.Module] = set()
        self.failure: str | None = None

    def learn(self, key: tuple[Place, int], verdict: Layout | str) -> None:
        """Add what a pass has shown of a layer to what others have."""
        known = self.places.get(key, verdict)
        if isinstance(known, Layout) and isinstance(verdict, Layout):
            same = known[:2] == verdict[:2]
            verdict = known._replace(several=known.several or verdict.several) if same else SEVERAL
        self.places[key] = known if isinstance(known, str) else verdict
