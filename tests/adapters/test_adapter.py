"""Adapters are vectors: sums, multiples and differences are those of their updates, on models and on files."""

import copy
import operator
from typing import Any

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import spectune
from adapters.adapter_cases import METHODS, assert_same_update, deltas, made, small
from spectune import Adapter, SpectuneError
from spectune.methods import parse

X = torch.linspace(-1, 1, 24).reshape(4, 6)
ONE_TERM = [m for m in METHODS if m.startswith(("svf", "svft", "lora_xs", "lora"))]
MODEL = small()
POOL = [made(method, MODEL, seed=seed) for method in METHODS for seed in (1, 2)]
PARTS = [  # on some of the layers only
    made("svf", MODEL, targets=["0"]),
    made("lora:rank=2", MODEL, targets=["4", "2"]),
    made("dora:rank=2", MODEL, targets=["2"]),
]


def combined(adapters: Any, weights: Any) -> dict[str, torch.Tensor]:
    """Return the weighted sum of dense updates, float64."""
    total: dict[str, torch.Tensor] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, delta in deltas(adapter).items():
            total[name] = total.get(name, torch.zeros_like(delta)) + weight * delta
    return total


@pytest.mark.parametrize("method", METHODS)
def test_the_articles_sum_over_one_method(method, tmp_path):
    a, b, c = (made(method, MODEL, seed=seed) for seed in (1, 2, 3))
    total = 0.7 * a + 0.3 * b - c
    assert_same_update(total, combined((a, b, c), (0.7, 0.3, -1)))
    if method in ONE_TERM:
        assert all(len(layer.terms) == 1 for layer in total.layers.values())
    if method in ONE_TERM and not method.startswith("lora:"):  # the same coefficients
        assert total.parameter_count() <= a.parameter_count()
        together, alone = total.save(tmp_path / "sum"), a.save(tmp_path / "one")
        sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in (together, alone)]
        assert sizes[0] <= sizes[1] + 64
    elif method not in ONE_TERM:
        assert all(len(layer.terms) == 3 for layer in total.layers.values())


weights = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 0.5]), st.floats(-3, 3, allow_nan=False, width=32))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*POOL, *PARTS]), weights), min_size=1, max_size=5))
def test_any_sum_is_the_sum_of_the_updates(pairs):
    adapters, factors = zip(*pairs, strict=True)
    total = factors[0] * adapters[0]
    for adapter, factor in pairs[1:]:
        total = total + factor * adapter
    assert_same_update(total, combined(adapters, factors), 3e-5)
    if all(parse(t.method).additive for layer in total.layers.values() for t in layer.terms):
        assert_same_update(total.to_lora(), combined(adapters, factors), 3e-5)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(POOL), st.sampled_from([*POOL, *PARTS]), st.sampled_from([*POOL, *PARTS]), weights, weights)
def test_laws(a, b, c, s, t):
    near = 3e-5
    assert_same_update(a + b, b + a, near)
    assert_same_update((a + b) + c, a + (b + c), near)
    assert_same_update(s * (a + b), s * a + s * b, near)
    assert_same_update((s + t) * a, s * a + t * a, near)
    assert_same_update(s * (t * a), (s * t) * a, near)
    assert_same_update(a - b, a + (-b), near)
    assert_same_update(-(b - a), a - b, near)
    assert_same_update(1.0 * a, a, near)
    assert_same_update(a * s, s * a, near)
    assert_same_update((4 * a) / 4, a, near)
    assert_same_update(a - a, {n: torch.zeros_like(d) for n, d in deltas(a).items()}, near)
    assert_same_update(0 * a, {n: torch.zeros_like(d) for n, d in deltas(a).items()}, 0)


@pytest.mark.parametrize("method", ONE_TERM)
def test_a_difference_of_coefficients_is_exactly_zero(method):
    a = made(method, MODEL)
    for delta in deltas(a - a).values():
        assert delta.abs().max() <= (1e-6 if method.startswith("lora:") else 0)


def test_svf_addition_is_exact_to_float32_rounding():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 96))
    a, b = (made("svf", copy.deepcopy(base), seed=seed, scale=0.1) for seed in (1, 2))
    together, apart = (a + b).delta("0").double(), a.delta("0").double() + b.delta("0").double()
    assert (together - apart).norm() <= 1e-6 * apart.norm()
    (term,) = (a + b).layers["0"].terms
    expected = (a.layers["0"].terms[0].trained["z"].double() + b.layers["0"].terms[0].trained["z"].double() - 1).float()
    assert torch.equal(term.trained["z"], expected)


