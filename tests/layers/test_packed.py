"""Layers whose weights another library holds packed: what adapters make of them, beside a dense oracle in float64."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import spectune
from spectune import SVF, SVFT, AdaLoRA, Adapter, DoRA, LoRA, LoRAXS, MiLoRA, PiSSA, SpectuneError
from spectune.layers.modules import effective_weight
from spectune.layers.packed import Packed, beside_class, put_beside

bnb = pytest.importorskip("bitsandbytes")

METHODS = [
    LoRA(rank=4),
    SVF(),
    SVFT(pattern="banded", width=2),
    PiSSA(rank=4),
    MiLoRA(rank=4, dropout=0.0),
    LoRAXS(rank=4),
    DoRA(LoRA(rank=4)),
    DoRA(PiSSA(rank=4)),
    AdaLoRA(),
]
EPS = 2e-6  # of products in float32
ROUNDED = 3e-2  # of inputs rounded to 8 bits, as LLM.int8 does where nothing trains


def four_bits(out_features, in_features, dtype=torch.float32, bias=True, double=True):
    layer = bnb.nn.Linear4bit(in_features, out_features, bias=bias, compute_dtype=dtype, quant_type="nf4")
    weight = torch.randn(out_features, in_features, dtype=dtype) / in_features**0.5
    packed = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=double)
    layer.weight = packed.to("cpu")
    return layer.to(dtype) if dtype != torch.float32 else layer


def eight_bits(out_features, in_features, dtype=torch.float32, bias=True):
    layer = bnb.nn.Linear8bitLt(in_features, out_features, bias=bias, has_fp16_weights=False)
    weight = torch.randn(out_features, in_features) / in_features**0.5
    layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
    return layer


def low_rank_beside(out_features, in_features, dtype=torch.float32, bias=True):
    layer = four_bits(out_features, in_features, dtype, bias)
    put_beside(layer, torch.randn(out_features, 3, dtype=dtype) / 9, torch.randn(3, in_features, dtype=dtype) / 9)
    return layer


KINDS = {"nf4": four_bits, "int8": eight_bits, "beside": low_rank_beside}


def model_of(kind):
    torch.manual_seed(0)
    return nn.Sequential(kind(128, 64), nn.Tanh(), kind(64, 128))


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same_state(model, before):
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[key], value) for key, value in before.items())


def trained(model, by=0.05):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn_like(parameter))
    return model


def weights_of(model):
    return {name: effective_weight(model.get_submodule(name)).dense().double() for name in ("0", "2")}


def oracle(model, weights, deltas, x):
    hidden = torch.tanh(F.linear(x, weights["0"] + deltas["0"], model[0].bias.double()))
    return F.linear(hidden, weights["2"] + deltas["2"], model[2].bias.double())


def off(ours, theirs):
    ours, theirs = ours.detach().double(), theirs.detach()
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}-{getattr(method, 'inner', '')!s:.5}")
def test_every_method_is_that_over_the_dequantized_weight(kind, method, tmp_path):
    model = model_of(kind)
    weights, before = weights_of(model), state(model)
    trained(spectune.adapt(model, method))
    x = torch.randn(5, 64, requires_grad=True)
    y = model(x)
    towards = torch.randn_like(y)
    y.backward(towards)
    adapter = spectune.extract(model)
    deltas = {name: adapter.delta(name).double() for name in weights}
    exact = x.detach().double().requires_grad_()
    expected = oracle(model, weights, deltas, exact)
    expected.backward(towards.double())
    assert off(y, expected) < EPS
    assert off(x.grad, exact.grad) < EPS
    rounding = ROUNDED if kind is eight_bits else EPS
    model.eval()
    with torch.no_grad():
        assert off(model(x), expected) < rounding
    adapter.save(tmp_path / "adapter")
    spectune.detach(model)
    assert same_state(model, before)
    assert type(model[0]) in (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt, beside_class(bnb.nn.Linear4bit))
    spectune.attach(model, Adapter.load(tmp_path / "adapter"))
    with torch.no_grad():
        assert off(model(x), expected) < rounding
    assert same_state(spectune.detach(model), before)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}-{getattr(method, 'inner', '')!s:.5}")
def test_gradients_of_what_is_trained(kind, method):
    model = trained(spectune.adapt(model_of(kind), method))
    weights = {name: effective_weight(model.get_submodule(name)).dense() for name in ("0", "2")}
    dense = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    for name, weight in weights.items():
        layer = dense.get_submodule(name)
        layer.weight.data, layer.bias.data = weight, model.get_submodule(name).bias.data.clone()
    adapter = spectune.extract(model)
    spectune.attach(dense, adapter, trainable=True)
    x, towards = torch.randn(5, 64), torch.randn(5, 64)
    model(x).backward(towards)
    dense(x).backward(towards)
    ours = {n: p for n, p in model.named_parameters() if p.requires_grad}
    theirs = dict(dense.named_parameters())
    assert ours
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-5)


def test_no_dense_weight_is_kept(kind):
    model = spectune.adapt(model_of(kind), LoRA(rank=2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(torch.randn(3, 64, requires_grad=True))
    assert all(t.numel() < 64 * 64 for t in kept)
    y.sum().backward()
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(t.is_floating_point() and t.numel() >= 64 * 128 for t in tensors)


def test_rows_mixtures_and_activation(kind):
    model = model_of(kind)
    weights = weights_of(model)
    deltas = {}
    for name, method in (("a", SVF()), ("b", LoRA(rank=2)), ("c", SVF())):
        trained(spectune.adapt(model, method, name=name))
        adapter = spectune.extract(model, name)
        deltas[name] = {layer: adapter.delta(layer).double() for layer in weights}
    model.eval()
    rounding = ROUNDED if kind is eight_bits else EPS
    x = torch.randn(3, 64)
    nothing = {layer: torch.zeros_like(w) for layer, w in weights.items()}
    mixed = {layer: 0.5 * deltas["a"][layer] + 0.25 * deltas["c"][layer] for layer in weights}
    with torch.no_grad():
        with spectune.route(model, ["b", None, {"a": 0.5, "c": 0.25}]):
            y = model(x)
        for row, own in enumerate((deltas["b"], nothing, mixed)):
            assert off(y[row], oracle(model, weights, own, x[row].double())) < rounding
        spectune.activate(model, {"a": 0.5, "c": 0.25})
        assert off(model(x), oracle(model, weights, mixed, x.double())) < rounding
        spectune.activate(model, None)
        assert off(model(x), oracle(model, weights, nothing, x.double())) < rounding
        spectune.activate(model, "b")
        with spectune.fused(model):  # which leaves packed weights as they are
            assert off(model(x), oracle(model, weights, deltas["b"], x.double())) < rounding


def test_merging_packs_again_where_it_is_asked_to(kind):
    model = model_of(kind)
    weights, before = weights_of(model), state(model)
    trained(spectune.adapt(model, LoRA(rank=4)))
    with pytest.raises(SpectuneError, match=r"weight of '0' is packed .* merge\(requantize=True\)"):
        spectune.merge(model)
    adapter = spectune.extract(model)
    wanted = {name: w + adapter.delta(name).double() for name, w in weights.items()}
    spectune.merge(model, requantize=True)
    assert type(model[0]) in (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt, beside_class(bnb.nn.Linear4bit))
    for name, weight in wanted.items():
        rounded = effective_weight(model.get_submodule(name)).dense()
        assert 1e-4 < off(rounded, weight) < (0.012 if kind is eight_bits else 0.12)
    model.eval()
    with torch.no_grad():
        model(torch.randn(2, 64))
    spectune.unmerge(model)
    assert spectune.extract(model).layers.keys() == weights.keys()
    assert same_state(spectune.detach(model), before)


def test_another_packing_is_another_base(kind):
    adapter = spectune.extract(trained(spectune.adapt(model_of(kind), SVF())))
    other = model_of(four_bits if kind is eight_bits else eight_bits)
    with pytest.raises(SpectuneError, match="belongs to another base: the weight of '0'"):
        spectune.attach(other, adapter)
    spectune.attach(model_of(kind), adapter)  # packed again, and alike


def test_a_weight_stays_as_it_is_packed_whatever_the_processor():
    """bitsandbytes lays a weight out anew in evaluation mode, for AVX-512, and rounds its scales for it."""
    model = model_of(four_bits).to(torch.bfloat16)
    before = state(model)
    for layer in (model[0], model[2]):
        layer.support_avx512bf16_for_cpu = True
    spectune.adapt(model, LoRA(rank=2)).eval()
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        model(x)
    y = model.train()(x.requires_grad_())
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.any()
    assert same_state(spectune.detach(model), before)
    assert model[0].support_avx512bf16_for_cpu


def test_a_base_that_has_answered_is_the_same_base():
    """Where bitsandbytes laid its weights out anew, their scales are rounded ever after."""
    fresh, used = model_of(four_bits), model_of(four_bits)
    for layer in (used[0], used[2]):
        data, layer.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
            layer.weight.data, layer.weight.quant_state
        )
        layer.weight.data = data
    apart = off(effective_weight(used[0]).dense(), effective_weight(fresh[0]).dense().double())
    assert 0 < apart < 4e-3
    adapter = spectune.extract(trained(spectune.adapt(used, SVF())))
    x = torch.randn(2, 64)
    y = spectune.attach(fresh, adapter)(x)
    if bnb.functional.has_avx512bf16():  # elsewhere that layout has no product
        assert off(y, used(x).double()) < 1e-2
    other = model_of(four_bits)
    other[0].weight = bnb.nn.Params4bit(effective_weight(fresh[0]).dense() * 1.01, requires_grad=False).to("cpu")
    with pytest.raises(SpectuneError, match="belongs to another base: the weight of '0'"):
        spectune.attach(other, adapter)


def test_the_basis_is_held_in_what_the_model_computes_in():
    model = nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16), eight_bits(64, 64, bias=False))
    spectune.adapt(model, SVF())
    assert {t.dtype for t in model[1].bases.buffers() if t.dim() == 2} == {torch.bfloat16}


def test_what_is_not_packed_yet_is_told():
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4")
    with pytest.raises(SpectuneError, match="a Linear4bit has not packed its weight yet"):
        spectune.adapt(nn.Sequential(layer), LoRA(rank=2))


def test_a_packed_weight_is_not_written_to(kind):
    weight = effective_weight(kind(64, 64))
    assert isinstance(weight, Packed)
    with pytest.raises(SpectuneError, match="cannot be written to"):
        weight.mul_(2)
    assert type(copy.deepcopy(weight)) is torch.Tensor
    assert "Packed((64, 64)" in repr(weight)


def test_an_adapted_model_is_copied(kind):
    model = trained(spectune.adapt(model_of(kind), SVF()))
    x = torch.randn(2, 64)
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(model)(x), model(x))


def torchao(config):
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    quantization.quantize_(model, getattr(quantization, config)())
    return model


def quanto(kind):
    library = pytest.importorskip("optimum.quanto")
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    library.quantize(model, weights=getattr(library, kind))
    library.freeze(model)
    return model


@pytest.mark.parametrize(
    ("make", "kind", "rounding"),
    [
        (torchao, "Int8WeightOnlyConfig", EPS),
        (torchao, "Int8DynamicActivationInt8WeightConfig", ROUNDED),
        (torchao, "Float8WeightOnlyConfig", EPS),
        (quanto, "qint8", EPS),
        (quanto, "qint4", EPS),
        (quanto, "qfloat8", EPS),
    ],
)
def test_weights_that_dequantize_themselves(make, kind, rounding):
    torch.manual_seed(0)
    model = make(kind)
    weights, held, own = weights_of(model), model[0].weight, type(model[0])
    for method in (SVF(), DoRA(LoRA(rank=4))):
        trained(spectune.adapt(model, method))
        x = torch.randn(5, 64, requires_grad=True)
        y, towards = model(x), torch.randn(5, 64)
        y.backward(towards)
        adapter = spectune.extract(model)
        exact = x.detach().double().requires_grad_()
        expected = oracle(model, weights, {name: adapter.delta(name).double() for name in weights}, exact)
        expected.backward(towards.double())
        assert off(y, expected) < rounding
        assert off(x.grad, exact.grad) < rounding
        with pytest.raises(SpectuneError, match=r"cannot be packed again: how .* packed it is not known"):
            spectune.merge(model, requantize=True)
        spectune.detach(model)
        assert model[0].weight is held
        assert type(model[0]) is own
        assert all(torch.equal(now, weights[name]) for name, now in weights_of(model).items())
