"""Checkpointed regions that keep the products of linear layers: the same gradients, and no product twice."""

import weakref

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import spectune

METHODS = [
    "lora:rank=2",
    "lora:rank=2,dropout=0.5",
    "pissa:rank=2",
    "lora_xs:rank=2",
    "svf",
    "svft:pattern=banded,width=1",
    "dora:inner=lora,rank=2",
]


class Block(nn.Module):
    """An MLP with a norm, an adapted and a plain layer, and a change in place."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.plain = nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 6)
        self.in_place = in_place

    def forward(self, x):
        hidden = self.up(self.norm(x))
        if self.in_place:
            hidden.mul_(2)
        return x + F.dropout(self.plain(self.down(F.silu(hidden))), 0.2, self.training).tanh()


def adapted(method, **options):
    torch.manual_seed(0)
    block = Block(**options).double()
    spectune.adapt(block, method, exclude=["plain"], factored=True)
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return block.train()


def gradients(block, x, passes=1, **options):
    torch.manual_seed(1)
    leaf = x.clone().requires_grad_()
    block.zero_grad()
    y = checkpoint(block, leaf, **options) if options else block(leaf)
    for i in range(passes):
        y.square().sum().backward(retain_graph=i < passes - 1)
    return [y.detach(), leaf.grad, *(p.grad.clone() for p in block.parameters() if p.requires_grad)]


LIGHT = {"use_reentrant": False, "context_fn": spectune.keep_products}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
def test_gradients_are_the_same_to_the_last_bit(method, in_place, passes):
    if in_place and method.startswith("dora"):
        pytest.skip("DoRA keeps its output, and autograd refuses a change in place")
    block, x = adapted(method, in_place=in_place), torch.randn(4, 6, dtype=torch.float64)
    plain, light = gradients(block, x, passes), gradients(block, x, passes, **LIGHT)
    assert all(torch.equal(a, b) for a, b in zip(plain, light, strict=True))


class Products(TorchDispatchMode):
    """Count the products with some matrices."""

    def __init__(self, matrices):
        super().__init__()
        self.storages, self.count = {m.untyped_storage().data_ptr() for m in matrices}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.count += any(t.untyped_storage().data_ptr() in self.storages for t in args)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def nothing_known(monkeypatch):
    """Regions begin without knowing what is behind their last layer."""
    monkeypatch.setattr("spectune.speed.recompute_cache._looked_at", set())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_no_product_with_a_frozen_matrix_but_the_last_is_taken_twice(method, dtype, nothing_known):
    block, x = adapted(method).to(dtype), torch.randn(4, 6, dtype=dtype)
    matrices = [t for t in (*block.parameters(), *block.buffers()) if t.dim() == 2 and not t.requires_grad]

    def taken(**options):
        with Products(matrices) as products:
            gradients(block, x, **options)
        return products.count

    without, once = taken(), taken(**LIGHT)
    assert once == without + 1  # and the last one, behind which is a dropout here
    assert taken(**LIGHT) == without < taken(use_reentrant=False)


class Residual(Block):
    """A block whose last layer is the last that keeps anything."""

    def forward(self, x):
        return x + self.down(F.silu(self.up(self.norm(x))))


@pytest.mark.parametrize("method", ["lora:rank=2", "svf", "lora:rank=2,dropout=0.5"])
@pytest.mark.parametrize("stop", [True, False])
def test_the_last_product_is_neither_held_nor_taken_again(method, stop, nothing_known):
    block, x = Residual().double(), torch.randn(4, 6, dtype=torch.float64)
    spectune.adapt(block, method, ["down"], factored=True)
    with set_checkpoint_early_stop(stop), Products([block.down.weight, *block.down.buffers()]) as products:
        plain = gradients(block.train(), x)
        without, products.count = products.count, 0
        light = gradients(block, x, **LIGHT)
    assert all(torch.equal(a, b) for a, b in zip(plain, light, strict=True))
    assert (products.count == without) is (stop and "dropout" not in method)  # else something is done with it


def test_a_change_in_place_of_the_last_product_sees_its_numbers(nothing_known):
    class Changed(Residual):
        def forward(self, x):
            return self.down(F.silu(self.up(self.norm(x)))).add_(x).tanh()

    block, x = Changed().double(), torch.randn(4, 6, dtype=torch.float64)
    spectune.adapt(block, "lora:rank=2", ["down"])
    plain, light = gradients(block.train(), x), gradients(block, x, **LIGHT)
    assert all(torch.equal(a, b) for a, b in zip(plain, light, strict=True))


def test_only_products_are_held_and_not_for_longer_than_they_are_needed(nothing_known):
    block, leaf = adapted("lora:rank=1"), torch.randn(500, 6, dtype=torch.float64, requires_grad=True)
    tapes = []

    def contexts():
        regions = spectune.keep_products()
        tapes.append(regions[0]._cache)
        return regions

    y = checkpoint(block, leaf, use_reentrant=False, context_fn=contexts)
    (cache,) = tapes
    held = [tensor for tensors, _ in cache._results for tensor in tensors if tensor is not None]
    widths = [t.shape[1] for t in held]
    assert sorted(widths) == [1, 1, 6, 9]  # not the last product
    assert {t.untyped_storage().nbytes() for t in held} == {sum(64 * -(-500 * width * 8 // 64) for width in widths)}
    y.sum().backward()
    assert cache._results == [None] * 3
    alive = weakref.ref(cache)
    del y, held, cache
    tapes.clear()
    assert alive() is None  # without the help of the garbage collector


def test_under_autocast_all_is_computed_again():
    block, x = adapted("lora:rank=2").float(), torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        plain, light = gradients(block, x), gradients(block, x, **LIGHT)
    assert all(torch.equal(a, b) for a, b in zip(plain, light, strict=True))
