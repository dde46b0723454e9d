"""PEFT reads what we write and we read what PEFT writes: the same keys, the same config, the same logits."""

import json
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
import torch.nn as nn
import transformers as tf
from safetensors.torch import load_file, save_file

import spectune
import tiny
from adapters.adapter_cases import assert_same_update, deltas, made, moved
from spectune import Adapter, SpectuneError

IDS = torch.arange(5, 15).repeat(2, 1)
MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert}
Q = {"llama": "q_proj", "gpt2": "c_attn", "bert": "query"}
IGNORED = {"peft_version", "target_modules", "base_model_name_or_path", "auto_mapping"}  # say who saved what, where


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS)[0]


@contextmanager
def pefts_own_warnings() -> Iterator[None]:
    """Silence what PEFT says of Conv1D, of its PiSSA, of rank 0, and what transformers says of PEFT."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message="PiSSA changes the base weights")
        warnings.filterwarnings("ignore", message=".*LoRA tensor.* have invalid shape", category=UserWarning)
        yield


def in_peft(model: Any, folder: Any) -> Any:
    with pefts_own_warnings():
        return peft.PeftModel.from_pretrained(model, folder).eval()


def peft_model(model: Any, config: Any, **options: Any) -> Any:
    with pefts_own_warnings():
        return peft.get_peft_model(model, config, **options)


def shaken(model: Any, scale: float = 0.1) -> Any:
    """Move PEFT's parameters away from where they start."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(scale * torch.randn_like(parameter))
    return model.eval()


def assert_peft_answers_like(folder: Any, build: Any, adapter: Adapter) -> Any:
    ours = spectune.attach(build(), adapter)
    theirs = in_peft(build(), folder)
    assert not torch.allclose(logits(ours), logits(build()), atol=1e-3)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-5, atol=1e-5)
    return theirs


def assert_we_answer_like(folder: Any, build: Any, theirs: Any) -> Adapter:
    adapter = Adapter.from_peft(folder)
    ours = spectune.attach(build(), adapter)
    assert not torch.allclose(logits(ours), logits(build()), atol=1e-3)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    assert spectune.attach(build(), Adapter.load(folder))
    return adapter


# -- ours in PEFT


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("method", ["lora:rank=4", "lora:rank=4,rslora=true,alpha=6,dropout=0.1", "dora:rank=4"])
def test_our_folder_is_pefts_own(tmp_path, architecture, method):
    build = MODELS[architecture]
    adapter = made(method, build())
    adapter.save(tmp_path / "ours")
    theirs = assert_peft_answers_like(tmp_path / "ours", build, adapter)

    theirs.save_pretrained(tmp_path / "theirs")
    ours, again = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "theirs"))
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in again.items()}
    assert all(torch.equal(value, again[key]) for key, value in ours.items())
    read, written = (peft.LoraConfig.from_pretrained(tmp_path / f) for f in ("ours", "theirs"))
    read, written = ({k: v for k, v in vars(c).items() if k not in IGNORED} for c in (read, written))
    assert read == written
    documents = [json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("ours", "theirs")]
    assert documents[0].keys() <= documents[1].keys()
    assert_same_update(Adapter.load(tmp_path / "theirs").bind(build()), adapter.bind(build()))


def test_the_folder_that_peft_makes_from_the_start_has_the_same_keys(tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", use_dora=True)
    peft_model(tiny.llama(), config).save_pretrained(tmp_path / "theirs")
    made("dora:rank=4", tiny.llama()).save(tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "theirs"))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert any(key.endswith(".lora_magnitude_vector") for key in ours)


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize(
    "method", ["pissa:rank=4", "milora:rank=4,alpha=6", "lora_xs:rank=4", "adalora:rank=4", "vera:rank=5"]
)
def test_exports_are_exact(tmp_path, architecture, method):
    build = MODELS[architecture]
    adapter = made(method, build())
    exported = adapter.export(tmp_path)
    assert exported.error == 0.0
    assert_peft_answers_like(tmp_path, build, adapter)
    wide = {"pissa": 8, "milora": 8, "lora_xs": 4, "adalora": 6, "vera": 5}[method.partition(":")[0]]
    assert {layer.terms[0].method.rank for layer in exported.layers.values()} == {wide}
    assert_same_update(Adapter.from_peft(tmp_path), adapter)


