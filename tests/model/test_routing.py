"""A different adapter, mixture or none in each row of a batch: equal to running each row alone."""

from typing import Any

import pytest
import torch
import torch.nn as nn

import spectune
import tiny
from spectune import SVF, SVFT, AdaLoRA, DoRA, LoRA, LoRAXS, MiLoRA, PiSSA, SpectuneError

METHODS = {
    "svf": SVF(),
    "sigmoid": SVF(parametrization="sigmoid"),
    "banded": SVFT(pattern="banded", width=2),
    "random": SVFT(pattern="random", width=2),
    "lora": LoRA(rank=2),
    "lora_xs": LoRAXS(rank=4),
    "dora": DoRA(LoRA(rank=2)),
    "dora_svf": DoRA(SVF()),
    "pissa": PiSSA(rank=3),
    "milora": MiLoRA(rank=3),
    "adalora": AdaLoRA(rank=2),
}
ALIKE = ["svf", "banded", "random", "lora", "lora_xs", "dora", "pissa"]


def several(model, methods) -> Any:
    """Put an adapter of each method on a model, far enough from its start to change what it says."""
    for name, method in methods.items():
        spectune.adapt(model, method, name=name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def alone(model, choices, run):
    """Return run(i) for each row with its choice activated for the whole model."""
    answers = []
    for i, choice in enumerate(choices):
        spectune.activate(model, choice)
        answers.append(run(i))
    spectune.activate(model, None)
    return answers


def ids(rows=4, length=7):
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def check_forward(model, choices):
    tokens = ids(len(choices))
    expected = torch.cat(alone(model, choices, lambda i: model(tokens[i : i + 1]).logits))
    with spectune.route(model, choices):
        together = model(tokens).logits
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-4)
    plain = model(tokens).logits
    assert all((together[i] - plain[i]).abs().max() > 1e-3 for i, choice in enumerate(choices) if choice)
    return together


@pytest.mark.parametrize("kind", ALIKE)
def test_two_adapters_of_one_kind(kind):
    model = several(tiny.llama(), {"a": METHODS[kind], "b": METHODS[kind]})
    check_forward(model, ["a", None, "b", {"a": 0.5, "b": -0.7}, {"b": 2.0}])


def test_cores_over_one_basis_keep_their_own_scale():
    model = several(tiny.llama(), {"a": LoRAXS(rank=4, alpha=4), "b": LoRAXS(rank=4, alpha=12)})
    layer = model.model.layers[0].mlp.up_proj
    assert list(layer.bases) == ["lora_xs-4"]
    mixture = {"a": 0.5, "b": -0.5}
    check_forward(model, ["a", "b", mixture, None])
    deltas = {name: spectune.extract(model, name).delta("model.layers.0.mlp.up_proj") for name in mixture}
    x = torch.randn(3, 32)
    spectune.activate(model, None)
    plain = layer(x)
    spectune.activate(model, mixture)
    torch.testing.assert_close(layer(x) - plain, x @ (0.5 * deltas["a"] - 0.5 * deltas["b"]).T, rtol=1e-3, atol=1e-4)


def test_a_sum_of_adapters_answers_term_by_term():
    """An attached sum has several terms in a layer, each with a weight, one of them over a shared basis."""
    model = several(tiny.llama(), {"a": SVF(), "b": PiSSA(rank=3), "c": DoRA(LoRA(rank=2)), "d": LoRAXS(rank=4)})
    a, b, c, d = (spectune.extract(model, name) for name in "abcd")
    total = 0.5 * a - 0.7 * b + 0.4 * c + 2.0 * d
    spectune.attach(model, total, name="sum")
    tokens = ids(2)
    with torch.no_grad():
        at_once = model(tokens).logits
        spectune.activate(model, {"a": 0.5, "b": -0.7, "c": 0.4, "d": 2.0})
        torch.testing.assert_close(at_once, model(tokens).logits, rtol=1e-3, atol=1e-3)
        check_forward(model, ["sum", {"sum": 0.5, "a": 1.0}, None])


def test_every_kind_at_once():
    model = several(tiny.llama(), METHODS)
    everything = dict.fromkeys(METHODS, 0.3)
    check_forward(model, [*METHODS, None, everything, {"svf": 0.4, "sigmoid": 0.4, "pissa": -1.0, "dora": 0.5}, {}])


