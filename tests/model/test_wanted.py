"""Which modules an adapter brings whole: by names, suffixes and patterns, and with what is tied to them."""

from typing import Any

import pytest
import torch
import torch.nn as nn

from spectune.adapters.terms import WholeTerm
from spectune.errors import SpectuneError
from spectune.model.fresh import FRESH
from spectune.model.wanted import fresh_heads, groups_of, is_head, resolve_whole, with_tied_rows


class Model(nn.Module):
    """Two blocks, an embedding that an output layer is tied to, and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "act": nn.Tanh()}) for _ in range(2)
        )
        self.out = nn.Linear(4, 9, bias=False)
        self.out.weight = self.embed.weight
        self.head = nn.Linear(4, 3)


@pytest.fixture
def model() -> Any:
    return Model()


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ((), {}),
        ("head", {"head": None}),
        (["norm"], {"blocks.0.norm": None, "blocks.1.norm": None}),
        (["blocks.1.norm", "head"], {"blocks.1.norm": None, "head": None}),
        ("blocks.0", {"blocks.0.up": None, "blocks.0.norm": None}),
        (r"blocks\.\d\.up", {"blocks.0.up": None, "blocks.1.up": None}),
        ("embed", {"embed": None, "out": None}),
        (["out"], {"out": None, "embed": None}),
        ({"embed": [5, 2, 5]}, {"embed": [2, 5], "out": [2, 5]}),
        ({"embed": None, "head": [1]}, {"embed": None, "out": None, "head": [1]}),
    ],
)
def test_what_is_asked_for(model, asked, wanted):
    assert resolve_whole(model, asked) == wanted


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("hed", "modules_to_save: 'hed' matches no module with parameters; did you mean 'head'"),
        (["act"], "modules_to_save: 'act' matches no module with parameters"),
        ([r"blocks\.\d\.up"], "matches no module with parameters"),  # a pattern is one text, and no list
        ({"norm": [0]}, "modules_to_save: rows are given of 'blocks.0.norm', which is a LayerNorm"),
        ({"embed": []}, "modules_to_save: the rows of 'embed' must be whole numbers from 0 to 8, not []"),
        ({"embed": [9]}, "modules_to_save: the rows of 'embed' must be whole numbers from 0 to 8, not [9]"),
        ({"embed": [-1]}, "must be whole numbers from 0 to 8"),
        ({"embed": [True]}, "must be whole numbers from 0 to 8"),
        ({"embed": [1.0]}, "must be whole numbers from 0 to 8"),
    ],
)
def test_what_cannot_be_asked_for(model, asked, message):
    with pytest.raises(SpectuneError) as refused:
        resolve_whole(model, asked)
    assert message in str(refused.value)


def test_what_the_checkpoint_lacked_comes_along(model):
    setattr(model.head, FRESH, True)
    setattr(model.blocks[1]["norm"], FRESH, True)
    assert resolve_whole(model) == {"blocks.1.norm": None, "head": None}
    assert resolve_whole(model, ["up"]).keys() == {"blocks.1.norm", "head", "blocks.0.up", "blocks.1.up"}
    assert fresh_heads(model) == ["head"]


def test_which_are_heads(model):
    assert is_head(model, "head", None)
    assert not is_head(model, "head", [1])
    assert not is_head(model, "embed", None)
    parts = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    assert not is_head(parts, "attention.out_proj", None)  # whose owner reads its weight


def test_rows_are_those_of_what_is_tied_too(model):
    term = WholeTerm({"weight": torch.zeros(2, 4)}, rows=(2, 5))
    whole = WholeTerm({"weight": torch.zeros(3, 4)})
    found = with_tied_rows(model, {"embed": [term], "head": [whole]})
    assert found == {"embed": [term], "head": [whole], "out": [term]}
    assert with_tied_rows(model, {"embed": [whole]}) == {"embed": [whole]}


def test_groups_are_the_outermost_that_are_whole(model):
    assert groups_of(model, ["blocks.0.up", "blocks.0.norm", "head"]) == ["blocks.0", "head"]
    every = ["blocks.0.up", "blocks.0.norm", "blocks.1.up", "blocks.1.norm"]
    assert groups_of(model, every) == ["blocks"]
    assert groups_of(model, ["blocks.0.up"]) == ["blocks.0.up"]
    assert groups_of(model, []) == []
