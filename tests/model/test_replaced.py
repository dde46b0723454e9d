"""A layer that something else takes the place of, after it was adapted, is told of."""

import copy
import gc

import pytest
import torch
import torch.nn as nn

import spectune
import tiny
from spectune import SpectuneError
from spectune.training.trainer.silent import check_gradients


def resized(build, **options):
    model = build()
    spectune.adapt(model, "lora:rank=2", **options)
    model.resize_token_embeddings(120)
    gc.collect()
    return model


@pytest.mark.parametrize(
    ("build", "head", "other"),
    [
        (tiny.llama, "lm_head", "q_proj"),
        (tiny.qwen3, "lm_head", "down_proj"),
        (tiny.gpt2, "lm_head", "c_attn"),
        (tiny.bert, "cls.predictions.decoder", "query"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_resized_output_embedding_is_told_of_wherever_the_adapter_is_asked_for(build, head, other):
    model = resized(build, targets=[head, other])
    tied = hasattr(model.get_submodule(head), "adapters")
    for ask in (
        lambda: spectune.extract(model),
        lambda: spectune.activate(model, None),
        lambda: spectune.merge(model),
        lambda: spectune.route(model, [None]).__enter__(),
        lambda: check_gradients(model),
        *([lambda: model(torch.tensor([[1, 2]]))] if model.get_submodule(head).weight.shape[0] == 120 and tied else []),
    ):
        with pytest.raises(SpectuneError, match=f"'{head}' was replaced after it was adapted.*resize"):
            ask()


def test_detaching_is_the_way_out():
    model = resized(tiny.llama, targets=["lm_head", "q_proj"])
    spectune.detach(model)
    spectune.adapt(model, "lora:rank=2", targets=["lm_head", "q_proj"])
    assert "lm_head" in spectune.extract(model).layers


def test_what_was_not_adapted_may_be_replaced():
    model = resized(tiny.llama)
    assert len(spectune.extract(model).layers) == 14


def test_a_copy_or_a_part_that_went_is_no_loss():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    spectune.adapt(model, "lora:rank=2")
    copied = copy.deepcopy(model)
    del model
    gc.collect()
    assert len(spectune.extract(copied).layers) == 2
    assert copied(torch.zeros(1, 4)).shape == (1, 4)


def two(build=lambda: nn.Linear(4, 4), **options):
    return spectune.adapt(nn.ModuleDict({"a": nn.Linear(4, 4), "b": build()}), "lora:rank=2", **options)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("loss", ["replaced", "swapped", "dropped"])
def test_a_layer_that_is_still_held_elsewhere_is_missed_all_the_same(loss, copied):
    model = copy.deepcopy(two()) if copied else two()
    held = model["a"]
    if loss == "replaced":
        model["a"] = nn.Linear(4, 4)
    elif loss == "swapped":
        model["a"], model["b"] = model["b"], model["a"]
    else:
        del model["a"]
    for ask in (spectune.extract, spectune.merge, lambda model: spectune.activate(model, None)):
        with pytest.raises(SpectuneError, match="'a' was replaced after it was adapted"):
            ask(model)
    assert held is not spectune.detach(model)._modules.get("a")


def test_a_module_that_is_brought_whole_is_missed_as_well():
    model = two(lambda: nn.LayerNorm(4), modules_to_save=["b"])
    assert set(spectune.extract(model).modules) == {"b"}
    model["b"] = nn.LayerNorm(4)
    with pytest.raises(SpectuneError, match="'b' was replaced after it was adapted"):
        spectune.extract(model)


def test_an_embedding_that_grew_in_place_is_missed_where_it_is_brought_whole():
    def grown(modules):
        model = tiny.mixtral()  # of which transformers lengthens the embedding itself
        spectune.adapt(model, "lora:rank=2", targets=["q_proj"], modules_to_save=modules)
        model.resize_token_embeddings(120)
        return model

    with pytest.raises(SpectuneError, match=r"'model.embed_tokens' was replaced after it was adapted"):
        spectune.extract(grown(["embed_tokens"]))
    assert spectune.extract(grown({"embed_tokens": [3, 5]})).modules["model.embed_tokens"][0].rows == (3, 5)


def test_parts_of_a_model_and_a_model_around_it_give_what_they_have():
    model = two()
    around = nn.ModuleDict({"inner": model, "other": nn.Linear(4, 4)})
    assert set(spectune.extract(around).layers) == {"inner.a", "inner.b"}
    assert set(spectune.extract(nn.ModuleDict({"c": model["b"]})).layers) == {"c"}


@pytest.mark.parametrize("name", ["lm_head", "model.layers.0.mlp.up_proj"])
def test_a_model_with_a_replaced_layer_is_not_saved_nor_adapted_again(name, tmp_path):
    model = tiny.llama()
    spectune.adapt(model, "svf", targets=["lm_head", "up_proj"])
    around, _, last = name.rpartition(".")
    held = model.get_submodule(around) if around else model
    plain = getattr(held, last)
    setattr(held, last, nn.Linear(plain.in_features, plain.out_features, bias=False))
    for act in (lambda: model.save_pretrained(tmp_path / "saved"), lambda: spectune.adapt(model, "svf", name="b")):
        with pytest.raises(SpectuneError, match=f"'{name}' was replaced"):
            act()
    assert not (tmp_path / "saved").exists()
    spectune.detach(model)
    spectune.adapt(model, "svf", name="b")
