"""SVFT's start with the gate of the authors' code, its coefficients and its patterns (arXiv 2405.19597)."""

import pytest
import torch
from starts import assert_projections, dense, start_of, weight

from spectune import SVFT

PATTERNS = ["plain", "banded", "random", "top_k"]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)


@every_pattern
@pytest.mark.parametrize("shape", [(8, 13), (13, 8)])
def test_the_papers_start_is_w(pattern, shape):
    W, method = weight(*shape), SVFT(pattern=pattern, width=2)
    frozen, t = start_of(method, W)
    assert not dense(method.factors({**frozen, **t})).any()
    torch.testing.assert_close(dense(method.whole({**frozen, **t})), W)


@every_pattern
def test_the_gate_of_the_code_starts_halfway_open_on_normal_entries(pattern):
    method = SVFT(pattern=pattern, width=3, gate=True)
    torch.manual_seed(0)
    frozen, t = start_of(method, weight(60, 60))
    assert torch.equal(t["g"], torch.zeros(1, dtype=torch.float64))
    n = len(t["M"])
    assert abs(float(t["M"].square().sum()) - 2) < 5 * (8 / n) ** 0.5  # a sum of n squares of variance 2 / n
    # sigmoid(0) = 1/2, and U and V are orthogonal: the update is as long as M / 2
    change = dense(method.factors({**frozen, **t}))
    torch.testing.assert_close(torch.linalg.vector_norm(change), torch.linalg.vector_norm(t["M"]) / 2)


@every_pattern
@pytest.mark.parametrize("gate", [False, True])
def test_coefficients_hold_the_update_without_its_gate(pattern, gate):
    method = SVFT(pattern=pattern, width=2, gate=gate)
    frozen, t = start_of(method, weight(9, 11))
    t = {key: value + torch.randn_like(value) for key, value in t.items()}
    plain, trained = method.from_coefficients(method.coefficients({**frozen, **t}))
    assert not plain.gate
    assert trained.keys() == {"M"}
    torch.testing.assert_close(dense(plain.factors({**frozen, **trained})), dense(method.factors({**frozen, **t})))


@every_pattern
def test_a_seed_and_a_width_make_another_basis_only_where_they_say_which_entries(pattern):
    fields = {"random": {"pattern", "width", "seed"}, "top_k": {"pattern", "width"}}
    assert set(SVFT(pattern=pattern).basis_fields) == fields.get(pattern, set())


def test_layers_of_one_size_share_their_random_entries_whatever_they_hold():
    method = SVFT(pattern="random", width=2, seed=7)
    (one, _), (other, _) = start_of(method, weight(9, 12, 0)), start_of(method, weight(9, 20, 1))
    assert torch.equal(one["rows"], other["rows"])
    assert torch.equal(one["columns"], other["columns"])


@pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
def test_what_w_makes_of_the_basis_is_known_without_w(shape):
    assert_projections(SVFT(), weight(*shape))
