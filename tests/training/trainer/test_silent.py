"""The first step of any trainer of ours tells of layers that it gave no gradient."""

import pytest
import torch
import torch.nn as nn
from transformers import TrainingArguments

import spectune
from spectune import SpectuneError

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")


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


class Reads(Model):
    """Takes the weight of a layer that it never calls."""

    def forward(self, x, labels=None):
        found = super().forward(x)
        return {"loss": found["loss"] + self.second._parameters["weight"].square().mean() * found["y"].mean()}


class Teacher(Model):
    """Calls a layer without gradients."""

    def forward(self, x, labels=None):
        found = super().forward(x)
        with torch.no_grad():
            target = self.second(x)
        return {"loss": (found["y"] - target).square().mean()}


class Pooler(Model):
    """Calls a layer whose answer the loss does not depend on."""

    def forward(self, x, labels=None):
        return super().forward(x) | {"pooled": self.second(x)}


class Choice(nn.Module):
    """A router that sends all tokens to one of its experts."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, labels=None):
        y = self.experts[1](x) + self.experts[2](x[:0]).sum()
        return {"loss": (y - x).square().mean()}


def train(model, tmp_path, on_silent="raise"):
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    data = [{"x": torch.randn(4), "labels": torch.zeros(())} for _ in range(8)]
    trainer = spectune.Trainer(model, arguments, train_dataset=data)
    trainer.on_silent = on_silent
    trainer.train()
    assert not any(layer._forward_pre_hooks for layer in model.modules())


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (Model(["first"]), "adapter on 'second' cannot learn: the model never called it .*exclude=\\['second'\\]"),
        (Reads(["first"]), "the model reads the weight of 'second' itself .*gets no gradient"),
        (Teacher(["first"]), "adapter on 'second' cannot learn: the model calls it without gradients"),
    ],
)
def test_a_layer_that_cannot_learn_is_an_error_that_names_it(model, told, tmp_path):
    with pytest.raises(SpectuneError, match=told):
        train(spectune.adapt(model, "lora:rank=2"), tmp_path)


def test_layers_that_are_all_asked_are_nothing_to_tell_of(tmp_path):
    train(spectune.adapt(Model(["first", "second"]), "lora:rank=2"), tmp_path)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (Pooler(["first"]), "the loss does not depend on what they answer: 'second'"),
        (Choice(), "others like it were called, and these train only if a later step reaches them: 'experts.0'"),
    ],
)
def test_what_the_task_or_the_data_leaves_out_is_a_warning(model, told, tmp_path):
    with pytest.warns(UserWarning, match=told):
        train(spectune.adapt(model, "lora:rank=2"), tmp_path)


def test_the_error_can_be_made_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="never called it in the first step.*: 'second'"):
        train(spectune.adapt(Model(["first"]), "lora:rank=2"), tmp_path, on_silent="warn")


def test_an_adapter_that_does_not_answer_cannot_train(tmp_path):
    one = spectune.adapt(Model(["first", "second"]), "lora:rank=2", ["first"], name="a")
    spectune.adapt(one, "lora:rank=2", ["second"], name="default")
    spectune.trainable(spectune.activate(one, "default"), "a")
    with pytest.raises((SpectuneError, RuntimeError)):
        train(one, tmp_path)
