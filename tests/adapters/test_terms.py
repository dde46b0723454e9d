"""Terms: factors of them, heads, and weights that somebody else holds."""

import copy
import gc
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn as nn

from adapters.some_terms import delta, every_method, term, weight
from spectune import SVF, DoRA, LoRA, SpectuneError
from spectune.adapters.terms import LayerUpdate, Lent, Term, WholeTerm, as_head, lora_term


@every_method
@pytest.mark.parametrize("factor", [2.5, -0.5, 1.0, 0.0])
def test_a_factor_multiplies_the_update(method, factor):
    W = weight()
    one = term(method, W)
    many = one.scaled(factor)
    torch.testing.assert_close(delta([many], W), factor * delta([one], W))
    if isinstance(method, LoRA):
        assert many.weight == 1.0  # a plain LoRA still, which every format holds


def test_equal_singular_values_hang_on_rounding_and_others_do_not():
    orthogonal = torch.linalg.qr(weight(shape=(8, 8)))[0]
    assert term(SVF(), orthogonal).hangs_on_rounding
    assert not term(SVF(), weight()).hangs_on_rounding
    assert not term(LoRA(rank=2), orthogonal).hangs_on_rounding  # which takes no vectors of W
    zeros = Term(SVF(), {"z": torch.ones(3)}, basis={"S": torch.zeros(3)})
    assert not zeros.hangs_on_rounding
    assert not replace(zeros, basis={"S": torch.empty(3, device="meta")}).hangs_on_rounding


def test_a_lent_tensor_goes_with_whoever_holds_it():
    parameter = nn.Parameter(torch.ones(2, 3))
    lent = Lent(parameter, lambda tensor: tensor.mT)
    assert lent().shape == (3, 2)
    assert copy.deepcopy(lent) is lent  # a copy of an adapter is of the same base
    assert pickle.loads(pickle.dumps(lent))() is None
    del parameter
    gc.collect()
    assert lent() is None


def test_what_is_a_head_and_what_is_not():
    H = torch.randn(2, 5, dtype=torch.float64)
    plain, turned = (as_head(WholeTerm({"weight": H}, 0.5), conv1d) for conv1d in (False, True))
    assert plain.trained["H"].dtype is torch.float32
    assert (plain.trained["H"].shape, turned.trained["H"].shape) == ((2, 5), (5, 2))
    assert (plain.weight, plain.method.bias) == (0.5, False)
    assert as_head(WholeTerm({"weight": H, "bias": H[:, 0]}), False).method.bias
    for tensors, rows in (
        ({"weight": H[0]}, None),
        ({"weight": H}, (1,)),
        ({"weight": H, "scale": H}, None),
        ({}, None),
    ):
        assert as_head(WholeTerm(tensors, rows=rows), False) is None


def test_what_is_sealed_holds_nothing_that_w_gives_again():
    W = weight()
    sealed = LayerUpdate((7, 9), (term(SVF(), W), term(LoRA(rank=2), W)), held=W).sealed()
    svf, lora = sealed.terms
    assert sealed.held is svf.basis is None
    assert svf.sketch is not None
    assert lora.sketch is None  # which needs no base to be what it is
    svf = replace(svf, basis=term(SVF(), W).basis)
    svf.check("q", W, sealed.base_sketch)
    other = replace(svf, trained={"z": svf.trained["z"] + 0.5})
    with pytest.raises(SpectuneError, match="q"):
        other.check("q", W, sealed.base_sketch)
    assert LayerUpdate((7, 9), (term(LoRA(rank=2), W),), held=W).sealed().base_sketch is None


def test_dora_around_a_lora_takes_its_factor_as_a_weight():
    one = Term(DoRA(LoRA(rank=2)), {})
    assert one.scaled(0.5).weight == 0.5
    made = lora_term(torch.ones(4, 2), torch.ones(2, 3))
    assert made.method.scale == 1.0
