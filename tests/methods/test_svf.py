"""SVF's two parametrizations, from arXiv 2501.06252, against the singular values of W' themselves."""

import pytest
import torch
from starts import assert_projections, dense, start_of, weight

from spectune import SVF

SHAPES = [(9, 14), (14, 9), (10, 10)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_values_of_w_are_multiplied_by_z(shape):
    W = weight(*shape)
    frozen, t = start_of(SVF(), W)
    assert torch.equal(t["z"], torch.ones(min(shape), dtype=torch.float64))
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    z = torch.linspace(0.2, 1.8, min(shape), dtype=torch.float64)
    found = W + dense(SVF().factors({**frozen, "z": z}))
    torch.testing.assert_close(found, U @ torch.diag(S * z) @ Vh)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_sigmoid_of_the_code_keeps_the_sum_of_the_values_wherever_p_is(shape):
    W, method = weight(*shape), SVF(parametrization="sigmoid", max_mult=2.0)
    frozen, start = start_of(method, W)
    total = torch.linalg.matrix_norm(W, "nuc")
    for p in (start["p"], start["p"] + torch.linspace(-2, 2, min(shape), dtype=torch.float64)):
        values = torch.linalg.svdvals(W + dense(method.factors({**frozen, "p": p})))
        torch.testing.assert_close(values.sum(), total)


def test_the_sigmoid_starts_at_a_tenth_and_near_w():
    method = SVF(parametrization="sigmoid")
    p = method.initial(method.shapes(4096, 5000), {})["p"]
    assert abs(float(p.mean()) - 0.1) < 1e-3
    assert abs(float(p.std()) - 0.01) < 1e-3
    W = weight(30, 50)
    frozen, t = start_of(method, W)
    change = dense(method.factors({**frozen, **t}))
    assert 0 < torch.linalg.matrix_norm(change) < 0.02 * torch.linalg.matrix_norm(W)


@pytest.mark.parametrize("max_mult", [0.5, 1.0, 3.0])
def test_the_largest_multiple_cancels(max_mult):
    W, one = weight(6, 8), SVF(parametrization="sigmoid")
    frozen, t = start_of(one, W)
    other = SVF(parametrization="sigmoid", max_mult=max_mult)
    torch.testing.assert_close(dense(other.factors({**frozen, **t})), dense(one.factors({**frozen, **t})))


@pytest.mark.parametrize("method", [SVF(), SVF(parametrization="sigmoid")], ids=lambda m: m.parametrization)
def test_coefficients_add_as_the_updates_do(method):
    W = weight(7, 9)
    frozen, _ = start_of(method, W)
    name = "z" if method.parametrization == "plain" else "p"
    a, b = ({**frozen, name: torch.randn(7, dtype=torch.float64)} for _ in range(2))
    sums = {"z": 0.75 * method.coefficients(a)["z"] - 0.5 * method.coefficients(b)["z"]}
    plain, trained = method.from_coefficients(sums)
    found = dense(plain.factors({**frozen, **trained}))
    torch.testing.assert_close(found, 0.75 * dense(method.factors(a)) - 0.5 * dense(method.factors(b)))


def test_without_the_spectrum_a_sigmoid_has_no_coefficients():
    assert SVF(parametrization="sigmoid").coefficients({"p": torch.zeros(3)}) is None
    assert SVF().coefficients({"z": torch.full((3,), 1.5)}) is not None


@pytest.mark.parametrize("shape", SHAPES)
def test_what_w_makes_of_the_basis_is_known_without_w(shape):
    assert_projections(SVF(), weight(*shape))