def test_rows_of_the_base_alone_are_the_base():
    model = several(tiny.llama(), {"a": SVF(), "b": LoRA(rank=2)})
    tokens = ids()
    with torch.no_grad():
        spectune.activate(model, None)
        plain = model(tokens).logits
        with spectune.route(model, [None] * 4):
            assert torch.equal(model(tokens).logits, plain)


CHOICES = ["svf", None, {"svf": 0.5, "pissa": 0.5}, "dora", "lora"]


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return several(tiny.llama(), {k: METHODS[k] for k in ("svf", "pissa", "dora", "lora", "lora_xs")})


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": False, "use_cache": False},
    ],
    ids=["greedy", "beams", "several beams", "no cache"],
)
def test_generating(llama, settings):
    tokens = ids(len(CHOICES), 5)
    settings = settings | {"max_new_tokens": 6, "attention_mask": torch.ones_like(tokens)}

    def run(i):
        own = settings | {"attention_mask": settings["attention_mask"][i : i + 1]}
        return llama.generate(tokens[i : i + 1], **own)

    expected = torch.cat(alone(llama, CHOICES, run))
    with spectune.route(llama, CHOICES):
        together = llama.generate(tokens, **settings)
    assert torch.equal(together, expected)
    assert len({tuple(row[5:].tolist()) for row in together}) > 2


def test_sampling_several_sequences(llama):
    tokens = ids(2, 5)
    mask = torch.ones_like(tokens)
    with spectune.route(llama, ["svf", None]):
        out = llama.generate(tokens, attention_mask=mask, do_sample=True, num_return_sequences=3, max_new_tokens=4)
    assert out.shape == (6, 9)
    assert torch.equal(out[:3, :5], tokens[:1].expand(3, -1))


def test_left_padded_prompts(llama):
    prompts = [ids(1, n)[0] for n in (6, 2, 4, 3, 5)]
    padded = torch.stack([torch.cat([torch.zeros(6 - len(p), dtype=torch.int64), p]) for p in prompts])
    options: Any = {"max_new_tokens": 5, "do_sample": False}
    expected = alone(
        llama,
        CHOICES,
        lambda i: llama.generate(prompts[i][None], attention_mask=torch.ones(1, len(prompts[i])).long(), **options),
    )
    with spectune.route(llama, CHOICES):
        together = llama.generate(padded, attention_mask=(padded != 0).long(), **options)
    assert torch.equal(together[:, 6:], torch.stack([e[0, -5:] for e in expected]))


@pytest.mark.parametrize("beams", [1, 3])
def test_encoder_decoder_generates(beams):
    model = several(tiny.t5(), {"svf": SVF(), "lora": LoRA(rank=2), "dora": DoRA(LoRA(rank=2))})
    choices = ["svf", None, "lora", {"dora": 1.0, "svf": 0.5}]
    tokens = ids()
    options: Any = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False}
    expected = alone(model, choices, lambda i: model.generate(tokens[i : i + 1], **options))
    with spectune.route(model, choices):
        together = model.generate(tokens, **options)
    assert torch.equal(together, torch.cat(expected))


def test_gradients_reach_the_adapters_of_their_rows_alone():
    model = several(nn.Sequential(nn.Linear(6, 5)), {"a": LoRA(rank=2), "b": SVF(), "c": DoRA(SVF()), "d": SVF()})
    model.requires_grad_(True)
    x = torch.randn(4, 3, 6)
    with spectune.route(model, ["a", {"b": 0.5, "c": 0.5}, None, "b"]):
        model(x).square().sum().backward()
    grads = {n.split(".")[2]: p.grad for n, p in model.named_parameters() if ".adapters." in n}
    assert grads["d"] is None
    routed = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for i, choice in enumerate(["a", {"b": 0.5, "c": 0.5}, None, "b"]):
        spectune.activate(model, choice)
        model(x[i : i + 1]).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in routed:
            torch.testing.assert_close(parameter.grad, routed[name])


