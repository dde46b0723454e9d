"""Terms: factors of them, sums of them, heads, and weights that somebody else holds."""

import copy
import gc
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn as nn

from spectune import SVF, SVFT, DoRA, LoRA, LoRAXS, PiSSA, SpectuneError
from spectune.adapters.terms import LayerUpdate, Lent, Term, WholeTerm, add_layers, as_head, collect, lora_term
from spectune.spectral import decompose_many

METHODS = [
    SVF(),
    SVF(parametrization="sigmoid"),
    SVFT(pattern="banded", width=2),
    LoRAXS(rank=3, alpha=6),
    PiSSA(rank=3),
    LoRA(rank=3),
    LoRA(rank=3, alpha=5, rslora=True),
]
every_method = pytest.mark.parametrize("method", METHODS, ids=repr)


def weight(seed=0, shape=(7, 9)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def term(method, W, seed=1, **options) -> Term:
    request = method.request()
    basis = None if request is None else method.basis(W, decompose_many({"": W}, request, cache=False)[""])
    torch.manual_seed(seed)
    trained = {
        k: v + 0.3 * torch.randn_like(v) for k, v in method.initial(method.shapes(*W.shape), basis or {}).items()
    }
    return Term(method, trained, basis=basis, **options)


def delta(terms, W):
    return sum(t.weight * t.method.delta(t.tensors(), W) for t in terms)


@every_method
@pytest.mark.parametrize("factor", [2.5, -0.5, 1.0, 0.0])
def test_a_factor_multiplies_the_update(method, factor):
    W = weight()
    one = term(method, W)
    many = one.scaled(factor)
    torch.testing.assert_close(delta([many], W), factor * delta([one], W))
    if isinstance(method, LoRA):
        assert many.weight == 1.0  # a plain LoRA still, which every format holds


@every_method
def test_a_sum_has_as_few_terms_as_hold_it(method):
    W = weight()
    terms = [term(method, W, seed, weight=w) for seed, w in ((1, 1.0), (2, -0.5), (3, 0.25))]
    joined = collect(terms)
    torch.testing.assert_close(delta(joined, W), delta(terms, W), rtol=1e-4, atol=1e-5)
    assert len(joined) == (3 if isinstance(method, PiSSA) else 1)  # each of these has another basis than its factors


def test_kinds_come_in_one_order_and_what_is_alone_stays_as_it_is():
    W = weight()
    lora, svf, pissa = term(LoRA(rank=2), W), term(SVF(), W), term(PiSSA(rank=2), W)
    first, second, third = collect([pissa, lora, svf])
    assert first.method == SVF()
    assert torch.equal(first.trained["z"], svf.trained["z"])
    assert second is lora
    assert third is pissa


def test_a_basis_of_another_weight_joins_nothing():
    W = weight()
    terms = [term(SVF(), W, 1), replace(term(SVF(), W, 2), stays=True), replace(term(SVF(), W, 3), stays=True)]
    assert len(collect(terms)) == 3


def test_sketches_add_as_the_updates_do_and_one_that_is_missing_leaves_none():
    W = weight()
    terms = [replace(t, sketch=t.make_sketch(W)) for t in (term(SVF(), W, 1), term(SVF(), W, 2))]
    (joined,) = collect([terms[0], replace(terms[1], weight=-0.5)])
    made = joined.make_sketch(W)
    torch.testing.assert_close(joined.sketch[:-1], made[:-1], rtol=1e-4, atol=1e-5)
    # the last entry is what rounding is compared with: the parts' norms, which a sum that cancels is not as long as
    parts = terms[0].sketch[-1] + 0.5 * terms[1].sketch[-1]
    torch.testing.assert_close(joined.sketch[-1], parts)
    assert made[-1] <= joined.sketch[-1]
    (joined,) = collect([terms[0], replace(terms[1], sketch=None)])
    assert joined.sketch is None


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


def test_updates_of_different_layers_do_not_add():
    def layer(W, **options):
        return LayerUpdate((7, 9), (term(SVF(), W),), held=W, **options)

    W = weight()
    with pytest.raises(SpectuneError, match=r"shape of 'q': \(7, 9\) and \(9, 7\)"):
        add_layers("q", layer(W), replace(layer(W), shape=(9, 7)))
    with pytest.raises(SpectuneError, match="different bases: 'q' is another weight in each"):
        add_layers("q", layer(W), layer(weight(5)))
    total = add_layers("q", layer(W), layer(W.clone()))  # the same values, and other memory
    assert len(total.terms) == 1
    assert total.base_sketch is not None


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
