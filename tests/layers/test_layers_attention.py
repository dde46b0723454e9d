"""torch's MultiheadAttention and the encoders around it: every projection a layer, whatever way torch would take."""

import copy
import json
import pickle
from typing import Any

import peft
import pytest
import torch
import torch.nn as nn

import spectune
from spectune import SVF, Adapter, DoRA, LoRA, PiSSA, SpectuneError
from spectune.adapters.folder import CONFIG
from spectune.layers.adapted import adapted_layers
from spectune.layers.modules import effective_weight

X = torch.linspace(-1, 1, 3 * 5 * 8).sin().reshape(3, 5, 8) * 2


class Clip(nn.Module):
    """A block of a CLIP as open_clip has it."""

    def __init__(self, cross=False, **options):
        super().__init__()
        self.ln, self.attn, self.mlp = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, **options), nn.Linear(8, 8)
        self.cross = cross
        for bias in (self.attn.in_proj_bias, self.attn.out_proj.bias):
            if bias is not None:
                nn.init.normal_(bias)

    def forward(self, x):
        h = self.ln(x)
        other = h.flip(1) if self.cross else h
        return self.mlp(x + self.attn(h, other, other, need_weights=False)[0])


def clip(**options):
    torch.manual_seed(0)
    return Clip(**options).eval()


def move(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def dense(model, base):
    """Return the base with W' in the place of each W, written there by hand."""
    plain, adapter = copy.deepcopy(base).requires_grad_(False), spectune.extract(model)
    held = {"in_proj": plain.attn.in_proj_weight, "out_proj": plain.attn.out_proj.weight, "mlp": plain.mlp.weight}
    for name in adapter.layers:
        key = name.rpartition(".")[2]
        if key in held:
            held[key] += adapter.delta(name)
        elif plain.attn.in_proj_weight is None:
            getattr(plain.attn, f"{key}_weight").add_(adapter.delta(name))
        else:
            plain.attn.in_proj_weight[8 * "qkv".index(key[0]) :][:8] += adapter.delta(name)
    return plain


@pytest.mark.parametrize("method", [SVF(), LoRA(2), DoRA(PiSSA(rank=2))], ids=lambda m: m.name)
@pytest.mark.parametrize("split", [None, "auto"])
@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {},
        {"cross": True, "batch_first": True},
        {"kdim": 8, "vdim": 8, "bias": False},
        {"kdim": 9},
    ],
    ids=["fused", "time first", "cross", "no bias", "apart"],
)
def test_the_answer_is_that_of_a_dense_module(options, split, method, tmp_path):
    if options.get("kdim") == 9:  # keys of another size, which have weights apart

        class Wide(Clip):
            def forward(self, x):
                h = self.ln(x)
                keys = torch.cat([h, h[..., :1]], -1)
                return self.mlp(x + self.attn(h, keys, h)[0])

        torch.manual_seed(0)
        base: Any = Wide(**options).eval()
    else:
        base = clip(**options)
    model = spectune.adapt(copy.deepcopy(base), method, split=split)
    torch.testing.assert_close(model(X), base(X))
    move(model)
    y = model(X)
    torch.testing.assert_close(y, dense(model, base)(X))
    with torch.no_grad():
        torch.testing.assert_close(model(X), y)  # torch's fused function would not ask the layers
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(g.any() for g in torch.autograd.grad(y.square().sum(), trained))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)) if type(base) is Clip else model):
        torch.testing.assert_close(copied(X), y)
    adapter = spectune.extract(model)
    spectune.merge(model)
    torch.testing.assert_close(model(X), y)
    spectune.unmerge(model)
    torch.testing.assert_close(model(X), y)
    spectune.detach(model)
    assert type(model.attn) is nn.MultiheadAttention
    assert torch.equal(model(X), base(X))
    adapter.save(tmp_path)
    torch.testing.assert_close(spectune.attach(model, Adapter.load(tmp_path))(X), y)


def test_gradients_are_those_of_a_dense_module():
    base = clip(batch_first=True).double()
    model = spectune.adapt(copy.deepcopy(base), LoRA(2))
    move(model)
    layers = adapted_layers(model)
    held = {name: dict(layer.adapters["default"][0].named_parameters()) for name, layer in layers.items()}
    trained = [p for own in held.values() for p in own.values()]
    ours = torch.autograd.grad(model(X.double()).tanh().sum(), trained)
    new = {n: effective_weight(layer).detach() + 8 * held[n]["B"] @ held[n]["A"] for n, layer in layers.items()}
    named = {"attn.in_proj": "attn.in_proj_weight", "attn.out_proj": "attn.out_proj.weight", "mlp": "mlp.weight"}
    y = torch.func.functional_call(base, {named[n]: w for n, w in new.items()}, (X.double(),))
    for a, b in zip(ours, torch.autograd.grad(y.tanh().sum(), trained), strict=True):
        torch.testing.assert_close(a, b)


def test_rows_have_adapters_of_their_own():
    base = clip(batch_first=True)
    model = spectune.adapt(copy.deepcopy(base), SVF(), name="a")
    spectune.adapt(model, LoRA(2), targets=["attn"], name="b")
    move(model)
    with torch.no_grad():
        alone = []
        for row, choice in zip(X, (None, "a", "b"), strict=True):
            with spectune.route(model, [choice]):
                alone.append(model(row[None])[0])
        with spectune.route(model, [None, "a", "b"]):
            torch.testing.assert_close(model(X), torch.stack(alone))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("targets", [["linear1"], ["self_attn"], ["out_proj"], ["in_proj"], "all-linear"], ids=str)