def test_rows_nest_and_come_back_after_an_error():
    model = several(tiny.llama(), {"a": SVF(), "b": LoRA(rank=2)})
    spectune.activate(model, {"a": 0.5})
    tokens = ids(2)
    with torch.no_grad():
        before = model(tokens).logits
        with spectune.route(model, ["a", None]):
            outer = model(tokens).logits
            with pytest.raises(SpectuneError), spectune.route(model, ["b", "b"]):
                model(ids(3))
            with spectune.route(model, ["b", "b"]):
                inner = model(tokens).logits
            assert not torch.equal(inner, outer)
            assert torch.equal(model(tokens).logits, outer)
            assert "generate" in vars(model)
        assert torch.equal(model(tokens).logits, before)
    assert "generate" not in vars(model)


def test_generate_of_a_wrapper_is_kept_and_restored():
    model = several(tiny.llama(), {"a": SVF()})
    own = model.generate
    model.generate = own
    with spectune.route(model, ["a", None]):
        out = model.generate(ids(2), attention_mask=torch.ones(2, 7).long(), max_new_tokens=2, num_beams=2)
    assert out.shape == (2, 9)
    assert vars(model)["generate"] is own


@pytest.mark.parametrize("rows", [3, 5, 8])
def test_the_wrong_number_of_rows_is_told(rows):
    model = several(tiny.llama(), {"a": SVF()})
    with spectune.route(model, ["a"] * rows), pytest.raises(SpectuneError, match=rf"given {rows} rows .*\(4, 7\)"):
        model(ids(4))
    with spectune.route(model, ["a", None]), pytest.raises(SpectuneError, match="one entry for each row"):
        model(ids(4))  # a multiple is meant for generate's beams only
    mask = torch.ones(4, 7).long()
    for prompts in ({"inputs": ids(4)}, {"input_ids": ids(4)}, {"inputs_embeds": model.model.embed_tokens(ids(4))}):
        with spectune.route(model, ["a", None]), pytest.raises(SpectuneError, match=r"given 2 rows .*\(4, 7"):
            model.generate(**prompts, attention_mask=mask, max_new_tokens=1)


def test_what_cannot_be_routed_is_told():
    model = several(nn.Sequential(nn.Linear(4, 4)), {"a": SVF()})
    for rows in ("a", {"a": 1.0}, []):
        with pytest.raises(SpectuneError, match="list with one entry for each row"), spectune.route(model, rows):
            pass
    with pytest.raises(SpectuneError, match="no adapter 'b'"), spectune.route(model, ["a", "b"]):
        pass
    with spectune.route(model, ["a", None, None, None]), pytest.raises(SpectuneError, match=r"\(4,\)"):
        model(torch.randn(4))
    with pytest.raises(SpectuneError, match="no adapter"), spectune.route(nn.Linear(2, 2), [None]):
        pass


def test_parts_adapted_apart_are_routed_together():
    model: Any = nn.Sequential(nn.Sequential(nn.Linear(6, 6)), nn.Sequential(nn.Linear(6, 4)))
    several(model[0], {"a": SVF()})
    several(model[1], {"a": LoRA(rank=2)})
    x = torch.randn(2, 6)
    spectune.activate(model, "a")
    active = model(x)
    spectune.activate(model, None)
    plain = model(x)
    assert not torch.allclose(active, plain)
    with spectune.route(model, [None, "a"]):
        torch.testing.assert_close(model(x), torch.stack([plain[0], active[1]]))
    spectune.detach(model)
    assert torch.equal(model(x), plain)
    assert all(p.requires_grad for p in model.parameters())


def by_layer(model, adapters, choice):
    """Return the sum of adapters that weights by layer make, through the algebra."""
    parts = [adapters[name].by_layer(weights) for name, weights in choice.items()]
    return sum(parts[1:], parts[0])


