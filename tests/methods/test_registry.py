"""Methods as declarations: defaults, wrong values, text and JSON forms."""

import dataclasses
import re

import pytest
from cases import EVERY, name
from hypothesis import given
from hypothesis import strategies as st

import spectune
from spectune import SVF, SVFT, AdaLoRA, DoRA, LoRA, LoRAXS, MiLoRA, PiSSA, SpectuneError
from spectune.methods import METHODS, find, from_fields, parse, to_text


def test_every_method_is_usable_without_arguments_and_described():
    assert set(METHODS) == {"lora", "svf", "svft", "pissa", "milora", "lora_xs", "dora", "adalora", "vera"}
    for key, cls in METHODS.items():
        method = cls()
        assert (method.name, getattr(spectune, cls.__name__)) == (key, cls)
        assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", method.paper)
        assert method.summary
        assert 0 < method.learning_rate < 1
        assert from_fields(method.fields()) == method == parse(key)
        with pytest.raises(dataclasses.FrozenInstanceError):
            method.name = "other"  # type: ignore[misc]


def test_papers_defaults():
    assert (LoRA().rank, LoRA().alpha, LoRA().scale) == (8, 16, 2)
    assert LoRA(rank=16, alpha=8, rslora=True).scale == 2
    assert (PiSSA().rank, PiSSA().scale, PiSSA().dropout) == (128, 1, 0)
    assert (MiLoRA().rank, MiLoRA().scale, MiLoRA().dropout) == (64, 1, 0.05)
    assert (LoRAXS().rank, LoRAXS().scale) == (64, 1)
    assert (AdaLoRA().first_rank, AdaLoRA(rank=5).first_rank, AdaLoRA(rank=4, initial_rank=9).first_rank) == (12, 8, 9)
    assert (SVF().parametrization, SVFT().pattern, SVFT().gate) == ("plain", "plain", False)
    assert DoRA().inner == LoRA(rank=16, alpha=32)


INTEGERS = (0, -1, 1.5, "8", None, True, float("nan"))
NUMBERS = ("1", True, float("nan"), float("inf"), [1])
FLAGS = (1, 0, "yes", None)
WRONG = [
    *[(cls, "rank", v) for cls in (LoRA, PiSSA, MiLoRA, LoRAXS, AdaLoRA, spectune.VeRA) for v in INTEGERS],
    *[(cls, "alpha", v) for cls in (LoRA, PiSSA, MiLoRA, LoRAXS, AdaLoRA) for v in (0, -2, *NUMBERS)],
    *[(cls, "dropout", v) for cls in (LoRA, PiSSA, MiLoRA, AdaLoRA, spectune.VeRA) for v in (1, -0.1, None, *NUMBERS)],
    *[(LoRA, "rslora", v) for v in FLAGS],
    *[(SVFT, "gate", v) for v in FLAGS],
    *[(SVFT, "pattern", v) for v in ("bands", None, 3)],
    *[(SVFT, "width", v) for v in (-1, 1.5, None, True)],
    *[(cls, "seed", v) for cls in (SVFT, spectune.VeRA) for v in (-1, 1.5, 2**32)],
    *[(SVF, "parametrization", v) for v in ("log", None)],
    *[(SVF, "max_mult", v) for v in (0, -1, *NUMBERS)],
    *[(AdaLoRA, "initial_rank", v) for v in (7, 0, 9.5, "12")],
    *[(AdaLoRA, f, v) for f in ("t_init", "t_final", "gamma") for v in (-1, None, *NUMBERS)],
    *[(AdaLoRA, "penalty", v) for v in ("sum", None, 1)],
    *[(AdaLoRA, f, v) for f in ("beta1", "beta2") for v in (1, -0.1, None, *NUMBERS)],
    *[(AdaLoRA, f, v) for f in ("interval", "total_steps") for v in (0, -1, 2.5, "10")],
    *[(spectune.VeRA, "d_initial", v) for v in (0, -1, None, *NUMBERS)],
    *[(DoRA, "inner", v) for v in (None, "lora", DoRA(), LoRA)],
]


@pytest.mark.parametrize(("cls", "field", "value"), WRONG)
def test_a_wrong_value_is_told_with_its_field(cls, field, value):
    with pytest.raises(SpectuneError, match=rf"^{field} of {cls.__name__} must be .*, not "):
        cls(**{field: value})


