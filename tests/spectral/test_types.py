"""What may be asked of a decomposition, what a weight must be, and the sentences for what is not so."""

import re

import pytest
import torch

from spectune.errors import SpectuneError
from spectune.spectral._types import (
    SVD,
    OneSided,
    Request,
    check_criterion,
    check_rank,
    checked,
    empty_decomposition,
    signs,
)


@pytest.mark.parametrize(
    "said",
    [
        {"kind": "top", "rank": 1},
        {"kind": "bottom", "rank": 7, "tol": 0.0, "certify": "residual"},
        {"kind": "full"},
        {"kind": "one_sided"},
    ],
)
def test_requests_that_are_understood_are_told_apart_by_what_they_say(said):
    assert Request(**said) == Request(**said)
    assert hash(Request(**said)) == hash(Request(**said))
    assert Request(**said) != Request("top", 3)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"kind": "middle"}, "kind must be 'top', 'bottom', 'full' or 'one_sided', not 'middle'"),
        ({"kind": "top"}, "rank must be an integer >= 1 where kind is 'top', not None"),
        ({"kind": "top", "rank": 0}, "rank must be an integer >= 1 where kind is 'top', not 0"),
        ({"kind": "bottom", "rank": True}, "rank must be an integer >= 1 where kind is 'bottom', not True"),
        ({"kind": "bottom", "rank": 2.0}, "rank must be an integer >= 1 where kind is 'bottom', not 2.0"),
        ({"kind": "full", "rank": 2}, "rank must be None where kind is 'full': all triplets are computed"),
        ({"kind": "one_sided", "rank": 2}, "rank must be None where kind is 'one_sided': all triplets are computed"),
        ({"kind": "full", "tol": -1.0}, "tol must be a number >= 0, not -1.0"),
        ({"kind": "full", "tol": float("nan")}, "tol must be a number >= 0, not nan"),
        ({"kind": "full", "certify": "all"}, "certify must be 'span' or 'residual', not 'all'"),
    ],
)
def test_requests_that_are_refused(said, message):
    with pytest.raises(SpectuneError) as refused:
        Request(**said)
    assert str(refused.value) == message


def test_criteria():
    for certify in ("span", "residual"):
        check_criterion(0, certify)
        check_criterion(float("inf"), certify)


@pytest.mark.parametrize(
    ("dtype", "found"),
    [
        (torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)  # fmt: skip
def test_a_weight_is_taken_in_a_dtype_that_factors_with_its_largest_magnitude(dtype, found):
    W = torch.tensor([[0.5, -3.0, 1.0], [2.0, 0.0, -0.25]], dtype=dtype, requires_grad=True)
    taken, largest = checked(W)
    assert (taken.dtype, largest, taken.requires_grad) == (found, 3.0, False)
    assert torch.equal(taken.double(), W.detach().double())
    assert checked(torch.zeros(2, 2))[1] == 0.0


@pytest.mark.parametrize(
    ("W", "message"),
    [
        (torch.zeros(4), "a weight of shape (4,) is not a matrix with rows and columns; reshape it first"),
        (torch.zeros(2, 3, 4), "a weight of shape (2, 3, 4) is not a matrix"),
        (torch.zeros(0, 3), "a weight of shape (0, 3) is not a matrix with rows and columns"),
        (torch.zeros(2, 2, dtype=torch.int8), "a weight in torch.int8 is packed or quantized, not floating point"),
        (torch.zeros(2, 2, dtype=torch.float8_e4m3fn), "a weight in torch.float8_e4m3fn is packed or quantized"),
        (torch.zeros(2, 2, device="meta"), "a weight on the meta device has no values"),
        (torch.tensor([[1.0, float("nan")]]), "a weight holds values that are not finite; repair the checkpoint"),
        (torch.tensor([[1.0, -float("inf")]]), "a weight holds values that are not finite"),
        (torch.tensor([[1.0, 1e300]], dtype=torch.float64) * 1e300, "a weight holds values that are not finite"),
    ],
)
def test_what_cannot_be_decomposed(W, message):
    with pytest.raises(SpectuneError, match=re.escape(message)):
        checked(W)


def test_how_many_triplets_are_computed():
    shape = torch.Size((5, 3))
    assert check_rank(None, "full", shape) == check_rank(3, "full", shape) == 3
    assert [check_rank(rank, "top", shape) for rank in (1, 2, 3)] == [1, 2, 3]
    assert check_rank(2, "bottom", shape[::-1]) == 2


@pytest.mark.parametrize(
    ("rank", "which", "message"),
    [
        (2, "full", "which='full' returns all 3 triplets; take which='top' or 'bottom' with rank 2"),
        (2, "both", "which must be 'full', 'top' or 'bottom', not 'both'"),
        (None, "top", "rank must be an integer >= 1 where which is 'top', not None"),
        (0, "bottom", "rank must be an integer >= 1 where which is 'bottom', not 0"),
        (True, "top", "rank must be an integer >= 1 where which is 'top', not True"),
        (4, "top", "rank 4 is above min(out, in) = 3 of a 5 x 3 weight; take rank <= 3"),
    ],
)
def test_ranks_that_are_refused(rank, which, message):
    with pytest.raises(SpectuneError) as refused:
        check_rank(rank, which, torch.Size((5, 3)))
    assert str(refused.value) == message


def test_signs_make_the_largest_entry_positive():
    rows = torch.tensor([[1.0, -3.0], [-1.0, 0.5], [2.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    found = signs(rows)
    assert found.tolist() == [-1.0, -1.0, 1.0, 1.0]
    assert found.dtype == torch.float64


@pytest.mark.parametrize(
    ("request_", "shapes"),
    [
        (Request("top", 2), ((5, 2), (2,), (2, 3))),
        (Request("bottom", 1), ((5, 1), (1,), (1, 3))),
        (Request("full"), ((5, 3), (3,), (3, 3))),
        (Request("one_sided"), ((5, 3), (3, 3), (3,))),
    ],
)
def test_a_decomposition_without_values_has_the_shapes_of_one_with(request_, shapes):
    found = empty_decomposition(request_, 5, 3)
    assert type(found) is (OneSided if request_.kind == "one_sided" else SVD)
    assert tuple(map(tuple, (part.shape for part in found))) == shapes
    assert all(part.is_meta for part in found)
    assert empty_decomposition(None, 5, 3) is None
