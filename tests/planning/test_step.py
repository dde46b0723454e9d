"""A step that is counted on the meta device does what the real one does."""

import gc
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import spectune
import tiny
from spectune.layers.adapted import adapted_layers
from spectune.methods import parse
from spectune.model.targets import resolve
from spectune.planning.batch import Batch, loss_of, make_inputs, training_attention
from spectune.planning.machine import Machine
from spectune.planning.step import _pass, measure
from spectune.speed.checkpointing import checkpoint_activations


def addmm_flop(out, a, b, **_):
    return 2 * a[0] * a[1] * b[1]


METHODS = ["lora:rank=2", "svf", "svft:pattern=banded,width=2", "svft:pattern=top_k,width=2", "pissa:rank=4"]
METHODS += ["lora_xs:rank=4", "dora:rank=2", "dora:inner=svf", "adalora:rank=2", "vera:rank=8"]
BATCH = Batch(2, 8, gradient_checkpointing=False)


def llama(layers=2):
    model = tiny.llama(num_hidden_layers=layers)
    model.set_attn_implementation("sdpa")
    return model


def cost(model, methods, batch=BATCH, dtype=torch.float32):
    return measure(model, methods, batch, dtype, Machine())


def methods_of(model, text):
    return resolve(model, parse(text))


@pytest.mark.parametrize("text", METHODS)
@pytest.mark.parametrize("again", [False, "selective", True])
def test_flops_are_those_of_a_real_step(text, again):
    real = spectune.adapt(llama(), text, factored=True).train()
    checkpoint_activations(real, again)
    in_place = {torch.ops.aten.addmm_: lambda *shapes, out_shape=None, **_: addmm_flop(*shapes)}
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with training_attention(real):
        inputs = make_inputs(real, BATCH)
        with counter:
            loss_of(real, inputs).backward()
    meta = llama().to("meta")
    batch = replace(BATCH, gradient_checkpointing=again)
    assert cost(meta, methods_of(meta, text), batch).flops == counter.get_total_flops()


@pytest.mark.parametrize("text", ["floor", "full", *METHODS])
def test_what_is_held_is_at_least_what_autograd_saves(text):
    """On real tensors: every storage that backward will read, but parameters and bases."""
    real = llama()
    if text == "floor":
        real.requires_grad_(False)
        real.get_input_embeddings().register_forward_hook(lambda m, i, output: output.requires_grad_())
    elif text != "full":
        spectune.adapt(real, text, factored=True)
    own = {t.untyped_storage().data_ptr() for t in [*real.parameters(), *real.buffers()]}
    saved, kept = {}, []

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), training_attention(real):
        loss_of(real.train(), make_inputs(real, BATCH))
    least = sum(size for pointer, size in saved.items() if pointer not in own)
    meta = llama().to("meta")
    found = cost(meta, text if text in ("floor", "full") else methods_of(meta, text)).activations
    assert least <= found <= 2 * least


def test_what_is_computed_again_is_not_held():
    model = llama(7).to("meta")
    chosen = methods_of(model, "lora:rank=2")
    for dtype in (torch.float32, torch.bfloat16):
        everything, light, blocks = (
            cost(model, chosen, Batch(4, 64, gradient_checkpointing=how), dtype) for how in (False, "selective", True)
        )
        assert everything.saved > 1.5 * light.saved > 2 * blocks.saved
        assert everything.seconds < min(light.seconds, blocks.seconds)
        assert everything.flops <= light.flops < 0.95 * blocks.flops
        assert (everything.flops == light.flops) is (dtype == torch.bfloat16)  # in float32 wide products are repeated
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_a_step_with_dropout_is_counted_too():
    again = replace(BATCH, gradient_checkpointing="selective")
    counts = []
    for text in ("lora:rank=2,dropout=0.1", "lora:rank=2"):
        model = llama().to("meta")
        counts.append(cost(model, methods_of(model, text), again))
    assert counts[0].seconds > counts[1].seconds > 0


@pytest.mark.parametrize("again", [False, "selective", True])
@pytest.mark.parametrize("text", ["floor", "full", "lora:rank=2", "svf", "dora:rank=2"])
def test_two_short_models_tell_of_a_deep_one(text, again):
    model, batch = llama(7).to("meta"), replace(BATCH, gradient_checkpointing=again)
    chosen = text if text in ("floor", "full") else methods_of(model, text)
    short, whole = cost(model, chosen, batch), _pass(model, chosen, batch, torch.float32, Machine())
    assert short.flops == pytest.approx(whole.flops)
    assert short.activations == pytest.approx(whole.activations, rel=0.02)
    assert short.seconds == pytest.approx(whole.seconds, rel=0.02)


def test_blocks_that_differ_are_all_passed():
    model = llama(7).to("meta")
    mixed = resolve(model, parse("lora:rank=2"), overrides={"layers.5.mlp.up_proj": "lora:rank=9"})
    assert cost(model, mixed).flops == _pass(model, mixed, BATCH, torch.float32, Machine()).flops


def test_cost_is_affine_in_the_rows():
    model = llama().to("meta")
    # padding of the rows that the loss takes at once is in steps of 32
    chosen, batches = methods_of(model, "lora:rank=2"), [replace(BATCH, rows=4 * n, length=9) for n in (2, 3, 5)]
    two, three, five = (cost(model, chosen, batch) for batch in batches)
    assert two.extended(three, 3).activations == pytest.approx(five.activations, rel=0.02)
    assert two.extended(three, 3).flops == pytest.approx(five.flops)


def test_half_precision_holds_less_and_frozen_bases_follow_it():
    model = llama().to("meta")
    chosen = methods_of(model, "svf")
    assert cost(model, chosen, dtype=torch.bfloat16).activations < cost(model, chosen).activations


def test_the_model_comes_back_as_it_was():
    model = llama().to("meta")
    before = {n: (p.dtype, p.shape, p.requires_grad) for n, p in model.named_parameters()}
    cost(model, methods_of(model, "dora:rank=2"), dtype=torch.bfloat16)
    gc.collect()
    assert {n: (p.dtype, p.shape, p.requires_grad) for n, p in model.named_parameters()} == before
    assert not adapted_layers(model)
    assert model.config._attn_implementation == "sdpa"
    assert all(p.grad is None for p in model.parameters())


def test_logits_where_the_loss_is_hold_less():
    model = llama().to("meta")
    chosen = methods_of(model, "lora:rank=2")
    assert cost(model, chosen, replace(BATCH, supervised=0.25)).activations < cost(model, chosen).activations


@pytest.mark.parametrize("architecture", [a for a in tiny.ARCHITECTURES if a not in ("clip", "mixtral")])
def test_every_architecture_is_passed(architecture):
    model = tiny.ARCHITECTURES[architecture]().to("meta")
    adapted = cost(model, methods_of(model, "lora:rank=2"))
    floor = cost(model, "floor")
    assert adapted.flops > floor.flops > 0
    assert adapted.activations > floor.activations > 0


def test_examples_of_a_plan_have_nothing_in_common():
    model = tiny.ARCHITECTURES["llama"]()
    with training_attention(model):
        assert make_inputs(model, Batch(rows=3, length=16))["input_ids"].shape == (1, 48)
