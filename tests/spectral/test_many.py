"""Many weights: the same as one by one, in any mixture, with errors that name the layer."""

from __future__ import annotations

import pytest
import torch
from spectra import weight_like

from spectune.errors import SpectuneError
from spectune.spectral import SVD, OneSided, Request, decompose_many, one_sided, svd
from spectune.spectral import _many as many


@pytest.fixture
def weights():
    return {
        "q": weight_like(300, 300, 1),
        "k": weight_like(40, 120, 2),
        "up": weight_like(500, 300, 3),
        "down": weight_like(300, 500, 4).bfloat16(),
        "v": weight_like(40, 120, 5),
    }


@pytest.mark.parametrize("kind", ["top", "bottom", "full", "one_sided"])
def test_as_one_by_one(weights, kind):
    rank = 4 if kind in ("top", "bottom") else None
    found = decompose_many(weights, Request(kind, rank), cache=False)
    assert list(found) == list(weights)
    for name, W in weights.items():
        single = one_sided(W) if kind == "one_sided" else svd(W, rank, kind)
        assert isinstance(found[name], OneSided if kind == "one_sided" else SVD)
        for a, b in zip(found[name], single, strict=True):
            assert torch.equal(a, b)


def test_results_do_not_depend_on_threads_or_company(weights):
    alone = decompose_many({"up": weights["up"]}, Request("top", 4), cache=False)["up"]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together = decompose_many(weights, Request("top", 4), cache=False)["up"]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_large_weights_go_in_turn(weights, monkeypatch):
    monkeypatch.setattr(many, "SMALL", 40_000)
    found = decompose_many(weights, Request("top", 4), cache=False)
    assert list(found) == list(weights)
    torch.testing.assert_close(found["up"].S, svd(weights["up"], 4, "top").S)


def test_functions_are_called_once_when_their_turn_comes(weights):
    calls = []

    def source(name):
        def read():
            calls.append(name)
            return weights[name]

        return read

    found = decompose_many({name: source(name) for name in weights}, Request("full"), cache=False)
    assert sorted(calls) == sorted(weights)
    assert torch.equal(found["k"].S, svd(weights["k"]).S)


def test_progress_ends_at_the_total_and_is_in_proportion_to_the_work(weights):
    seen = []
    decompose_many(weights, Request("full"), cache=False, progress=lambda done, total: seen.append((done, total)))
    assert len(seen) == len(weights)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]
    assert seen[-1][1] == sum(1 + W.numel() * min(W.shape) // 10**6 for W in weights.values())


def test_nothing_to_do():
    assert decompose_many({}, Request("full")) == {}


def test_the_random_state_and_gradients_are_left_alone(weights):
    weights["q"] = torch.nn.Parameter(weights["q"])
    before = torch.get_rng_state()
    found = decompose_many(weights, Request("top", 4), cache=False)
    assert torch.equal(before, torch.get_rng_state())
    assert not found["q"].U.requires_grad


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.full((9, 9), float("nan")), "'model.bad' cannot be decomposed: .* not finite"),
        (torch.zeros(9, 9, dtype=torch.uint8), "'model.bad' cannot be decomposed: .* packed or quantized"),
        (torch.zeros(9, 9, device="meta"), "'model.bad' cannot be decomposed: .* meta device"),
        (torch.zeros(9, 9, 9), "'model.bad' cannot be decomposed: .* not a matrix"),
        (torch.zeros(2, 9), r"'model.bad' cannot be decomposed: rank 4 is above min\(out, in\) = 2"),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_errors_name_the_layer(weights, bad, message, cached, tmp_path):
    with pytest.raises(SpectuneError, match=message):
        decompose_many(weights | {"model.bad": bad}, Request("top", 4), cache=tmp_path if cached else False)
    assert not list(tmp_path.glob("**/*.tmp"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("middle",), "kind must be"),
        (("top",), "rank must be an integer"),
        (("top", 0), "rank must be an integer"),
        (("top", True), "rank must be an integer"),
        (("full", 3), "rank must be None"),
        (("top", 3, float("nan")), "tol must be"),
        (("top", 3, 1e-4, "hope"), "certify must be"),
    ],
)
def test_requests_are_checked(arguments, message):
    with pytest.raises(SpectuneError, match=message):
        Request(*arguments)
