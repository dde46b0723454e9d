"""Proofs that a core or a method of your own keeps its contract: inherit a case, give it an example, run pytest.

class TestBlocks(CoreContract):
    size = 12

    def example(self):
        return Blocks(torch.randn(3, 4, 4, dtype=torch.float64))

class TestBlockSVF(MethodContract):
    method = BlockSVF(blocks=2)
"""

from __future__ import annotations

import copy
import tempfile
from typing import Any, TypeVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from spectune.adapters.adapter import Adapter
from spectune.layers.adapted import Adapted
from spectune.layers.cores import Core, mix
from spectune.layers.modules import effective_weight
from spectune.methods import Method, from_fields, parse, to_text
from spectune.model.adapting import adapt, attach
from spectune.model.lifecycle import detach, extract
from spectune.model.merging import merge
from spectune.model.names import updates_of
from spectune.model.routing import route

C = TypeVar("C", bound=Core)


class CoreContract:
    """What holds for every core C (p x q); a subclass gives an example and its number of columns, q."""

    size: int

    def example(self) -> Core:
        """Return a core in float64, without a batch axis; its values should be no special ones."""
        raise NotImplementedError

    def test_its_two_products_are_of_one_matrix(self) -> None:
        core = self.example()
        C = dense(core, self.size)
        t, g = _randn(2, 5, C.shape[1]), _randn(2, 5, C.shape[0])
        torch.testing.assert_close(core.apply(t), t @ C.T)
        torch.testing.assert_close(core.transposed(g), g @ C)

    def test_its_gradients_are_those_of_its_product(self) -> None:
        core = self.example()
        values = _values(core).requires_grad_()
        C = dense(core, self.size)
        t, grad = _randn(5, C.shape[1]).requires_grad_(), _randn(5, C.shape[0])
        expected = torch.autograd.grad(with_values(core, values).apply(t), (t, values), grad)
        to_t, to_values = core.gradients(t.detach(), grad, True)
        assert to_values is not None
        torch.testing.assert_close(to_t, expected[0])
        torch.testing.assert_close(to_values, expected[1])
        assert core.gradients(t.detach(), grad, False)[1] is None

    def test_every_row_of_a_batch_may_have_a_core_of_its_own(self) -> None:
        core = self.example()
        other = with_values(core, _values(core).flip(0) * 2 - 0.5)
        batched = with_values(core, torch.stack([_values(core), _values(other)]))
        t, g = _randn(2, 3, dense(core, self.size).shape[1]), _randn(2, 3, dense(core, self.size).shape[0])
        torch.testing.assert_close(batched.apply(t), torch.stack([core.apply(t[0]), other.apply(t[1])]))
        torch.testing.assert_close(batched.transposed(g), torch.stack([core.transposed(g[0]), other.transposed(g[1])]))

    def test_cores_of_one_layout_add_value_by_value(self) -> None:
        core = self.example()
        other = with_values(core, _values(core).flip(0) * 2 - 0.5)
        assert core.layout == other.layout
        torch.testing.assert_close(
            dense(mix([core, other], [0.5, -2.0]), self.size),
            0.5 * dense(core, self.size) - 2 * dense(other, self.size),
        )

    def test_it_computes_in_the_dtype_of_what_it_is_given(self) -> None:
        core = self.example()
        for dtype in (torch.float32, torch.bfloat16):
            t = _randn(4, dense(core, self.size).shape[1]).to(dtype)
            assert core.apply(t).dtype == dtype

    def test_it_compiles_without_a_break(self) -> None:
        core = self.example()
        t = _randn(4, dense(core, self.size).shape[1])

        def product(values: Tensor, t: Tensor) -> Tensor:
            return with_values(core, values).apply(t)

        compiled = torch.compile(product, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(_values(core), t), core.apply(t))


