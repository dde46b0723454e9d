"""Which layers a method goes to: suffixes, regexes, exclusions and overrides."""

import json
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn as nn

import spectune
import tiny
from cli.typed import run
from spectune import SVF, DoRA, LoRA
from spectune.errors import SpectuneError
from spectune.layers.adapted import adapted_layers
from spectune.model.targets import resolve
from spectune.training.config import load_config

BLOCK = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
BLOCK += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
EVERY = [f"model.layers.{i}.{name}" for i in (0, 1) for name in BLOCK]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llama()


def names(*args, **kwargs):
    return list(resolve(*args, **kwargs))


def test_all_linear_is_all_but_the_output_embedding_in_order(model):
    assert names(model, SVF()) == EVERY
    assert names(model, SVF(), ["lm_head", "q_proj"]) == [EVERY[0], EVERY[7], "lm_head"]
    assert "cls.predictions.decoder" not in names(tiny.bert(), SVF())
    assert "cls.predictions.transform.dense" in names(tiny.bert(), SVF())


def test_suffixes_end_at_a_dot(model):
    assert names(model, SVF(), ["q_proj", "v_proj"]) == [n for n in EVERY if n.endswith(("q_proj", "v_proj"))]
    assert names(model, SVF(), "down_proj") == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert names(model, SVF(), ["layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]
    with pytest.raises(ValueError, match="'proj' matches no linear layer"):
        names(model, SVF(), ["proj"])


def test_one_string_may_be_a_regex_for_the_whole_name(model):
    assert names(model, SVF(), r".*\.0\..*[qk]_proj") == EVERY[:2]
    assert names(model, SVF(), exclude=r".*\.mlp\..*") == [n for n in EVERY if "mlp" not in n]
    with pytest.raises(ValueError, match="matches no linear layer"):
        names(model, SVF(), r"layers\.0")


def test_overrides_go_from_whole_name_to_regex_to_suffix(model):
    chosen = resolve(
        model,
        SVF(),
        ["q_proj", "v_proj"],
        overrides={
            "v_proj": "lora:rank=2",
            r".*\.1\..*v_proj": DoRA(),
            "model.layers.1.self_attn.q_proj": None,
            r".*\.1\..*q_proj": LoRA(rank=3),
            "down_proj": LoRA(rank=4),
        },
    )
    assert chosen == {
        "model.layers.0.self_attn.q_proj": SVF(),
        "model.layers.0.self_attn.v_proj": LoRA(rank=2),
        "model.layers.0.mlp.down_proj": LoRA(rank=4),
        "model.layers.1.self_attn.v_proj": DoRA(),
        "model.layers.1.mlp.down_proj": LoRA(rank=4),
    }


def test_what_is_excluded_stays_out_of_overrides(model):
    chosen = resolve(model, SVF(), exclude=r".*\.0\..*", overrides={"q_proj": LoRA()})
    assert [n for n in chosen if ".0." in n] == []
    assert chosen["model.layers.1.self_attn.q_proj"] == LoRA()


def test_torchs_own_attention_and_encoders_are_linear_layers_too():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.MultiheadAttention(8, 2), nn.Linear(8, 2))
    inside = ["0.self_attn.in_proj", "0.self_attn.out_proj", "0.linear1", "0.linear2", "1.in_proj", "1.out_proj", "2"]
    assert names(model, SVF()) == inside
    assert names(model, SVF(), ["self_attn"]) == inside[:2]


class Grouped(nn.Linear):
    """A block-diagonal product: two groups of features."""

    def forward(self, x):
        w = self.weight.view(2, -1, x.shape[-1])
        return torch.einsum("...gi,goi->...go", x, w)


class Squared(nn.Linear):
    """A function of W x, whose merged form would be another one."""

    def forward(self, x):
        return super().forward(x).square()


class Renamed(nn.Linear):
    """W x + b in a forward method of its own."""

    def forward(self, x):
        return super().forward(x)


def test_layers_whose_class_computes_something_else_are_left_out():
    model = nn.Sequential(Grouped(3, 4), Squared(3, 4), Renamed(3, 4))
    with pytest.warns(UserWarning, match="left out of 'all-linear': .*, because Grouped answers otherwise"):
        assert names(model, SVF()) == ["2"]
    with pytest.raises(ValueError, match=r"no effect on '1', because Squared answers otherwise than with x W\^T \+ b"):
        names(model, SVF(), ["1"])


def test_a_model_may_be_one_layer():
    layer = nn.Linear(3, 4)
    assert names(layer, SVF()) == [""]
    assert spectune.adapt(layer, "svf") is layer
    assert type(spectune.merge(layer)) is nn.Linear


def test_a_name_of_a_module_stands_for_the_layers_in_it(model):
    assert names(model, SVF(), ["mlp"]) == [n for n in EVERY if "mlp" in n]
    assert names(model, SVF(), "layers.1.self_attn") == [f"model.layers.1.{n}" for n in BLOCK[:4]]
    assert names(model, SVF(), exclude=["mlp"]) == [n for n in EVERY if "mlp" not in n]


def test_targets_may_map_patterns_to_methods(model):
    chosen = resolve(model, None, {"mlp": LoRA(rank=4), "q_proj|v_proj": SVF(), "model.layers.0.mlp.up_proj": None})
    assert {n.rpartition(".")[2] for n, m in chosen.items() if m == SVF()} == {"q_proj", "v_proj"}
    assert [n for n, m in chosen.items() if m == LoRA(rank=4)] == [
        n for n in EVERY if "mlp" in n and "0.mlp.up" not in n
    ]
    assert len(chosen) == 9
    spectune.adapt(adapted := tiny.llama(), targets={"q_proj|v_proj": "svf", "mlp": LoRA(8)})
    assert len(spectune.extract(adapted).layers) == 10
    with pytest.raises(ValueError, match="leave the method out"):
        resolve(model, SVF(), {"mlp": LoRA()})
    with pytest.raises(ValueError, match="no method is given"):
        spectune.adapt(tiny.llama())
    with pytest.raises(ValueError, match="targets: 'mpl' matches no linear layer"):
        resolve(model, None, {"mpl": LoRA()})


def test_blocks_are_chosen_as_peft_does(model):
    first = [n for n in EVERY if ".0." in n]
    assert names(model, SVF(), layers_to_transform=0) == first
    assert names(model, SVF(), layers_to_transform=[0], layers_pattern="layers") == first
    assert names(model, SVF(), ["q_proj"], layers_to_transform=[1], layers_pattern=["h", "layers"]) == [EVERY[7]]
    assert names(model, SVF(), ["q_proj"], layers_to_transform=[1], layers_pattern="h|layers") == [EVERY[7]]
    with pytest.raises(ValueError, match=r"layers_to_transform: no target is in block 2 \(they are in 0 to 1\)"):
        names(model, SVF(), layers_to_transform=[0, 2])
    with pytest.raises(ValueError, match=r"layers_pattern: 'layer' holds none .* did you mean 'layers'"):
        names(model, SVF(), layers_to_transform=[0], layers_pattern="layer")
    with pytest.raises(ValueError, match="give both, or neither"):
        names(model, SVF(), layers_pattern="layers")


def test_rank_and_alpha_by_pattern(model):
    chosen: Any = resolve(
        model,
        DoRA(LoRA(rank=8, alpha=16)),
        ["q_proj", "v_proj"],
        rank_pattern={r"layers\.0\..*q_proj": 2, "q_proj": 4},
        alpha_pattern={"^model.layers.1.self_attn.v_proj": 3},
    )
    assert [(m.inner.rank, m.inner.alpha) for m in chosen.values()] == [(2, 16), (8, 16), (4, 16), (8, 3)]
    with pytest.raises(ValueError, match=r"rank_pattern: 'k_proj' matches no target; did you mean 'q_proj'"):
        resolve(model, LoRA(), ["q_proj"], rank_pattern={"k_proj": 3})
    with pytest.raises(ValueError, match="has svf, which has no rank"):
        resolve(model, SVF(), rank_pattern={"k_proj": 3})
    with pytest.raises(ValueError, match="rank of LoRA must be an integer >= 1, not 0"):
        resolve(model, LoRA(), rank_pattern={"k_proj": 0})


def test_other_modules_of_the_same_name_are_named():
    model = nn.ModuleDict(
        {"a": nn.ModuleDict({"proj": nn.Linear(3, 4)}), "b": nn.ModuleDict({"proj": nn.ConvTranspose2d(3, 4, 1)})}
    )
    with pytest.warns(UserWarning, match=r"'proj' names 'b.proj' \(ConvTranspose2d\) too, which is left out"):
        assert names(model, SVF(), ["proj"]) == ["a.proj"]
    with pytest.raises(ValueError, match=r"'b.proj' matches no linear layer: 'b.proj' is a ConvTranspose2d"):
        names(model, SVF(), ["b.proj"])


def test_what_all_linear_cannot_take_is_told_with_the_share_that_it_can(caplog):
    with caplog.at_level("INFO", "spectune"):
        spectune.adapt(tiny.llama(), "lora:rank=1")
        assert not caplog.records
        spectune.adapt(nn.Sequential(nn.Linear(8, 8), nn.Conv2d(8, 8, 1), nn.Embedding(90, 9)), "lora:rank=1")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message == "'all-linear' covers 50% of the weights outside embeddings; it cannot take *.weight"


@pytest.mark.parametrize("setting", ["targets", "exclude", "rank_pattern", "layers_pattern"])
def test_a_pattern_that_would_never_end_is_given_up(setting, monkeypatch):
    monkeypatch.setattr("spectune.model.patterns._SECONDS", 0.2)
    bomb = "((a|a)+)+[.]never"
    model = nn.Sequential(OrderedDict({"a" * 60: nn.Sequential(nn.Linear(2, 2))}))
    options = {setting: {bomb: 1} if setting == "rank_pattern" else bomb}
    options |= {"layers_to_transform": 0} if setting == "layers_pattern" else {}
    with pytest.raises(SpectuneError, match="takes too long to match: write it more simply"):
        spectune.adapt(model, "lora:rank=1", **options)


def test_a_weight_that_is_computed_is_covered(caplog):
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    spectune.adapt(model, "lora:rank=2")
    assert not [r for r in caplog.records if "covers" in r.message]


def test_the_tensor_of_experts_stands_for_them_as_in_peft(tmp_path):
    model = tiny.mixtral()
    ups = [n for n in names(model, SVF()) if n.endswith("gate_up_proj")]
    downs = [n for n in names(model, SVF()) if ".experts." in n and n.endswith("down_proj")]
    assert len(ups) == len(downs) == 8
    assert names(model, SVF(), ["experts.gate_up_proj"]) == ups
    assert set(names(model, SVF(), ["experts.gate_up_proj", "experts.down_proj"])) == {*ups, *downs}
    assert names(model, SVF(), "model.layers.1.mlp.experts.down_proj") == downs[4:]
    assert names(model, SVF(), r".*experts\.down_proj") == downs
    assert not {*ups} & {*names(model, SVF(), exclude=["experts.gate_up_proj"])}
    mixed = resolve(model, None, {"experts.gate_up_proj": SVF(), "mlp.experts.down_proj": LoRA(1)})
    assert [type(mixed[name]) for name in (ups[0], downs[0])] == [SVF, LoRA]
    overrides: Any = {"experts.1.down_proj": None, "experts.down_proj": LoRA(1)}
    assert [n for n in downs if n not in names(model, SVF(), overrides=overrides)] == [downs[1], downs[5]]
    ranks = resolve(model, LoRA(2), ["experts.down_proj"], rank_pattern={"experts.down_proj": 1})
    assert {getattr(method, "rank", None) for method in ranks.values()} == {1}
    with pytest.raises(SpectuneError, match=r"'experts\.down_prj' matches no linear layer; did you mean 'down_proj'"):
        names(model, SVF(), ["experts.down_prj"])

    (tmp_path / "run.yaml").write_text("model: m\ndata: d\noutput: o\nmethod: svf\ntargets: [experts.gate_up_proj]\n")
    for config in (
        load_config(tmp_path / "run.yaml", []),
        load_config(None, ["model=m", "data=d", "output=o", "method=svf", "targets=[experts.gate_up_proj]"]),
    ):
        assert list(adapted_layers(spectune.adapt(tiny.mixtral(), **config.where()))) == ups
    model.config.save_pretrained(tmp_path / "model")
    asked = ["plan", str(tmp_path / "model"), "-m", "svf", "--targets", "experts.gate_up_proj", "--json"]
    (row,) = json.loads(run(*asked).stdout)["rows"]
    assert row["trainable_parameters"] == 8 * 32
