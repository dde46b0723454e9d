"""Convolutions and embeddings: every method against dense oracles, PEFT's format, rows, merging, files."""

import copy
import json
import pickle
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers as tf

import spectune
from layers.other_layers import IDS, net
from spectune import SVF, SVFT, Adapter, DoRA, LoRA, LoRAXS, MiLoRA, PiSSA, SpectuneError
from spectune.adapters.folder import CONFIG
from spectune.layers.adapted import adapted_layers
from spectune.layers.kinds import Vectors, kind_of
from spectune.layers.modules import as_held, effective_weight
from spectune.layers.unfolded import Unfolded
from spectune.methods.adalora import AdaLoRA
from spectune.methods.vera import VeRA
from spectune.reading import read_json

METHODS = [
    SVF(),
    SVFT(),
    SVFT(pattern="banded"),
    PiSSA(rank=3),
    MiLoRA(rank=3, dropout=0.0),
    LoRAXS(rank=3),
    LoRA(3),
    DoRA(LoRA(3)),
    DoRA(SVF()),
    AdaLoRA(rank=2, initial_rank=3),
    VeRA(rank=3),
]
LAYERS: dict[str, Any] = {
    "patches": (lambda: nn.Conv2d(3, 8, 4, stride=4, bias=False), (2, 3, 8, 8)),
    "3x3": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 6)),
    "1x1": (lambda: nn.Conv2d(5, 7, 1), (2, 5, 3, 3)),
    "dilated": (lambda: nn.Conv2d(3, 6, (3, 2), stride=(2, 1), padding="valid", dilation=2), (2, 3, 9, 7)),
    "circular": (lambda: nn.Conv1d(4, 6, 5, padding=2, padding_mode="circular"), (2, 4, 9)),
    "3d": (lambda: nn.Conv3d(2, 6, 2), (2, 2, 3, 4, 3)),
    "no batch": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 5, 6)),
    "groups": (lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2), (2, 6, 5, 4)),
    "depthwise": (lambda: nn.Conv1d(5, 10, 4, padding=3, groups=5), (2, 5, 6)),
    "groups reflected": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", groups=2), (4, 5, 6)),
    "embedding": (lambda: nn.Embedding(11, 6, padding_idx=0), None),
    "bag of sums": (lambda: nn.EmbeddingBag(11, 6, mode="sum", padding_idx=0), None),
    "bag of means": (lambda: nn.EmbeddingBag(11, 6), None),
}


def one(name, dtype=torch.float64):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make().to(dtype)
    return nn.Sequential(layer).eval(), IDS.clamp(min=1) if shape is None else torch.randn(shape, dtype=dtype)


def move(model, size=0.1):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            parameter.data += size * torch.randn(parameter.shape, generator=generator)


def dense(layer, weight, x):
    """Return the answer of a plain layer whose W (out x in) is another one."""
    held = kind_of(layer).held(weight, kind_of(layer).kernel(layer))
    if isinstance(layer, nn.Embedding):
        return F.embedding(x, held)
    if isinstance(layer, nn.EmbeddingBag):
        return F.embedding_bag(x, held, mode=layer.mode, padding_idx=layer.padding_idx)
    return layer._conv_forward(x, held, layer.bias)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{getattr(m, 'pattern', '')}")
