"""Modules that adapters bring whole: heads that the checkpoint lacked, what is asked for, rows, statistics."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import spectune
from spectune import Adapter, SpectuneError
from tiny import BERT, TEXT, tf

IDS = torch.randint(3, 90, (3, 10), generator=torch.Generator().manual_seed(0))
LORA = "lora:rank=2"


def answer(model, ids=IDS):
    with torch.no_grad():
        out = model(ids)
    return out.logits if hasattr(out, "logits") else out


def moved(model, seed=1):
    """Give every trained tensor a random step."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def saved_and_back(adapter, path):
    adapter.save(path)
    return Adapter.load(path)


@pytest.mark.parametrize(
    "wanted",
    [["norm"], ["embed_tokens"], ["lm_head"], ["embed_tokens", "layers.0.mlp"], {"embed_tokens": [3, 80]}],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_any_module_is_trained_whole(tmp_path, wanted, tied):
    def base():
        torch.manual_seed(0)
        return tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, tie_word_embeddings=tied)).eval()

    model = base()
    before, plain = state(model), answer(model)
    spectune.adapt(model, LORA, ["q_proj"], modules_to_save=wanted)
    torch.testing.assert_close(answer(model), plain, atol=1e-6, rtol=1e-5)
    logits = model.train()(IDS, labels=IDS)
    logits.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad and p.dim() == 1)
    expected = answer(moved(model).eval())
    loaded = saved_and_back(spectune.extract(model), tmp_path)
    other = spectune.attach(base(), loaded)
    torch.testing.assert_close(answer(other), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(answer(spectune.merge(other)), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(answer(copy.deepcopy(model)), expected)
    assert torch.equal(answer(spectune.activate(model, None)), plain)
    spectune.detach(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert type(model.model.norm).__name__ == "LlamaRMSNorm"


def test_tied_weights_are_trained_as_one():
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, tie_word_embeddings=True))
    spectune.adapt(model, LORA, ["q_proj"], modules_to_save=["embed_tokens"])
    assert model.lm_head.adapters["default"][0].H is model.model.embed_tokens.adapters["default"].weight


@pytest.mark.parametrize("wanted", [["embed_tokens", "norm"], {"embed_tokens": [5, 9], "norm": None}], ids=str)
def test_mixtures_and_rows_of_a_batch(wanted):
    torch.manual_seed(0)
    base = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)).eval()
    ids = IDS.clone()
    ids[:, 2:4] = torch.tensor([5, 9])
    model, alone = copy.deepcopy(base), [answer(base, ids)]
    for i, name in enumerate("ab"):
        single = moved(spectune.adapt(copy.deepcopy(base), LORA, ["q_proj"], modules_to_save=wanted), i)
        alone.append(answer(single, ids))
        spectune.attach(model, spectune.extract(single), name)
    with spectune.route(model, [None, "a", "b"]):
        routed = answer(model, ids)
    torch.testing.assert_close(routed, torch.stack([alone[i][i] for i in range(3)]), atol=1e-5, rtol=1e-4)
    mixed = answer(spectune.activate(model, {"a": 0.75, "b": 0.25}), ids)
    joined = 0.75 * spectune.extract(model, "a") + 0.25 * spectune.extract(model, "b")
    torch.testing.assert_close(answer(spectune.attach(copy.deepcopy(base), joined), ids), mixed, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(answer(spectune.merge(model), ids), mixed, atol=1e-5, rtol=1e-4)


def test_rows_of_modules_that_answer_once_for_all():
    torch.manual_seed(0)
    model = tf.BertModel(tf.BertConfig(**BERT)).eval()  # positions have one row, whatever the batch has
    plain = model(IDS).last_hidden_state
    moved(spectune.adapt(model, LORA, ["query"], modules_to_save=["position_embeddings"]))
    changed = model(IDS).last_hidden_state
    with spectune.route(model, ["default", None, None]):
        routed = model(IDS).last_hidden_state
    torch.testing.assert_close(routed, torch.stack([changed[0], plain[1], plain[2]]), atol=1e-5, rtol=1e-4)


def test_rows_of_a_module_with_adapted_layers_inside():
    torch.manual_seed(0)
    base = tf.BertForMaskedLM(tf.BertConfig(**BERT)).eval()  # whose `predictions` hold a bias, and a dense layer inside
    model, alone = copy.deepcopy(base), [base(IDS).logits]
    for i, name in enumerate("ab"):
        single = moved(spectune.adapt(copy.deepcopy(base), LORA, ["query", "dense"], bias="all"), i)
        alone.append(single(IDS).logits)
        spectune.attach(model, spectune.extract(single), name)
    choices = [None, "a", "b"]
    for context in (torch.no_grad, torch.enable_grad):
        with spectune.route(model, choices), context():
            routed = model(IDS).logits
        torch.testing.assert_close(routed, torch.stack([alone[i][i] for i in range(3)]), atol=1e-5, rtol=1e-4)


def test_statistics_that_move_are_the_adapters_own(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).eval()

    model, x = base(), 3 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) + 1
    before, plain = state(model), answer(model, x)
    assert not spectune.extract(spectune.adapt(copy.deepcopy(model), LORA)).modules  # which have not moved
    spectune.adapt(model, LORA).train()(x).sum().backward()
    expected = answer(model.eval(), x)
    loaded = saved_and_back(spectune.extract(model), tmp_path)
    assert torch.equal(answer(spectune.attach(base(), loaded), x), expected)
    assert torch.equal(answer(spectune.activate(model, None), x), plain)
    torch.testing.assert_close(answer(spectune.merge(spectune.attach(base(), loaded)), x), expected)
    after = spectune.detach(model).state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_new_tokens_are_trained_and_saved(tmp_path):
    torch.manual_seed(0)
    tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, tie_word_embeddings=True)).save_pretrained(tmp_path / "base")

    def grown(seed):
        model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        torch.manual_seed(seed)
        model.resize_token_embeddings(TEXT["vocab_size"] + 4)
        return model

    ids = IDS.clone()
    ids[:, 4] = TEXT["vocab_size"] + 1
    model = moved(spectune.adapt(grown(1), LORA, ["q_proj"]))
    adapter = spectune.extract(model)
    assert adapter.modules["model.embed_tokens"][0].rows == tuple(range(96, 100))
    loaded = saved_and_back(adapter, tmp_path / "adapter")
    torch.testing.assert_close(answer(spectune.attach(grown(2), loaded), ids), answer(model, ids))
    small = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(SpectuneError, match=r"call model.resize_token_embeddings\(100\) first"):
        spectune.attach(small, loaded)


