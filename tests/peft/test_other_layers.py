"""Convolutions and embeddings as targets of a `peft_config`: as `spectune.adapt` has them, and folders both ways."""

import pytest
import torch
import torch.nn as nn
from peft import PeftModel, get_peft_model

import spectune
import spectune.peft as sp
import tiny
from layers.other_layers import IDS, net
from peft_cases import logits, trained
from spectune import SpectuneError
from spectune.layers.adapted import adapted_layers

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # PEFT's

ALL = ["table", "one", "two", "three", "groups", "out"]
CONFIGS = [
    sp.SVFConfig(target_modules=ALL),
    sp.SVFTConfig(target_modules=ALL, pattern="banded", width=2),
    sp.LoRAXSConfig(target_modules=ALL, r=3),
    sp.PiSSAConfig(target_modules=ALL, r=2),
    sp.MiLoRAConfig(target_modules=ALL, r=2, lora_dropout=0.0, use_dora=True),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)
def test_as_adapt_has_them(config, tmp_path):
    model = trained(net(in_groups=True), config)
    model.save_pretrained(tmp_path / "peft")
    ours = spectune.attach(net(in_groups=True), spectune.Adapter.load(tmp_path / "peft"))
    spectune.trainable(ours, ["default"])
    y = model(IDS)
    torch.testing.assert_close(ours(IDS), y)
    assert (y - net(in_groups=True)(IDS)).abs().max() > 1e-3
    (y.square().sum()).backward()
    ours(IDS).square().sum().backward()
    for name, layer in model.base_model._by_name().items():
        ((update,),) = adapted_layers(ours)[name].adapters.values()
        for key, p in layer.own["default"].trained().items():
            torch.testing.assert_close(update.trained()[key].grad, p.grad, msg=lambda t, k=f"{name} {key}": f"{k}: {t}")
    torch.testing.assert_close(PeftModel.from_pretrained(net(in_groups=True), tmp_path / "peft")(IDS), y)
    spectune.extract(ours).save(tmp_path / "ours")
    again = PeftModel.from_pretrained(net(in_groups=True), tmp_path / "ours").eval()
    torch.testing.assert_close(again(IDS), y)
    again.merge_adapter(safe_merge=True)
    torch.testing.assert_close(again(IDS), y)
    again.unmerge_adapter()
    torch.testing.assert_close(again(IDS), y)
    merged = again.merge_and_unload()
    assert [type(m) for m in merged.modules()] == [type(m) for m in net(in_groups=True).modules()]
    torch.testing.assert_close(merged(IDS), y)


def test_each_row_has_its_adapter():
    model = trained(trained(net(in_groups=True), CONFIGS[0], "a"), CONFIGS[0], "b", seed=2)
    ids = torch.randint(1, 11, (4, 4), generator=torch.Generator().manual_seed(0))
    alone = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        alone[name] = model(ids)
    with model.disable_adapter():
        alone["__base__"] = model(ids)
    names = ["b", "__base__", "a", "b"]
    with torch.no_grad():
        rows = model(ids, adapter_names=names)
    torch.testing.assert_close(rows, torch.stack([alone[name][i] for i, name in enumerate(names)]))


def test_a_second_adapter_of_all_linear_layers_leaves_them():
    model = trained(net(in_groups=True), sp.SVFConfig(target_modules=["one", "out", "table"]), "a")
    model.add_adapter("b", sp.SVFConfig(target_modules="all-linear"))
    assert [name for name, layer in model.base_model._by_name().items() if layer.method_of("b")] == ["out"]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.MultiheadAttention(4, 2), "is a MultiheadAttention, and the methods of spectune.peft adapt linear layers"),
        (nn.ConvTranspose2d(3, 4, 2), "is a ConvTranspose2d, and the methods of spectune.peft adapt linear layers"),
        (nn.Embedding(5, 4, max_norm=1.0), "is a Embedding with max_norm"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_adapted_is_named(layer, message):
    with pytest.raises(SpectuneError, match=message):
        get_peft_model(nn.Sequential(layer, nn.Linear(4, 4)), sp.SVFConfig(target_modules=["0"]))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_merging_leaves_what_is_tied_to_it(target, tmp_path):
    def new():
        return tiny.llama(initializer_range=0.2, tie_word_embeddings=True).eval()

    model = trained(new(), sp.SVFConfig(target_modules=[target, "q_proj"]))
    y, tied = logits(model), model.get_base_model()
    before = tied.get_input_embeddings().weight if target == "lm_head" else tied.lm_head.weight
    model.merge_adapter()
    assert torch.allclose(logits(model), y, atol=1e-3)
    model.unmerge_adapter()
    assert torch.equal(logits(model), y)
    own = model.base_model._by_name()
    layer = next(layer for name, layer in own.items() if name.endswith(target))
    assert layer.adapted._parameters["weight"] is before
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), y, atol=1e-3)
    merged.save_pretrained(tmp_path)
    assert torch.allclose(logits(type(merged).from_pretrained(tmp_path)), y, atol=1e-3)