@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_gradients_are_those_of_a_dense_layer(name, method):
    model, x = one(name)
    plain = copy.deepcopy(model[0])
    x = x.requires_grad_() if x.is_floating_point() else x
    spectune.adapt(model, method, targets=["0"])
    start = model(x).detach()
    torch.testing.assert_close(start, plain(x).detach(), atol=1e-4, rtol=0)  # LoRA-XS starts near W
    move(model)
    layer: Any = model[0]
    (update,) = layer.adapters["default"]
    trained = update.trained()
    inputs = [*trained.values(), *([x] if x.requires_grad else [])]
    y = model(x)
    target = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad((y.tanh() * target).sum(), inputs)
    weight = effective_weight(layer).detach()
    y2 = dense(plain, weight + update.method.delta(layer.tensors(update), weight), x)
    torch.testing.assert_close(y, y2)
    assert not torch.allclose(y, start)
    theirs = torch.autograd.grad((y2.tanh() * target).sum(), inputs)
    for key, a, b in zip([*trained, "x"], ours, theirs, strict=False):
        if method.additive or key in ("magnitude", "x"):  # DoRA takes its norm for a constant
            torch.testing.assert_close(a, b, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("method", [SVF(), LoRA(3), DoRA(PiSSA(rank=2))], ids=lambda m: m.name)
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_merged_saved_and_loaded_answers_the_same(name, method, tmp_path):
    model, x = one(name, torch.float32)
    base = copy.deepcopy(model)
    spectune.adapt(model, method, targets=["0"])
    move(model)
    y = model(x)
    adapter = spectune.extract(model)
    layer: Any = model[0]
    torch.testing.assert_close(dense(base[0], effective_weight(layer) + adapter.delta("0"), x), y)
    adapter.save(tmp_path / "a")
    spectune.merge(model)
    assert type(model[0]) is type(base[0])
    assert model[0].weight.is_contiguous()
    torch.testing.assert_close(model(x), y)
    spectune.unmerge(model)
    torch.testing.assert_close(model(x), y)
    assert torch.equal(model[0].weight, base[0].weight)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(copied(x), y)
    spectune.detach(model)
    assert torch.equal(model(x), base(x))
    loaded = Adapter.load(tmp_path / "a")
    torch.testing.assert_close(spectune.attach(base, loaded)(x), y)


ALL = ["table", "one", "two", "three", "out"]


def as_if_alone(model, choices):
    """Check that each row of a batch with these choices is what it would be alone; return the batch."""
    ids = torch.randint(1, 11, (len(choices), 4), generator=torch.Generator().manual_seed(0))
    alone = []
    with torch.no_grad():
        for row, choice in zip(ids, choices, strict=True):
            with spectune.route(model, [choice]):
                alone.append(model(row[None])[0])
        with spectune.route(model, choices):
            torch.testing.assert_close(model(ids), torch.stack(alone))
    return ids


def test_rows_and_mixtures_are_answered_as_if_they_were_alone():
    model = net()
    for name, method in (("a", LoRA(3)), ("b", SVF()), ("c", DoRA(LoRA(2)))):
        spectune.adapt(model, method, targets=ALL, name=name)
    move(model)
    choices = ["a", {"a": 0.5, "b": 2.0}, None, "c", "b"]
    ids = as_if_alone(model, choices)
    with torch.no_grad(), spectune.route(model, [None] * 5):
        torch.testing.assert_close(model(ids), net()(ids))


class Grouped(nn.Module):
    """A bag, convolutions in groups, of one channel each too, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(11, 8, mode="sum")
        self.groups = nn.Conv2d(2, 6, 3, padding=1, groups=2)
        self.depthwise = nn.Conv1d(6, 6, 4, padding=3, groups=6)
        self.out = nn.Linear(6, 4)

    def forward(self, ids):
        h = self.bag(ids).reshape(-1, 2, 2, 2)
        h = self.groups(h).flatten(2)
        return self.out(self.depthwise(h).mean(2))


def grouped():
    torch.manual_seed(0)
    return Grouped().eval()


IN_GROUPS = ["bag", "groups", "depthwise", "out"]


def test_rows_of_bags_and_of_convolutions_in_groups():
    model = grouped()
    for name, method in (("a", LoRA(3)), ("b", SVF()), ("c", DoRA(LoRA(2))), ("d", SVF())):
        spectune.adapt(model, method, targets=IN_GROUPS, name=name)
    move(model)
    choices = ["a", {"a": 0.5, "b": 2.0}, None, "c", {"b": 1.0, "d": -0.5}]
    as_if_alone(model, choices)


def test_groups_are_compiled_and_kept_in_our_own_folder(tmp_path):
    model = spectune.adapt(grouped(), targets={"bag|groups": LoRA(2), "depthwise": DoRA(LoRA(2)), "out": SVF()})
    move(model)
    y = model(IDS)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS), y)
    lora = spectune.adapt(grouped(), LoRA(2), targets=IN_GROUPS)
    move(lora)
    spectune.extract(lora).save(tmp_path)
    assert read_json(tmp_path / CONFIG)["library_name"] == "spectune"
    torch.testing.assert_close(spectune.attach(grouped(), Adapter.load(tmp_path))(IDS), lora(IDS))
    with pytest.raises(SpectuneError, match=r"an EmbeddingBag, 'bag', which PEFT does not know"):
        spectune.extract(lora).export(tmp_path / "peft", "peft")


@pytest.mark.parametrize("compiled", [False, True])
def test_rows_that_cancel_in_groups(compiled):
    model, x = one("groups")
    spectune.adapt(model, DoRA(LoRA(8)), targets=["0"])
    layer: Any = model[0]
    weight = effective_weight(layer).detach().double()
    update = layer.adapters["default"][0]
    trained = update.trained()
    wanted = torch.zeros_like(weight)
    wanted[[1, 6]] = 1e-7 * torch.randn(2, weight.shape[1], dtype=weight.dtype) - weight[[1, 6]]
    u, s, v = torch.linalg.svd(wanted, full_matrices=False)
    trained["A"].data.copy_(v)
    trained["B"].data.copy_(u * s / update.method.factors(trained).scale)
    answer: Any = torch.compile(model, backend="eager") if compiled else model
    total = weight + update.method.delta(layer.tensors(update), weight).double()
    torch.testing.assert_close(answer(x), layer._conv_forward(x, total.unflatten(1, (3, 3, 3)), layer.bias))


def test_a_bag_with_offsets_is_told_of():
    model = nn.Sequential(nn.EmbeddingBag(11, 6))
    spectune.adapt(model, LoRA(2), targets=["0"])
    with pytest.raises(SpectuneError, match=r"called with offsets beside its input"):
        model[0](IDS.flatten(), torch.tensor([0, 3]))


def test_adapters_of_one_basis_add_and_compress():
    model = spectune.adapt(net(), SVF(), targets=ALL)
    move(model)
    adapter = spectune.extract(model)
    doubled = spectune.attach(net(), adapter + adapter)
    assert adapter.to_lora(6).error < 1e-5
    spectune.activate(model, {"default": 2.0})
    torch.testing.assert_close(doubled(IDS), model(IDS))
    as_lora = spectune.attach(net(), adapter.to_lora(8))
    spectune.activate(model, "default")
    torch.testing.assert_close(as_lora(IDS), model(IDS))


def test_torch_compile_traces_them():
    model = spectune.adapt(net(), targets={"table|one": LoRA(2), "two": DoRA(LoRA(2)), "three": SVF()})
    move(model)
    y = model(IDS)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS), y)
    (of_compiled,) = torch.autograd.grad(compiled(IDS).sum(), [model.three.adapters["default"][0].tensor("z")])
    (of_plain,) = torch.autograd.grad(model(IDS).sum(), [model.three.adapters["default"][0].tensor("z")])
    torch.testing.assert_close(of_compiled, of_plain)


def test_low_precision_autocast_dropout_and_biases():
    model = spectune.adapt(net(), LoRA(3, dropout=0.5), targets=ALL, bias="lora_only")
    move(model)
    y = model(IDS)
    halves = copy.deepcopy(model).bfloat16()
    torch.testing.assert_close(halves(IDS).float(), y, atol=0.05, rtol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(IDS).float(), y, atol=0.05, rtol=0.05)
    assert "one" in spectune.extract(model).modules
    attached = spectune.attach(net(), spectune.extract(model))
    torch.testing.assert_close(attached(IDS), y)
    model.train()
    assert not torch.equal(model(IDS), model(IDS))  # a convolution's input is dropped; an embedding's has but its one


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.table(ids))


def test_a_table_that_is_tied_to_the_output_comes_apart_when_it_is_merged():
    torch.manual_seed(0)
    model = Tied().eval()
    before = model.head.weight.clone()
    spectune.adapt(model, SVF(), targets=["table"])
    move(model)
    y = model(IDS)
    spectune.merge(model)
    torch.testing.assert_close(model(IDS), y)
    assert torch.equal(model.head.weight, before)
    spectune.unmerge(model)
    assert model.head.weight is model.table.weight


# -- which layers


def test_all_linear_is_linear_and_others_are_named():
    assert list(adapted_layers(spectune.adapt(net(), SVF()))) == ["out"]
    assert list(adapted_layers(spectune.adapt(net(), SVF(), targets=["two", "table"]))) == ["table", "two"]
    assert list(adapted_layers(spectune.adapt(net(), SVF(), targets="t.*"))) == ["table", "two", "three"]
    overridden = adapted_layers(spectune.adapt(net(), SVF(), overrides={"one": LoRA(2)}))
    assert list(overridden) == ["one", "out"]
    around = nn.ModuleDict({"block": net()})
    assert list(adapted_layers(spectune.adapt(around, SVF(), targets=["block"]))) == ["block.out"]
    left_out = spectune.adapt(net(), SVF(), targets=ALL, exclude=["three"])
    assert "three" not in adapted_layers(left_out)


class Padded(nn.Conv2d):
    def forward(self, input):
        return F.conv2d(F.pad(input, (1, 0, 1, 0)), self.weight, self.bias)


class Scaled(nn.Embedding):
    def forward(self, input):
        return super().forward(input) * 3


def test_what_goes_around_its_class_is_gone_around():
    torch.manual_seed(0)
    model: Any = nn.Sequential(Scaled(11, 6)).eval()
    plain = copy.deepcopy(model[0])
    spectune.adapt(model, LoRA(3), targets=["0"])
    move(model)
    assert isinstance(model[0], (Unfolded, Scaled))
    weight = effective_weight(model[0]) + spectune.extract(model).delta("0")
    torch.testing.assert_close(model(IDS), 3 * F.embedding(IDS, as_held(plain, weight)))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Embedding(5, 4, max_norm=1.0), "'0' is a Embedding with max_norm"),
        (Padded(3, 4, 2), "'0' is a Padded that answers otherwise than its class does"),
        (nn.ConvTranspose2d(3, 4, 2), "'0' is a ConvTranspose2d"),
        (nn.EmbeddingBag(5, 4, mode="max"), "'0' is a EmbeddingBag of maxima, which multiplies by no matrix"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_adapted_is_named(layer, message):
    model = nn.Sequential(layer, nn.Linear(4, 4))
    with pytest.raises(SpectuneError, match=message):
        spectune.adapt(model, LoRA(2), targets=["0"])


def test_an_adapter_goes_to_layers_of_its_kind_alone(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 1))
    spectune.adapt(model, LoRA(2), targets=["0"])
    move(model)
    spectune.extract(model).save(tmp_path)
    adapter = Adapter.load(tmp_path)
    with pytest.raises(SpectuneError, match="'0' is of another kind than the model's: conv 1x1 in the adapter, linear"):
        spectune.attach(nn.Sequential(nn.Linear(4, 6)), adapter)
    other = nn.Sequential(nn.Conv2d(1, 6, 2))
    with pytest.raises(SpectuneError, match="conv 1x1 in the adapter, conv 2x2 in the model"):
        spectune.attach(other, adapter, check=False)


@pytest.mark.parametrize("said", [["pool", 2], ["conv", 0], ["conv", 7], ["conv", 2, "x"], "conv", [[]]])
def test_a_file_with_an_unknown_kind_is_refused(said, tmp_path):
    model = spectune.adapt(nn.Sequential(nn.Conv2d(4, 6, 2)), SVF(), targets=["0"])
    spectune.extract(model).save(tmp_path)
    config = read_json(tmp_path / CONFIG)
    config["layers"]["0"]["kind"] = said
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(SpectuneError, match="kind"):
        Adapter.load(tmp_path)


def test_formats_of_linear_layers_refuse_them(tmp_path):
    model = spectune.adapt(net(), LoRA(2), targets=ALL)
    move(model)
    with pytest.raises(SpectuneError, match="takes LoRA of linear layers alone"):
        spectune.extract(model).export(tmp_path / "mlx", "mlx")


def test_a_stand_in_for_an_input_has_products_and_nothing_else():
    layer = nn.Embedding(11, 6)
    x: Any = Vectors(kind_of(layer), layer, IDS, (2, 4, 11), torch.float32)  # type: ignore[arg-type]
    matrix, bias = torch.randn(3, 11), torch.randn(3)
    torch.testing.assert_close(F.linear(x, matrix, bias), F.one_hot(IDS, 11).float() @ matrix.T + bias)
    with pytest.raises(SpectuneError, match="takes exp of its input"):
        torch.exp(x)
    conv = nn.Conv1d(4, 4, 1, groups=2)
    x = Vectors(kind_of(conv), conv, torch.ones(1, 4, 3), (1, 3, 2), torch.float32)  # type: ignore[arg-type]
    with pytest.raises(SpectuneError, match="takes linear of its input"):
        F.linear(x, torch.randn(3, 2))


# -- models as they are


class Block(nn.Module):
    """A ResNet block as those of diffusers' UNets."""

    def __init__(self, into, out, time):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, into), nn.Conv2d(into, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, out)
        self.norm2, self.conv2 = nn.GroupNorm(2, out), nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(into, out, 1)

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(F.silu(time))[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in, self.down, self.up = nn.Conv2d(4, 8, 3, padding=1), Block(8, 12, 6), Block(20, 8, 6)
        self.downsample = nn.Conv2d(12, 12, 3, stride=2, padding=1)
        self.conv_out = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x, time):
        a = self.conv_in(x)
        b = F.interpolate(self.downsample(self.down(a, time)), scale_factor=2)
        return self.conv_out(self.up(torch.cat([a, b], 1), time))


