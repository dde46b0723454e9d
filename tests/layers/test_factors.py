"""Factors: what L C R makes of vectors."""

import torch

from layers.test_cores import SHAPES, SIZE, build, dense, kinds
from spectune.layers.cores import Identity
from spectune.layers.factors import Factors


@kinds
def test_factors_apply_what_their_dense_product_says(kind):
    values = torch.randn(SHAPES[kind], dtype=torch.float64)
    left, right = torch.randn(9, SIZE, dtype=torch.float64), torch.randn(SIZE, 5, dtype=torch.float64)
    factors = Factors(left, right, build(kind, values), 0.3)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(factors.dense(), 0.3 * left @ dense(kind, values) @ right)
    torch.testing.assert_close(factors.apply(x), x @ factors.dense().T)
    plain = Factors(left, right)
    assert plain.core == Identity()
    torch.testing.assert_close(plain.apply(x), x @ (left @ right).T)
