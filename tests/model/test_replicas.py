"""Replicas as nn.DataParallel makes them: plain tensors in the place of parameters."""

import importlib

import pytest
import torch

import spectune
import tiny

replicate = importlib.import_module("torch.nn.parallel.replicate")


@pytest.fixture
def on_the_cpu(monkeypatch):
    copies = lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices]  # noqa: E731
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(replicate, "_get_device_index", lambda *args, **kwargs: 0)


WHOLE = {
    "gpt2": ["transformer.wpe", "transformer.ln_f", "lm_head"],
    "bert": {"bert.embeddings.word_embeddings": [3, 4, 5], "cls.predictions.transform.LayerNorm": None},
}


@pytest.mark.parametrize("architecture", WHOLE)
def test_modules_that_are_brought_whole_are_in_a_replica_too(architecture, on_the_cpu):
    model = tiny.ARCHITECTURES[architecture]()
    check(spectune.adapt(model, "lora:rank=2", modules_to_save=WHOLE[architecture]), tiny.batch(architecture))


@pytest.mark.parametrize(
    "method",
    ["lora:rank=2", "svf", "dora:inner=pissa,rank=2", "svft", "adalora:rank=2,total_steps=20,t_init=2,t_final=2"],
)
@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_a_replica_answers_and_learns_as_the_model_does(architecture, method, on_the_cpu):
    model, inputs = tiny.ARCHITECTURES[architecture](), tiny.batch(architecture)
    check(spectune.adapt(model, method), inputs)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # PEFT's
@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_a_replica_of_a_model_that_peft_holds(options, on_the_cpu):
    peft, ours = pytest.importorskip("peft"), importlib.import_module("spectune.peft")
    model, inputs = tiny.ARCHITECTURES["gpt2"](), tiny.batch("gpt2")
    check(peft.get_peft_model(model, ours.SVFConfig(target_modules=["c_attn", "c_fc"], **options)), inputs)


def check(model, inputs):
    """Assert that a replica answers as the model does, and that its gradients reach the model."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model(**inputs).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    _, replica = replicate.replicate(model, [torch.device("cpu")] * 2)
    loss = replica(**inputs).loss
    torch.testing.assert_close(loss, model(**inputs).loss)
    loss.backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        _, replica = replicate.replicate(model, [torch.device("cpu")] * 2)
        torch.testing.assert_close(replica(**inputs).logits, model(**inputs).logits)
