"""What the plug-in decides without vLLM: releases that it knows, folders that are ours, what goes as a LoRA."""

from dataclasses import dataclass

import pytest
import torch

from spectune.errors import SpectuneError
from spectune.vllm import plugin, register
from training.folder import make_model, save_folder
from transformer2.cases import adapter

LAYER = "model.layers.0.self_attn.q_proj"


class Named:
    def __init__(self, **values):
        self.__dict__.update(values)


@pytest.mark.parametrize("release", ["0.31.9", "0.320.1", "1.0.0", None])
def test_a_release_that_is_not_known_is_left_alone_with_a_warning(monkeypatch, caplog, release):
    monkeypatch.setattr(plugin, "_version", lambda name: release)
    register()
    assert "tested with vLLM 0.32 and not with" in caplog.text
    caplog.clear()
    monkeypatch.setenv("SPECTUNE_VLLM", "off")
    register()
    assert not caplog.text


@pytest.mark.parametrize("release", ["0.32.0", "0.32.1+cpu"])
def test_a_release_that_is_known(monkeypatch, release):
    monkeypatch.setattr(plugin, "_version", lambda name: release)
    plugin._check_release()


def test_only_our_folders_are_taken(tmp_path):
    adapter("svf").save(tmp_path / "ours")
    adapter("lora:rank=2").save(tmp_path / "pefts")
    found = [plugin._is_ours(tmp_path / name) for name in ("ours", "pefts", "none")]
    assert found == [True, False, False]


@pytest.mark.parametrize("method", ["pissa:rank=2", "milora:rank=2", "adalora", "lora:rank=3,alpha=12"])
def test_what_has_a_finite_rank_goes_as_the_lora_that_it_is(tmp_path, method):
    from spectune.vllm.checkpoint import Checkpoint

    base = save_folder(tmp_path / "base")
    made = adapter(method, model=make_model()) + 0.5 * adapter("lora:rank=1", model=make_model(), seed=3)
    update = made.layers[LAYER]
    terms = Checkpoint(base).checked(LAYER, update)
    cores, others = plugin._split(terms)
    assert not cores
    left, right = plugin._factors(LAYER, update, others)
    torch.testing.assert_close(left @ right, made.bind(make_model()).delta(LAYER), atol=1e-5, rtol=1e-4)


def test_what_is_no_sum_is_refused():
    update = adapter("dora:rank=2").layers[LAYER]
    with pytest.raises(SpectuneError, match="is no sum that vLLM could add: merge"):
        plugin._factors(LAYER, update, update.terms)


def engine(full=False, piecewise=False, split=(), sharded=False):
    graphs = Named(has_full_cudagraphs=lambda: full, has_piecewise_cudagraphs=lambda: piecewise)
    config = Named(compilation_config=Named(cudagraph_mode=graphs, splitting_ops=split))
    return Named(spectune_config=config, lora_config=Named(fully_sharded_loras=sharded))


def test_engines_that_would_go_past_the_cores_are_refused():
    plugin._check_engine(engine())
    plugin._check_engine(engine(piecewise=True, split=["vllm::unified_attention", plugin.OPERATOR]))
    with pytest.raises(SpectuneError, match=r"full CUDA graphs .* --enforce-eager.*PIECEWISE"):
        plugin._check_engine(engine(full=True))
    for split in (None, [], ["vllm::unified_attention"]):
        with pytest.raises(SpectuneError, match="not split at vllm::spectune_add_cores"):
            plugin._check_engine(engine(piecewise=True, split=split))
    with pytest.raises(SpectuneError, match="fully-sharded"):
        plugin._check_engine(engine(sharded=True))


@pytest.mark.parametrize("split", [["vllm::unified_attention"], [], None])
def test_graphs_that_are_split_are_split_at_the_cores_too(split):
    config, manager = Named(compilation_config=Named(splitting_ops=split)), Named()
    for _ in range(2):  # another model of the process
        plugin._remember_config(lambda *given: None, manager, config)
    assert config.compilation_config.splitting_ops == (["vllm::unified_attention", plugin.OPERATOR] if split else split)


def test_vllms_lora_hears_of_its_own_tokens_alone():
    @dataclass
    class Mapping:
        index_mapping: tuple[int, ...]
        prompt_mapping: tuple[int, ...]

    adapters = {7: Named(shares={"some": 1}, loras={}), 8: Named(shares={"some": 1}, loras={"some": 1})}
    adapters[9] = Named(loras={"some": 1})  # one of vLLM's
    told, wrapper = [], Named(device="cpu")
    mapping = Mapping((7, 7, 0, 8, 9), (7, 0, 8, 9))
    plugin._begin(lambda *given: told.append(given), Named(_registered_adapters=adapters), wrapper, mapping, [9, 8, 7])
    assert told == [(Mapping((0, 0, 0, 8, 9), (0, 0, 8, 9)), [9, 8, 7])]
    batch = wrapper.spectune_batch
    assert (len(batch), batch.present) == (5, {1, 2})
    assert batch.rows(frozenset({1, 2})).tokens.tolist() == [0, 1, 3]
    assert batch.rows(frozenset({1, 2})).slots.tolist() == [2, 2, 1]
    assert batch.first(2).rows(frozenset({2})).tokens is None


def test_how_bases_are_kept_is_asked_for_by_name(monkeypatch):
    assert not plugin._in_eight_bits()
    monkeypatch.setenv("SPECTUNE_VLLM_BASES", "INT8")
    assert plugin._in_eight_bits()
    monkeypatch.setenv("SPECTUNE_VLLM_BASES", "fp4")
    with pytest.raises(SpectuneError, match="SPECTUNE_VLLM_BASES is 'fp4', and not 'model' or 'int8'"):
        plugin._in_eight_bits()