def test_sums_and_mixtures_are_exported_exactly(tmp_path):
    build = tiny.llama
    parts = [made(m, build(), seed=i) for i, m in enumerate(["pissa:rank=2", "milora:rank=2", "lora_xs:rank=3"])]
    total = 0.7 * parts[0] + 0.3 * parts[1] - 0.5 * parts[2] + 0.2 * made("adalora:rank=2", build(), seed=9)
    total.export(tmp_path / "sum")
    assert_peft_answers_like(tmp_path / "sum", build, total)
    expected = sum(w * deltas(p)["model.layers.0.mlp.up_proj"] for w, p in zip((0.7, 0.3, -0.5), parts, strict=True))
    got = deltas(0.7 * parts[0] + 0.3 * parts[1] - 0.5 * parts[2])["model.layers.0.mlp.up_proj"]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)

    loras = 0.5 * made("lora:rank=2", build(), seed=3) - made("lora:rank=4,rslora=true", build(), seed=4)
    loras.save(tmp_path / "loras")  # already PEFT's format
    assert_peft_answers_like(tmp_path / "loras", build, loras)
    half = 0.5 * made("lora:rank=2", build(), seed=3)
    half.save(tmp_path / "half")
    assert json.loads((tmp_path / "half/adapter_config.json").read_text())["lora_alpha"] == 8
    assert_peft_answers_like(tmp_path / "half", build, half)


@pytest.mark.parametrize("rslora", ["true", "false"])
@pytest.mark.parametrize("around", ["lora:", "dora:inner=lora,"])
def test_ranks_and_alphas_that_differ_by_layer(tmp_path, rslora, around):
    overrides = {
        "k_proj": f"{around}rank=2,alpha=3,rslora={rslora}",
        "layers.1.mlp.up_proj": f"{around}rank=5,rslora={rslora}",
        "down_proj": None,
    }
    adapter = made(f"{around}rank=4,alpha=9,rslora={rslora}", tiny.llama(), overrides=overrides)
    adapter.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], len(config["rank_pattern"])) == (4, 9, 3)
    assert_peft_answers_like(tmp_path, tiny.llama, adapter)
    loaded = Adapter.load(tmp_path)
    assert {n: layer.terms[0].method for n, layer in loaded.layers.items()} == {
        n: layer.terms[0].method for n, layer in adapter.layers.items()
    }


def test_lora_that_pefts_config_cannot_say_is_kept_by_us_and_exported_plainly(tmp_path):
    for overrides in ({"k_proj": "lora:rank=2,rslora=true"}, {"k_proj": "dora:rank=2"}, {"k_proj": "lora:dropout=.5"}):
        adapter = made("lora:rank=4", tiny.llama(), overrides=overrides)
        adapter.save(tmp_path / "kept")
        assert json.loads((tmp_path / "kept/adapter_config.json").read_text())["library_name"] == "spectune"
        assert_same_update(Adapter.load(tmp_path / "kept").bind(tiny.llama()), adapter)
        assert adapter.export(tmp_path / "exported").error == 0.0
        assert_peft_answers_like(tmp_path / "exported", tiny.llama, adapter)


