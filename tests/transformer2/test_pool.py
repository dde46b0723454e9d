"""Adapters from disk to memory to the model: what answers is what attaching the adapter, or the sum, would answer."""

import pytest
import torch

import spectune
import tiny as models
from spectune import SpectuneError
from spectune.layers.adapted import adapted_layers
from spectune.model.names import adapter_names
from spectune.transformer2.pool import Pool
from transformer2 import cases

SETS = {
    "svf": ("svf",) * 3,
    "lora": ("lora:rank=2",) * 3,
    "lora_xs": ("lora_xs:rank=4",) * 3,
    "svft": ("svft:pattern=banded,width=1",) * 3,
    "mixed": ("svf", "lora:rank=2", "dora:rank=2"),
}


@pytest.mark.parametrize("methods", SETS.values(), ids=SETS)
def test_a_mixture_by_route_is_the_sum_of_adapters_attached(tmp_path, methods):
    pool = cases.pool(tmp_path, methods)
    rows = [{"ahoy": 1.0}, {}, {"ahoy": 0.7, "plus": 0.3, "say": -0.2}, {"plus": 0.4, "say": 0.4}]
    tokens = cases.ids(4)
    with torch.no_grad(), pool.route(rows):
        together = pool.model(tokens).logits
    for i, row in enumerate(rows):
        parts = [weight * pool.library.adapter(name) for name, weight in row.items()]
        total = None if not parts else sum(parts[1:], parts[0])
        torch.testing.assert_close(together[i : i + 1], cases.logits_of(total, tokens[i : i + 1]), rtol=1e-3, atol=1e-3)
    assert (together - cases.logits_of(None, tokens)).abs().amax((1, 2))[[0, 2, 3]].min() > 1e-2


def test_weights_by_layer_are_the_sum_layer_by_layer(tmp_path):
    pool = cases.pool(tmp_path, ("svf", "lora:rank=2", "lora_xs:rank=4"))
    layers = list(pool.library.adapter("ahoy").layers)
    weights = {n: {layer: 0.1 * ((i + k) % 7) for i, layer in enumerate(layers)} for k, n in enumerate(cases.NAMES)}
    parts = [pool.library.adapter(name).by_layer(w) for name, w in weights.items()]
    expected = cases.logits_of(parts[0] + parts[1] + parts[2], cases.ids(2))
    with torch.no_grad():
        pool.activate(weights)
        torch.testing.assert_close(pool.model(cases.ids(2)).logits, expected, rtol=1e-3, atol=1e-3)
        with pool.route([weights, {"ahoy": 0.5}]):
            torch.testing.assert_close(pool.model(cases.ids(2)).logits[:1], expected[:1], rtol=1e-3, atol=1e-3)


def test_slots_take_turns(tmp_path):
    """More adapters than slots, of two structures: each answers as if it were alone, whatever was there before."""
    names = [f"a{i}" for i in range(6)]
    methods = ["svf", "svf", "lora:rank=2", "svf", "lora:rank=2", "svf"]
    pool = Pool(cases.tiny(), cases.library(tmp_path, methods, names), slots=2)
    tokens = cases.ids(1)
    expected = {name: cases.logits_of(pool.library.adapter(name), tokens) for name in names}
    with torch.no_grad():
        for name in [*names, *reversed(names), *names[::2]]:
            pool.activate({name: 1.0})
            torch.testing.assert_close(pool.model(tokens).logits, expected[name], rtol=1e-4, atol=1e-4)
            assert len(adapter_names(pool.model)) <= 2
        with pool.route([{name: 1.0} for name in names]):  # one batch with more adapters than slots
            together = pool.model(tokens.expand(6, -1)).logits
        torch.testing.assert_close(together, torch.cat([expected[name] for name in names]), rtol=1e-4, atol=1e-4)
        pool.activate({"a2": 1.0})
        assert len(adapter_names(pool.model)) <= 2  # what the wide batch needed is gone
        torch.testing.assert_close(pool.model(tokens).logits, expected["a2"], rtol=1e-4, atol=1e-4)
        pool.activate(None)
        torch.testing.assert_close(pool.model(tokens).logits, cases.logits_of(None, tokens))
    pool.close()
    assert not adapted_layers(pool.model)


@pytest.mark.parametrize("method", ["svf", "lora:rank=2", "dora:rank=2"])
def test_batches_go_on_from_what_is_kept_of_others(tmp_path, method):
    """Slots are overwritten between batches, and those that were not are not copied again."""
    names = [f"a{i}" for i in range(5)]
    pool = Pool(cases.tiny(), cases.library(tmp_path, [method] * 5, names), slots=2)
    tokens = cases.ids(1)
    expected = {name: cases.logits_of(pool.library.adapter(name), tokens) for name in names}
    for batch in (["a0", "a1"], ["a1", "a2"], ["a0", "a2"], ["a3"], names, ["a4", "a0"], ["a4", "a0"]):
        with torch.no_grad(), pool.route([{name: 1.0} for name in batch]):
            together = pool.model(tokens.expand(len(batch), -1)).logits
        torch.testing.assert_close(together, torch.cat([expected[n] for n in batch]), rtol=1e-4, atol=1e-4)


def test_a_slot_is_overwritten_without_touching_the_disk_or_the_layers(tmp_path, monkeypatch):
    pool = cases.pool(tmp_path, slots=1)
    for name in cases.NAMES:
        pool.activate({name: 1.0})
    before = {id(module) for module in pool.model.modules()}
    monkeypatch.setattr(type(pool.library), "adapter", lambda *_: pytest.fail("read from disk"))
    for name in cases.NAMES:
        pool.activate({name: 1.0})
    assert {id(module) for module in pool.model.modules()} == before


