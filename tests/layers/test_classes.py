"""Modules that change their class: copies, pickles, and what others wrapped around them."""

from typing import Any

import torch
import torch.nn as nn
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

import spectune
from layers.test_stored import adapted_parameters, small
from spectune.layers.adapted import adapted_layers
from spectune.model.fresh import fresh_modules


def test_torch_save_keeps_a_whole_model(tmp_path):
    model, x = small("svf"), torch.randn(3, 6)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(x), model(x))
    spectune.merge(loaded)
    torch.testing.assert_close(loaded(x), model(x))


class Doubling(ModelHook):
    def post_forward(self, module, output):
        return 2 * output


def test_layers_that_accelerate_has_wrapped_answer_too():
    model: Any = nn.Sequential(nn.Linear(6, 4))
    x = torch.randn(2, 6)
    plain = model(x)
    add_hook_to_module(model[0], Doubling())
    spectune.adapt(model, "svf")
    with torch.no_grad():
        adapted_parameters(model)[0].fill_(3)
    torch.testing.assert_close(model(x), 2 * (3 * plain - 2 * model[0].bias))
    spectune.detach(model)
    assert torch.equal(model(x), 2 * plain)
    spectune.adapt(model, "svf")
    remove_hook_from_module(model[0])
    with torch.no_grad():
        adapted_parameters(model)[0].fill_(3)
    torch.testing.assert_close(model(x), 3 * plain - 2 * model[0].bias)


def test_part_of_a_model_that_has_its_own_adapters_attribute():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.adapters = nn.ModuleList([nn.Linear(4, 4)])
            self.bases = nn.Linear(4, 4)

        def forward(self, x):
            return self.bases(self.adapters[0](x))

    model: Any = Block()
    x = torch.randn(2, 4)
    plain = model(x)
    spectune.adapt(model, "svf")
    assert set(adapted_layers(model)) == {"adapters.0", "bases"}
    for name, parameter in model.named_parameters():  # as transformers marks what a checkpoint filled
        parameter._is_hf_initialized = not name.startswith("adapters.0.")
    assert fresh_modules(model) == ["adapters.0"]
    assert torch.equal(model(x), plain)
    spectune.detach(model)
    assert torch.equal(model(x), plain)
