"""Experts whose weights lie side by side in one tensor: adapted, merged, saved and routed as any linear layer."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf

import spectune
import tiny
from spectune import SVF, Adapter, LoRA
from spectune.layers.adapted import adapted_layers
from spectune.layers.modules import effective_weight, find_linear
from spectune.speed.checkpointing import checkpoint_activations

MOE: dict[str, Any] = {"num_experts_per_tok": 2, "head_dim": 8}
LATENT: dict[str, Any] = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
MODELS: dict[str, Any] = {
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**tiny.TEXT, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**tiny.TEXT, **MOE, num_experts=4, moe_intermediate_size=24)
    ),
    "gpt_oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**tiny.TEXT, **MOE, num_local_experts=4)),
    "deepseek_v3": lambda: tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(
            **{**tiny.TEXT, "num_key_value_heads": 4},
            **LATENT,
            v_head_dim=8,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
        )
    ),
    "llama4": lambda: tf.Llama4ForCausalLM(
        tf.Llama4TextConfig(
            **tiny.TEXT,
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=1,
            intermediate_size_mlp=48,
            interleave_moe_layer_step=1,
            attention_chunk_size=32,
        )
    ),
}
IDS = torch.arange(1, 19).reshape(2, 9)
METHODS = [
    "lora:rank=2",
    "svf",
    "svft:pattern=banded,width=1",
    "pissa:rank=2",
    "lora_xs:rank=2",
    "adalora:rank=2,total_steps=9",
]


def made(name: str, implementation: str | None = None) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        if not parameter.any():  # as Llama-4's experts are
            torch.nn.init.normal_(parameter, std=0.05)
    if implementation is not None and name != "llama4":
        model.set_experts_implementation(implementation)
    return model


def shaken(model: Any, by: float = 0.05) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn_like(parameter))
    return model


def oracle(base: Any, adapter: Adapter) -> Any:
    """The base in float64 with W + dW written over each W."""
    dense = copy.deepcopy(base).double()
    dense.config._experts_implementation = "eager"  # the others take no float64
    with torch.no_grad():
        for name in adapter.layers:
            effective_weight(find_linear(dense, name)).add_(adapter.delta(name).double())
    return dense


@pytest.mark.parametrize("method", [*METHODS, "dora:rank=2", "dora:inner=svf"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_every_method_is_exact_in_the_answer_and_its_gradients(name, method):
    model = made(name)
    base = copy.deepcopy(model)
    spectune.adapt(model, method, targets=["gate_up_proj", "down_proj"])
    assert len(adapted_layers(model)) == 16
    torch.testing.assert_close(model(IDS).logits, base(IDS).logits, atol=1e-5, rtol=1e-5)
    shaken(model)
    dense = oracle(base, spectune.extract(model))
    answer = model(IDS).logits
    torch.testing.assert_close(answer, dense(IDS).logits.float(), atol=1e-5, rtol=1e-5)
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits.square().sum().backward()
    exact = embeddings.detach().double().requires_grad_()
    dense(inputs_embeds=exact).logits.square().sum().backward()
    assert embeddings.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(embeddings.grad, exact.grad.float(), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:left out of 'all-linear'")  # Llama-4's routers
def test_all_linear_takes_the_experts_of_every_layout(name, implementation, caplog):
    model = made(name, implementation)
    base = copy.deepcopy(model)
    with caplog.at_level("INFO", "spectune"):
        spectune.adapt(model, LoRA(rank=2))
    share = [int(r.message.split("%")[0].split()[-1]) for r in caplog.records if "covers" in r.message]
    assert all(percent >= 90 for percent in share)
    dense = oracle(base, spectune.extract(shaken(model)))
    answer = model(IDS).logits
    torch.testing.assert_close(answer, dense(IDS).logits.float(), atol=2e-5, rtol=1e-4)
    spectune.detach(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert torch.equal(model(IDS).logits, base(IDS).logits)


def test_gradients_of_the_factors_are_those_of_a_dense_model():
    model = made("mixtral", "eager").double()
    spectune.adapt(model, LoRA(rank=2), targets=["down_proj"])
    shaken(model)
    dense = oracle(made("mixtral"), spectune.extract(model))
    for parameter in dense.parameters():
        parameter.requires_grad_("experts" in "".join(n for n, p in dense.named_parameters() if p is parameter))
    model(IDS, labels=IDS).loss.backward()
    dense(IDS, labels=IDS).loss.backward()
    layer: Any = adapted_layers(model)["model.layers.1.mlp.experts.2.down_proj"]
    (update,) = layer.adapters["default"]
    whole = dense.model.layers[1].mlp.experts.down_proj.grad[2]
    scale = update.method.scale
    torch.testing.assert_close(update.B.grad, scale * whole @ update.A.T)
    torch.testing.assert_close(update.A.grad, scale * update.B.T @ whole)


@pytest.mark.parametrize("method", ["lora:rank=2", "svf", "dora:rank=2"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_merged_taken_out_saved_and_loaded(name, method, tmp_path):
    model = made(name)
    base = copy.deepcopy(model)
    shaken(spectune.adapt(model, method))
    expected = model(IDS).logits
    adapter = spectune.extract(model)
    adapter.save(tmp_path / "adapter")
    loaded = spectune.attach(copy.deepcopy(base), Adapter.load(tmp_path / "adapter"))
    torch.testing.assert_close(loaded(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "merged")
    reloaded = type(base).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(reloaded(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    spectune.merge(model)
    assert {n for n, _ in model.named_modules()} == {n for n, _ in base.named_modules()}
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    spectune.unmerge(model)
    assert torch.equal(model(IDS).logits, expected)
    spectune.detach(model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), base.parameters(), strict=True))
    other = made(name)
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if "down_proj" in n)[1] *= 1.5
    with pytest.raises(ValueError, match=r"experts\.1\.down_proj"):
        spectune.attach(other, Adapter.load(tmp_path / "adapter"))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:left out of 'all-linear'")
def test_rows_with_adapters_of_their_own(name):
    model = made(name)
    for adapter in ("a", "b"):
        shaken(spectune.adapt(model, LoRA(rank=2), name=adapter), by=0.1 if adapter == "a" else 0.2)
    alone = []
    for row, choice in enumerate(("a", "b")):
        spectune.activate(model, choice)
        alone.append(model(IDS[row : row + 1]).logits)
    with spectune.route(model, ["a", "b"]):
        torch.testing.assert_close(model(IDS).logits, torch.cat(alone), atol=1e-5, rtol=1e-4)
    spectune.activate(model, None)
    assert torch.equal(model(IDS).logits, made(name)(IDS).logits)


@pytest.mark.parametrize("split", [None, "auto"])
def test_another_adapter_with_split_on_a_model_that_has_one(split):
    model = made("mixtral")
    for name, how in (("a", split), ("b", "auto")):
        spectune.adapt(model, LoRA(rank=2), name=name, split=how)
    assert list(spectune.extract(model, "b").layers) == list(spectune.extract(model, "a").layers)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_plain_trainer_goes_on_from_its_checkpoint(name, tmp_path):
    def trainer(model: Any) -> tf.Trainer:
        options: dict[str, Any] = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_steps": 2}
        arguments = tf.TrainingArguments(str(tmp_path), max_steps=4, learning_rate=2e-2, **options)
        return tf.Trainer(model, arguments, train_dataset=[{"input_ids": r, "labels": r} for r in IDS])  # type: ignore

    model = spectune.adapt(made(name), LoRA(rank=2), targets=["gate_up_proj", "down_proj"])
    trainer(model).train()
    expected = model.eval()(IDS).logits
    second, base = made(name), made(name)
    spectune.adapt(second, LoRA(rank=2), targets=["gate_up_proj", "down_proj"])
    trainer(second).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(second.eval()(IDS).logits, expected, atol=1e-4, rtol=1e-3)
    halfway = type(base).from_pretrained(tmp_path / "checkpoint-4")
    torch.testing.assert_close(halfway(IDS).logits, expected, atol=1e-4, rtol=1e-3)
    spectune.detach(second)
    assert all(torch.equal(p, q) for p, q in zip(second.parameters(), base.parameters(), strict=True))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_states_of_experts_and_of_models_around_them(name, tmp_path):
    whole = made(name)
    shaken(spectune.adapt(whole.model, LoRA(rank=2), targets=["gate_up_proj", "down_proj"]))
    expected = whole(IDS).logits
    whole.save_pretrained(tmp_path)
    torch.testing.assert_close(type(whole).from_pretrained(tmp_path)(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    again = made(name)
    spectune.adapt(again.model, LoRA(rank=2), targets=["gate_up_proj", "down_proj"])
    merged = spectune.merge(copy.deepcopy(whole)).state_dict()
    with pytest.raises(spectune.SpectuneError, match=r"experts\.\w+ and no adapter"):
        again.load_state_dict(merged, strict=False)
    again.load_state_dict(whole.state_dict())
    assert torch.equal(again(IDS).logits, expected)


def test_copies_and_casts():
    model = shaken(spectune.adapt(made("qwen3_moe", "eager"), "svf"))
    copied = copy.deepcopy(model)
    assert torch.equal(copied(IDS).logits, model(IDS).logits)
    expected = model(IDS).logits
    torch.testing.assert_close(copied.to(torch.float64)(IDS).logits.float(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(pickle.loads(pickle.dumps(model))(IDS).logits, expected)


@pytest.mark.parametrize("mode", [True, "selective"])
@pytest.mark.parametrize("method", ["lora:rank=2", "dora:rank=2"])
def test_checkpointed_blocks_have_the_same_gradients(method, mode):
    model = shaken(spectune.adapt(made("qwen3_moe", "grouped_mm"), method)).train()
    model(IDS, labels=IDS).loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    checkpoint_activations(model, mode)
    model(IDS, labels=IDS).loss.backward()
    again = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads, again, strict=True))


@pytest.mark.parametrize("method", ["lora:rank=2", "adalora:rank=1,initial_rank=2,total_steps=6,t_init=1,t_final=1"])
def test_experts_that_no_token_goes_to_wait_for_one(method):
    model = spectune.adapt(made("mixtral"), method).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(IDS[:1, :2], labels=IDS[:1, :2]).loss  # two tokens, each to two of four experts
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


WAYS: dict[str, Any] = {
    "einsum": lambda x, w: torch.einsum("ti,eoi->teo", x, w),
    "float": lambda x, w: torch.stack([x.float() @ w[i].float().T for i in range(3)], 1),
    "double": lambda x, w: (x.double() @ w.double().mT).movedim(0, 1),
    "to": lambda x, w: (x.to(torch.float64) @ w.to(torch.float64).transpose(1, 2)).movedim(0, 1),
    "type_as": lambda x, w: torch.stack([F.linear(x.double(), one.type_as(x.double())) for one in w], 1),
    "T": lambda x, w: torch.stack([x @ w[i].T for i in range(3)], 1),
    "t": lambda x, w: torch.stack([torch.mm(x, w[i].t()) for i in range(-3, 0)], 1),
    "permute": lambda x, w: (x @ w.permute(0, 2, 1)).movedim(0, 1),
    "weight first": lambda x, w: torch.stack([(w[i] @ x.T).T for i in range(3)], 1),
    "slices": lambda x, w: torch.cat([x @ w[:, :2].mT, x @ w[:, 2:].mT], -1).movedim(0, 1),
    "picked": lambda x, w: torch.einsum("ti,keoi->tkeo", x, w[torch.tensor([[2, 0, 1]])])[:, 0].roll(-1, 1),
    "chunks": lambda x, w: torch.cat([x @ part.mT for part in torch.chunk(w, 2, dim=1)], -1).movedim(0, 1),
    "views": lambda x, w: (x @ w.reshape(-1, w.shape[-1]).T).view(len(x), 3, -1),
    "unbind": lambda x, w: torch.stack([F.linear(x, one) for one in w.unbind()], 1),
    "cat": lambda x, w: (x @ torch.cat([w, -w])[: len(w)].mT).movedim(0, 1),
    "scaled": lambda x, w: (x @ (2 * w / 2 - 0 * w).mT).movedim(0, 1),
    "addmm": lambda x, w: torch.stack([torch.addmm(torch.zeros(5), x, w[i].T) for i in range(3)], 1),
    "normed": lambda x, w: (x @ F.normalize(w, dim=-1).mT).movedim(0, 1),
}


class Strange(torch.nn.Module):
    """Experts that use their tensor in a way of their own."""

    is_transposed = False

    def __init__(self, way: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up_proj = torch.nn.Parameter(torch.randn(3, 5, 4))
        self.down_proj = torch.nn.Parameter(torch.randn(3, 4, 5))
        self.way = way

    def forward(self, x: Any) -> Any:
        return self.way(x, self.up_proj)


@pytest.mark.parametrize("method", ["lora:rank=2", "dora:rank=2", "svf"])
@pytest.mark.parametrize("way", WAYS)
def test_whatever_is_done_with_experts_is_done_with_the_adapted_ones(way, method):
    model = shaken(spectune.adapt(torch.nn.ModuleDict({"experts": Strange(WAYS[way])}), method, ["up_proj"]), 0.3)
    plain = shaken(spectune.adapt(torch.nn.ModuleDict({"experts": Strange(WAYS["unbind"])}), method, ["up_proj"]), 0.3)
    x = torch.randn(6, 4)
    if way == "normed":
        plain["experts"].way = lambda x, w: torch.einsum("ti,eoi->teo", x, F.normalize(torch.stack(list(w)), dim=-1))
    answers = [m["experts"](x) for m in (model, plain)]
    torch.testing.assert_close(answers[0].float(), answers[1], atol=1e-5, rtol=1e-5)
    for answer in answers:
        answer.float().square().sum().backward()
    trained = [[p.grad for p in m.parameters() if p.requires_grad] for m in (model, plain)]
    for a, b in zip(*trained, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    adapter = spectune.extract(model)
    spectune.merge(model)
    torch.testing.assert_close(model["experts"](x), answers[0], atol=1e-5, rtol=1e-5)
    assert len(adapter.layers) == 3


def test_casts_of_bfloat16_experts_keep_what_the_adapter_adds():
    model = torch.nn.ModuleDict({"experts": Strange(WAYS["float"])}).to(torch.bfloat16)
    shaken(spectune.adapt(model, "lora:rank=2", ["up_proj"]), 1e-2)
    x = torch.randn(6, 4)
    held, adapter = model["experts"].up_proj.double(), spectune.extract(model)
    whole = torch.stack([held[i] + adapter.delta(f"experts.{i}.up_proj").double() for i in range(3)])
    torch.testing.assert_close(model["experts"](x), torch.einsum("ti,eoi->teo", x.double(), whole).float())


def test_what_has_no_right_answer_with_adapters_is_refused_by_name():
    def made(way: Any, method: Any = "lora:rank=2", adapters: tuple[str, ...] = ("default",)) -> Any:
        model = torch.nn.ModuleDict({"experts": Strange(way)})
        for name in adapters:
            shaken(spectune.adapt(model, method, ["up_proj"], name=name))
        return model

    x = torch.randn(2, 4)
    refused = r"Strange uses its 'up_proj' in a way that is not known with adapters \({}.*leave the experts out"
    for why, way in {
        "mul_": lambda x, w: w.mul_(2),
        "data": lambda x, w: w.data.mul_(2),
        "writing": lambda x, w: w.__setitem__(0, x),
        "relu_": lambda x, w: torch.relu_(w),
        "add": lambda x, w: torch.add(w, w, out=torch.empty(3, 5, 4)),
    }.items():
        with torch.no_grad(), pytest.raises(ValueError, match=refused.format(why)):
            made(way)["experts"](x)
    with pytest.raises(ValueError, match=refused.format("with dropout")):
        made(WAYS["einsum"], LoRA(2, dropout=0.5)).train()["experts"](x)
    two = made(WAYS["einsum"], adapters=("a", "b"))
    with spectune.route(two["experts"], ["a", "b"]), pytest.raises(ValueError, match=refused.format("rows of the")):
        two["experts"](x)


def test_experts_whose_layout_is_not_known_are_none():
    unknown = Strange(WAYS["einsum"])
    unknown.is_transposed = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="'up_proj' matches no linear layer"):
        spectune.adapt(torch.nn.ModuleDict({"e": unknown, "l": torch.nn.Linear(2, 2)}), "lora:rank=2", ["up_proj"])
    with pytest.raises(ValueError, match="would be adapted and have rows or tensors of its own"):
        spectune.adapt(made("mixtral"), "lora:rank=2", modules_to_save=["model.layers.0.mlp.experts"])


def test_the_name_of_a_module_of_experts_stands_for_them():
    model = spectune.adapt(tiny.mixtral(), targets={"experts": LoRA(1), "q_proj": SVF()})
    names = list(adapted_layers(model))
    assert sum(".experts." in name for name in names) == len(names) - len(model.model.layers)
