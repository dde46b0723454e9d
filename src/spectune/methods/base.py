"""What a method is: the factors it starts from and which of them train."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.layers.factors import Base, Factors, Ratio
from spectune.layers.kinds import Vectors
from spectune.layers.updates import Update
from spectune.spectral import SVD, OneSided, Request
from spectune.speed.dropout import dropout

Tensors = Mapping[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
Decomposition = SVD | OneSided | None  # what `request` is answered with


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC):
    """A fine-tuning method as a declaration; subclasses are frozen dataclasses, one file each.

    A subclass states the tensors that train (`shapes`, `initial`), the frozen ones it needs (`request`, `basis`)
    and how they make up the factors of W' = W + s L C R (`factors`).  `spectune.adapt` does the rest.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    learning_rate: ClassVar[float]  # a starting point for a short run on a small model
    basis_fields: ClassVar[tuple[str, ...]] = ()  # the fields that the frozen tensors depend on
    earlier: ClassVar[Mapping[str, object]] = {}  # fields that older files lack, and what these were written with
    learns_from_zero: ClassVar[bool] = True  # False where L or R is made of W, so that nothing moves where W is zero
    core_only: ClassVar[bool] = False  # L and R are frozen: adapters over one basis add core by core
    additive: ClassVar[bool] = True  # W' - W is s L C R, so that a DoRA magnitude can go around it
    replaces: ClassVar[bool] = False  # W' does not depend on W
    in_factors: ClassVar[bool] = True  # W' - W, or with a ratio W', is told by `factors`

    # -- what a method declares

    @abc.abstractmethod
    def shapes(self, out_features: int, in_features: int) -> Shapes:
        """Return the shape of each trained tensor for a weight (out_features x in_features)."""

    @abc.abstractmethod
    def initial(self, shapes: Shapes, basis: Tensors) -> dict[str, Tensor]:
        """Return the trained tensors at the start, float32 on the CPU or on the basis' device."""

    def initial_of_table(self, shapes: Shapes, basis: Tensors) -> dict[str, Tensor]:
        """Return the trained tensors at the start of an embedding, each of whose inputs picks a column of R."""
        return self.initial(shapes, basis)

    @abc.abstractmethod
    def factors(self, t: Tensors) -> Factors:
        """Return L, C, R and s, given the trained and the frozen tensors by name."""

    def request(self) -> Request | None:
        """Return the decomposition of W that `basis` needs, or None."""
        return None

    def basis(self, weight: Tensor, decomposition: Decomposition) -> dict[str, Tensor]:
        """Return the frozen tensors for a weight (out x in), given what `request` asked for."""
        return {}

    def fit(self, out_features: int, in_features: int) -> Method:
        """Return the method as a weight (out_features x in_features) takes it: with the largest rank that it has."""
        return self

    # -- what follows from the declaration; a method that is not additive overrides `respond`, `ratio` and `delta`

    def respond(self, t: Tensors, x: Tensor, base: Base, training: bool) -> Tensor:
        """Return x (W' - W)^T for x (..., in)."""
        return self.factors(t).apply(self._dropped(x, training))

    def add(self, t: Tensors, x: Tensor, y: Tensor) -> None:
        """Add to y (..., out), in place and without gradients, x dW^T for x (..., in), dW = s L C R."""
        self.factors(t).add(x, y)

    def ratio(self, t: Tensors, base: Base) -> Ratio | None:
        """Return what W + s L C R is multiplied by to give W', or None where they are the same."""
        return None

    def ratios(self, ts: Sequence[Tensors], bases: Sequence[Base]) -> Tensor | None:
        """Return the ratios of several layers (layers x out), or None where each is to be asked by `ratio`."""
        return None

    def whole_layer(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """Return the trained tensors with which W' = W and b' = b, where W' does not depend on W."""
        raise NotImplementedError

    def replacement(self, t: Tensors, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W'^T + bias for x (..., in), where W' does not depend on W."""
        raise NotImplementedError

    def whole(self, t: Tensors) -> Factors | None:
        """Return the factors of W + s L C R itself, where the basis holds all of W."""
        return None

    def still(self, t: Tensors) -> Tensors:
        """Return the tensors as they are where W' = W, for a method with `whole`."""
        return t

    @property
    def drop(self) -> float:
        """The probability of dropping an input of the update in training."""
        return getattr(self, "dropout", 0.0)

    def _dropped(self, x: Any, training: bool) -> Any:
        if not self.drop or not training:
            return x
        return x.dropped(self.drop) if isinstance(x, Vectors) else dropout(x, self.drop)

    def delta(self, t: Tensors, weight: Tensor) -> Tensor:
        """Return W' - W (out x in), dense."""
        return self.factors(t).dense()

    def bias_of(self, t: Tensors, own: Tensor | None) -> Tensor | None:
        """Return b', the layer's bias under the update, where it is another than the layer's own b."""
        return None

    def projections(self, t: Tensors) -> tuple[Tensor, Tensor] | None:
        """Return g and h with W R^T = L diag(g) and R R^T = diag(h), where the basis makes it so."""
        return None

    def spectrum(self, t: Tensors) -> Tensor | None:
        """Return the singular values whose vectors are frozen tensors, or None where there are none."""
        return t.get("S")

    def coefficients(self, t: Tensors) -> dict[str, Tensor] | None:
        """Return trained tensors that are linear in dW, zero where dW is; None where there are none."""
        return None

    def from_coefficients(self, coefficients: Tensors) -> tuple[Method, dict[str, Tensor]]:
        """Return the method and trained tensors whose coefficients these are; the inverse of `coefficients`."""
        return self, dict(coefficients)

    def start_schedule(self, updates: Sequence[Update]) -> None:  # noqa: B027 - most methods have none
        """Begin whatever the method does by itself as training proceeds, over all its updates in a model."""

    # -- shared by all

    @property
    def basis_key(self) -> str:
        """Name the frozen tensors: methods with the same key on the same weight share them."""
        values = (str(getattr(self, field)).replace(".", "_") for field in self.basis_fields)
        return "-".join((self.name, *values))

    def parameter_count(self, out_features: int, in_features: int) -> int:
        """Count the trained parameters for a weight (out_features x in_features)."""
        return sum(int(torch.Size(shape).numel()) for shape in self.shapes(out_features, in_features).values())

    def fields(self) -> dict[str, object]:
        """Return the name and every field, as JSON values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            "name": self.name,
            **{k: v.fields() if isinstance(v, Method) else v for k, v in values.items()},
        }


class _Ranked(Protocol):
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[object]]]

    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> float | None: ...


R = TypeVar("R", bound=_Ranked)


def at_most(method: R, limit: int) -> R:
    """Return a method with `rank` and `alpha` at a rank of at most `limit`, with the same scale."""
    if method.rank <= limit:
        return method
    alpha = None if method.alpha is None else method.alpha * limit / method.rank
    return dataclasses.replace(method, rank=limit, alpha=alpha)


def check_int(method: Method, *fields: str, least: int = 1) -> None:
    """Raise unless each field is an integer of at least `least`."""
    for field in fields:
        value = getattr(method, field)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SpectuneError(f"{field} of {type(method).__name__} must be an integer >= {least}, not {value!r}")


def check_range(method: Method, field: str, low: float, high: float = 1e12, *, open_low: bool = False) -> None:
    """Raise unless the field is a number in [low, high), or in (low, high) if `open_low`.

    With greater ones than 1e12 products of float32 values overflow.
    """
    value = getattr(method, field)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value < high or (open_low and value == low):
        bounds = f"{'(' if open_low else '['}{low}, {high:g})"
        raise SpectuneError(f"{field} of {type(method).__name__} must be a number in {bounds}, not {value!r:.40}")


def check_bool(method: Method, *fields: str) -> None:
    """Raise unless each field is True or False."""
    for field in fields:
        value = getattr(method, field)
        if not isinstance(value, bool):
            raise SpectuneError(f"{field} of {type(method).__name__} must be true or false, not {value!r}")


def check_choice(method: Method, field: str, choices: Iterable[str]) -> None:
    """Raise unless the field is one of `choices`."""
    value = getattr(method, field)
    if value not in (choices := tuple(choices)):
        raise SpectuneError(f"{field} of {type(method).__name__} must be one of {', '.join(choices)}, not {value!r}")
