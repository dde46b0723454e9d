"""A model that PEFT holds, over our layers: states, sums, rows and folders."""

import copy

import peft
import pytest
import torch
import transformers as tf
from packaging.version import Version
from peft import AutoPeftModel, AutoPeftModelForCausalLM, PeftModel, convert_to_lora, get_peft_model
from transformers.integrations.peft import MIN_PEFT_VERSION

import spectune
import spectune.peft as sp
import tiny
from peft_cases import logits, trained, x

# PEFT's, of gradient checkpointing, merged adapters and patterns that match nothing
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "FutureWarning", "RuntimeWarning")
]
CONFIGS = [
    sp.SVFConfig(),
    sp.SVFConfig(parametrization="sigmoid"),
    sp.SVFTConfig(pattern="banded", width=2),
    sp.LoRAXSConfig(r=4, rank_pattern={"q_proj": 2}),
    sp.PiSSAConfig(r=4),
    sp.MiLoRAConfig(r=4, lora_alpha=8),
    sp.SVFConfig(use_dora=True),
]
SHORT = [CONFIGS[0], CONFIGS[3], CONFIGS[6]]
ALL = [
    pytest.param(c, id=f"{type(c).__name__}{i}", marks=[] if c in SHORT else [pytest.mark.slow])
    for i, c in enumerate(CONFIGS)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.llama(initializer_range=0.2).save_pretrained(folder)
    return folder


@pytest.fixture
def new(base):
    return lambda: tf.AutoModelForCausalLM.from_pretrained(base).eval()


@pytest.mark.parametrize("config", ALL)
def test_a_folder_opens_on_either_side(new, config, tmp_path):
    model = trained(new(), config)
    y = logits(model)
    assert (y - logits(new())).abs().max() > 0.1
    model.save_pretrained(tmp_path / "peft")
    ours = spectune.Adapter.load(tmp_path / "peft")
    assert torch.equal(logits(spectune.attach(new(), ours)), y)
    ours.save(tmp_path / "ours")
    spectune.extract(model).save(tmp_path / "extracted")
    for folder in ("peft", "ours", "extracted"):
        for low in (False, True):
            again = PeftModel.from_pretrained(new(), tmp_path / folder, low_cpu_mem_usage=low)
            assert type(again.peft_config["default"]) is type(config)
            assert torch.equal(logits(again), y)
        plain = new()
        plain.load_adapter(str(tmp_path / folder))
        assert torch.equal(logits(plain), y)
    assert torch.equal(logits(AutoPeftModel.from_pretrained(tmp_path / "peft")), y)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "extracted")), y)


@pytest.mark.parametrize("config", ALL)
def test_merging_is_taken_back_to_the_last_bit(new, config):
    model, plain = trained(new(), config), new()
    y, state = logits(model), plain.state_dict()
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        assert torch.allclose(logits(model), y, atol=1e-4)
        model.unmerge_adapter()
        assert torch.equal(logits(model), y)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(model), y)
    base_state = peft.get_base_model_state_dict(model)
    assert base_state.keys() == state.keys()
    assert all(torch.equal(base_state[key], state[key]) for key in state)
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert torch.allclose(logits(merged), y, atol=1e-4)


@pytest.mark.parametrize("change", ["half", "added"])
def test_unmerging_after_somebody_else(new, change):
    model = trained(new(), sp.SVFConfig(target_modules=["q_proj"]))
    model.merge_adapter()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.get_base_layer()
    expected = new().model.layers[0].self_attn.q_proj.weight.data
    if change == "half":
        model.half()
        expected = expected.half()
    else:
        layer.weight.data += 0.5
        expected = expected + 0.5
    model.unmerge_adapter()
    assert torch.allclose(layer.weight.data, expected, atol=0 if change == "half" else 1e-5)


def test_unloading_leaves_the_base(new):
    model = trained(new(), sp.SVFConfig()).unload()
    assert torch.equal(logits(model), logits(new()))
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear


@pytest.mark.parametrize("more", [{"trainable_token_indices": [3, 5]}, {"modules_to_save": ["layers.0.mlp"]}])
def test_unloading_takes_what_pefts_own_wrappers_hold(new, more):
    model = trained(new(), sp.SVFConfig(target_modules=["q_proj"], **more))
    y = logits(model)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.allclose(logits(merged), y, atol=1e-4)
    assert merged.state_dict().keys() == new().state_dict().keys()
    assert torch.equal(logits(model.unload()), logits(new()))  # the module that is trained whole has not moved