def test_memory_holds_the_values_alone_and_forgets_the_least_recently_used(tmp_path):
    pool = cases.pool(tmp_path)
    one = pool.load("ahoy")
    assert one.bytes == 4 * pool.library.record("ahoy").parameters
    assert pool.load("plus").structure is one.structure
    pool.max_bytes = 2 * one.bytes
    pool.load("ahoy")
    pool.load("say")
    assert [record.name for record in pool._packed] == ["ahoy", "say"]
    assert pool.bytes == 2 * one.bytes
    tiny_memory = Pool(cases.tiny(), pool.library, max_bytes=1, slots=1)
    for name in (*cases.NAMES, "ahoy"):  # a limit below one adapter keeps one
        tiny_memory.activate({name: 1.0})
        expected = cases.logits_of(pool.library.adapter(name), cases.ids(1))
        torch.testing.assert_close(tiny_memory.model(cases.ids(1)).logits, expected, rtol=1e-4, atol=1e-4)


def test_two_pools_on_one_model_keep_out_of_each_others_way(tmp_path):
    model = cases.tiny()
    pools = [
        Pool(model, cases.library(tmp_path / str(i), ("svf", method, "svf")))
        for i, method in enumerate(("svf", "lora"))
    ]
    for name in cases.NAMES:
        for pool in pools:
            pool.activate({name: 1.0})
            expected = cases.logits_of(pool.library.adapter(name), cases.ids(1))
            with torch.no_grad():
                torch.testing.assert_close(model(cases.ids(1)).logits, expected, rtol=1e-4, atol=1e-4)
    for pool in pools:
        pool.close()
    assert not adapted_layers(model)


def test_nothing_of_the_library_trains(tmp_path):
    pool = cases.pool(tmp_path)
    pool.place(cases.NAMES)
    assert not any(parameter.requires_grad for parameter in pool.model.parameters())


def test_the_models_own_adapters_stay(tmp_path):
    model = cases.tiny()
    spectune.attach(model, cases.adapter("lora:rank=2", seed=7), "own")
    pool = Pool(model, cases.library(tmp_path), slots=1)
    pool.activate({"ahoy": 1.0})
    pool.activate({"plus": 1.0})
    pool.close()
    assert adapter_names(model) == ["own"]
    spectune.activate(model, "own")
    expected = cases.logits_of(cases.adapter("lora:rank=2", seed=7), cases.ids(1))
    torch.testing.assert_close(model(cases.ids(1)).logits, expected)


def test_what_trains_goes_on_training(tmp_path):
    model = cases.tiny()
    spectune.adapt(model, "svf", name="own", factored=True)
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    pool = Pool(model, cases.library(tmp_path, ("svf", "lora:rank=2", "svf")), slots=1)
    for name in cases.NAMES:
        pool.activate({name: 1.0})
    assert {name for name, p in model.named_parameters() if p.requires_grad} == training
    assert all(layer.selection.factored for layer in adapted_layers(model).values())


def test_an_adapter_that_was_replaced_answers_as_the_new_one(tmp_path):
    pool = cases.pool(tmp_path)
    pool.activate({"ahoy": 1.0})
    pool.library.remove("ahoy")
    new = cases.adapter(seed=9)
    pool.library.add("ahoy", new)
    pool.activate({"ahoy": 1.0})
    with torch.no_grad():
        torch.testing.assert_close(
            pool.model(cases.ids(1)).logits, cases.logits_of(new, cases.ids(1)), rtol=1e-4, atol=1e-4
        )
    pool.library.remove("ahoy")
    with pytest.raises(SpectuneError, match="has no adapter 'ahoy'"):
        pool.activate({"ahoy": 1.0})


def test_a_weight_that_is_no_number_is_told_by_the_adapters_name(tmp_path):
    with pytest.raises(SpectuneError, match="weight of adapter 'plus' must be a finite number"):
        cases.pool(tmp_path).activate({"ahoy": 1.0, "plus": float("nan")})


@pytest.mark.parametrize("method", ["svf", "lora:rank=2"])
def test_another_base_is_refused_by_its_weights(tmp_path, method):
    other = cases.tiny()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(SpectuneError, match=r"the library .* belongs to another base: .*up_proj.* differs"):
        Pool(other, cases.library(tmp_path, (method,) * 3))


def test_a_base_without_the_layers_is_refused(tmp_path):
    with pytest.raises(SpectuneError, match="belongs to another base: the model has no linear layer"):
        Pool(models.gpt2(), cases.library(tmp_path))


def test_an_adapter_that_another_base_took_the_place_of_is_refused(tmp_path):
    pool = cases.pool(tmp_path)
    pool.activate({"ahoy": 1.0})
    other = cases.tiny()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    cases.adapter(model=other).save(pool.library.folder("plus"))
    with pytest.raises(SpectuneError, match=r"the files of 'plus' in the library .* are not those that were added"):
        pool.activate({"plus": 1.0})


def test_an_adapter_that_would_not_come_out_as_trained_is_refused(tmp_path):
    pool = cases.pool(tmp_path, ("lora_xs:rank=4",) * 3)
    pool.activate({"ahoy": 1.0})
    for layer in adapted_layers(pool.model).values():
        for basis in layer.bases.values():
            basis.U.copy_(basis.U.roll(1, 0))
    with pytest.raises(SpectuneError, match="does not reproduce its update"):
        pool.activate({"plus": 1.0})
