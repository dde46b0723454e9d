"""Every architecture: adapted, trained one step, saved, loaded, merged, checkpointed and compiled."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn as nn

import spectune
import tiny
from spectune.layers.adapted import adapted_layers
from spectune.layers.modules import is_linear

METHODS = ["svf", "lora:rank=4", "dora:inner=pissa,rank=4"]
HEADS = {  # outside what a pretrained model has, so new in one that comes from no checkpoint
    "roberta": {"classifier.dense", "classifier.out_proj"},
    "deberta": {"pooler.dense", "classifier"},
    "vit": {"classifier"},
}


def loss_of(model, inputs):
    return model(**inputs).loss


def double(architecture) -> tuple[Any, dict[str, Any]]:
    """Return a model and a batch in float64, in which what one small step changes is far above rounding."""
    inputs = tiny.batch(architecture)
    inputs |= {k: v.double() for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    model = tiny.ARCHITECTURES[architecture]().double()
    model.config._experts_implementation = "eager"  # grouped products of experts are of 32 bits at most
    return model, inputs


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_adapted_trained_saved_loaded_and_merged(architecture, method, tmp_path):
    model, inputs = double(architecture)
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    start = loss_of(model, inputs).item()

    spectune.adapt(model, method)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linears = {n for n, m in model.named_modules() if is_linear(m) and m is not head}
    layers = adapted_layers(model)
    assert set(layers) == linears
    whole = {n for n, m in layers.items() if [type(u.method) for u in m.adapters["default"]] == [spectune.Head]}
    assert whole == HEADS.get(architecture, set())
    loss = loss_of(model, inputs)
    assert loss.item() == pytest.approx(start, rel=1e-5)

    loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, p in model.named_parameters() if ".adapters." in n}
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    after = loss_of(model, inputs).item()
    assert after < start

    spectune.extract(model).save(tmp_path)
    adapter = spectune.Adapter.load(tmp_path)
    fresh = spectune.attach(double(architecture)[0], adapter)
    assert loss_of(fresh, inputs).item() == pytest.approx(after, rel=1e-5)

    merged = spectune.merge(copy.deepcopy(model))
    assert not adapted_layers(merged)
    assert loss_of(merged, inputs).item() == pytest.approx(after, rel=1e-4)
    for name, parameter in model.named_parameters():
        if ".adapters." not in name:
            assert id(parameter) == before[name][0]
            assert torch.equal(parameter, before[name][1])


def test_the_experts_of_mixtral_are_adapted_and_its_routers_are_not():
    model = tiny.mixtral()
    experts = [n for n, p in model.named_parameters() if "experts" in n and p.dim() == 3]
    assert experts
    spectune.adapt(model, "lora:rank=2")
    assert {name.rpartition(".")[2] for name in adapted_layers(model)} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"
    }  # fmt: skip


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ["lora:rank=4,dropout=0.5", "svft:pattern=banded,width=2", "dora:rank=4"])
@pytest.mark.parametrize("architecture", ["llama", "t5", "vit"])
def test_gradient_checkpointing_gives_the_same_gradients(architecture, method, reentrant):
    model, inputs = tiny.ARCHITECTURES[architecture]().train(), tiny.batch(architecture)
    spectune.adapt(model, method)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(1)
        loss_of(model, inputs | ({"use_cache": False} if architecture != "vit" else {})).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert grads[0].keys() == grads[1].keys()
    assert all(".adapters." in name for name in grads[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-4)


COMPILED = [
    "lora:rank=4",
    "svf",
    "svf:parametrization=sigmoid",
    "svft",
    "svft:pattern=banded,width=2",
    "pissa:rank=4",
    "lora_xs:rank=4",
    "adalora:rank=4",
    "vera:rank=4",
    "dora:rank=4",
    "svft:pattern=random,width=2",
    "dora:inner=svf",
]


@pytest.mark.parametrize("method", COMPILED)
def test_a_compiled_layer_has_no_graph_break(method):
    torch._dynamo.reset()
    model: Any = nn.Sequential(nn.Linear(12, 8))
    spectune.adapt(model, method)
    with torch.no_grad():
        for parameter in model[0].adapters.parameters():
            parameter.add_(torch.randn_like(parameter))
    x = torch.randn(2, 3, 12)
    expected = model(x)
    expected.square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, as it compiles
        y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        y.square().sum().backward()
    torch.testing.assert_close(y, expected)
    for name, parameter in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(parameter.grad, grads[name], atol=1e-4, rtol=1e-5)
