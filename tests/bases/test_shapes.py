"""Trained parameters of the built-in shapes equal the papers', as docs/plan.md lists them."""

import pytest
import transformers as tf

from spectune import SVF, SVFT, DoRA, LoRA, LoRAXS, SpectuneError
from spectune.bases.shapes import build, find_config, known
from spectune.layers.modules import effective_weight
from spectune.methods.adalora import AdaLoRA
from spectune.model.targets import resolve
from spectune.planning.sizes import keras_lora_parameters

MLP = ["gate_proj", "up_proj", "down_proj"]
QKVUD = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
QV = ["q_proj", "v_proj"]

CASES = [
    ("roberta-base", LoRA(rank=8), ["query", "value"], 294_912, "0.3M"),
    ("gpt2-medium", LoRA(rank=4, alpha=32), ["c_attn"], 393_216, "0.35M in the paper"),
    ("llama-3-8b", SVF(), MLP, 393_216, "0.39M"),
    ("llama-3-8b", SVF(), QV, 163_840, "0.16M"),
    ("llama-3-8b", SVF(), [*QV, *MLP], 557_056, "0.58M in the paper"),
    ("gemma-2b", SVFT(), "all-linear", 193_536, "0.19M"),
    ("gemma-2b", SVFT(pattern="random", width=16), "all-linear", 6_352_416, "6.35M"),
    ("gemma-2b", SVFT(pattern="banded", width=16), "all-linear", 6_352_416, "6.35M"),
    ("gemma-2b", LoRA(rank=32), QKVUD, 26_247_168, "26.2M"),
    ("gemma-7b", SVFT(), QKVUD, 430_080, "0.43M"),
    ("gemma-7b", SVFT(pattern="random", width=16), "all-linear", 19_816_384, "19.8M"),
    ("llama-3-8b", SVFT(), QKVUD, 458_752, "0.48M in the paper"),
    ("mistral-7b", LoRAXS(rank=64), "all-linear", 917_504, "0.92M"),
    ("mistral-7b", LoRA(rank=64), "all-linear", 167_772_160, "168M"),
    ("gemma-7b", LoRAXS(rank=64), "all-linear", 802_816, "0.80M"),
    ("gemma-7b", LoRA(rank=64), "all-linear", 200_015_872, "200M"),
    ("llama-2-7b", DoRA(LoRA(rank=16)), QKVUD, 28_925_952, "0.43%"),
    ("llama-2-7b", DoRA(LoRA(rank=32)), QKVUD, 56_975_360, "0.84%"),
    ("deberta-v3-base", LoRA(rank=8), "all-linear", 1_327_104, "1.33M"),
    ("deberta-v3-base", LoRA(rank=2), "all-linear", 331_776, "0.33M"),
    ("gemma-7b", LoRA(rank=8), QV, 3_211_264, "3.2M, where Keras trains 22.1M"),
]
BASES = {
    "roberta-base": 124_645_632,
    "roberta-large": 355_359_744,
    "deberta-v3-base": 183_831_552,
    "gpt2-medium": 354_823_168,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma-2-9b": 9_241_705_984,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "minilm-l6": 22_713_216,
}


@pytest.fixture(scope="module")
def models():
    built = {}

    def of(name):
        if name not in built:
            built[name] = build(find_config(name))
        return built[name]

    return of


@pytest.mark.parametrize(("name", "method", "targets", "expected", "paper"), CASES)
def test_counts_are_the_papers(models, name, method, targets, expected, paper):
    model = models(name)
    chosen = resolve(model, method, targets)
    shapes = [effective_weight(model.get_submodule(layer)).shape for layer in chosen]
    assert sum(method.parameter_count(*shape) for shape in shapes) == expected


def test_adalora_ends_near_the_papers_count(models):
    """1.27M: which triplets are kept decides; 576 of them, of layers of 1,536 to 3,840 values."""
    model = models("deberta-v3-base")
    method = AdaLoRA(rank=8)
    shapes = [effective_weight(model.get_submodule(layer)).shape for layer in resolve(model, method)]
    kept = method.rank * len(shapes)
    assert kept * (min(map(sum, shapes)) + 1) < 1_270_000 < kept * (max(map(sum, shapes)) + 1)


@pytest.mark.parametrize(("name", "rank", "expected"), [("gemma-7b", 8, 22_134_784), ("gemma-2b", 4, 1_363_968)])
def test_keras_trains_factors_of_every_head(name, rank, expected):
    assert keras_lora_parameters(find_config(name), rank) == expected


@pytest.mark.parametrize("name", known())
def test_a_base_has_its_published_size(models, name):
    assert sum(p.numel() for p in models(name).parameters()) == BASES[name]


def hub_cache(folder, monkeypatch, name, config):
    """Put a configuration where the hub's library keeps those of a name."""
    place = folder / f"models--{name.replace('/', '--')}"
    (place / "snapshots" / "0123").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0123", encoding="utf-8")
    config.save_pretrained(place / "snapshots" / "0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))


@pytest.mark.parametrize("name", ["somebody/a-model", "somebody/llama-3-8b"])  # which is no built-in shape then
def test_a_model_of_the_hub_is_read_from_its_cache(name, tmp_path, monkeypatch):
    hub_cache(tmp_path, monkeypatch, name, tf.LlamaConfig(vocab_size=77, hidden_size=64))
    assert (find_config(name).vocab_size, find_config(name).hidden_size) == (77, 64)


def test_a_model_that_the_hub_does_not_give_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert find_config("meta-llama/Llama-3-8B").hidden_size == 4096
    with pytest.raises(SpectuneError, match=r"unknown model '.*/qwen4-8b'.*'qwen3-8b'.*not to be had from the hub"):
        find_config("somebody/qwen4-8b")
    with pytest.raises(SpectuneError, match="unknown model 'no name/--x'"):
        find_config("no name/--x")