@pytest.mark.parametrize("config", SHORT)
def test_each_row_has_its_adapter(new, config):
    model = trained(trained(new(), config, "one"), config, "two", seed=2)
    alone = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        alone[name] = logits(model)
    with torch.no_grad():
        rows = model(x.repeat(2, 1)[:3], adapter_names=["two", "__base__", "one"]).logits
    expected = [alone["two"][0], logits(new())[1], alone["one"][0]]
    torch.testing.assert_close(rows, torch.stack(expected), atol=1e-3, rtol=1e-3)
    replies = model.generate(input_ids=x, adapter_names=["one", "two"], max_new_tokens=3, do_sample=False, num_beams=2)
    for i, name in enumerate(("one", "two")):
        model.set_adapter(name)
        one = model.generate(input_ids=x[i : i + 1], max_new_tokens=3, do_sample=False, num_beams=2)
        assert torch.equal(replies[i], one[0])
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(x, adapter_names=["one", "three"])


def test_several_adapters(new):
    model = trained(trained(new(), sp.SVFConfig(), "one"), sp.SVFConfig(), "two", seed=2)
    model.base_model.set_adapter(["one", "two"])
    both = logits(model)
    expected = spectune.attach(new(), spectune.extract(model, "one") + spectune.extract(model, "two"))
    assert torch.allclose(both, logits(expected), atol=1e-4)
    assert len(model.base_model.model.model.layers[0].mlp.up_proj.adapted.bases) == 1  # shared
    model.delete_adapter("one")
    model.set_adapter("two")
    assert spectune.adapter_names(model) == ["two"]
    assert torch.equal(logits(model), logits(trained(new(), sp.SVFConfig(), "two", seed=2)))
    model.delete_adapter("two")
    assert torch.equal(logits(model.base_model.model), logits(new()))


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[1], CONFIGS[2], CONFIGS[3]])
def test_a_weighted_sum_is_exact(new, config, tmp_path):
    model = trained(trained(new(), config, "one"), config, "two", seed=2)
    a, b = (spectune.extract(model, name) for name in ("one", "two"))
    model.add_weighted_adapter(["one", "two"], [0.7, -0.3], "sum")
    model.set_adapter("sum")
    expected = logits(spectune.attach(new(), 0.7 * a - 0.3 * b))
    assert torch.allclose(logits(model), expected, atol=1e-4)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(logits(PeftModel.from_pretrained(new(), tmp_path / "sum")), logits(model))


def test_what_has_no_sum_says_so(new):
    model = trained(trained(new(), sp.MiLoRAConfig(r=2), "one"), sp.MiLoRAConfig(r=2), "two")
    with pytest.raises(spectune.SpectuneError, match=r"no milora holds the sum.*to_lora"):
        model.add_weighted_adapter(["one", "two"], [1, 1], "sum")
    with pytest.raises(spectune.SpectuneError, match="combination_type='svd'"):
        model.add_weighted_adapter(["one", "two"], [1, 1], "sum", combination_type="svd")


def test_another_base_is_refused(new, tmp_path):
    trained(new(), sp.SVFConfig()).save_pretrained(tmp_path)

    def other_base():
        model = new()
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
        return model

    for low in (False, True):
        with pytest.raises(spectune.SpectuneError, match=r"another base.*layers\.1\.mlp\.up_proj"):
            PeftModel.from_pretrained(other_base(), tmp_path, low_cpu_mem_usage=low)
    other = other_base()
    other.load_adapter(str(tmp_path))  # transformers fills in the values itself, and the first answer shows
    with pytest.raises(spectune.SpectuneError, match="another base"):
        other(x)


def test_other_parts_of_a_model_are_saved_too(new, tmp_path):
    config = sp.SVFConfig(
        target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], trainable_token_indices=[3, 5]
    )
    model = trained(new(), config)
    for key, p in model.named_parameters():
        if "lm_head.modules_to_save" in key or "trainable_tokens_delta" in key:
            p.data += 0.1
    y = logits(model)
    model.save_pretrained(tmp_path / "peft")
    assert torch.equal(logits(PeftModel.from_pretrained(new(), tmp_path / "peft")), y)
    ours = spectune.attach(new(), spectune.Adapter.load(tmp_path / "peft"))
    assert torch.allclose(logits(ours), y, atol=1e-5)
    with pytest.raises(spectune.SpectuneError, match=r"is trained whole by PEFT.*save_pretrained"):
        spectune.extract(model)


