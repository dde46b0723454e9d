"""LoRA-XS's frozen factors and its start, from arXiv 2405.17604, against a dense SVD."""

import pytest
import torch
from starts import dense, start_of, weight

from spectune import LoRAXS

SHAPES = [(9, 14), (14, 9)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [None, 10.0])
def test_u_is_orthonormal_and_the_values_go_wholly_to_the_right(shape, alpha):
    W, method = weight(*shape), LoRAXS(rank=4, alpha=alpha)
    frozen, _ = start_of(method, W)
    U, S, Vh = (part[..., :4] if i < 2 else part[:4] for i, part in enumerate(torch.linalg.svd(W, full_matrices=False)))
    torch.testing.assert_close(frozen["U"].mT @ frozen["U"], torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(torch.linalg.vector_norm(frozen["SVh"], dim=1), S)
    # with R the identity the update is s times the best approximation of W of this rank, whatever the vectors' signs
    found = dense(method.factors({**frozen, "R": torch.eye(4, dtype=torch.float64)}))
    torch.testing.assert_close(found, method.scale * U @ torch.diag(S) @ Vh)


def test_r_starts_normal_with_a_deviation_of_a_hundred_thousandth():
    method = LoRAXS(rank=200)
    torch.manual_seed(0)
    R = method.initial(method.shapes(300, 400), {})["R"]
    assert R.shape == (200, 200)
    assert abs(float(R.std()) - 1e-5) < 1e-7
    assert abs(float(R.mean())) < 2e-7


def test_coefficients_hold_the_scale():
    method = LoRAXS(rank=3, alpha=12)
    frozen, t = start_of(method, weight(8, 6))
    plain, trained = method.from_coefficients(method.coefficients({**frozen, **t}))
    assert plain.scale == 1.0
    torch.testing.assert_close(dense(plain.factors({**frozen, **trained})), dense(method.factors({**frozen, **t})))


def test_what_w_makes_of_the_basis_is_known_without_w():
    W, method = weight(7, 12), LoRAXS(rank=4)
    frozen, t = start_of(method, W)
    f = method.factors({**frozen, **t})
    g, h = method.projections({**frozen, **t})
    torch.testing.assert_close(W @ f.right.mT, f.left * g)
    torch.testing.assert_close(f.right @ f.right.mT, torch.diag(h))


def test_the_rank_is_no_larger_than_the_weight_and_the_scale_stays():
    method = LoRAXS(rank=64, alpha=32).fit(10, 40)
    assert method.rank == 10
    assert method.scale == 0.5
