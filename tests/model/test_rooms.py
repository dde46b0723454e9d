"""Layers with less room than a method's rank, and layers whose weight is all zeros."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn as nn
import transformers as tf

import spectune
import tiny
from spectune import SVF, SVFT, AdaLoRA, DoRA, LoRA, LoRAXS, MiLoRA, PiSSA
from spectune.layers.adapted import adapted_layers

RANKED = [PiSSA(rank=8), PiSSA(rank=8, alpha=4), MiLoRA(rank=8), LoRAXS(rank=8, alpha=16), AdaLoRA(rank=4)]


def with_a_small_head() -> Any:
    config = tf.BertConfig(**tiny.BERT, num_labels=2)
    torch.manual_seed(0)
    model = tf.BertForSequenceClassification(config).eval()
    for parameter in model.parameters():  # as if a checkpoint had it all, and the head were no new one
        parameter._is_hf_initialized = True
    return model


def tokens():
    return torch.randint(3, 96, (3, 5), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", [LoRA(), DoRA(LoRA()), spectune.VeRA(rank=16)], ids=lambda m: m.basis_key)
def test_a_rank_that_is_no_rank_of_the_weight_has_no_limit(method):
    model = spectune.adapt(with_a_small_head(), method)
    (update,) = model.classifier.adapters["default"]
    assert update.method == method
    assert 16 in update.trained().get("d", torch.empty(16)).shape


@pytest.mark.parametrize("around", [lambda m: m, DoRA], ids=["plain", "dora"])
@pytest.mark.parametrize("method", RANKED, ids=spectune.methods.to_text)
def test_a_small_layer_takes_all_that_there_is(method, around, tmp_path):
    method = around(method)
    with pytest.warns(UserWarning, match=r"'classifier' have less room than .*'classifier' \(2 x 32\) has ") as told:
        model = spectune.adapt(with_a_small_head(), method)
    assert len(told) == 1
    layers = adapted_layers(model)
    inner = getattr(layers["classifier"].adapters["default"][0].method, "inner", None)
    small, asked = inner or layers["classifier"].adapters["default"][0].method, getattr(method, "inner", method)
    assert small.rank == 2
    assert small.fit(2, 32) == small
    if hasattr(asked, "scale"):
        assert small.scale == pytest.approx(asked.scale)
    assert all(u.method == method for n, la in layers.items() if n != "classifier" for u in la.adapters["default"])

    out = model(input_ids=tokens(), labels=torch.tensor([0, 1, 1]))
    out.loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 5 * parameter.grad
        after = model(tokens()).logits
    spectune.extract(model).save(tmp_path / "a")
    loaded = spectune.attach(with_a_small_head(), spectune.Adapter.load(tmp_path / "a"))
    torch.testing.assert_close(loaded(tokens()).logits, after)
    torch.testing.assert_close(spectune.merge(model)(tokens()).logits, after, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(after, out.logits, atol=1e-6)


def test_a_rank_of_its_own_for_a_layer_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spectune.adapt(with_a_small_head(), PiSSA(rank=8), overrides={"classifier": PiSSA(rank=2)})
        spectune.adapt(with_a_small_head(), PiSSA(rank=8), exclude=["classifier"])


def test_a_plan_counts_what_adapting_makes(tmp_path):
    config = tf.LlamaConfig(
        **{**tiny.TEXT, "num_key_value_heads": 1, "head_dim": 4, "architectures": ["LlamaForCausalLM"]}
    )
    config.save_pretrained(tmp_path)
    for method in ("pissa:rank=8", "lora_xs:rank=8", "adalora:rank=8", "lora:rank=64", "dora:inner=milora,rank=12"):
        row = spectune.plan(str(tmp_path), [method], precisions=["fp32"], measured=False).rows[0]
        torch.manual_seed(0)
        model = tf.LlamaForCausalLM(config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spectune.adapt(model, method)
        assert row["trainable_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
        spectune.extract(model).save(tmp_path / method)
        file = tmp_path / method / "adapter_model.safetensors"
        assert abs(row["adapter_bytes"] - file.stat().st_size) <= 64


def zeros() -> Any:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    nn.init.zeros_(model[1].weight)
    return model


@pytest.mark.parametrize("around", [lambda m: m, DoRA], ids=["plain", "dora"])
@pytest.mark.parametrize("method", [SVF(), PiSSA(rank=2), MiLoRA(rank=2), LoRAXS(rank=2)], ids=lambda m: m.name)
def test_what_cannot_learn_from_zeros_says_so(method, around):
    method = around(method)
    with pytest.warns(UserWarning, match=rf"{method.name} cannot learn where a weight is all zeros, as it is in '1'"):
        model = spectune.adapt(zeros(), method)
    assert list(adapted_layers(model)) == ["0", "1"]


@pytest.mark.parametrize(
    "method", [LoRA(rank=2), SVFT(), AdaLoRA(rank=2, total_steps=20), DoRA(LoRA(rank=2))], ids=lambda m: m.name
)
def test_what_learns_from_zeros_does(method):
    model = spectune.adapt(zeros(), method)
    x, wanted = torch.randn(16, 6), torch.randn(16, 4)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(20):
        loss = (model(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert any(p.grad.abs().sum() > 0 for p in model[1].adapters.parameters())
