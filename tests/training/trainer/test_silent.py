"""The first step of any trainer of ours tells of layers that it gave no gradient."""

import pytest
import torch
import torch.nn as nn
from transformers import TrainingArguments

import spectune


class Model(nn.Module):
    """Two layers, of which `used` says which the loss goes through."""

    def __init__(self, used):
        super().__init__()
        self.first, self.second, self.used = nn.Linear(4, 4), nn.Linear(4, 4), used

    def forward(self, x, labels=None):
        y = x
        for name in self.used:
            y = getattr(self, name)(y)
        return {"loss": (y - x).square().mean() + 0 * y.sum(), "y": y}


def train(model, tmp_path):
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    data = [{"x": torch.randn(4), "labels": torch.zeros(())} for _ in range(8)]
    spectune.Trainer(model, arguments, train_dataset=data).train()


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_a_layer_without_a_gradient_is_named(tmp_path):
    train(spectune.adapt(Model(["first", "second"]), "lora:rank=2"), tmp_path)
    with pytest.warns(UserWarning, match="got no gradient in the first step .*: 'second'; exclude"):
        train(spectune.adapt(Model(["first"]), "lora:rank=2"), tmp_path)
    one = spectune.adapt(Model(["first", "second"]), "lora:rank=2", ["first"], name="a")
    spectune.adapt(one, "lora:rank=2", ["second"], name="default")
    spectune.trainable(spectune.activate(one, "default"), "a")
    with pytest.raises((spectune.SpectuneError, RuntimeError)):
        train(one, tmp_path)
