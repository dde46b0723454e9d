"""Every method against its paper's formula: forward, gradients, start, merge, detach."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import EVERY, LAYERS, adapted, name, starts_at_base
from oracle import dense, svd

import spectune
from spectune import SVFT, DoRA, LoRA, MiLoRA, PiSSA
from spectune.layers.core_ops import band_entries
from spectune.layers.modules import effective_weight
from spectune.speed.dropout import dropout

every_method = pytest.mark.parametrize("method", EVERY, ids=name)
every_layer = pytest.mark.parametrize("kind", LAYERS)
TOLERANCE: Any = {"rtol": 1e-8, "atol": 1e-9}


def parts(layer):
    """Return W, the trained tensors and the frozen ones of a layer with one adapter."""
    (update,) = layer.adapters["default"]
    trained = update.trained()
    frozen = {k: v for k, v in layer.tensors(update).items() if k not in trained}
    return effective_weight(layer).detach(), trained, frozen


@every_layer
@every_method
def test_forward_and_gradients_are_the_papers(method, kind):
    model, layer = adapted(kind, method)
    W, trained, frozen = parts(layer)
    x = torch.randn(3, 5, W.shape[1], dtype=torch.float64, requires_grad=True)
    target = torch.randn(3, 5, W.shape[0], dtype=torch.float64)
    y = model(x)
    grads = torch.autograd.grad((y.tanh() * target).sum(), [x, *trained.values()])

    leaves = {k: v.detach().clone().requires_grad_() for k, v in trained.items()}
    x2 = x.detach().clone().requires_grad_()
    y2 = F.linear(x2, dense(method, W, leaves, frozen), layer.bias)
    expected = torch.autograd.grad((y2.tanh() * target).sum(), [x2, *leaves.values()])

    torch.testing.assert_close(y, y2, **TOLERANCE)
    assert all(g.abs().max() > 1e-4 for g in expected)
    for key, ours, theirs in zip(["x", *leaves], grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE, msg=lambda m, key=key: f"{key}: {m}")


@every_layer
@every_method
def test_the_start_is_the_base(method, kind):
    model, layer = adapted(kind, method, torch.float32, trained=False)
    x = torch.randn(2, 3, effective_weight(layer).shape[1])
    torch.testing.assert_close(model.train()(x), y := model.eval()(x))  # training may take a faster product
    spectune.detach(model)
    if starts_at_base(method):
        # DoRA adds the bias after the ratio, and not in the product
        rounding = {"rtol": 1e-5, "atol": 1e-5} if isinstance(method, DoRA) else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(y, model(x), **rounding)
    elif "lora_xs" in name(method):
        assert 0 < (y - model(x)).abs().max() < 1e-3
    else:
        assert 1e-3 < (y - model(x)).abs().max() < 30


@every_method
def test_merging_gives_the_same_outputs_and_a_plain_layer(method):
    for kind in LAYERS:
        model, layer = adapted(kind, method)
        plain = layer.plain_class
        x = torch.randn(4, effective_weight(layer).shape[1], dtype=torch.float64)
        y = model(x)
        W, trained, frozen = parts(layer)
        spectune.merge(model)
        assert type(model[0]) is plain
        torch.testing.assert_close(model(x), y, **TOLERANCE)
        torch.testing.assert_close(effective_weight(model[0]).data, dense(method, W, trained, frozen), **TOLERANCE)


@every_method
def test_a_half_weight_adds_half_the_update(method):
    model, layer = adapted("tall", method)
    x = torch.randn(4, 9, dtype=torch.float64)
    W, trained, frozen = parts(layer)
    delta = dense(method, W, trained, frozen) - W
    spectune.activate(model, {"default": -0.5})
    torch.testing.assert_close(model(x), F.linear(x, W - 0.5 * delta, layer.bias), **TOLERANCE)


@every_layer
@every_method
def test_detaching_gives_the_layer_back_as_it_was(method, kind):
    torch.manual_seed(1)
    model: Any = torch.nn.Sequential(LAYERS[kind]())
    before = {k: (id(v), v.detach().clone()) for k, v in model.named_parameters()}
    layer, attributes, cls = model[0], set(vars(model[0])), type(model[0])
    spectune.adapt(model, method)
    assert isinstance(model[0], cls)
    model(torch.randn(2, effective_weight(layer).shape[1])).square().sum().backward()
    assert all(p.grad is not None for p in layer.adapters.parameters())
    spectune.detach(model)
    assert model[0] is layer
    assert type(layer) is cls
    assert set(vars(layer)) == attributes
    for key, parameter in model.named_parameters():
        assert (id(parameter), parameter.requires_grad, parameter.grad) == (before[key][0], True, None)
        assert torch.equal(parameter, before[key][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_method
def test_half_precision_bases_keep_their_dtype_and_masters_are_float32(method, dtype):
    model, layer = adapted("tall", method, dtype)
    W, trained, frozen = parts(layer)
    assert {v.dtype for v in trained.values()} == {torch.float32}
    x = torch.randn(3, 5, 9, dtype=dtype, requires_grad=True)
    y = model(x)
    y.float().square().sum().backward()
    assert y.dtype == dtype
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in trained.values())
    exact = dense(method, W.double(), {k: v.detach().double() for k, v in trained.items()}, double(frozen))
    expected = F.linear(x.double(), exact, layer.bias.double())
    assert (y - expected).norm() < 0.03 * expected.norm()
    merged = spectune.merge(model)
    assert merged[0].weight.dtype == dtype
    assert (merged(x) - expected).norm() < 0.03 * expected.norm()


def double(tensors):
    return {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}


@pytest.mark.parametrize("method", [m for m in EVERY if m.additive and not getattr(m, "dropout", 0)], ids=name)
def test_gradcheck_of_the_whole_layer(method):
    model, _ = adapted("tall", method)
    parameters = dict(model.named_parameters())
    names = [n for n in parameters if ".adapters." in n]

    def run(x, *values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *(parameters[n] for n in names)))


@pytest.mark.parametrize("method", [LoRA(rank=4, dropout=0.5), MiLoRA(rank=4, dropout=0.3), PiSSA(rank=3, dropout=0.2)])
@pytest.mark.parametrize("magnitude", [False, True])
def test_dropout_falls_on_all_but_the_frozen_layer(method, magnitude):
    model, layer = adapted("tall", DoRA(method) if magnitude else method)
    W, trained, frozen = parts(layer)
    x = torch.randn(6, 9, dtype=torch.float64)
    torch.manual_seed(5)
    y = model(x)
    torch.manual_seed(5)
    dropped = dropout(x, method.dropout)
    assert (dropped == 0).any()
    V = dense(method, W, trained, frozen)
    ratio = trained["magnitude"] / V.norm(dim=1) if magnitude else torch.ones(12, dtype=torch.float64)
    expected = x @ W.T + (ratio - 1) * (dropped @ W.T) + ratio * (dropped @ (V - W).T) + layer.bias
    torch.testing.assert_close(y, expected, **TOLERANCE)
    model.eval()
    torch.testing.assert_close(model(x), F.linear(x, W + ratio[:, None] * V - W, layer.bias), **TOLERANCE)
    model.train()
    assert layer.adapters["default"][0].training


@pytest.mark.parametrize("inner", [m.inner for m in EVERY if isinstance(m, DoRA)], ids=name)
def test_doras_norm_is_exact_under_autocast(inner):
    method = DoRA(inner)
    _, layer = adapted("tall", method, torch.float32)
    W, trained, frozen = parts(layer)
    with torch.autocast("cpu", torch.bfloat16):
        norms, _ = method._norms(
            layer.tensors(layer.adapters["default"][0]), method.factors(trained | frozen), layer.base()
        )
    expected = (W + inner.delta(trained | frozen, W)).norm(dim=1)
    torch.testing.assert_close(norms, expected, rtol=2e-5, atol=1e-5)


def test_dora_leaves_a_row_of_zeros_alone():
    model: Any = torch.nn.Sequential(torch.nn.Linear(6, 5))
    with torch.no_grad():
        model[0].weight[2] = 0
    x = torch.randn(3, 6)
    y = model.eval()(x)
    spectune.adapt(model, DoRA(LoRA(rank=2)))
    assert torch.equal(model(x), y)
    model.train()
    model(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model[0].adapters.parameters())


def test_doras_norm_is_exact_where_it_is_computed_in_pieces(monkeypatch):
    monkeypatch.setattr("spectune.methods.dora._CHUNK", 20)
    for inner in EVERY:
        if inner.additive:
            model, layer = adapted("conv1d", DoRA(inner))
            W, trained, frozen = parts(layer)
            x = torch.randn(2, 9, dtype=torch.float64)
            expected = F.linear(x, dense(DoRA(inner), W, trained, frozen), layer.bias)
            torch.testing.assert_close(model(x), expected, **TOLERANCE)


def test_random_entries_are_as_many_as_the_bands_and_repeat_for_a_seed_only():
    entries = []
    for seed in (0, 0, 1):
        _, layer = adapted("square", SVFT(pattern="random", width=3, seed=seed))
        _, _, frozen = parts(layer)
        pairs = set(zip(frozen["rows"].tolist(), frozen["columns"].tolist(), strict=True))
        assert len(pairs) == len(frozen["rows"]) == band_entries(10, 3) == 10 * 7 - 3 * 4
        entries.append(pairs)
    assert entries[0] == entries[1] != entries[2]


def test_top_k_entries_are_where_the_vectors_meet():
    for kind in ("square", "tall", "wide"):
        _, layer = adapted(kind, SVFT(pattern="top_k", width=1))
        W, _, frozen = parts(layer)
        U, _, Vh = svd(W)
        k = Vh.shape[0]
        overlap = torch.tensor([[abs(float(U[:k, i] @ Vh[j, :k])) for j in range(k)] for i in range(k)])
        found = torch.zeros(k, k, dtype=torch.bool)
        found[frozen["rows"], frozen["columns"]] = True
        assert int(found.sum()) == band_entries(k, 1)
        assert overlap[found].min() >= overlap[~found].max() - 1e-6


def test_a_band_wider_than_the_matrix_is_all_of_it():
    model, layer = adapted("wide", SVFT(pattern="banded", width=50))
    W, trained, frozen = parts(layer)
    assert trained["M"].numel() == 81
    method = SVFT(pattern="banded", width=8)
    x = torch.randn(2, 12, dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ dense(method, W, trained, frozen).T, **TOLERANCE)


@every_method
def test_empty_and_one_dimensional_inputs(method):
    model, layer = adapted("tall", method)
    x = torch.randn(9, dtype=torch.float64)
    torch.testing.assert_close(model(x), model(x[None])[0])
    empty = model(torch.zeros(0, 4, 9, dtype=torch.float64))
    assert empty.shape == (0, 4, 12)
    empty.sum().backward()
    assert all(p.grad is not None for p in layer.adapters.parameters())


@every_method
def test_autocast_answers_in_the_dtype_of_the_base(method):
    model, layer = adapted("tall", method, torch.float32)
    x = torch.randn(4, 9)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert (y - exact).norm() < 0.03 * exact.norm()
    assert all(p.grad.isfinite().all() for p in layer.adapters.parameters())


@every_method
def test_a_copy_is_independent(method):
    model, _ = adapted("square", method)
    x = torch.randn(2, 10, dtype=torch.float64)
    y = model(x)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(x), y, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for parameter in copied[0].adapters.parameters():
            parameter.add_(1)
    spectune.activate(copied, None)
    assert torch.equal(model(x), y)