def test_what_cannot_be_brought_whole_is_named():
    def base():
        torch.manual_seed(0)
        return tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT))

    for wanted, message in (
        (["embed_token"], "'embed_token' matches no module with parameters; did you mean 'embed_tokens'"),
        ("(", "is not a valid regular expression"),
        ({"norm": [1]}, "rows are given of 'model.norm', which is a LlamaRMSNorm"),
        ({"embed_tokens": [96]}, r"from 0 to 95, not \[96\]"),
    ):
        with pytest.raises(SpectuneError, match=message):
            spectune.adapt(base(), LORA, ["q_proj"], modules_to_save=wanted)
    model = spectune.adapt(base(), LORA, ["lm_head"])
    with pytest.raises(SpectuneError, match="'lm_head' would be adapted and have rows"):
        spectune.adapt(model, LORA, ["q_proj"], modules_to_save={"lm_head": [1]}, name="b")
    assert spectune.adapter_names(model) == ["default"]
    other = spectune.extract(spectune.adapt(base(), LORA, ["q_proj"], modules_to_save=["norm"]))
    other.modules = {"model.norms": other.modules["model.norm"]}
    with pytest.raises(SpectuneError, match=r"the model has no module 'model\.norms'; did you mean 'model.norm'"):
        spectune.attach(base(), other)


def speech():
    torch.manual_seed(0)
    sizes = {"conv_dim": (16, 16), "conv_kernel": (4, 2), "conv_stride": (4, 2), "num_feat_extract_layers": 2}
    sizes |= {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    sizes |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 20}
    return tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config(**sizes)).eval()


