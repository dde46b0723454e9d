"""An adapter's updates away from its model: their sums by hand, what lacks a basis, and whether a base is theirs."""

import pytest
import torch

from adapters.adapter_cases import made, small
from spectune import Adapter, SpectuneError
from spectune.adapters.contents import Contents
from spectune.adapters.labels import SEVERAL, Labels
from spectune.adapters.terms import LayerUpdate, Term, WholeTerm, lora_term
from spectune.layers.modules import effective_weight
from spectune.methods import parse


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora(out=5, into=4, rank=2, seed=0, weight=1.0):
    term = lora_term(drawn(out, rank, seed=seed), drawn(rank, into, seed=seed + 1))
    return term if weight == 1.0 else Term(term.method, term.trained, weight)


def weights(model):
    return {name: effective_weight(model.get_submodule(name)).detach() for name in ("0", "2", "4")}


def test_an_update_is_the_sum_of_its_terms():
    terms = lora(), lora(seed=5, weight=-0.5)
    contents = Contents({"a.b": LayerUpdate((5, 4), terms)})
    expected = sum(term.weight * term.trained["B"] @ term.trained["A"] for term in terms)
    torch.testing.assert_close(contents.delta("a.b"), expected)
    assert contents.delta("a.b").dtype == torch.float32
    assert contents.parameter_count() == 2 * (5 * 2 + 2 * 4)


def test_modules_that_are_whole_count_too():
    modules = {"norm": [WholeTerm({"weight": torch.ones(7), "bias": torch.ones(7)})]}
    contents = Contents({"a": LayerUpdate((5, 4), (lora(),))}, modules=modules)
    assert contents.parameter_count() == 18 + 14
    assert contents.modules == {"norm": tuple(modules["norm"])}


def test_labels_are_kept_as_they_are_read():
    several = Labels(["a", "b"], SEVERAL)
    assert Contents({}, labels=several).labels is several
    assert Contents({}, labels=["a", "b"]).labels == Labels(["a", "b"])
    assert Contents({}).labels is None


def test_layers_that_are_not_there():
    contents = Contents({"model.layers.0.q_proj": LayerUpdate((5, 4), (lora(),))})
    with pytest.raises(SpectuneError, match=r"the adapter has no layer 'model\.layers\.0\.q_prj'; did you mean"):
        contents.delta("model.layers.0.q_prj")
    with pytest.raises(SpectuneError, match="the adapter has no layer"):
        contents.complete("nothing")


@pytest.mark.parametrize("method", ["svf", "pissa:rank=2", "lora_xs:rank=3", "dora:inner=svf"])
def test_a_basis_is_made_again_of_the_weight(tmp_path, method):
    whole = made(method)
    stored = Adapter.load(whole.save(tmp_path / "a"))
    assert all(term.lacks_basis for layer in stored.layers.values() for term in layer.terms)
    with pytest.raises(SpectuneError, match=r"on '0' is stored without its basis.*call adapter\.bind"):
        stored.complete()
    bound = stored.bind(small())
    bound.complete("2")
    assert [any(t.lacks_basis for t in layer.terms) for layer in bound.layers.values()] == [True, False, True]
    assert bound.complete() is bound
    for name in whole.layers:
        torch.testing.assert_close(bound.delta(name), whole.delta(name), atol=1e-5, rtol=1e-4)


def test_an_update_that_is_no_sum_needs_the_base(tmp_path):
    stored = Adapter.load(made("dora:inner=svf").save(tmp_path / "a", bases="embed"))
    with pytest.raises(SpectuneError, match=r"dora on '0' needs the base weight: call adapter\.bind\(model\)"):
        stored.delta("0")


@pytest.mark.parametrize(
    ("method", "bases", "contained"),
    [
        ("lora:rank=2", "none", True), ("svf", "none", False), ("svf", "embed", True), ("dora:rank=2", "none", False),
        ("dora:inner=svf", "embed", False),
    ],
)  # fmt: skip
def test_what_can_be_had_without_the_base(tmp_path, method, bases, contained):
    stored = Adapter.load(made(method).save(tmp_path / "a", bases=bases))
    assert [stored.self_contained(name) for name in stored.layers] == [contained] * 3
    if contained:
        stored.delta("0")


def test_a_base_is_told_again_by_its_values_where_they_matter():
    ours, other = weights(small()), weights(small(seed=9))
    adapter = made("svf")
    adapter.check_base(ours)
    with pytest.raises(SpectuneError, match="'0'"):
        adapter.check_base(other)
    adapter.check_base(other, values=False)
    with pytest.raises(SpectuneError, match="'4'"):
        adapter.check_base({**ours, "4": ours["4"][:, 1:]}, values=False)


def test_a_head_goes_onto_any_base():
    head = Term(parse("head"), {"H": drawn(5, 4)})
    contents = Contents({"a": LayerUpdate((5, 4), (head,))})
    assert contents.base_sketch("a") is None
    contents.check_base({"a": drawn(5, 4, seed=3)})
    assert contents.self_contained("a")


def test_a_sketch_is_made_once_and_stays():
    adapter = made("svf")
    sketch = adapter.base_sketch("0")
    assert adapter.layers["0"].base_sketch is sketch
    assert adapter.base_sketch("0") is sketch
    unbound = Contents({"a": LayerUpdate((5, 4), (lora(),))})
    assert unbound.base_sketch("a") is None  # no weight is at hand
