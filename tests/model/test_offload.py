"""Weights that accelerate holds elsewhere until a layer is called, before adapting and after."""

import accelerate
import pytest
import torch

import spectune
import tiny

CPU = torch.device("cpu")
METHODS = ["lora:rank=2", "svf", "dora:inner=pissa,rank=2", "svft"]


def shaken(model):
    with torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
def test_offloaded_before_and_after_adapting(architecture, method, buffers):
    build, inputs = tiny.ARCHITECTURES[architecture], tiny.batch(architecture)
    model = shaken(spectune.adapt(build(), method))
    expected = model(**inputs)
    expected.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    adapter = spectune.extract(model)
    after = shaken(spectune.adapt(build(), method))
    accelerate.cpu_offload(after, execution_device=CPU, offload_buffers=buffers)
    before = build()
    accelerate.cpu_offload(before, execution_device=CPU, offload_buffers=buffers)
    attached = build()
    accelerate.cpu_offload(attached, execution_device=CPU)
    for offloaded in (
        after,
        shaken(spectune.adapt(before, method)),
        spectune.attach(attached, adapter, trainable=True),
    ):
        assert {p.device.type for p in offloaded.parameters() if p.requires_grad} == {"cpu"}
        assert {p.device.type for p in offloaded.parameters() if not p.requires_grad} == {"meta"}
        found = offloaded(**inputs)
        torch.testing.assert_close(found.logits, expected.logits)
        found.loss.backward()
        for name, parameter in offloaded.named_parameters():
            if name in gradients:
                torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)
        again = spectune.attach(build(), spectune.extract(offloaded))
        torch.testing.assert_close(again(**inputs).logits, expected.logits)
        with pytest.raises(spectune.SpectuneError, match="is offloaded and would come back as it was"):
            spectune.merge(offloaded)
        spectune.detach(offloaded)
        torch.testing.assert_close(offloaded(**inputs).logits, build()(**inputs).logits)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_layers_on_the_disk(tmp_path):
    build, inputs = tiny.mistral, tiny.batch("mistral")
    model = shaken(spectune.adapt(build(), "svf"))
    build().save_pretrained(tmp_path)
    where = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    where |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    loaded = type(model).from_pretrained(tmp_path, device_map=where, offload_folder=tmp_path / "off")
    loaded.config._attn_implementation = "eager"
    spectune.attach(loaded, spectune.extract(model))
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
    spectune.detach(loaded)
    plain = loaded(**inputs).logits
    spectune.adapt(loaded, "svf", modules_to_save=["norm"])
    assert list(spectune.extract(loaded).modules) == ["model.norm"]  # what is on the disk is no new head
    torch.testing.assert_close(loaded(**inputs).logits, plain)
    with pytest.raises(spectune.SpectuneError, match="sharded or offloaded cannot be saved merged"):
        loaded.save_pretrained(tmp_path / "merged")
