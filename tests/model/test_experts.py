"""Experts whose weights lie side by side in one tensor: adapted, merged, saved and routed as any linear layer."""

import copy
import pickle
from typing import Any

import pytest
import torch
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


class Strange(torch.nn.Module):
    """Experts that use their tensor in a way of their own."""

    is_transposed = False

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = torch.nn.Parameter(torch.randn(3, 5, 4))
        self.down_proj = torch.nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: Any) -> Any:
        return torch.einsum("ti,eoi->teo", x, self.up_proj).sum()


def test_what_is_not_known_of_experts_is_refused_by_name():
    model = spectune.adapt(torch.nn.ModuleDict({"experts": Strange()}), "lora:rank=2")
    with pytest.raises(ValueError, match=r"Strange uses its 'up_proj' in a way that is not known .*einsum"):
        model["experts"](torch.randn(2, 4))
    unknown = Strange()
    unknown.is_transposed = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="'up_proj' matches no linear layer"):
        spectune.adapt(torch.nn.ModuleDict({"e": unknown, "l": torch.nn.Linear(2, 2)}), "lora:rank=2", ["up_proj"])
    with pytest.raises(ValueError, match="would be adapted and have rows or tensors of its own"):
        spectune.adapt(made("mixtral"), "lora:rank=2", modules_to_save=["model.layers.0.mlp.experts"])


def test_the_name_of_a_module_of_experts_stands_for_them():
    model = spectune.adapt(tiny.mixtral(), targets={"experts": LoRA(1), "q_proj": SVF()})
    names = list(adapted_layers(model))
    assert sum(".experts." in name for name in names) == len(names) - len(model.model.layers)
