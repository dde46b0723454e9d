"""Norms with their gradient in one piece, against autograd's through the model's own."""

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

import spectune
from spectune.speed.checkpointing import checkpoint_activations
from spectune.speed.norms import fused_norms
from training.folder import make_model

KINDS = [LlamaRMSNorm, Olmo2RMSNorm, Gemma3RMSNorm]


def norm(kind, dtype=torch.float32, size=24):
    torch.manual_seed(0)
    module = kind(size, eps=1e-5).to(dtype).requires_grad_(False)
    module.weight.copy_(torch.randn(size))
    return module


def answer_and_gradient(module, x, grad):
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(grad)
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_is_the_same_to_the_last_bit_and_the_gradient_to_rounding(kind, dtype):
    module = norm(kind, dtype)
    x, grad = torch.randn(2, 3, 24).to(dtype), torch.randn(2, 3, 24).to(dtype)
    theirs = answer_and_gradient(module, x, grad)
    with fused_norms(module):
        ours = answer_and_gradient(module, x, grad)
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])
    assert "forward" not in vars(module)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_keeps_little_but_the_input(kind):
    module, kept = norm(kind, torch.bfloat16), []
    x = torch.randn(1, 50, 24).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), fused_norms(module):
        module(x)
    assert sum(t.numel() for t in kept) == x.numel() + 50 + 24


class Shifted(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) + 0.01


@pytest.mark.parametrize(
    "module", [norm(Shifted), nn.LayerNorm(8), nn.Embedding(4, 8), nn.LayerNorm(8, elementwise_affine=False)]
)
def test_what_follows_no_known_formula_is_left_alone(module):
    with fused_norms(module):
        assert "forward" not in vars(module)


class Gated(LlamaRMSNorm):
    def forward(self, hidden_states, gate=None):
        return super().forward(hidden_states if gate is None else hidden_states * gate.sigmoid())


def test_what_else_a_norm_takes_goes_to_its_own():
    module = norm(Gated)
    x, gate = torch.randn(1, 3, 24, requires_grad=True), torch.randn(1, 3, 24)
    theirs = module(x, gate)
    with fused_norms(module):
        assert type(module(x).grad_fn).__name__ == "_NormBackward"
        assert torch.equal(module(x, gate), theirs)
        assert torch.equal(module(hidden_states=x, gate=gate), theirs)


def test_hooks_see_the_models_inputs_alone():
    module, seen = norm(LlamaRMSNorm), []
    module.register_forward_hook(lambda module, args, answer: seen.append(args[0].shape))
    with fused_norms(module):
        assert not seen
        module(torch.randn(1, 3, 24, requires_grad=True))
    assert seen == [(1, 3, 24)]


def test_a_norm_that_learns_or_does_not_answer_to_autograd_is_the_models_own():
    module = norm(LlamaRMSNorm)
    x = torch.randn(1, 3, 24, requires_grad=True)
    with fused_norms(module):
        assert type(module(x).grad_fn).__name__ == "_NormBackward"
        assert module(x.detach()).grad_fn is None
        module.requires_grad_(True)
        assert type(module(x).grad_fn).__name__ != "_NormBackward"


def test_a_norm_that_is_adapted_within_learns():
    model = make_model()
    ids = torch.randint(3, 20, (1, 8))
    with fused_norms(model):
        spectune.adapt(model, "lora:rank=2", modules_to_save=["norm", "input_layernorm"])
        model(ids, labels=ids).loss.backward()
        norms = [model.model.norm, *(layer.input_layernorm for layer in model.model.layers)]
        assert all(float(own.adapters.default.weight.grad.norm()) > 0 for own in norms)


@pytest.mark.parametrize("how", [False, "selective", True])
def test_a_model_learns_the_same(how):
    model = spectune.adapt(make_model(), "lora:rank=2").train()
    checkpoint_activations(model, how)
    ids = torch.tensor([[1, 5, 7, 2, 9]])

    def gradients():
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    theirs = gradients()
    with fused_norms(model):
        ours = gradients()
    assert len(ours) > 0
    torch.testing.assert_close(ours, theirs)