def test_adaloras_of_older_files_keep_the_penalty_they_were_trained_with():
    fields = AdaLoRA(rank=3).fields()
    del fields["penalty"]
    assert from_fields(fields) == AdaLoRA(rank=3, penalty="sum_of_squares")
    assert from_fields(fields, complete=False) == AdaLoRA(rank=3)


def test_adaloras_phases_must_fit_into_the_run():
    for values in ({"t_init": 60, "t_final": 40}, {"t_init": 0.5, "t_final": 0.5}, {"t_init": 100}):
        with pytest.raises(SpectuneError, match=r"t_init \+ t_final of AdaLoRA must be below total_steps \(100\)"):
            AdaLoRA(total_steps=100, **values)


@pytest.mark.parametrize("method", EVERY, ids=name)
def test_text_and_fields_read_back(method):
    assert parse(to_text(method)) == method
    assert from_fields(method.fields()) == method
    assert parse(method) is method


@given(st.builds(LoRA, rank=st.integers(1, 999), alpha=st.floats(1e-3, 1e6), rslora=st.booleans()))
def test_any_lora_reads_back(method):
    assert parse(to_text(method)) == method
    assert parse(to_text(DoRA(method))) == DoRA(method)


def test_text_forms():
    assert parse("pissa:rank=16") == PiSSA(rank=16)
    assert parse(" svft : pattern = banded , width = 8 ".replace(" :", ":")) == SVFT(pattern="banded", width=8)
    assert parse("dora:inner=pissa,rank=16") == DoRA(PiSSA(rank=16))
    assert parse("dora:inner=lora,rank=4") == DoRA(LoRA(rank=4))
    assert parse("dora:rank=4") == DoRA(LoRA(rank=4, alpha=32))
    assert parse("lora:rslora=True,alpha=1e-1,dropout=.5") == LoRA(rslora=True, alpha=0.1, dropout=0.5)
    assert parse("pissa:alpha=none") == PiSSA()
    assert (to_text(SVF()), to_text(DoRA()), to_text(DoRA(LoRA()))) == ("svf", "dora", "dora:inner=lora")
    assert to_text(DoRA(PiSSA(rank=16))) == "dora:inner=pissa,rank=16"
    assert {find(text) for text in ("lora_xs", "LoRA-XS", "loraxs", "LORAXS")} == {LoRAXS}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lorra", r"unknown method 'lorra'; did you mean 'lora'.*known: .*svft"),
        ("", "unknown method ''"),
        ("lora:rank", r"'rank' in method 'lora:rank' is not field=value"),
        ("lora:rang=3", r"lora has no field 'rang'; did you mean 'rank' .*\(known: alpha, dropout, rank, rslora\)"),
        ("lora:rank=x", "rank of LoRA must be an integer >= 1, not 'x'"),
        ("dora:inner=nothing", "unknown method 'nothing'"),
        ("dora:inner=dora", "inner of DoRA must be an additive method"),
        ("dora:inner=svf,rank=3", "dora has no field 'rank'"),
        ("lora:rank=2,rank=4", "'rank' is given twice in method 'lora:rank=2,rank=4'"),
    ],
)
def test_text_that_is_no_method_is_told(text, told):
    with pytest.raises(SpectuneError, match=told):
        parse(text)


def test_fields_of_a_file_must_be_whole():
    fields = LoRA().fields()
    with pytest.raises(SpectuneError, match="the description of a method has no 'name'"):
        from_fields({k: v for k, v in fields.items() if k != "name"})
    with pytest.raises(SpectuneError, match="the description of lora lacks the field 'alpha'"):
        from_fields({k: v for k, v in fields.items() if k != "alpha"})
    with pytest.raises(SpectuneError, match="lora has no field 'rnk'; did you mean 'rank'"):
        from_fields(fields | {"rnk": 3})


def test_the_frozen_tensors_key_is_shared_where_the_tensors_are():
    assert SVF().basis_key == SVF(parametrization="sigmoid").basis_key
    assert SVFT().basis_key == SVFT(pattern="banded", gate=True).basis_key != SVFT(pattern="top_k").basis_key
    assert SVFT(pattern="random").basis_key != SVFT(pattern="random", seed=1).basis_key
    assert PiSSA(rank=4).basis_key == PiSSA(rank=4, alpha=4, dropout=0.5).basis_key
    keys = {m.basis_key for m in (PiSSA(rank=4), PiSSA(rank=4, alpha=6), PiSSA(rank=5), MiLoRA(rank=4), LoRAXS(rank=4))}
    assert len(keys) == 5
    assert all("." not in m.basis_key for m in EVERY)