def test_a_head_of_ours_is_among_the_modules_to_save(tmp_path):
    def classifier():
        torch.manual_seed(3)
        return tf.BertForSequenceClassification(tf.BertConfig(**tiny.BERT, num_labels=3)).eval()

    model = spectune.adapt(classifier(), spectune.SVF(), targets=["query"], modules_to_save=["classifier"])
    for p in model.parameters():
        p.data += 0.1 if p.requires_grad else 0.0
    spectune.extract(model).save(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(classifier(), tmp_path)), logits(model))
    assert torch.equal(logits(spectune.attach(classifier(), spectune.Adapter.load(tmp_path))), logits(model))


@pytest.mark.skipif(Version(peft.__version__) < Version("0.21"), reason="this PEFT does not save them")
def test_biases_that_train(tmp_path):
    def gpt():
        torch.manual_seed(3)
        return tf.GPT2LMHeadModel(
            tf.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=96, bos_token_id=1, eos_token_id=2)
        ).eval()

    model = trained(gpt(), sp.SVFConfig(target_modules=["c_attn", "c_proj"], bias="svf_only"))
    for key, p in model.named_parameters():
        p.data += 0.1 if key.endswith("bias") and p.requires_grad else 0.0
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(gpt(), tmp_path)), logits(model))
    assert torch.allclose(logits(spectune.attach(gpt(), spectune.Adapter.load(tmp_path))), logits(model), atol=1e-5)


def test_a_lora_of_it(new):
    model = trained(new(), sp.LoRAXSConfig(r=4))
    config, state = convert_to_lora(model, rank=4)
    lora = get_peft_model(new(), config)
    peft.set_peft_model_state_dict(lora, state)
    assert torch.allclose(logits(lora.eval()), logits(model), atol=1e-3)


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION), reason="this transformers takes adapters of a later PEFT"
)
def test_transformers_own_adapters(new, tmp_path):
    model = new()
    model.add_adapter(sp.SVFConfig(init_weights=False))
    y = logits(model)
    model.save_pretrained(tmp_path)
    model.disable_adapters()
    assert torch.equal(logits(model), logits(new()))
    model.enable_adapters()
    assert torch.equal(logits(model), y)
    again = new()
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits(again), y)
    model.delete_adapter("default")
    assert torch.equal(logits(model), logits(new()))


def test_it_trains_as_ours_does(new):
    """The same losses, bit for bit, as by `spectune.adapt`."""

    def losses(model):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            loss = model(input_ids=x, labels=x).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()

    ours = spectune.adapt(new().train(), spectune.SVF())
    assert list(losses(ours)) == list(losses(get_peft_model(new().train(), sp.SVFConfig())))


def test_a_copy_is_its_own(new):
    model = trained(new(), sp.SVFConfig())
    again = copy.deepcopy(model)
    before = logits(model)
    for key, p in model.named_parameters():
        p.data += 0.1 if key.endswith(".default") else 0.0
    assert torch.equal(logits(again), before)
    assert not torch.equal(logits(model), before)


def test_blocks_are_chosen_among_all_linear_layers(new):
    model = get_peft_model(new(), sp.SVFConfig(layers_to_transform=[1], exclude_modules=["down_proj"]))
    expected = {n for n, m in new().named_modules() if isinstance(m, torch.nn.Linear) and ".1." in n}
    assert set(model.base_model.targeted_module_names) == {n for n in expected if "down_proj" not in n}


@pytest.mark.parametrize(
    ("task", "kind"), [("TOKEN_CLS", "TokenClassification"), ("QUESTION_ANS", "QuestionAnswering")]
)
def test_heads_that_peft_trains_whole_are_no_targets(task, kind, tmp_path):
    def bert():
        torch.manual_seed(3)
        return getattr(tf, f"BertFor{kind}")(tf.BertConfig(**tiny.BERT)).eval()

    def answer(model):
        with torch.no_grad():
            return model(x)[0]

    model = trained(bert(), sp.SVFConfig(task_type=task))
    assert (answer(model) - answer(bert())).abs().max() > 1e-5
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(PeftModel.from_pretrained(bert(), tmp_path)), answer(model))