class MethodContract:
    """What holds for every method; a subclass gives one, with a rank that layers of 6 to 12 features can take."""

    method: Method

    def test_its_text_and_its_fields_describe_it(self) -> None:
        assert from_fields(self.method.fields()) == self.method
        assert parse(to_text(self.method)) == self.method

    def test_forward_and_gradients_are_those_of_its_delta(self) -> None:
        for layer_kind in (nn.Linear(9, 12), nn.Linear(12, 9, bias=False)):
            model, layer = self._adapted(layer_kind)
            (update,) = updates_of(layer, "default")
            weight = effective_weight(layer).detach()
            x, target = _randn(3, 5, weight.shape[1]).requires_grad_(), _randn(3, 5, weight.shape[0])
            y = model(x)
            ours = torch.autograd.grad((y.tanh() * target).sum(), [x, *update.trained().values()])
            delta = update.method.delta(layer.tensors(update), weight)
            y2 = F.linear(x, weight + delta, layer.bias)
            theirs = torch.autograd.grad((y2.tanh() * target).sum(), [x, *update.trained().values()])
            torch.testing.assert_close(y, y2)
            # a method that is not additive may take a part of W' for a constant, as DoRA does its norm
            for a, b in zip(ours, theirs, strict=True) if self.method.additive else ():
                torch.testing.assert_close(a, b)

    def test_the_base_is_never_written_to(self) -> None:
        plain = nn.Linear(9, 12)
        before = copy.deepcopy(plain.state_dict())
        model, _ = self._adapted(plain)
        model(_randn(2, 9)).sum().backward()
        detach(model)
        assert all(torch.equal(value.to(before[key].dtype), before[key]) for key, value in plain.state_dict().items())

    def test_what_is_saved_is_what_was_trained(self) -> None:
        plain = nn.Linear(9, 12)
        model, _ = self._adapted(copy.deepcopy(plain), torch.float32)
        x = torch.randn(4, 9)
        y = model(x)
        with tempfile.TemporaryDirectory() as folder:
            extract(model).save(folder)
            loaded = Adapter.load(folder)
        other = nn.Sequential(copy.deepcopy(plain))
        attach(other, loaded)
        torch.testing.assert_close(other(x), y)

    def test_adapters_add(self) -> None:
        model, _ = self._adapted(nn.Linear(9, 12), torch.float32)
        adapter = extract(model)
        if self.method.additive:
            torch.testing.assert_close((adapter + 0.5 * adapter).delta("0"), 1.5 * adapter.delta("0"))

    def test_a_merged_layer_answers_the_same(self) -> None:
        model, _ = self._adapted(nn.Linear(9, 12))
        x = _randn(4, 9)
        y = model(x)
        merge(model)
        assert not isinstance(model[0], Adapted)
        torch.testing.assert_close(model(x), y)

    def test_rows_are_answered_as_if_they_were_alone(self) -> None:
        model, _ = self._adapted(nn.Linear(9, 12), torch.float32)
        x = torch.randn(3, 4, 9)
        alone = model(x)
        with torch.no_grad(), route(model, ["default", None, {"default": 0.5}]):
            routed = model(x)
        torch.testing.assert_close(routed[0], alone[0])
        torch.testing.assert_close(routed[1], F.linear(x[1], model[0].weight, model[0].bias))

    def _adapted(self, layer: nn.Module, dtype: torch.dtype = torch.float64) -> tuple[Any, Adapted]:
        """Return a model of one layer, adapted and away from where the method starts."""
        model: Any = nn.Sequential(layer).to(dtype)
        adapt(model, self.method)
        adapted = model[0]
        with torch.no_grad():
            for update in updates_of(adapted, "default"):
                for parameter in update.trained().values():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.eval(), adapted


def dense(core: Core, size: int) -> Tensor:
    """Return C (p x size), from its product with the identity."""
    return core.apply(torch.eye(size, dtype=_values(core).dtype)).T


def with_values(core: C, values: Tensor) -> C:
    """Return the core with other values."""
    return core.holding(values)


def _values(core: Core) -> Tensor:
    assert core.values is not None  # or there is nothing to prove
    return core.values.detach().clone()


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)
