"""What other libraries save of an adapted model is the trained model, and a run goes on from their checkpoints."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import save_model
from torch import nn
from transformers import Trainer, TrainingArguments

import spectune
from spectune import SpectuneError
from spectune.layers import stored
from tiny import BERT, TEXT, bert, llama, tf

IDS = torch.randint(3, 90, (4, 8), generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def base(tied=False):
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, tie_word_embeddings=tied)).eval()


def answer(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def trainer(model, folder, steps=2, **options):
    arguments = TrainingArguments(
        folder, max_steps=steps, learning_rate=5e-2, use_cpu=True, report_to=[], disable_tqdm=True, **options
    )
    return Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in IDS])


def moved(model, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", ["M2M100", "Bart", "PLBart", "T5"])
def test_what_else_is_tied_to_an_adapted_output_embedding_stays_so_in_what_is_saved(tmp_path, kind):
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers", "num_layers"), 2)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_heads"), 4)
    sizes |= {"d_kv": 8, "d_ff": 48, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64}
    config = getattr(tf, f"{kind}Config")(vocab_size=100, d_model=32, tie_word_embeddings=True, **sizes)
    torch.manual_seed(0)
    cls = getattr(tf, f"{kind}ForConditionalGeneration")
    model = moved(spectune.adapt(cls(config).eval(), "lora:rank=2", ["lm_head"]))
    ties = dict(model._tied_weights_keys), dict(model.all_tied_weights_keys), config.tie_word_embeddings

    def answered(model):
        with torch.no_grad():
            return model(input_ids=IDS, decoder_input_ids=IDS.flip(1)).logits

    expected = answered(model)
    model.save_pretrained(tmp_path)
    assert (model._tied_weights_keys, model.all_tied_weights_keys, config.tie_word_embeddings) == ties
    torch.testing.assert_close(answered(cls.from_pretrained(tmp_path).eval()), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("svf", {}),
        ("dora:rank=2", {"modules_to_save": ["norm"]}),
        ("lora:rank=2", {"targets": ["lm_head"]}),
        ("lora:rank=2", {"targets": ["q_proj"], "modules_to_save": {"embed_tokens": [5, 9]}}),
        ("lora:rank=2", {"targets": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_save_pretrained_writes_the_model_as_it_answers(tmp_path, method, options, tied):
    model = moved(spectune.adapt(base(tied), method, **options))
    expected = answer(model)
    model.save_pretrained(tmp_path)
    assert model.config.tie_word_embeddings == tied
    loaded, info = tf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    torch.testing.assert_close(answer(loaded), expected, atol=1e-5, rtol=1e-4)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    assert torch.equal(answer(model), expected)
    assert type(spectune.detach(model)) is tf.LlamaForCausalLM


def test_models_inside_others_copies_and_pickles_save_alike(tmp_path):
    torch.manual_seed(0)
    wrapper = nn.Sequential()
    wrapper.encoder = tf.BertModel(tf.BertConfig(**BERT)).eval()
    moved(spectune.adapt(wrapper, "svf"))
    for i, model in enumerate(
        (wrapper.encoder, copy.deepcopy(wrapper).encoder, pickle.loads(pickle.dumps(wrapper)).encoder)
    ):
        model.save_pretrained(tmp_path / str(i))
        loaded = tf.AutoModel.from_pretrained(tmp_path / str(i)).eval()
        torch.testing.assert_close(loaded(IDS)[0], wrapper.encoder(IDS)[0], atol=1e-5, rtol=1e-4)


def test_transformers_own_trainer_saves_the_trained_model_and_goes_on(tmp_path):
    model = spectune.adapt(base(), "lora:rank=2", modules_to_save=["norm"])
    whole = trainer(model, tmp_path / "a", 4, save_steps=2)
    whole.train()
    expected = answer(model)
    whole.save_model(tmp_path / "end")
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "end")
    torch.testing.assert_close(answer(loaded), expected, atol=1e-5, rtol=1e-4)
    torch.manual_seed(0)
    second = spectune.adapt(base(), "lora:rank=2", modules_to_save=["norm"])
    before = {k: v.clone() for k, v in base().state_dict().items()}
    trainer(second, tmp_path / "a", 4).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    torch.testing.assert_close(answer(second), expected, atol=1e-4, rtol=1e-3)
    after = spectune.detach(second).state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    halfway = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "checkpoint-4")
    torch.testing.assert_close(answer(halfway), expected, atol=1e-5, rtol=1e-4)


def test_a_merged_state_is_not_adapted_once_more():
    model = moved(spectune.adapt(base(), "svf"))
    merged = spectune.merge(copy.deepcopy(model)).state_dict()
    with pytest.raises(SpectuneError, match=r"another model.layers.0.self_attn.q_proj.weight and no adapter"):
        model.load_state_dict(merged, strict=False)
    model.load_state_dict(base().state_dict(), strict=False)  # the base's own
    model.load_state_dict(model.state_dict())


def test_whose_parameters_are_tied_is_found_out_once_for_a_save(monkeypatch, tmp_path):
    model = spectune.adapt(bert(), "lora:rank=2")
    asked = []
    owners = stored.owners_in
    monkeypatch.setattr(stored, "owners_in", lambda root: asked.append(root) or owners(root))
    save_model(model, str(tmp_path / "model.safetensors"))
    assert asked == [model]
    assert "asked" not in vars(stored._latest)  # and nothing holds the model afterwards


def test_a_saver_that_is_not_known_gets_w_and_adapters_beside_and_w_alone_once_merged():
    model = llama()
    keys, base = model.state_dict().keys(), {k: t.clone() for k, t in model.state_dict().items()}
    spectune.adapt(model, "lora:rank=2")
    for p in model.parameters():
        p.data += 0.1 if p.requires_grad else 0
    state = model.state_dict()
    assert state.keys() > keys
    assert all(torch.equal(state[k], base[k]) for k in keys)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*adapters"):
        llama().load_state_dict(state)
    state = {k: t.clone() for k, t in spectune.merge(model).state_dict().items()}
    assert state.keys() == keys
    assert not torch.equal(state["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"])
    assert spectune.unmerge(model).state_dict().keys() > keys
