"""PEFT's own tests, with the configs of spectune.peft in the place of PEFT's.

A pytest plugin, for the tests of PEFT's source distribution (`run.py` fetches them).  Every parameter that is a config
of PEFT's becomes one of ours; tests that have none are left out; what is not ours to do is on a list, with the reason.
With IN_PLACE_OF_LORA=1 in the environment it is for files whose tests make a LoraConfig themselves, and then make SVF.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import peft
import pytest
import torch

import spectune.peft as ours

if "diffusers" not in sys.modules:  # imported at the top of the tests, for those of image models
    absent = ModuleType("diffusers")
    absent.__spec__ = ModuleSpec("diffusers", None)
    absent.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
    sys.modules["diffusers"] = absent

SVF, SVFT, XS, PISSA, MILORA = ours.SVFConfig, ours.SVFTConfig, ours.LoRAXSConfig, ours.PiSSAConfig, ours.MiLoRAConfig
VERA, ADALORA = ours.VeRAConfig, ours.AdaLoRAConfig

AS_LORA = os.environ.get("IN_PLACE_OF_LORA") == "1"


class InPlaceOfLora:
    """Makes an SVFConfig by the options of a LoRA, of which those that SVF does not have are left out."""

    def __new__(cls, *args, **options):
        if options.pop("init_lora_weights", True) is False:
            options["init_weights"] = False
        for key in ("r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "rank_pattern", "alpha_pattern"):
            options.pop(key, None)
        if options.get("bias") == "lora_only":
            options["bias"] = "svf_only"
        return SVF(*args, **options)


if AS_LORA:
    peft.LoraConfig = InPlaceOfLora

ONE = {"target_modules": ["lin0"]}
BOTH = {"target_modules": ["lin0", "lin1"]}
CUSTOM = [  # name, model, config, options: PEFT's models with linear layers
    ("MLP 1 SVF", "MLP", SVF, {"target_modules": "lin0"}),
    ("MLP 2 SVF", "MLP", SVF, ONE),
    ("MLP 3 SVF", "MLP", SVF, BOTH),
    ("MLP 4 SVF whole module", "MLP", SVF, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP 5 SVF sigmoid", "MLP", SVF, {**BOTH, "parametrization": "sigmoid"}),
    ("MLP 6 SVF with DoRA", "MLP", SVF, {**BOTH, "use_dora": True}),
    ("MLP 7 SVF factored", "MLP", SVF, {**BOTH, "factored": True}),
    ("MLP 1 SVFT", "MLP", SVFT, ONE),
    ("MLP 2 SVFT banded", "MLP", SVFT, {**BOTH, "pattern": "banded", "width": 1}),
    ("MLP 3 SVFT top k", "MLP", SVFT, {**ONE, "pattern": "top_k", "width": 1}),
    ("MLP 1 LoRA-XS", "MLP", XS, {**ONE, "r": 4}),
    ("MLP 2 LoRA-XS", "MLP", XS, {**BOTH, "r": 2, "rank_pattern": {"lin1": 1}}),
    ("MLP 1 PiSSA", "MLP", PISSA, {**ONE, "r": 4}),
    ("MLP 1 MiLoRA", "MLP", MILORA, {**BOTH, "r": 2, "lora_dropout": 0.0}),
    ("MLP 2 MiLoRA with DoRA", "MLP", MILORA, {**ONE, "r": 2, "use_dora": True, "lora_dropout": 0.0}),
    ("MLP 1 VeRA", "MLP", VERA, {**ONE, "r": 4}),
    ("Conv1d 1 SVF", "Conv1d", SVF, {"target_modules": ["conv1d"]}),
    ("Conv2d 1 SVF", "Conv2d", SVF, {"target_modules": ["conv2d"]}),
    ("Conv2d 2 PiSSA", "Conv2d", PISSA, {"target_modules": ["conv2d", "lin0"], "r": 2}),
    ("Conv2d 3 SVF with DoRA", "Conv2d", SVF, {"target_modules": ["conv2d"], "use_dora": True}),
    ("Conv2d Groups SVF", "Conv2dGroups", SVF, {"target_modules": ["conv2d"]}),
    ("Conv3d 1 LoRA-XS", "Conv3d", XS, {"target_modules": ["conv3d"], "r": 2}),
    ("Embedding 1 SVF", "EmbConv1D", SVF, {"target_modules": ["emb"]}),
    ("Embedding + transformers Conv1D 1 SVF", "EmbConv1D", SVF, {"target_modules": ["emb", "conv1d"]}),
    ("MLP 1 AdaLoRA", "MLP", ADALORA, {**BOTH, "r": 2, "total_steps": 8, "t_init": 1, "t_final": 2}),
]
SHORT = [(SVF, {}), (SVFT, {"pattern": "banded", "width": 2}), (XS, {"r": 4}), (MILORA, {"r": 4, "lora_dropout": 0.0})]
PAIRS = [
    (f"{kind.__name__} {how}", kind.__name__.lower(), kind, {**ONE, **more}, {**other, **more})
    for kind, more in [(k, {**m, "init_weights": False}) for k, m in SHORT]
    for how, other in (("same", ONE), ("different", {"target_modules": ["lin1"]}))
]
MIXED = [
    (f"{kind.__name__} mixed", kind(**ONE, **more, init_weights=False), kind(**ONE, **more, init_weights=False))
    for kind, more in SHORT
]

# classes of test_initialization.py that try what holds for any method, and LoRA for all
SHARED = (
    "TestCustomModelConfigWarning",
    "TestLowCpuMemUsage",
    "TestNamingConflictWarning",
    "TestNoInfiniteRecursionDeepspeed",
)

# what does not come out as PEFT's tests have it: a pattern for the test's name, and the reason
REASONS = {
    r"test_disable_adapters(_with_merging)?\[.*(sigmoid|LoRA-XS)": "the method starts near W, as its authors have it",
    r"test_mixed_adapter_batches_(unsupported_layer|length_mismatch)_raises": "refused, in a sentence of ours",
    r"test_mixed_adapter_batches_mha_raises": "the rows are answered, each by its adapter",
    r"test_parameters_after_loading_model\[(MLP 1 MiLoRA|Conv2d 2 PiSSA)": "not finite by then, which is refused",
    r"test_auto.py.*(extended_vocab|embedding_size)": "asks a hub for a model",
    r"test_lora_conversion\[SVFT": "a band has full rank, and the best LoRA of a rank is not near it",
    r"TestHotSwapping": "PEFT hotswaps LoRA alone",
    r"test_mixed.py.*test_decoder_model": "what SVF starts with at random changes logits, and none of the tokens",
    r"test_(get_peft_model_(with_task_type_)?low_cpu_mem_usage|from_pretrained_missing_keys)": "asks by LoRA's names",
    r"test_low_level_api.py.*(adapter_in_model|get_peft_model_state_dict|TestLowLevelFunctional::test_modules_to_save|"
    r"(missing|extra)_keys_warning|inject_from_state_dict_model_with|prefix_removal|unsharded)": "asks by LoRA's names",
    r"test_inject_from_state_dict_transformers_target_parameters": "linear layers are named in target_modules",
    r"test_inject_from_state_dict_stable_diffusion": "asks a hub for a model",
    r"test_inject_from_state_dict_low_cpu_mem_usage$": "what tells a base again is not on the meta device",
    r"test_(inject_from_state_dict_low_cpu_mem_usage_with_weight|set_peft_model_state_dict_preserves)": (
        "its tensors are drawn at random, what tells the base among them, which is refused"
    ),
    r"test_config.py.*(test_from_pretrained(_cache_dir)?\[|with_runtime_config)": "asks a hub for a LoRA",
}
if peft.__version__.startswith("0.20."):
    gone = "this PEFT asks encoder-decoders for what those of transformers 5.23 no longer have"
    REASONS |= {r"test_auto.py.*(?i:seq2seq)": gone, "test_encoder_decoder_models.py": gone}


def _cases(names, argvalues, where):
    """Return what takes the place of a parametrization by configs, or None where it is by something else."""
    if names[-4:] == ["test_name", "model_id", "config_cls", "config_kwargs"]:
        return CUSTOM
    if names == ["test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"]:
        return PAIRS
    if names == ["test_name", "config0", "config1"] and "MIXED" in where:
        return MIXED
    if names == ["config_class", "mandatory_kwargs"]:
        return [(kind, {}) for kind, _ in SHORT]
    if names == ["config_cls", "config_kwargs"]:
        if not any(isinstance(v, tuple) and isinstance(v[1], dict) for v in argvalues):
            return None
        task = next((v[1].get("task_type") for v in argvalues if isinstance(v, tuple)), None)
        # an encoder's pooler is a target too, and has no part in the hidden states that its tests ask for
        options = {"exclude_modules": ["pooler.dense"]} if task == "FEATURE_EXTRACTION" else {}
        return [(kind, {"task_type": task, "target_modules": None, **options, **more}) for kind, more in SHORT]
    if names == ["config_cls"] and len(argvalues) > 10:
        return [kind for kind, _ in SHORT]
    return None


def _named(argnames):
    return [n.strip() for n in argnames.split(",")] if isinstance(argnames, str) else list(argnames)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    """Exchange the configs before pytest reads them."""
    swapped = False
    marks = metafunc.definition.own_markers
    for i, mark in enumerate(marks):
        if mark.name != "parametrize":
            continue
        names, values = _named(mark.args[0]), list(mark.args[1])
        where = "MIXED" if names == ["test_name", "config0", "config1"] else ""
        cases = _cases(names, values, where)
        if cases is not None:
            marks[i] = pytest.mark.parametrize(mark.args[0], cases).mark
            swapped = True
    metafunc.definition._ours = swapped


def makes_lora(item):
    """Whether a test makes a LoraConfig itself, or by its fixtures or class, and is of none of LoRA's own matters."""
    if "test_initialization.py" in item.nodeid and item.cls is not None and item.cls.__name__ not in SHARED:
        return False
    known = [item.function, item.cls, *(d.func for found in item._fixtureinfo.name2fixturedefs.values() for d in found)]
    return any("LoraConfig" in inspect.getsource(part) for part in known if part is not None and _is_theirs(part))


