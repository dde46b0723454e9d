"""Compression is the best approximation of its rank, says its error, and takes whatever an adapter may hold."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adapters.adapter_cases import METHODS, assert_same_update, deltas, made, small
from spectune import Adapter, LoRA, SpectuneError
from spectune.adapters.terms import LayerUpdate, Term


def lora(*factors: tuple[torch.Tensor, torch.Tensor]) -> Adapter:
    """Return a LoRA adapter with the layer "0" and, further on, "1", ... of these (B, A)."""
    layers = {}
    for i, (B, A) in enumerate(factors):
        term = Term(LoRA(rank=A.shape[0], alpha=A.shape[0]), {"A": A, "B": B})
        layers[str(i)] = LayerUpdate((B.shape[0], A.shape[1]), (term,))
    return Adapter(layers)


def assert_best(made_one: Adapter, exact: dict[str, torch.Tensor], rank: int, tolerance: float = 1e-6) -> None:
    """Compare with torch.linalg.svd of the dense update, in float64."""
    lost = total = 0.0
    for name, delta in exact.items():
        S = torch.linalg.svdvals(delta)
        least = float(S[rank:].square().sum())
        got = float((made_one.delta(name).double() - delta).square().sum())
        # rounded factors, and dense updates decomposed to 1e-6, are off by R, in ||E||^2 + 2 <E, R> + ||R||^2
        float32 = 1e-6 * float(S.norm())
        rounding = 2 * math.sqrt(least) * float32 + float32**2
        assert least * (1 - tolerance) - rounding <= got <= least * (1 + tolerance) + rounding
        assert made_one.layers[name].terms[0].method.rank <= max(rank, 1)
        lost, total = lost + least, total + float(S.square().sum())
    if total:
        assert math.isclose(made_one.error, math.sqrt(lost / total), rel_tol=1e-4, abs_tol=1e-6)
    else:
        assert made_one.error == 0


sizes = st.integers(1, 12)


@settings(max_examples=80, deadline=None)
@given(sizes, sizes, st.integers(1, 4), st.integers(1, 6), st.integers(1, 14), st.integers(0, 99), st.integers(0, 3))
def test_the_best_of_its_rank(out, into, terms, width, rank, seed, zeros):
    drawn = torch.Generator().manual_seed(seed)
    total = None
    for i in range(terms):
        A, B = torch.randn(width, into, generator=drawn), torch.randn(out, width, generator=drawn)
        if zeros > i:
            B[:, :: zeros + 1] = 0  # factors of lower rank than their width, or nothing at all
        if zeros == 3:
            A[0] = A[-1]
        part = (0.5 + i) * lora((B, A))
        total = part if total is None else total + part
    assert isinstance(total, Adapter)
    assert_best(total.compress(rank), deltas(total), rank)


def test_layers_of_all_shapes_at_once():
    torch.manual_seed(0)
    shapes = [(30, 20), (20, 30), (30, 20), (64, 8), (9, 70), (25, 25)]
    adapters = [lora(*((torch.randn(o, 4), torch.randn(4, i)) for o, i in shapes)) for _ in range(3)]
    total = 0.7 * adapters[0] + 0.2 * adapters[1] - adapters[2]
    for rank in (1, 4, 7, 12, 40):
        assert_best(total.compress(rank), deltas(total), rank)


def test_factors_of_very_different_sizes():
    torch.manual_seed(0)
    B, A = torch.randn(40, 6), torch.randn(6, 30)
    scales = torch.tensor([1e6, 1e-6, 1.0, 1e3, 1e-3, 1e-5])
    even, uneven = lora((B, A)), lora((B * scales, A / scales[:, None]))
    for rank in (2, 4, 5):
        expected = even.compress(rank)
        got = uneven.compress(rank)
        assert math.isclose(got.error, expected.error, rel_tol=1e-4)
        assert_same_update(got, expected, 1e-5)


def test_small_singular_values_are_kept_to_float32():
    torch.manual_seed(0)
    U, V = torch.linalg.qr(torch.randn(50, 8).double())[0], torch.linalg.qr(torch.randn(40, 8).double())[0]
    S = 10.0 ** -torch.arange(8).double()
    exact = U @ torch.diag(S) @ V.mT
    wide = lora(((U * S).float(), V.mT.float())) + lora((torch.zeros(50, 2), torch.randn(2, 40)))
    for rank in range(1, 8):
        found = torch.linalg.svdvals(wide.compress(rank).delta("0").double())[:rank]
        assert torch.all((found - S[:rank]).abs() < 3e-7)
    assert (wide.compress(8).delta("0").double() - exact).norm() < 1e-6


def test_a_rank_above_what_is_there_changes_nothing():
    torch.manual_seed(0)
    a = lora((torch.randn(20, 3), torch.randn(3, 10)), (torch.randn(4, 3), torch.randn(3, 4)))
    for rank in (3, 4, 10, 1000):
        same = a.compress(rank)
        assert same.error == 0
        assert_same_update(same, a, 1e-6)
        assert [layer.terms[0].method.rank for layer in same.layers.values()] == [3, 3]


def test_nothing_at_all():
    zero = lora((torch.zeros(20, 3), torch.randn(3, 10)), (torch.zeros(4, 4), torch.zeros(4, 4)))
    for made_one in (zero.compress(1), zero.compress(9), zero.to_lora(), zero.to_lora(2), (zero - zero).compress(1)):
        assert made_one.error == 0
        assert all(not delta.any() for delta in deltas(made_one).values())
        assert all(layer.terms[0].method.rank >= 1 for layer in made_one.layers.values())


def test_adalora_exports_what_it_kept(tmp_path):
    adapter = made("adalora:rank=2,initial_rank=4")
    adapter.layers["0"].terms[0].trained["E"].zero_()
    adapter.layers["2"].terms[0].trained["E"][1:] = 0
    exported = adapter.export(tmp_path)
    assert [layer.terms[0].method.rank for layer in exported.layers.values()] == [1, 1, 4]
    assert_same_update(Adapter.from_peft(tmp_path), adapter)
    for rank in (1, 2, 4):
        assert_best(adapter.compress(rank), deltas(adapter), rank)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_every_method(method, rank):
    model = small()
    adapter = made(method, model)
    assert_best(adapter.compress(rank), deltas(adapter), rank, 1e-4)
    assert_same_update(adapter.to_lora(), adapter, 1e-6)
    mixed = adapter - 0.3 * made("lora_xs:rank=2", model) + made("dora:rank=2", model, targets=["2"])
    assert_best(mixed.compress(rank), deltas(mixed), rank, 1e-4)
    assert mixed.compress(rank).base_model == adapter.base_model


@pytest.mark.parametrize("rank", [0, -1, True, 2.0, "3"])
def test_a_rank_that_is_none(rank: Any):
    adapter = made("lora:rank=2")
    for call in (adapter.compress, adapter.to_lora):
        with pytest.raises(SpectuneError, match="rank must be an integer >= 1"):
            call(rank)


class Largest(TorchDispatchMode):
    """Note the elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(made) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return made


def test_it_never_goes_through_a_dense_matrix():
    torch.manual_seed(0)
    n = 20_000  # 1.6 GB, and hours, if dense
    big = lora((torch.randn(n, 4), torch.randn(4, n))) + lora((torch.randn(n, 4), torch.randn(4, n)))
    with Largest() as largest:
        compressed = big.compress(4)
    assert n < largest.elements < 100 * n
    assert 0.3 < compressed.error < 0.8
