"""Sums of terms and of layers: what they do is the sum of what each does, in as few terms as hold it."""

from dataclasses import replace

import pytest
import torch

from adapters.some_terms import delta, every_method, term, weight
from spectune import SVF, LoRA, PiSSA, SpectuneError
from spectune.adapters.adding import add_layers, collect
from spectune.adapters.terms import LayerUpdate


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
