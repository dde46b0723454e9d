"""Convolutions and embeddings in PEFT's format, both ways."""

import peft
import pytest
import torch

import spectune
from layers.other_layers import IDS, net
from layers.test_kinds import ALL, grouped, move
from spectune import Adapter, DoRA, LoRA, SpectuneError
from spectune.adapters.folder import CONFIG
from spectune.reading import read_json


@pytest.mark.parametrize("dora", [False, True])
def test_peft_reads_what_is_written_here_and_the_other_way_round(dora, tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=ALL, use_dora=dora, rank_pattern={"one": 2})
    theirs = peft.get_peft_model(net(), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    theirs.save_pretrained(tmp_path / "theirs")
    read = spectune.attach(net(), Adapter.from_peft(tmp_path / "theirs"))
    torch.testing.assert_close(read(IDS), theirs(IDS))

    ours = spectune.adapt(net(), DoRA(LoRA(3)) if dora else LoRA(3), targets=ALL)
    move(ours)
    spectune.extract(ours).save(tmp_path / "ours")
    assert read_json(tmp_path / "ours" / CONFIG)["peft_type"] == "LORA"
    written = peft.PeftModel.from_pretrained(net(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(written(IDS), ours(IDS))
    loaded = Adapter.load(tmp_path / "ours")
    assert loaded.layer("two").kernel == (3, 2)
    torch.testing.assert_close(spectune.attach(net(), loaded)(IDS), ours(IDS))


def test_an_embeddings_lora_starts_as_peft_has_it_start():
    model = spectune.adapt(net(), LoRA(3), targets=["table", "out"])
    held = dict(model.named_parameters())
    assert not held["table.adapters.default.0.A"].any()
    assert held["table.adapters.default.0.B"].std() > 0.5
    assert not held["out.adapters.default.0.B"].any()
    model(IDS).sum().backward()
    asked = held["table.adapters.default.0.A"].grad.abs().sum(0) > 0  # no other row of the table is written to
    assert asked.nonzero().flatten().tolist() == sorted(set(IDS.flatten().tolist()) - {0})


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_what_peft_makes_of_groups_is_no_update_of_their_weight(tmp_path):
    theirs = peft.get_peft_model(grouped(), peft.LoraConfig(r=6, target_modules=["groups", "depthwise"]))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(SpectuneError, match=r"is a LoRA on a convolution in groups, each of which PEFT answers"):
        Adapter.from_peft(tmp_path)
