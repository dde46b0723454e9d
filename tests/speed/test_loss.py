"""The chunked cross-entropy against the model's own logits."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GraniteConfig, GraniteForCausalLM

import spectune
from spectune.speed import loss as loss_module
from spectune.speed.loss import IGNORE, cross_entropy_sum
from spectune.training.data.packing import Packer
from spectune.training.tasks.sft import encode
from training.folder import make_model, make_tokenizer

RECORDS = [{"prompt": "one plus two is", "completion": "three"}, {"text": "ahoy"}, {"text": "say hello and ahoy and"}]


def batch(model, padded=False):
    packer = Packer(model, 0)
    examples = encode(RECORDS, make_tokenizer(), 32).examples
    inputs = packer._padded(examples) if padded else packer(examples)
    inputs.pop("shift_labels", None)
    return inputs, inputs.pop("labels")


def reference(model, inputs, labels):
    logits = model(**inputs, use_cache=False).logits.float().flatten(0, -2)
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("at_once", [1 << 25, 520])
def test_values_and_gradients(padded, at_once, monkeypatch):
    monkeypatch.setattr(loss_module, "_HELD", at_once)
    monkeypatch.setattr(loss_module, "_BLOCK", at_once // 8)
    monkeypatch.setattr(loss_module, "STEP", 1)
    model = spectune.adapt(make_model(), "lora:rank=2").train()
    inputs, labels = batch(model, padded)
    ours, theirs = cross_entropy_sum(model, inputs, labels), reference(model, inputs, labels)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(model, 3 * ours), gradients(model, 3 * theirs), atol=1e-4, rtol=1e-4)
    assert "forward" not in vars(model.lm_head)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy_sum(model, inputs, labels), theirs)


def granite():
    config = GraniteConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        logits_scaling=7.0,
    )
    return spectune.adapt(GraniteForCausalLM(config), "lora:rank=2")


def with_an_adapted_head():
    return spectune.adapt(make_model(tie_word_embeddings=False), "lora:rank=2", targets=["lm_head", "q_proj"])


def all_trained():
    return make_model()


@pytest.mark.parametrize("make", [granite, with_an_adapted_head, all_trained])
def test_where_the_product_is_not_the_models_answer_its_logits_are_used(make):
    model = make().train()
    inputs, labels = batch(model)
    for _ in range(2):
        ours, theirs = cross_entropy_sum(model, inputs, labels), reference(model, inputs, labels)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(gradients(model, ours), gradients(model, theirs))


@settings(deadline=None)
@given(count=st.integers(0, 3000), most=st.integers(0, 300))
def test_rows_are_taken_in_even_parts(count, most):
    step = loss_module._even(count, most)
    assert step % loss_module.STEP == 0
    assert loss_module.STEP <= step <= max(most, loss_module.STEP)
    computed = sum(part + -part % loss_module.STEP for part in (min(step, count - i) for i in range(0, count, step)))
    assert computed < count + loss_module.STEP


def test_no_logits_of_all_positions_are_made(monkeypatch):
    monkeypatch.setattr(loss_module, "_HELD", 320)
    monkeypatch.setattr(loss_module, "STEP", 1)
    model = spectune.adapt(make_model(), "svf").train()
    inputs, labels = batch(model)
    largest = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: largest.append(t.shape) or t, lambda t: t):
        cross_entropy_sum(model, inputs, labels)
    assert labels.numel() > 2
    assert not [shape for shape in largest if shape[-1:] == (40,) and shape[:-1].numel() >= labels.numel()]


def cut_cross_entropy(e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False):
    """What the package of this name computes, with its signature's names."""
    return F.cross_entropy((e @ c.T).float(), targets, ignore_index=ignore_index, reduction=reduction)


def liger(input, weight, target, bias=None, ce_weight=None, ignore_index=-100, reduction="mean"):
    return F.cross_entropy((input @ weight.T).float(), target, ignore_index=ignore_index, reduction=reduction)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Take the CPU for a GPU, with neither package; return how to install one that notes what it is given."""
    calls = []

    def install(name, true):
        def function(*args, **kwargs):
            calls.append((name, args, kwargs))
            return true(*args, **kwargs)

        module = ModuleType(name)
        setattr(module, FUNCTIONS[name], function)
        monkeypatch.setitem(sys.modules, name, module)
        loss_module._installed.cache_clear()
        return calls

    for name in FUNCTIONS:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(loss_module, "_takes_kernels", lambda hidden: True)
    loss_module._installed.cache_clear()
    yield install
    loss_module._installed.cache_clear()


CUT, LIGER = "cut_cross_entropy", "liger_kernel.transformers.functional"
FUNCTIONS = {CUT: "linear_cross_entropy", LIGER: "liger_fused_linear_cross_entropy"}


@pytest.mark.parametrize(("names", "dtype", "taken"), [
    ((CUT, LIGER), torch.bfloat16, CUT),
    ((CUT, LIGER), torch.float32, LIGER),
    ((LIGER,), torch.bfloat16, LIGER),
    ((CUT,), torch.float32, None),
    ((), torch.bfloat16, None),
])  # fmt: skip
def test_which_package_sums_the_loss(names, dtype, taken, as_on_a_gpu):
    calls = []
    for name in names:
        calls = as_on_a_gpu(name, cut_cross_entropy if name == CUT else liger)
    model = spectune.adapt(make_model().to(dtype), "lora:rank=2").train()
    inputs, labels = batch(model)
    ours, theirs = cross_entropy_sum(model, inputs, labels), reference(model, inputs, labels)
    close = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(ours, theirs, **close)
    for one, other in zip(gradients(model, 3 * ours), gradients(model, 3 * theirs), strict=True):
        assert (one - other).norm() <= 0.1 * other.norm() + 1e-3  # as a whole: a number of few bits may be far off
    assert [name for name, *_ in calls] == ([taken] if taken else [])
    for _, (hidden, weight, targets), options in calls:
        wanted = labels[labels != IGNORE]
        assert torch.equal(targets, wanted)
        assert hidden.shape == (len(wanted), weight.shape[1])
        assert weight is model.lm_head.weight
        assert options == {"reduction": "sum"}


@pytest.mark.parametrize("make", [granite, with_an_adapted_head, all_trained])
def test_no_package_is_asked_where_the_product_is_not_the_models_answer(make, as_on_a_gpu):
    calls = as_on_a_gpu(LIGER, liger)
    model = make().train()
    inputs, labels = batch(model)
    torch.testing.assert_close(cross_entropy_sum(model, inputs, labels), reference(model, inputs, labels))
    assert not calls


def test_no_package_is_asked_about_nothing(as_on_a_gpu):
    calls = as_on_a_gpu(LIGER, liger)
    model = spectune.adapt(make_model(), "lora:rank=2").train()
    inputs, labels = batch(model)
    assert cross_entropy_sum(model, inputs, torch.full_like(labels, IGNORE)) == 0
    assert not calls


def test_the_cpu_keeps_to_its_own_sum():
    assert not loss_module._takes_kernels(torch.zeros(1))
