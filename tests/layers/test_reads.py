"""Weights read past their layer: told of in compiled code too, and only where values are taken."""

import pytest
import torch
import torch.nn as nn

import spectune
from layers.reading_model import Reads


@pytest.mark.parametrize("gradients", [False, True])
def test_compiled_code_that_that_reads_a_weight_is_told_of_and_what_looks_at_its_kind_is_not(gradients):
    class Looks(Reads):
        def forward(self, x):
            return self.read(self.called(x).to(self.read.weight.dtype)).view(-1, self.read.weight.shape[0])

    x, name = torch.randn(3, 6), "read"
    with torch.set_grad_enabled(gradients):
        for read in (Reads(), nn.ModuleList([Reads()])[0]):
            compiled = torch.compile(spectune.adapt(read, "lora:rank=2"), backend="aot_eager", fullgraph=True)
            with pytest.raises(spectune.SpectuneError, match=f"reads the weight of '{name}' itself"):
                compiled(x)
        looks = spectune.adapt(Looks(), "lora:rank=2")
        looks.read.adapters["default"][0].B.data.normal_()
        torch.testing.assert_close(torch.compile(looks, backend="aot_eager", fullgraph=True)(x), looks(x))
    torch._dynamo.reset()


def test_what_looks_at_a_weight_from_outside_finds_the_parameter():
    model = spectune.adapt(Reads(), "lora:rank=2", exclude=["read"])
    layer, norms = model.called, []
    assert layer.weight is dict(model.named_parameters())["called.weight"]
    model.register_forward_hook(lambda *_: norms.append(float(model.called.weight.norm())))
    layer.register_forward_hook(lambda layer, *_: norms.append(float(layer.weight.norm())))
    model(torch.randn(2, 6))
    assert norms == [float(layer.weight.norm())] * 2
