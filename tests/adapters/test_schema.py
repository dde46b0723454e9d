"""An adapter's config: whatever stands in it is read, or refused in one sentence."""

import copy
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import spectune
from adapters.adapter_cases import made, resave, small
from spectune import Adapter, SpectuneError
from spectune.adapters.folder import CONFIG, WEIGHTS


def test_unknown_and_missing_keys_name_the_nearest(tmp_path):
    made("pissa:rank=2").save(tmp_path)
    right = json.loads((tmp_path / CONFIG).read_text())

    def refused(message: str, change: Any) -> None:
        config = copy.deepcopy(right)
        change(config)
        (tmp_path / CONFIG).write_text(json.dumps(config))
        with pytest.raises(SpectuneError, match=message):
            Adapter.load(tmp_path)

    refused("lacks the key 'layers'", lambda c: c.update(layer=c.pop("layers")))
    refused("lacks the key 'methods'", lambda c: c.pop("methods"))
    refused(
        "'0' in 'layers' in .* the unknown key 'shap'; did you mean 'shape'", lambda c: c["layers"]["0"].update(shap=1)
    )
    refused("'0' in 'layers' in .* lacks the key 'conv1d'", lambda c: c["layers"]["0"].pop("conv1d"))
    refused("item 0 in 'terms' in .* the unknown key 'wait'", lambda c: c["layers"]["0"]["terms"][0].update(wait=1))
    refused("item 0 in 'terms' in .* lacks the key 'weight'", lambda c: c["layers"]["0"]["terms"][0].pop("weight"))
    refused("pissa has no field 'rnk'; did you mean 'rank'", lambda c: c["methods"][0].update(rnk=2))
    refused("pissa lacks the field 'rank'", lambda c: c["methods"][0].pop("rank"))
    refused("unknown method 'pisa'; did you mean 'pissa'", lambda c: c["methods"][0].update(name="pisa"))
    refused("has no 'name'", lambda c: c["methods"][0].pop("name"))
    refused("rank of PiSSA must be an integer >= 1, not 0", lambda c: c["methods"][0].update(rank=0))
    refused("format version 3; this release reads up to 2", lambda c: c.update(format_version=3))
    refused("is a PEFT adapter of type 'PISSA'", lambda c: c.update(library_name="other"))
    refused(
        "'library_name' in .* is 'other': should be 'spectune'",
        lambda c: c.update(library_name="other") or c.pop("peft_type"),
    )
    refused("'layers' in .* is {}: dictionary should have at least 1 item", lambda c: c["layers"].clear())
    refused(
        r"'terms' in '0' in 'layers' in .* is \[\]: list should have at least 1 item",
        lambda c: c["layers"]["0"]["terms"].clear(),
    )
    refused("has method 7, and there are 1", lambda c: c["layers"]["0"]["terms"][0].update(method=7))
    refused(
        "'weight' in item 0 in .* nan: should be a finite number",
        lambda c: c["layers"]["0"]["terms"][0].update(weight=float("nan")),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not valid JSON"),
        ("{", "is not valid JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "lacks the key"),
        ('{"rank": ' + "9" * 5000 + "}", "is not valid JSON"),
        ("[" * 100000, "is not valid JSON"),
        ("\udcff", "is not text in UTF-8"),
    ],
)
def test_a_config_that_is_no_json_object(tmp_path, text, message):
    made("svf").save(tmp_path)
    (tmp_path / CONFIG).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SpectuneError, match=message):
        Adapter.load(tmp_path)
    (tmp_path / CONFIG).unlink()
    with pytest.raises(SpectuneError, match=f"is not an adapter: it has no {CONFIG}"):
        Adapter.load(tmp_path)
    with pytest.raises(SpectuneError, match="there is no adapter folder"):
        Adapter.load(tmp_path / "nowhere")


JSON = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([10**30, 10**400, -(2**63), 1.5, -0.0, 1e308, float("inf"), float("nan"), "", "svf", "0", [], {}]),
    st.lists(st.one_of(st.integers(), st.text(max_size=3), st.none()), max_size=3),
    st.dictionaries(st.sampled_from(["name", "rank", "0", "x"]), st.integers(-2, 3), max_size=2),
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in a JSON document."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [*([at] if at else []), *(p for key, part in inside for p in places(part, (*at, key)))]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders in both formats, with a dense mixture of methods in one."""
    root = tmp_path_factory.mktemp("saved")
    model = small()
    total = made("dora:inner=svft,pattern=banded,width=1", model)
    for method in ("svf", "adalora:rank=2", "lora_xs:rank=2"):
        total = total + 0.5 * made(method, model)
    total.save(root / "ours")
    made("lora:rank=2", model, overrides={"0": "lora:rank=3,alpha=2"}).save(root / "peft")
    return root


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_value_anywhere_in_a_config_is_read_or_refused(saved, data):
    folder = saved / data.draw(st.sampled_from(["ours", "peft"]))
    whole = (folder / CONFIG).read_text()
    config = json.loads(whole)
    for _ in range(data.draw(st.integers(1, 2))):
        *path, last = data.draw(st.sampled_from(places(config)))
        place = config
        for key in path:
            place = place[key]
        place[last] = data.draw(JSON)
    weights = (folder / WEIGHTS).read_bytes()
    try:
        resave(folder, lambda tensors: None)  # without digests, so that every check is reached
        (folder / CONFIG).write_text(json.dumps(config))
        try:
            loaded = Adapter.load(folder)
            spectune.attach(small(), loaded)
        except SpectuneError as error:
            said = str(error)
        else:
            said = "nothing"
        assert "\n" not in said
        assert re.match(r"[a-zA-Z'\"/]", said)
    finally:
        (folder / CONFIG).write_text(whole)
        (folder / WEIGHTS).write_bytes(weights)