def test_encoders_take_their_own_way(targets):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0)
    base = nn.TransformerEncoder(layer, 2).eval()
    model = spectune.adapt(copy.deepcopy(base), LoRA(2), targets=targets)
    move(model)
    padded = torch.zeros(3, 5, dtype=torch.bool)
    padded[0, 3:] = True
    y = model(X, src_key_padding_mask=padded)
    with torch.no_grad():  # where torch would hand all weights, and nested tensors, to one function
        torch.testing.assert_close(model(X, src_key_padding_mask=padded)[~padded], y[~padded])
        assert not torch.allclose(y[~padded], base(X, src_key_padding_mask=padded)[~padded], atol=1e-3)
        spectune.activate(model, None)
        torch.testing.assert_close(
            model(X, src_key_padding_mask=padded)[~padded], base(X, src_key_padding_mask=padded)[~padded]
        )
        spectune.activate(model, "default")
    torch.testing.assert_close(copy.deepcopy(model)(X, src_key_padding_mask=padded), y)
    spectune.merge(model, keep=False)
    torch.testing.assert_close(model(X, src_key_padding_mask=padded)[~padded], y[~padded])
    assert {type(m) for m in model.modules()} == {type(m) for m in base.modules()}


def test_the_state_of_a_model_is_that_of_the_merged_one_for_those_who_save_it(tmp_path):
    from safetensors.torch import load_file, save_model

    model = spectune.adapt(clip(), SVF())
    move(model)
    save_model(model, str(tmp_path / "model.safetensors"))
    merged = spectune.merge(model)
    found = load_file(tmp_path / "model.safetensors")
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(found[name], tensor)


def test_pefts_lora_on_attention_is_read_as_peft_answers(tmp_path):
    theirs = peft.get_peft_model(clip(batch_first=True), peft.LoraConfig(r=2, target_modules=["attn", "mlp"])).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    theirs.save_pretrained(tmp_path)
    read = spectune.attach(clip(batch_first=True), Adapter.from_peft(tmp_path))
    torch.testing.assert_close(read(X), theirs(X))  # its out_proj's update counts twice
    config = json.loads((tmp_path / CONFIG).read_text())
    for version in ("1.0.0", "newer", None):
        (tmp_path / CONFIG).write_text(json.dumps({**config, "peft_version": version}))
        with pytest.raises(SpectuneError, match=r"'attn', whose output projection PEFT up to 0.21 updates twice"):
            Adapter.from_peft(tmp_path)


@pytest.mark.parametrize("split", [None, "auto"])
def test_peft_is_not_given_what_it_would_answer_otherwise(split, tmp_path):
    model = spectune.adapt(clip(), LoRA(2), targets=["attn"], split=split)
    move(model)
    with pytest.raises(SpectuneError, match=r"PEFT answers otherwise|others know as one"):
        spectune.extract(model).export(tmp_path, "peft")


def test_one_module_is_adapted_in_one_way():
    model = spectune.adapt(clip(), LoRA(2), targets=["q_proj"], split="auto")
    assert list(adapted_layers(model)) == ["attn.q_proj"]
    with pytest.raises(SpectuneError, match=r"'attn.in_proj' would be adapted as one layer, and 'attn.q_proj'"):
        spectune.adapt(model, SVF(), name="other")
    model = spectune.adapt(clip(), LoRA(2), targets=["in_proj"])
    with pytest.raises(SpectuneError, match=r"'attn.in_proj' would be adapted as one layer, and 'attn.v_proj'"):
        spectune.adapt(model, SVF(), targets=["v_proj"], split="auto", name="other")
    for targets in (["out_proj"], ["in_proj"]):
        with pytest.raises(SpectuneError, match=r"'attn' would be adapted and have rows or tensors of its own"):
            spectune.adapt(clip(), SVF(), targets=targets, modules_to_save=["attn"])


class Own(nn.MultiheadAttention):
    """One head, whose weights are sliced, turned and cast before they meet anything."""

    def forward(self, x, *others, **options):
        size = self.embed_dim
        query, key = (x @ self.in_proj_weight[i * size : (i + 1) * size].T for i in (0, 1))
        value = torch.einsum("bti,oi->bto", x.double(), self.in_proj_weight.double()[2 * size :]).float()
        mixed = (query @ key.mT).softmax(-1) @ value
        return mixed @ self.out_proj.weight.T.contiguous(), None


@pytest.mark.parametrize("options", [{}, {"split": "auto"}])
@pytest.mark.parametrize("method", ["lora:rank=2", "dora:rank=2"])
def test_a_class_that_does_something_else_with_the_weights_does_it_with_the_adapted_ones(method, options):
    base = clip()
    base.attn.__class__ = Own
    model = copy.deepcopy(base)
    spectune.adapt(model, method, ["attn"] if not options else ["q_proj", "v_proj", "out_proj"], **options)
    move(model)
    expected = dense(model, base)(X)
    torch.testing.assert_close(model(X), expected, atol=1e-5, rtol=1e-5)
    model(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if ".adapters." in n)
