"""AdaLoRA's schedule: when its penalty joins a gradient and what it listens to."""

import copy
import dataclasses
import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from transformers.trainer_callback import CallbackHandler

import spectune
from methods.adalora_runs import FIRST, LAYERS, METHOD, RANK, STEPS, data, kept, network, train, trainable, updates
from spectune import AdaLoRA, LoRA
from spectune.methods._adalora_schedule import BudgetSchedule, before_clip, tell_total_steps


def penalty_gradients(model: Any) -> Any:
    """The gradients of gamma times the mean norm, by autograd."""
    factors = {f"{i}.{name}": getattr(u, name) for i, u in enumerate(updates(model)) for name in ("P", "Q")}
    leaves = {key: value.detach().clone().requires_grad_() for key, value in factors.items()}
    eye = torch.eye(FIRST, dtype=torch.float64)
    norms = [((w.T @ w if key.endswith("P") else w @ w.T) - eye).norm() for key, w in leaves.items()]
    term: Any = METHOD.gamma * sum(norms) / len(norms)
    grads = torch.autograd.grad(term, [*leaves.values()])
    return {key: (factors[key], grad) for key, grad in zip(leaves, grads, strict=True)}


@pytest.mark.parametrize("how", ["once", "accumulated", "zeroed", "set_to_none", "scaled", "copied", "stepped"])
def test_the_penalty_joins_a_gradient_once_a_step_before_it_is_clipped(how):
    """E is zero at the start, so that P and Q have no gradient but the penalty's."""
    model = spectune.adapt(network(), METHOD)
    if how == "copied":
        model = copy.deepcopy(model)
    (x, y), *rest = data()
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=how == "scaled")
    expected = penalty_gradients(model)
    if how == "stepped":
        train(model, rest[:1], optimizer)
        optimizer.zero_grad()
    for _ in range(3 if how == "accumulated" else 1):
        scaler.scale(F.mse_loss(model(x), y)).backward()
    if how in ("zeroed", "set_to_none"):  # as where a loss was not finite
        optimizer.zero_grad(set_to_none=how == "set_to_none")
        F.mse_loss(model(x), y).backward()
    scaler.unscale_(optimizer)
    if how == "copied":  # hooks are not copied: it joins at the first step, and from then on before it
        scaler.step(optimizer)
        for parameter, grad in expected.values():
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-9, atol=0)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
    for parameter, grad in expected.values():
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-9, atol=0)
    optimizer.step()
    for parameter, grad in expected.values():
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-9, atol=0)


def test_gradients_that_are_asked_for_are_the_losss_own():
    model = spectune.adapt(network(), METHOD)
    x, y = data()[0]
    grads = torch.autograd.grad(F.mse_loss(model(x), y), trainable(model))
    assert sum(bool(grad.any()) for grad in grads) == LAYERS  # of E


def test_what_is_orthonormal_is_left_alone():
    model = spectune.adapt(network(), dataclasses.replace(METHOD, gamma=1e6))
    with torch.no_grad():
        for update in updates(model):
            update.P.copy_(torch.eye(*update.P.shape))
            update.Q.copy_(torch.eye(*update.Q.shape))
    x, y = data()[0]
    F.mse_loss(model(x), y).backward()
    assert not any(getattr(update, name).grad.any() for update in updates(model) for name in ("P", "Q"))


def test_a_copy_has_a_schedule_of_its_own():
    batches = data()
    model = spectune.adapt(network(), METHOD)
    train(model, batches[:5])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    copied = copy.deepcopy(model)
    train(copied, batches[5:])
    assert kept(copied) == RANK * LAYERS
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    train(model, batches[5:])
    assert all(torch.equal(v, copied.state_dict()[k]) for k, v in model.state_dict().items())


def test_two_models_and_another_optimizer_do_not_disturb_each_other():
    first, second = (spectune.adapt(network(), METHOD) for _ in range(2))
    other = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    train(first, data()[:2])
    assert [int(u.step) for u in updates(first) + updates(second)] == [2] * 3 + [0] * 3


def test_a_schedule_goes_with_its_adapter():
    gc.collect()
    before = len(BudgetSchedule._alive)
    model = spectune.adapt(network(), METHOD)
    assert len(BudgetSchedule._alive) == before + 1
    spectune.detach(model)
    gc.collect()
    assert len(BudgetSchedule._alive) == before
    spectune.adapt(model, LoRA(rank=2))
    train(model, data()[:1])


def test_without_a_length_it_warns_once_and_keeps_every_triplet():
    model = spectune.adapt(network(), AdaLoRA(rank=2))
    with pytest.warns(UserWarning, match=r"does not know the length of the run.*give AdaLoRA\(total_steps"):
        optimizer = train(model, data()[:1])
    train(model, data()[1:], optimizer)
    assert kept(model) == 3 * LAYERS


def test_phases_longer_than_the_run_are_told_when_the_run_is_known():
    model = spectune.adapt(network(), AdaLoRA(rank=2, t_init=30))
    tell_total_steps(model, STEPS)
    with pytest.raises(spectune.SpectuneError, match="must be below total_steps"):
        train(model, data()[:1])


def test_losses_that_are_scaled_together_have_the_penalty_once():
    model = spectune.adapt(network(), METHOD)
    expected = penalty_gradients(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    losses = scaler.scale([F.mse_loss(model(x), y) for x, y in data()[:2]])
    sum(losses).backward()
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    scaler.unscale_(optimizer)
    for parameter, grad in expected.values():
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-9, atol=0)
    assert BudgetSchedule.loss_scale is None


def test_a_step_that_a_scaler_leaves_out_counts_for_nothing():
    model = spectune.adapt(network(), METHOD)
    (x, y), *_ = data()
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    expected = penalty_gradients(model)
    for is_first in (True, False):
        optimizer.zero_grad()
        scaler.scale(F.mse_loss(model(x), y)).backward()
        if is_first:
            updates(model)[0].E.grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
    assert {int(update.step) for update in updates(model)} == {1}
    for parameter, grad in expected.values():
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-9, atol=0)


def test_what_is_clipped_by_hand_has_the_penalty_before():
    """As where hooks did not run: FSDP2's parts have none."""
    model = spectune.adapt(network(), METHOD)
    expected = penalty_gradients(model)
    for parameter, _ in expected.values():
        parameter.grad = torch.zeros_like(parameter)
    before_clip(model)
    before_clip(model)  # twice is as once
    for parameter, grad in expected.values():
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-9, atol=0)


def test_matrices_that_are_views_are_refused():
    model = spectune.adapt(network(), METHOD)
    flat = nn.Parameter(torch.zeros(9 * FIRST, dtype=torch.float64))
    del updates(model)[0].P
    updates(model)[0].P = flat.view(9, FIRST)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    with pytest.raises(spectune.SpectuneError, match=r"as FSDP1 makes them.*train with FSDP2 \(torch.distributed"):
        optimizer.step()


def test_deepspeed_is_refused_as_training_begins():
    model = spectune.adapt(network(), METHOD)
    handler = CallbackHandler([], model, None, None, None)
    state, control = transformers.TrainerState(max_steps=7), transformers.TrainerControl()
    arguments = SimpleNamespace(deepspeed="zero3.json")
    with pytest.raises(spectune.SpectuneError, match="take another method, or train without DeepSpeed"):
        handler.on_train_begin(arguments, state, control)
    arguments.deepspeed = None
    handler.on_train_begin(arguments, state, control)
    assert {update.__dict__["schedule"].total_steps for update in updates(model)} == {7}
    plain = CallbackHandler([], network(), None, None, None)
    assert "SpectuneRunLength" not in plain.callback_list