def test_a_unet_learns_and_is_merged_saved_and_routed(tmp_path):
    torch.manual_seed(0)
    base = UNet().eval()
    model = copy.deepcopy(base)
    spectune.adapt(model, SVF(), targets=["conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsample"])
    x, time, wanted = torch.randn(2, 4, 8, 8), torch.randn(2, 6), torch.randn(2, 4, 8, 8)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(8):
        loss = F.mse_loss(model(x, time), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    y = model(x, time)
    spectune.extract(model).save(tmp_path)
    torch.testing.assert_close(spectune.attach(copy.deepcopy(base), Adapter.load(tmp_path))(x, time), y)
    with torch.no_grad(), spectune.route(model, [None, "default"]):
        routed = model(x, time)
    torch.testing.assert_close(routed, torch.stack([base(x, time)[0], y[1]]))
    spectune.merge(model)
    torch.testing.assert_close(model(x, time), y)


CLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("make", "targets", "inputs"),
    [
        (
            lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**CLIP, image_size=16, patch_size=4)),
            ["patch_embedding", "q_proj"],
            {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 256).reshape(2, 3, 16, 16)},
        ),
        (
            lambda: tf.OPTForCausalLM(
                tf.OPTConfig(
                    vocab_size=11,
                    hidden_size=16,
                    word_embed_proj_dim=16,
                    ffn_dim=24,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    max_position_embeddings=16,
                )
            ),
            ["embed_tokens", "embed_positions"],
            {"input_ids": IDS},
        ),
        (
            lambda: tf.Gemma3ForCausalLM(
                tf.Gemma3TextConfig(
                    vocab_size=11,
                    hidden_size=16,
                    intermediate_size=24,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    head_dim=8,
                )
            ),
            ["embed_tokens", "v_proj"],
            {"input_ids": IDS},
        ),
        (
            lambda: tf.WhisperModel(
                tf.WhisperConfig(
                    vocab_size=11,
                    d_model=16,
                    encoder_layers=1,
                    decoder_layers=1,
                    encoder_attention_heads=2,
                    decoder_attention_heads=2,
                    encoder_ffn_dim=16,
                    decoder_ffn_dim=16,
                    num_mel_bins=8,
                    max_source_positions=8,
                    max_target_positions=8,
                    pad_token_id=0,
                    bos_token_id=1,
                    eos_token_id=2,
                    decoder_start_token_id=1,
                )
            ),
            ["conv1", "conv2", "embed_tokens"],
            {"input_features": torch.linspace(-1, 1, 2 * 8 * 16).reshape(2, 8, 16), "decoder_input_ids": IDS},
        ),
        (
            lambda: tf.ConvNextModel(
                tf.ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, layer_scale_init_value=1.0)
            ),
            ["dwconv", "patch_embeddings", "pwconv1"],
            {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 256).reshape(2, 3, 16, 16)},
        ),
    ],
    ids=["clip", "opt", "gemma", "whisper", "convnext"],
)
def test_transformers_models_answer_as_merged_and_by_row(make, targets, inputs, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    before = model(**inputs)[0].detach()
    spectune.adapt(model, targets={"|".join(targets): SVF()})
    move(model)
    with torch.no_grad():
        y = model(**inputs)[0]
        assert not torch.allclose(y, before, atol=1e-4)
        with spectune.route(model, [None, "default"]):
            torch.testing.assert_close(model(**inputs)[0], torch.stack([before[0], y[1]]), atol=1e-5, rtol=1e-5)
        spectune.extract(model).save(tmp_path)
        spectune.merge(model)
        torch.testing.assert_close(model(**inputs)[0], y, atol=1e-5, rtol=1e-5)
        spectune.unmerge(model)
        spectune.detach(model)
        torch.testing.assert_close(model(**inputs)[0], before, atol=0, rtol=0)
        spectune.attach(model, Adapter.load(tmp_path))
        torch.testing.assert_close(model(**inputs)[0], y, atol=1e-5, rtol=1e-5)
