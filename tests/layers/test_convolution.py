"""Convolutions as products with the patches under their kernel, in one to three dimensions and in groups."""

import math
from typing import Any

import pytest
import torch
import torch.nn as nn

from spectune.layers.kinds import kind_of
from spectune.layers.kinds.convolution import Convolution, GroupedConvolution

LAYERS = {
    "1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "2d": (lambda: nn.Conv2d(4, 6, (3, 2), dilation=(1, 2), padding=1), (2, 4, 5, 6)),
    "3d": (lambda: nn.Conv3d(2, 4, 2), (2, 2, 3, 4, 3)),
    "circular": (lambda: nn.Conv1d(4, 6, 5, padding=2, padding_mode="circular"), (2, 4, 9)),
    "same": (lambda: nn.Conv1d(4, 6, 5, padding="same", bias=False), (2, 4, 9)),
    "no batch": (lambda: nn.Conv2d(4, 6, 3), (4, 5, 6)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 4)),
    "depthwise": (lambda: nn.Conv1d(4, 8, 3, groups=4), (2, 4, 9)),
}


def made(name) -> tuple[Any, Any, torch.Tensor]:
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer = build().double()
    return layer, kind_of(layer), torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("name", LAYERS)
def test_a_kernel_is_a_matrix_and_back(name):
    layer, kind, _ = made(name)
    assert type(kind) is (GroupedConvolution if layer.groups > 1 else Convolution)
    W = kind.matrix(layer.weight)
    inputs = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    assert W.shape == (layer.out_channels, inputs)
    assert torch.equal(kind.held(W, kind.kernel(layer)), layer.weight)
    assert kind.kernel(layer) == layer.kernel_size


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("groups", "depthwise")])
def test_products_are_those_of_a_layer_with_that_kernel(name):
    """x M^T is linear in M, and for the rows of W it is the layer's answer without its bias."""
    layer, kind, x = made(name)
    W = kind.matrix(layer.weight)
    answer = kind.features_last(layer, layer(x))
    assert answer.shape[-1] == layer.out_channels
    bias = 0 if layer.bias is None else layer.bias
    torch.testing.assert_close(kind.product(layer, x, W) + bias, answer)
    torch.testing.assert_close(kind.as_answered(layer, answer), layer(x))
    mixed = torch.randn(3, layer.out_channels, dtype=torch.float64)
    t = kind.product(layer, x, mixed @ W)
    torch.testing.assert_close(t, (answer - bias) @ mixed.mT)
    left = torch.randn(layer.out_channels, 3, dtype=torch.float64)
    torch.testing.assert_close(kind.finish(layer, t, left), t @ left.mT)
    torch.testing.assert_close(kind.of_rows(layer, x, W[[3, 1]], torch.tensor([3, 1])), (answer - bias)[..., [3, 1]])


@pytest.mark.parametrize("name", ["groups", "depthwise"])
def test_in_groups_one_factor_serves_all_and_each_keeps_to_its_own_channels(name):
    layer, kind, x = made(name)
    W = kind.matrix(layer.weight)
    L, R = torch.randn(layer.out_channels, 2).double(), torch.randn(2, W.shape[1]).double()
    moved = made(name)[0]
    with torch.no_grad():
        moved.weight.add_(kind.held(L @ R, layer.kernel_size))
    t = kind.product(layer, x, R)
    assert t.shape[-2:] == (layer.groups, 2)
    expected = kind.features_last(layer, moved(x) - layer(x))
    torch.testing.assert_close(kind.finish(layer, t, L), expected)
    rows = torch.tensor([layer.out_channels - 1, 0])
    torch.testing.assert_close(
        kind.of_rows(layer, x, W[rows], rows), (kind.features_last(layer, layer(x)) - layer.bias)[..., rows]
    )


def test_a_matrix_in_another_dtype_is_taken_in_that_of_the_input():
    layer, kind, x = made("1d")
    W = kind.matrix(layer.weight)
    layer.float()
    found = kind.product(layer, x.float(), W)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), kind.product(layer.double(), x, W), rtol=1e-4, atol=1e-5)


def test_which_layers_are_of_which_kind():
    one, other = Convolution(), GroupedConvolution()
    plain, grouped = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2)
    assert (one.takes(plain), one.takes(grouped)) == (True, False)
    assert (other.takes(plain), other.takes(grouped)) == (False, True)
    assert not one.takes(nn.ConvTranspose2d(4, 4, 1))
    assert not other.takes(nn.Linear(4, 4))
    assert (one.several, other.several, one.looks_up) == (False, True, False)
