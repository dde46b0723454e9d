"""An input in the place of vectors: their products are those of the patches under a kernel, laid out by hand."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from spectune.errors import SpectuneError
from spectune.layers.kinds import kind_of
from spectune.layers.kinds.base import Vectors


def convolution(groups=1):
    """Return a layer, an input, and the vectors (n x places x in) that stand for it."""
    torch.manual_seed(0)
    layer = nn.Conv1d(4, 6, 3, padding=1, groups=groups, dtype=torch.float64)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    patches = F.unfold(F.pad(x, (1, 1))[:, :, None], (1, 3)).mT
    return layer, x, patches


def of(layer, x, patches):
    return Vectors(kind_of(layer), layer, x, patches.shape, x.dtype)


def test_a_kind_turns_a_tensor_into_w_and_back():
    layer, x, patches = convolution()
    kind = kind_of(layer)
    W = kind.matrix(layer.weight)
    assert torch.equal(kind.held(W, kind.kernel(layer)), layer.weight)
    assert kind.kernel(layer) == (3,)
    answer = kind.features_last(layer, layer(x))
    torch.testing.assert_close(answer, patches @ W.mT + layer.bias)
    assert torch.equal(kind.as_answered(layer, answer), layer(x))
    assert kind.takes(layer)
    assert not kind.takes(nn.Linear(2, 2))
    assert kind.refusal(layer) is None


def test_products_of_vectors_are_those_of_the_patches():
    layer, x, patches = convolution()
    vectors, M, L = of(layer, x, patches), torch.randn(3, 12).double(), torch.randn(6, 3).double()
    assert (vectors.shape, vectors.dtype, vectors.device) == (patches.shape, x.dtype, x.device)
    assert vectors.input is x
    torch.testing.assert_close(vectors.product(M), patches @ M.mT)
    torch.testing.assert_close(vectors.finish(vectors.product(M), L), patches @ M.mT @ L.mT)
    torch.testing.assert_close(vectors.of_rows(M, torch.tensor([5, 0, 2])), patches @ M.mT)


def test_some_of_the_rows():
    layer, x, patches = convolution()
    vectors, M = of(layer, x, patches)[torch.tensor([1])], torch.randn(3, 12).double()
    assert vectors.shape == (1, 5, 12)
    torch.testing.assert_close(vectors.product(M), patches[1:] @ M.mT)


def test_what_is_dropped_is_dropped_from_the_input():
    layer, x, patches = convolution()
    vectors, M = of(layer, x, patches), torch.randn(3, 12).double()
    torch.testing.assert_close(vectors.dropped(0.0).product(M), patches @ M.mT)
    dropped = vectors.dropped(0.5)
    gone = dropped.input == 0
    torch.testing.assert_close(dropped.input, torch.where(gone, 0, 2 * x))
    assert 0 < int(gone.sum()) < x.numel()
    assert dropped.shape == vectors.shape


def test_the_linear_function_takes_vectors_and_others_do_not():
    layer, x, patches = convolution()
    vectors, M, b = of(layer, x, patches), torch.randn(3, 12).double(), torch.randn(3).double()
    torch.testing.assert_close(F.linear(vectors, M), patches @ M.mT)
    torch.testing.assert_close(F.linear(vectors, M, b), patches @ M.mT + b)
    torch.testing.assert_close(F.linear(vectors, M, bias=b), patches @ M.mT + b)
    torch.testing.assert_close(F.linear(vectors, weight=M, bias=b), patches @ M.mT + b)
    torch.testing.assert_close(F.linear(input=vectors, weight=M), patches @ M.mT)
    with pytest.raises(SpectuneError, match="a method that takes relu of its input fits linear layers alone"):
        F.relu(vectors)
    with pytest.raises(SpectuneError, match="a method that takes matmul of its input fits linear layers alone"):
        torch.matmul(vectors, M.mT)


def test_in_groups_each_place_has_several_vectors():
    layer, x, _ = convolution(groups=2)
    kind, M = kind_of(layer), torch.randn(3, 6).double()
    assert kind.several
    parts = [F.unfold(F.pad(part, (1, 1))[:, :, None], (1, 3)).mT for part in x.chunk(2, 1)]
    vectors = Vectors(kind, layer, x, (2, 5, 6), x.dtype)
    torch.testing.assert_close(vectors.product(M), torch.stack([part @ M.mT for part in parts], -2))
    L = torch.randn(6, 3).double()
    expected = torch.cat([part @ M.mT @ own.mT for part, own in zip(parts, L.chunk(2), strict=True)], -1)
    torch.testing.assert_close(vectors.finish(vectors.product(M), L), expected)
    rows = torch.tensor([4, 1])  # the second group's, and the first's
    expected = torch.stack([parts[1] @ M[0], parts[0] @ M[1]], -1)
    torch.testing.assert_close(vectors.of_rows(M[:2], rows), expected)
    with pytest.raises(SpectuneError, match="fits linear layers alone"):
        F.linear(vectors, M)