def test_weights_by_layer_are_the_sum_of_adapters_by_layer():
    model = several(tiny.llama(), {k: METHODS[k] for k in ("svf", "lora", "dora", "lora_xs")})
    adapters = {name: spectune.extract(model, name) for name in ("svf", "lora", "dora", "lora_xs")}
    layers = list(adapters["svf"].layers)
    some: Any = {"svf": dict.fromkeys(layers[:5], 0.5), "lora": dict.fromkeys(layers[3:], -0.7)}
    other: Any = {"lora_xs": {n: 0.1 * i for i, n in enumerate(layers)}, "dora": {layers[0]: 1.0}}
    check_forward(model, [some, "svf", None, other, {"svf": 0.3, "lora": {layers[2]: 2.0}}])
    tokens = ids(2)
    with torch.no_grad():
        for choice in (some, other):
            spectune.activate(model, choice)
            expected = model(tokens).logits
            spectune.attach(model, by_layer(model, adapters, choice), name="sum")
            torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-3, atol=1e-3)
            spectune.detach(model, "sum")
        spectune.activate(model, some)
        expected = model(tokens).logits
        torch.testing.assert_close(spectune.merge(model)(tokens).logits, expected, rtol=1e-3, atol=1e-3)


def test_weights_may_be_tensors_that_get_gradients():
    model = several(tiny.llama(), {"svf": SVF(), "lora": LoRA(rank=2)})
    model.requires_grad_(False)
    layers = list(spectune.extract(model, "svf").layers)
    tokens = ids(2)

    def loss(a, b):
        with spectune.route(model, [{"svf": a, "lora": {layers[0]: b}}, {"svf": 0.5}]):
            return model(tokens).logits.square().mean()

    weights = [torch.tensor(0.3, requires_grad=True), torch.tensor(0.6, requires_grad=True)]
    loss(*weights).backward()
    for i, weight in enumerate(weights):
        moved = [[float(w.detach()) + sign * 1e-2 * (i == j) for j, w in enumerate(weights)] for sign in (1, -1)]
        with torch.no_grad():
            up, down = (loss(*pair) for pair in moved)
        assert float(weight.grad) == pytest.approx(float(up - down) / 2e-2, rel=2e-2)


@pytest.mark.parametrize("method", ["lora:rank=2", "svf", "dora:rank=2"])
def test_passes_of_one_context_have_the_weights_that_tensors_are_by_then(method):
    model, tokens = several(tiny.llama(), {"a": method, "b": method}), ids(2)
    weight = torch.tensor(0.5, requires_grad=True)
    with spectune.route(model, [{"a": weight}, "b"]):
        for context in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.enable_grad, torch.no_grad):
            with torch.no_grad():
                weight += 0.25
            with context():
                routed = model(tokens).logits
            with torch.no_grad():
                with spectune.route(model, [{"a": float(weight)}, "b"]):
                    expected = model(tokens).logits
                torch.testing.assert_close(routed.clone(), expected, rtol=1e-4, atol=1e-4)
            if routed.requires_grad:
                weight.grad = None
                routed.square().mean().backward()
                assert weight.grad


def test_gradients_after_a_pass_of_inference_mode():
    model, tokens = several(tiny.llama(), {"a": "lora:rank=2", "b": "svf"}), ids(2)
    with spectune.route(model, [{"a": 0.5}, {"b": 2.0}]):
        with torch.inference_mode():
            expected = model(tokens).logits
        logits = model(tokens).logits
    torch.testing.assert_close(logits, expected.clone(), rtol=1e-4, atol=1e-4)
    logits.sum().backward()


def test_layers_that_are_not_there_are_told():
    model = several(tiny.llama(), {"a": SVF()})
    near = r"no adapted layer '.*up_prj'; did you mean '.*up_proj'"
    with pytest.raises(SpectuneError, match=near):
        spectune.activate(model, {"a": {"model.layers.0.mlp.up_prj": 1.0}})
    with pytest.raises(SpectuneError, match="must be a finite number"):
        spectune.activate(model, {"a": {"model.layers.0.mlp.up_proj": float("nan")}})


@pytest.mark.parametrize("start", [1.0, 0.0])
def test_a_weight_of_one_or_zero_that_takes_gradients_takes_them(start):
    model: Any = spectune.adapt(nn.Sequential(nn.Linear(6, 8)), "lora:rank=2")
    with torch.no_grad():
        model[0].adapters["default"][0].B.normal_()
    weight = torch.tensor(start, requires_grad=True)
    spectune.activate(model, {"default": weight})
    model(torch.randn(3, 6)).square().sum().backward()
    assert weight.grad is not None
    assert weight.grad != 0
