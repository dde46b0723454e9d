"""What PEFT writes is read: the same logits, or one sentence of why not."""

import json
import math
import re
import warnings
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import spectune
import tiny
from adapters.adapter_cases import made, moved
from adapters.formats.test_peft import MODELS, in_peft, logits, peft_model, pefts_own_warnings
from spectune import Adapter, SpectuneError

Q = {"llama": "q_proj", "gpt2": "c_attn", "bert": "query"}


def shaken(model: Any, scale: float = 0.1) -> Any:
    """Move PEFT's parameters away from where they start."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(scale * torch.randn_like(parameter))
    return model.eval()


def assert_we_answer_like(folder: Any, build: Any, theirs: Any) -> Adapter:
    adapter = Adapter.from_peft(folder)
    ours = spectune.attach(build(), adapter)
    assert not torch.allclose(logits(ours), logits(build()), atol=1e-3)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    assert spectune.attach(build(), Adapter.load(folder))
    return adapter


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


@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`")
@pytest.mark.parametrize("options", [{}, {"trainable_token_indices": [2, 5]}])
def test_tying_that_peft_ensures_where_nothing_whole_is_tied(tmp_path, options):
    config = peft.LoraConfig(target_modules=["c_attn"], r=4, ensure_weight_tying=True, **options)
    theirs = shaken(peft_model(tiny.gpt2(), config))
    for name, parameter in theirs.named_parameters():
        parameter.data += 0.1 if "trainable_tokens_delta" in name else 0.0
    theirs.save_pretrained(tmp_path)
    assert_we_answer_like(tmp_path, tiny.gpt2, theirs)


@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`")
@pytest.mark.parametrize("options", [{"modules_to_save": ["wte"]}, {"target_modules": ["c_attn", "wte"]}])
def test_tying_of_what_the_file_holds_once_is_refused(tmp_path, options):
    config = peft.LoraConfig(**{"target_modules": ["c_attn"], "r": 4, "ensure_weight_tying": True, **options})
    peft_model(tiny.gpt2(), config).save_pretrained(tmp_path)
    with pytest.raises(SpectuneError, match="ensure_weight_tying=True and holds once what two tied layers have"):
        Adapter.from_peft(tmp_path)
