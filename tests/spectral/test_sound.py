"""What passes for a decomposition of the weight at hand, and what of another weight, end or kind does not."""

import pytest
import torch

from spectune.spectral import Request, decompose_many
from spectune.spectral._sound import is_decomposition

REQUESTS = [Request("full"), Request("one_sided"), Request("top", 5), Request("bottom", 5)]
SHAPES = [(40, 24), (24, 40), (30, 30)]
every_request = pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: r.kind)
every_shape = pytest.mark.parametrize("shape", SHAPES)


def weight(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def found(W, request):
    return decompose_many({"W": W}, request, cache=False)["W"]


@every_request
@every_shape
@pytest.mark.parametrize("size", [1.0, 2.0**-40, 2.0**40])
def test_what_was_computed_is_one_at_every_size(request_, shape, size):
    W = weight(shape) * size
    assert is_decomposition(W, found(W, request_), request_)


@every_request
@every_shape
def test_that_of_another_weight_is_none(request_, shape):
    W, other = weight(shape), weight(shape, seed=1)
    assert not is_decomposition(W, found(other, request_), request_)
    assert not is_decomposition(W, found(W * 1.01, request_), request_)


@every_request
@pytest.mark.parametrize("name", ["left", "S", "right"])
def test_a_number_that_is_none_is_noticed_wherever_it_is(request_, name):
    W = weight((40, 24))
    result = found(W, request_)
    fields = {"left": result._fields[0], "right": result._fields[1 if "L" in result._fields else 2], "S": "S"}
    broken = getattr(result, fields[name]).clone()
    broken.view(-1)[-1] = torch.nan
    assert not is_decomposition(W, result._replace(**{fields[name]: broken}), request_)


def test_a_vector_that_is_turned_round_alone_is_noticed():
    W = weight((40, 24))
    result = found(W, Request("full"))
    U = result.U.clone()
    U[:, 3] *= -1
    assert not is_decomposition(W, result._replace(U=U), Request("full"))


def test_values_out_of_order_or_below_zero_are_none():
    W, full = weight((40, 24)), Request("full")
    result = found(W, full)
    order = torch.arange(24)
    order[[0, 1]] = order[[1, 0]]
    turned = type(result)(result.U[:, order], result.S[order], result.Vh[order])  # the same product
    assert not is_decomposition(W, turned, full)
    below = type(result)(result.U * -1, result.S * -1, result.Vh)
    assert not is_decomposition(W, below, full)


def test_one_end_of_the_spectrum_is_not_the_other():
    W = weight((40, 24))
    for asked, given in (("top", "bottom"), ("bottom", "top")):
        assert not is_decomposition(W, found(W, Request(given, 5)), Request(asked, 5))


def test_shapes_and_dtypes_are_those_that_were_asked_for():
    W = weight((40, 24))
    result = found(W, Request("top", 5))
    assert not is_decomposition(W, result, Request("top", 4))
    assert not is_decomposition(W.double(), result, Request("top", 5))
    assert not is_decomposition(W[:, :-1], result, Request("top", 5))
    doubled = type(result)(*(part.double() for part in result))
    assert not is_decomposition(W, doubled, Request("top", 5))
