"""Which methods PEFT's words have a type for, and what their fields are called there."""

from dataclasses import dataclass, field, make_dataclass

import pytest

from spectune import SVF, DoRA, LoRA, LoRAXS, MiLoRA, PiSSA
from spectune.adapters.formats.dialect import fields_of, option_of, options_of, prefix_of, type_for, type_of
from spectune.methods import METHODS, Method, from_fields, parse


def test_types_are_ours_or_begin_with_our_name():
    assert {name: type_for(method) for name, method in METHODS.items()} == {
        "lora": None, "dora": None, "svf": "SVF", "svft": "SVFT", "milora": "MILORA", "pissa": "PISSA",
        "lora_xs": "LORAXS", "adalora": "SPECTUNEADALORA", "vera": "SPECTUNEVERA",
    }  # fmt: skip


def test_a_dora_has_the_type_of_what_it_is_around():
    assert type_of(DoRA(PiSSA(rank=2))) == type_of(PiSSA(rank=2)) == "PISSA"
    assert type_of(DoRA(LoRA(rank=2))) is None


def test_a_class_that_is_not_the_one_of_its_name_has_none():
    @dataclass(frozen=True)
    class Another(SVF):
        pass

    assert Another.name == "svf"
    assert type_for(Another) is None


@pytest.mark.parametrize(
    ("added", "type_"),
    [
        (("size", int, 3), "SPECTUNENEWONE2"),
        (("sizes", list, field(default_factory=list)), "SPECTUNENEWONE2"),
        (("size", int), None),
        (("bias", bool, False), None),
        (("around", Method, SVF()), None),
    ],
)
def test_methods_of_somebody_elses(added, type_, monkeypatch):
    """None where a config could not be made of its fields: one without a default, a method, a name that is taken."""
    kind = make_dataclass("Newer", [added], bases=(SVF,), frozen=True, kw_only=True, namespace={"name": "new_one-2"})
    monkeypatch.setitem(METHODS, "new_one-2", kind)
    assert type_for(kind) == type_


def test_prefixes_are_the_types_in_small_letters():
    assert prefix_of("SVF") == "svf_"
    assert prefix_of("SPECTUNEADALORA") == "spectuneadalora_"


def test_what_peft_calls_fields():
    assert [option_of(field) for field in ("rank", "alpha", "dropout", "width")] == [
        "r", "lora_alpha", "lora_dropout", "width"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "method",
    [
        SVF(), PiSSA(rank=3, alpha=5), MiLoRA(rank=2, dropout=0.5), LoRAXS(rank=4), DoRA(PiSSA(rank=3)),
        parse("svft:pattern=random,width=2,seed=3,gate=true"), parse("adalora:rank=2,total_steps=20"),
        parse("vera:rank=3"),
    ],
)  # fmt: skip
def test_options_there_and_back(method: Method):
    options = options_of(method)
    assert options["use_dora"] == isinstance(method, DoRA)
    assert not {"name", "rank", "alpha", "dropout", "inner"} & options.keys()
    inner = method.inner if isinstance(method, DoRA) else method
    before = dict(options)
    assert from_fields(fields_of(inner.name, options)) == method
    assert options == before


def test_a_rank_is_r():
    options = options_of(PiSSA(rank=3, alpha=7))
    assert (options["r"], options["lora_alpha"]) == (3, 7)