@pytest.mark.parametrize("first", ["whole", "other"])
def test_a_model_within_a_model_that_owns_a_tensor_is_brought_whole(first, tmp_path):
    model, heard = speech(), torch.randn(2, 400, generator=torch.Generator().manual_seed(1))
    kinds = {name: type(module) for name, module in model.named_modules()}
    masked = torch.zeros(2, 50, dtype=torch.bool).index_fill_(1, torch.arange(5), True)

    def answer(model):
        with torch.no_grad():
            return model.wav2vec2(heard, mask_time_indices=masked).last_hidden_state

    start = answer(model)
    other = {"targets": ["q_proj"], "name": "other"}
    if first == "other":
        spectune.adapt(model, "lora:rank=2", **other)
    spectune.adapt(model, "lora:rank=2", ["v_proj"], modules_to_save=["wav2vec2"], name="whole")
    if first == "whole":
        spectune.adapt(model, "lora:rank=2", **other)
    spectune.activate(model, "whole")
    with torch.no_grad():
        model.wav2vec2.adapters["whole"].masked_spec_embed.add_(1.0)
    moved = answer(model)
    assert (moved - start).abs().max() > 1e-3
    torch.testing.assert_close(answer(copy.deepcopy(model)), moved)
    assert type(model.wav2vec2).__name__ == "Wav2Vec2Model"
    spectune.detach(model, "whole")
    torch.testing.assert_close(answer(model), start)
    model.save_pretrained(tmp_path)  # of the adapter that is left, which does nothing yet
    assert torch.equal(
        tf.Wav2Vec2ForCTC.from_pretrained(tmp_path).wav2vec2.masked_spec_embed, model.wav2vec2.masked_spec_embed
    )
    spectune.detach(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds


class Named(nn.Module):
    """A module of one's own with the names that adapted ones use."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.adapters, self.bases = nn.ModuleDict({"one": nn.Linear(4, 4)}), nn.Linear(4, 4)

    def forward(self, x):
        return self.bases(self.scale * self.adapters["one"](x))


def test_modules_by_the_names_that_adapters_use_are_the_model_s_own():
    torch.manual_seed(0)
    model = nn.ModuleDict({"inner": Named(), "out": nn.Linear(4, 4)})
    base = copy.deepcopy(model)
    spectune.adapt(model, "lora:rank=2", ["out"], modules_to_save=["adapters.one"])
    model["inner"].bases.weight.requires_grad_(True).data += 1
    adapter = spectune.extract(model)
    assert set(adapter.modules) == {"inner.bases"}
    assert set(adapter.layers) == {"inner.adapters.one", "out"}
    x = torch.randn(2, 4)
    torch.testing.assert_close(spectune.attach(base, adapter)["inner"](x), model["inner"](x))
    with pytest.raises(SpectuneError, match=r"'inner' .Named. has 'adapters' of its own"):
        spectune.adapt(spectune.detach(model), "lora:rank=2", ["out"], modules_to_save=["inner"])
    layer = nn.Sequential(nn.Linear(4, 4))
    layer[0].selection = 3
    with pytest.raises(SpectuneError, match=r"'0' .Linear. has 'selection' of its own"):
        spectune.adapt(layer, "lora:rank=2")
    assert layer[0].selection == 3


class Reading(nn.Module):
    """Takes the tensors of its norm and its table itself, as fused norms and tied heads do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.linear, self.norm = nn.Embedding(90, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, ids):
        hidden = torch.tanh(self.linear(self.table(ids)))
        assert self.norm.weight.dtype is hidden.dtype
        return nn.functional.layer_norm(hidden, (8,), self.norm.weight, self.norm.bias) @ self.table.weight.T


@pytest.mark.parametrize("wanted", [["norm"], ["table"], {"table": [3, 80]}], ids=str)
def test_whoever_reads_the_tensors_of_a_whole_module_has_the_adapters(wanted):
    model: Any = Reading()
    plain: Any = Reading()
    before = plain(IDS).detach()
    spectune.adapt(model, LORA, ["linear"], modules_to_save=wanted)
    torch.testing.assert_close(model(IDS), before)
    moved(model)(IDS).square().mean().backward()
    adapter = spectune.extract(model)
    with torch.no_grad():
        plain.linear.weight += adapter.delta("linear")
        for name, (term, *_) in adapter.modules.items():
            for key, tensor in term.tensors.items():
                own = plain.get_submodule(name).get_parameter(key)
                own[slice(None) if term.rows is None else list(term.rows)] = tensor
    expected = plain(IDS)
    expected.square().mean().backward()
    torch.testing.assert_close(model(IDS), expected)
    for name, values in (("norm", None), ("table", [3, 80])):
        part = model.get_submodule(name)
        if hasattr(part, "adapters"):
            theirs = plain.get_submodule(name).weight.grad
            theirs = theirs if values is None or not isinstance(wanted, dict) else theirs[values]
            torch.testing.assert_close(part.adapters["default"].weight.grad, theirs, atol=1e-6, rtol=1e-4)
    with spectune.route(model, ["default", None, None]), pytest.raises(SpectuneError, match="all rows the same choice"):
        model(IDS)
    with torch.no_grad(), spectune.route(model, ["default"] * 3):
        torch.testing.assert_close(model(IDS), expected)
    torch.testing.assert_close(spectune.activate(model, None)(IDS), before)
    torch.testing.assert_close(spectune.merge(spectune.activate(model, "default"))(IDS), expected)


def test_compiled_code_that_reads_the_tensors_of_a_whole_module():
    model = moved(spectune.adapt(Reading(), LORA, ["linear"], modules_to_save=["norm"]))
    torch.testing.assert_close(answer(torch.compile(model, backend="eager")), answer(model))


def test_a_projection_of_attention_beside_one_that_is_brought_whole():
    torch.manual_seed(0)
    attention: Any = nn.MultiheadAttention(8, 2).eval()
    model, x = nn.Sequential(attention), torch.randn(4, 2, 8)
    plain = copy.deepcopy(attention)
    spectune.adapt(model, LORA, ["0.in_proj"], modules_to_save=["0.out_proj"])
    moved(model)
    adapter = spectune.extract(model)
    with torch.no_grad():
        plain.in_proj_weight += adapter.delta("0.in_proj")
        own = adapter.modules["0.out_proj"][0]
        plain.out_proj.load_state_dict(own.tensors)
    torch.testing.assert_close(attention(x, x, x)[0], plain(x, x, x)[0])
    attention(x, x, x)[0].square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm:FutureWarning")
@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.Conv1d(8, 8, 1)])
def test_a_weight_that_is_computed_is_trained_by_what_it_is_computed_of(layer, tmp_path):
    def base():
        return nn.Sequential(
            nn.utils.parametrizations.weight_norm(copy.deepcopy(layer)), nn.Flatten(), nn.Linear(64, 3)
        )

    model, x = base(), torch.randn(2, 8, 8)
    plain = copy.deepcopy(model)
    spectune.adapt(model, LORA, ["2"], modules_to_save=["0"])
    moved(model)(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    adapter = saved_and_back(spectune.extract(model), tmp_path)
    assert {key for terms in adapter.modules.values() for key in terms[0].tensors} == {"bias", "original0", "original1"}
    expected = answer(model, x)
    with torch.no_grad(), spectune.route(model, ["default", None]):
        torch.testing.assert_close(model(x), torch.stack([expected[0], answer(plain, x)[1]]))
    with torch.no_grad():
        for name, (term, *_) in adapter.modules.items():
            plain.get_submodule(name).load_state_dict(term.tensors, strict=False)
        plain[2].weight += adapter.delta("2")
    torch.testing.assert_close(answer(plain, x), expected)
    old = nn.Sequential(nn.utils.weight_norm(copy.deepcopy(layer)), nn.Linear(8, 3))
    with pytest.raises(SpectuneError, match=r"parametrizations\.weight_norm"):
        spectune.adapt(old, LORA, ["1"], modules_to_save=["0"])