def test_what_was_made_stays_as_it_was():
    a, b = made("svf", MODEL, seed=1), made("lora:rank=2", MODEL, seed=2)
    before = copy.deepcopy((deltas(a), deltas(b)))
    (0.3 * a + b - a).compress(2)
    -a / 3
    for adapter, expected in zip((a, b), before, strict=True):
        assert all(torch.equal(v, expected[k]) for k, v in deltas(adapter).items())


# -- the model


@pytest.mark.parametrize("methods", [(m, m) for m in METHODS] + [("svf", "lora:rank=2"), ("dora", "pissa:rank=2")])
def test_a_sum_answers_like_activating_both(methods):
    methods = [m if ":" in m or m == "svf" or m == "svft" else f"{m}:rank=2" for m in methods]
    model = small()
    a, b = (made(method, model, seed=seed) for seed, method in enumerate(methods))
    spectune.attach(model, a, "a")
    spectune.attach(model, b, "b")
    for s, t in ((1, 1), (0.7, -0.4)):
        expected = spectune.activate(model, {"a": s, "b": t})(X)
        torch.testing.assert_close(spectune.attach(small(), s * a + t * b)(X), expected, rtol=1e-5, atol=1e-5)


def test_a_sum_trains_on():
    model = small()
    spectune.attach(model, made("svf", model) + made("lora:rank=2", model), trainable=True)
    before = model(X)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    before.square().sum().backward()
    optimizer.step()
    assert model(X).square().sum() < before.square().sum()


# -- files


@pytest.mark.parametrize("method", METHODS)
def test_files_are_composed_without_the_base(tmp_path, method):
    a, b = made(method, MODEL, seed=1), made("lora_xs:rank=2", MODEL, seed=2)
    c = made(method, MODEL, seed=3)
    loaded = [Adapter.load(x.save(tmp_path / str(i))) for i, x in enumerate((a, b, c))]
    total = 0.7 * loaded[0] + 0.3 * loaded[1] - loaded[2]
    again = Adapter.load(total.save(tmp_path / "sum"))
    assert_same_update(again.bind(small()), combined((a, b, c), (0.7, 0.3, -1)))
    spectune.attach(small(), Adapter.load(tmp_path / "sum"))
    if method not in ("svf:parametrization=sigmoid", "dora:rank=2"):
        with pytest.raises(SpectuneError, match="another base"):
            spectune.attach(small(seed=3), Adapter.load(tmp_path / "sum"))
    if method in ONE_TERM and "sigmoid" not in method:
        assert all(len(layer.terms) == 2 for layer in total.layers.values())


def test_sigmoid_files_add_as_coefficients_where_the_spectrum_is_at_hand(tmp_path):
    adapters = [made("svf:parametrization=sigmoid", MODEL, seed=seed) for seed in (1, 2)]
    apart = [Adapter.load(a.save(tmp_path / str(i))) for i, a in enumerate(adapters)]
    embedded = [Adapter.load(a.save(tmp_path / str(i), bases="embed")) for i, a in enumerate(adapters)]
    plain = made("svf", MODEL)
    assert {len(layer.terms) for layer in (apart[0] + apart[1]).layers.values()} == {2}
    assert {len(layer.terms) for layer in (embedded[0] + embedded[1] - plain).layers.values()} == {1}
    expected = combined(adapters, (1, 1))
    assert_same_update((apart[0] + apart[1]).bind(small()), expected)
    assert_same_update(embedded[0] + embedded[1], expected)


# -- mistakes


def test_other_shapes_and_bases_are_refused(tmp_path):
    a = made("svf", MODEL)
    narrow = nn.Sequential(*small()[:4], nn.Linear(9, 4))
    with pytest.raises(SpectuneError, match=r"differ in the shape of '4': \(5, 9\) and \(4, 9\)"):
        a + made("lora:rank=2", narrow)
    elsewhere = made("svf", small(seed=7))
    for left, right in (
        (a, elsewhere),
        (Adapter.load(a.save(tmp_path / "a")), elsewhere),
        (Adapter.load(a.save(tmp_path / "a")), Adapter.load(elsewhere.save(tmp_path / "b"))),
    ):
        with pytest.raises(SpectuneError, match="different bases: '0' is another weight in each"):
            left + right
    same = made("svf", small())
    assert_same_update(a + same, combined((a, same), (1, 1)))
    in_half = made("svf", small(dtype=torch.bfloat16))
    assert {len(layer.terms) for layer in (Adapter.load(tmp_path / "a") + in_half).layers.values()} == {1}


def test_weights_are_finite_numbers():
    a = made("svf", MODEL)
    for factor in (float("nan"), float("inf")):
        with pytest.raises(SpectuneError, match="weight must be a finite number"):
            factor * a
    for operation, other in ((operator.mul, a), (operator.mul, "2"), (operator.add, 1), (operator.sub, None)):
        with pytest.raises(TypeError):
            operation(a, other)
    with pytest.raises(ZeroDivisionError):
        a / 0