def _is_theirs(part):
    return getattr(part, "__module__", "").startswith("tests.")


def pytest_collection_modifyitems(config, items):
    """Leave out what has no config to exchange."""
    kept, left = [], []
    for item in items:
        callspec = getattr(item, "callspec", None)
        values = list(callspec.params.values()) if callspec else []
        mine = any(
            isinstance(v, ours.SpectuneConfig) or (isinstance(v, type) and issubclass(v, ours.SpectuneConfig))
            for v in values
        )
        mine = mine or "test_auto.py" in item.nodeid  # whose folders are ours
        mine = mine or (AS_LORA and makes_lora(item))
        (kept if mine and "prompt_learning_with" not in item.name else left).append(item)
    for item in kept:
        for pattern, reason in REASONS.items():
            if re.search(pattern, item.nodeid):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=False), append=False)  # before one of PEFT's
    items[:] = kept
    config.hook.pytest_deselected(items=left)


@pytest.fixture(autouse=True)
def _all_of_it(monkeypatch):
    """Run what PEFT skips for methods that are not on its lists, where ours can do it."""
    for name in [n for n in sys.modules if n.endswith("testing_common")]:
        for skip in ("_skip_if_adding_weighted_adapters_not_supported", "_skip_if_conv1d_not_supported"):
            with contextlib.suppress(AttributeError):
                monkeypatch.setattr(sys.modules[name], skip, lambda *a, **k: None)
    for name in [n for n in sys.modules if n.endswith("test_custom_models")]:
        made = sys.modules[name].DeepMLP.__init__

        def seeded(self, *args, made=made, **kwargs):
            torch.manual_seed(0)  # an adapter of ours is refused by another base, which the tests make at random
            made(self, *args, **kwargs)

        monkeypatch.setattr(sys.modules[name].DeepMLP, "__init__", seeded)