class Odd(nn.Module):
    """Modules whose names are special in a regex, and ends of one another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleDict({"q+(x)": nn.Linear(6, 6), "q*": nn.Linear(6, 6), "[a-z]|": nn.Linear(6, 6)})
        self.q = nn.ModuleList([nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh())])
        self.top = nn.Linear(6, 6)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        x = torch.nn.functional.one_hot(input_ids % 6, 6).float()
        for layer in (*self.blocks.values(), *self.q, self.top):
            x = layer(x)
        return (x,)


@pytest.mark.parametrize("targets", ["all-linear", ["q+(x)", "0"], ["top", "q.0"]])
def test_names_that_are_special_in_a_regex(tmp_path, targets):
    overrides = {"q.0": "lora:rank=2,alpha=1"} | ({"blocks.q*": "lora:rank=1"} if targets == "all-linear" else {})
    adapter = made("lora:rank=3", Odd(), targets=targets, overrides=overrides)
    adapter.save(tmp_path)
    theirs = assert_peft_answers_like(tmp_path, Odd, adapter)
    adapted = {n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert adapted == adapter.layers.keys()
    theirs.save_pretrained(tmp_path / "again")
    assert_same_update(Adapter.from_peft(tmp_path / "again"), adapter)


def test_a_layer_at_the_top_of_a_model_is_not_taken_for_the_end_of_other_names(tmp_path):
    def build() -> Any:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(20, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 6)), nn.Linear(6, 6))

    adapter = made("lora:rank=2", build(), targets=["2", "1.1"], overrides={"2": "lora:rank=3"})
    adapter.save(tmp_path)
    theirs = in_peft(build(), tmp_path)
    ours = spectune.attach(build(), adapter)
    torch.testing.assert_close(theirs.base_model(IDS), ours(IDS), rtol=1e-5, atol=1e-5)


def test_more_layers_than_peft_lists_as_they_are(tmp_path):
    def build() -> Any:
        return tiny.llama(num_hidden_layers=5)

    adapter = made("lora:rank=2", build(), targets=["q_proj", "v_proj", "up_proj", "down_proj", "o_proj"])
    assert len(adapter.layers) == 25  # PEFT shortens lists of 20 and more
    adapter.save(tmp_path / "ours")
    assert_peft_answers_like(tmp_path / "ours", build, adapter).save_pretrained(tmp_path / "theirs")
    assert_same_update(Adapter.load(tmp_path / "theirs"), adapter)


@pytest.mark.parametrize(
    "method",
    ["svf", "svft:pattern=banded,width=2", "dora:inner=svf", "dora:inner=pissa,rank=2", "dora:rank=2", "pissa:rank=4"],
)
def test_best_lora_of_a_rank(tmp_path, method):
    adapter = made(method, tiny.llama(), targets=["q_proj", "up_proj"])
    exported = adapter.export(tmp_path / "r", rank=3, allow_loss=True)
    lost = total = 0.0
    for name, delta in deltas(adapter).items():
        S = torch.linalg.svdvals(delta)
        left = (exported.delta(name).double() - delta).square().sum()
        assert math.isclose(left, S[3:].square().sum(), rel_tol=1e-4)
        assert torch.linalg.matrix_rank(exported.delta(name)) == 3
        lost, total = lost + S[3:].square().sum(), total + S.square().sum()
    assert math.isclose(exported.error, math.sqrt(lost / total), rel_tol=1e-4)
    assert_peft_answers_like(tmp_path / "r", tiny.llama, exported)


@pytest.mark.parametrize("method", ["svf", "svft", "dora:inner=svf", "dora:inner=lora_xs,rank=4"])
def test_full_rank_updates_are_exported_or_merged_exactly(tmp_path, method):
    adapter = made(method, tiny.llama(), scale=0.1)
    assert adapter.export(tmp_path).error == 0.0
    theirs = in_peft(tiny.llama(), tmp_path)
    ours = spectune.attach(tiny.llama(), adapter)
    expected = logits(ours)
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-4)
    merged = spectune.merge(ours)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=3e-5)


def test_export_refuses_an_unknown_format(tmp_path):
    with pytest.raises(SpectuneError, match="format must be 'peft', 'diffusers', 'gguf' or 'mlx', not 'ggml'"):
        made("lora:rank=2").export(tmp_path, "ggml")  # type: ignore[arg-type]


# -- PEFT's in ours


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 6},
        {"r": 4, "use_rslora": True, "lora_dropout": 0.1},
        {"r": 3, "use_dora": True},
        {"r": 4, "init_lora_weights": "orthogonal"},
        {"r": 4, "init_lora_weights": "gaussian", "target_modules": "all-linear"},
    ],
)
def test_pefts_lora_and_dora(tmp_path, architecture, options):
    config = peft.LoraConfig(**{"target_modules": [Q[architecture]], **options})
    theirs = shaken(peft_model(MODELS[architecture](), config))
    theirs.save_pretrained(tmp_path)
    adapter = assert_we_answer_like(tmp_path, MODELS[architecture], theirs)
    adapter.save(tmp_path / "ours")
    torch.testing.assert_close(logits(in_peft(MODELS[architecture](), tmp_path / "ours")), logits(theirs))


@pytest.mark.parametrize("rslora", [False, True])
def test_pefts_patterns(tmp_path, rslora):
    config = peft.LoraConfig(
        r=4,
        lora_alpha=5,
        use_rslora=rslora,
        target_modules="all-linear",
        rank_pattern={"k_proj": 2, "^model.layers.1.self_attn.q_proj": 6, r"layers\.0\..*": 3},
        alpha_pattern={"mlp.up_proj": 9, r".*\.1\.self_attn\.[qk]_proj": 7},
    )
    theirs = shaken(peft_model(tiny.llama(), config))
    theirs.save_pretrained(tmp_path)
    adapter = assert_we_answer_like(tmp_path, tiny.llama, theirs)
    for name, module in theirs.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            method = adapter.layers[name].terms[0].method
            assert (method.rank, method.alpha) == (module.r["default"], module.lora_alpha["default"])
            assert math.isclose(method.scale, module.scaling["default"])
    adapter.save(tmp_path / "ours")
    torch.testing.assert_close(logits(in_peft(tiny.llama(), tmp_path / "ours")), logits(theirs))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"k_proj": 2}}])
def test_pissa_that_peft_converted(tmp_path, options):
    config = peft.LoraConfig(
        r=4, lora_alpha=4, init_lora_weights="pissa", target_modules=["q_proj", "k_proj"], **options
    )
    theirs = peft_model(tiny.llama(), config)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    theirs.save_pretrained(tmp_path / "unconverted")
    shaken(theirs)
    expected = logits(theirs)
    with pefts_own_warnings():
        theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    adapter = Adapter.from_peft(tmp_path / "converted")
    ours = spectune.attach(tiny.llama(), adapter)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(SpectuneError, match="init_lora_weights='pissa' and without conversion"):
        Adapter.from_peft(tmp_path / "unconverted")


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("pruned", [False, True])
def test_pefts_adalora(tmp_path, architecture, pruned):
    config = peft.AdaLoraConfig(init_r=6, target_r=2, total_step=10, tinit=1, tfinal=2, deltaT=1, lora_alpha=12)
    config.target_modules = {Q[architecture]}
    theirs = shaken(peft_model(MODELS[architecture](), config))
    if pruned:
        layers = [n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_E")]
        keep = [[True, False, False, True, False, True], [False] * 6]  # nothing is left of the second
        pattern = {f"{n}.lora_E": k for n, k in zip(layers, keep, strict=True)}
        theirs.peft_config["default"].rank_pattern = pattern
        theirs.base_model.rankallocator.mask_using_rank_pattern(theirs.base_model.model, pattern)
    with pefts_own_warnings():
        theirs.save_pretrained(tmp_path)
    sizes = {v.shape[0] for k, v in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_E" in k}
    assert sizes == ({3, 0} if pruned else {6})
    adapter = assert_we_answer_like(tmp_path, MODELS[architecture], theirs)
    assert len(adapter.layers) == (1 if pruned else 2)
    adapter.save(tmp_path / "lora")
    torch.testing.assert_close(
        logits(in_peft(MODELS[architecture](), tmp_path / "lora")), logits(theirs), rtol=1e-5, atol=1e-5
    )


def test_an_adapted_output_embedding_is_read_and_its_base_weight_compared(tmp_path):
    def build() -> Any:
        return tiny.llama(tie_word_embeddings=False)

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], use_dora=True)
    theirs = shaken(peft_model(build(), config))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers` to `True`")
        theirs.save_pretrained(tmp_path)
    assert any(k.endswith("base_layer.weight") for k in load_file(tmp_path / "adapter_model.safetensors"))
    assert_we_answer_like(tmp_path, build, theirs)
    other = build()
    with torch.no_grad():
        other.lm_head.weight.mul_(1.01)
    with pytest.raises(SpectuneError, match="another base: the weight of 'lm_head'"):
        spectune.attach(other, Adapter.load(tmp_path))


def test_folders_in_16_bits(tmp_path):
    theirs = shaken(peft_model(tiny.llama(), peft.LoraConfig(r=4, target_modules=["q_proj"])))
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file)
    theirs = in_peft(tiny.llama(), tmp_path)
    assert_we_answer_like(tmp_path, tiny.llama, theirs)


def test_a_model_without_its_head_has_other_names(tmp_path):
    def bare() -> Any:
        return tiny.llama().model

    theirs = shaken(peft_model(bare(), peft.LoraConfig(r=2, target_modules=["q_proj"])))
    theirs.save_pretrained(tmp_path)
    adapter = assert_we_answer_like(tmp_path, bare, theirs)
    assert min(adapter.layers) == "layers.0.self_attn.q_proj"
    with pytest.raises(
        SpectuneError, match=r"no linear layer 'layers.0.self_attn.q_proj'; did you mean 'model.layers.0"
    ):
        spectune.attach(tiny.llama(), adapter)
    made("lora:rank=2", bare()).save(tmp_path / "ours")
    assert isinstance(in_peft(bare(), tmp_path / "ours").base_model.model, tf.LlamaModel)


REFUSED = [
    ({"peft_type": "IA3"}, "adapter of type 'IA3'; LORA and ADALORA can be read"),
    ({"peft_type": None}, "adapter of type None"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' and without conversion"),
    ({"init_lora_weights": "olora"}, "init_lora_weights='olora' and without conversion"),
    ({"bias": {"q": 1}}, "bias={'q': 1}, which no adapter here holds"),
    ({"something_new": True}, r"saved by PEFT 0[.0-9]+ with something_new=True, which no adapter here holds"),
    ({"init_lora_weights": "mica"}, "init_lora_weights='mica', which no adapter here holds"),
    ({"layer_replication": [[0, 2]]}, "layer_replication="),
    ({"target_parameters": "experts.w"}, "'target_parameters' in .* is 'experts.w': should be a valid list"),
    ({"kasa_config": {"beta": 1}}, "kasa_config="),
    ({"use_dora": True}, "lora_magnitude_vector of .* and use_dora do not go together"),
    ({"r": 5}, "has rank 4, and the config says 5"),
    ({"r": None}, "'r' in .* is None: should be a finite number"),
    ({"lora_alpha": "16"}, "'lora_alpha' in .* is '16': should be a finite number"),
    ({"lora_alpha": float("nan")}, "'lora_alpha' in .* is nan: should be a finite number"),
    ({"lora_dropout": 7}, "dropout of LoRA must be"),
    ({"use_rslora": 1}, "'use_rslora' in .* is 1: should be a valid boolean"),
    ({"rank_pattern": {"(": 4}}, r"adapter_config.json: '\(' is not a regular expression"),
    ({"rank_pattern": [4]}, r"'rank_pattern' in .* is \[4\]: should be a valid dictionary"),
    ({"base_model_name_or_path": 3}, "'base_model_name_or_path' in .* is 3: should be a valid string"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_read_is_refused(tmp_path, changes, message):
    peft_model(tiny.llama(), peft.LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(SpectuneError, match=message):
        Adapter.from_peft(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.popitem() and None, "lacks lora_"),
        (lambda t: t.update({k: v[0] for k, v in t.items()}), "are not two factors of a linear layer's update"),
        (lambda t: t.update({k: v.long() for k, v in t.items()}), "are not two factors"),
        (lambda t: t.update({"base_model.model.embed.weight": torch.zeros(2)}), "belongs to no linear layer's LoRA"),
        (lambda t: t.clear(), "has no update"),
        (lambda t: t.update({min(t): t[min(t)] * torch.nan}), "not finite, in"),
    ],
)
def test_tensors_that_cannot_be_read_are_refused(tmp_path, change, message):
    peft_model(tiny.llama(), peft.LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(SpectuneError, match=message):
        Adapter.from_peft(tmp_path)


def test_a_negative_alpha_and_the_old_key_of_the_magnitude(tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=-3, target_modules=["q_proj"], use_dora=True)
    theirs = shaken(peft_model(tiny.llama(), config))
    theirs.save_pretrained(tmp_path)
    assert_we_answer_like(tmp_path, tiny.llama, theirs)
    file = tmp_path / "adapter_model.safetensors"
    save_file({re.sub("vector$", "vector.weight", k): v for k, v in load_file(file).items()}, file)
    assert_we_answer_like(tmp_path, tiny.llama, theirs)


def test_moving_to_zero_is_no_update(tmp_path):
    adapter = made("adalora:rank=2", tiny.llama(), targets=["q_proj"])
    for layer in adapter.layers.values():
        layer.terms[0].trained["E"].zero_()
    exported = adapter.export(tmp_path)
    assert {layer.terms[0].method.rank for layer in exported.layers.values()} == {1}
    torch.testing.assert_close(logits(in_peft(tiny.llama(), tmp_path)), logits(tiny.llama()), rtol=0, atol=0)
    assert moved(spectune.attach(tiny.llama(), Adapter.load(tmp_path)))


def test_modules_to_save_are_ends_of_names_at_a_dot_or_not(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])  # and every input_layernorm
    theirs = shaken(peft_model(tiny.llama(), config))
    theirs.save_pretrained(tmp_path)
    read = assert_we_answer_like(tmp_path, tiny.llama, theirs)
    assert {name.rpartition(".")[2] for name in read.modules} == {"norm", "input_layernorm", "post_attention_layernorm"}
    theirs = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(theirs | {"modules_to_save": ["lm_head"]}))
    with pytest.raises(SpectuneError, match="belongs to no linear layer's LoRA"):
        Adapter.load(tmp_path)
