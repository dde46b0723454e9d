"""AdaLoRA against its authors' algorithm, in a plain loop and in transformers.Trainer."""

import copy
import dataclasses
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

import spectune
import tiny
from methods.adalora_runs import FIRST, LAYERS, METHOD, RANK, STEPS, data, kept, network, train, trainable, updates
from spectune import AdaLoRA, DoRA


@pytest.mark.parametrize("clip", [None, 0.002])
@pytest.mark.parametrize("penalty", ["mean_norm", "sum_of_squares"])
def test_the_authors_algorithm_step_by_step(penalty, clip):
    """The penalty in the loss, clipping, the step, scores of what is then there, and the mask, in plain loops."""
    method = dataclasses.replace(METHOD, penalty=penalty)
    model = spectune.adapt(network(), method)
    ours = updates(model)
    layers = [{k: v.detach().clone().requires_grad_() for k, v in u.trained().items()} for u in ours]
    smooth = [{k: [torch.zeros_like(v), torch.zeros_like(v)] for k, v in layer.items()} for layer in layers]
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02)
    every = [p for layer in layers for p in layer.values()]
    reference = torch.optim.AdamW(every, lr=0.02)
    base, eye, end = network(), torch.eye(FIRST, dtype=torch.float64), STEPS - 5
    counts, final = [], None
    for t, (x, y) in enumerate(data(), start=1):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(trainable(model), clip)
        optimizer.step()

        h, norms = x, []
        for i, layer in enumerate(layers):
            linear = base[2 * i]
            W = linear.weight + method.alpha / FIRST * layer["P"] @ torch.diag(layer["E"]) @ layer["Q"]
            h = F.linear(h, W, linear.bias)
            h = torch.tanh(h) if i < LAYERS - 1 else h
            norms += [(layer["P"].T @ layer["P"] - eye).norm(), (layer["Q"] @ layer["Q"].T - eye).norm()]
        term = sum(norms) / (2 * LAYERS) if penalty == "mean_norm" else sum(norm**2 for norm in norms)
        reference.zero_grad()
        (F.mse_loss(h, y) + method.gamma * term).backward()
        if clip:
            assert torch.nn.utils.clip_grad_norm_(every, clip) > clip
        reference.step()
        if t <= end:  # then scores rest
            for layer, state in zip(layers, smooth, strict=True):
                for key, w in layer.items():
                    assert w.grad is not None
                    I = (w * w.grad).abs().detach()
                    bar, uncertain = state[key]
                    bar = method.beta1 * bar + (1 - method.beta1) * I
                    state[key] = [bar, method.beta2 * uncertain + (1 - method.beta2) * (I - bar).abs()]
        scores = torch.zeros(LAYERS, FIRST, dtype=torch.float64)
        for i, state in enumerate(smooth):
            importance = {key: bar * uncertain for key, (bar, uncertain) in state.items()}
            for j in range(FIRST):
                scores[i, j] = importance["E"][j] + importance["P"][:, j].mean() + importance["Q"][j, :].mean()
        if (3 < t <= end and t % 4 == 0) or t == end:
            budget = RANK + (FIRST - RANK) * (1 - (t - 3) / (STEPS - 5 - 3)) ** 3
            best = scores.flatten().topk(int(budget * LAYERS)).indices
            final = torch.zeros(LAYERS * FIRST, dtype=torch.bool)
            final[best] = True
            final = final.view(LAYERS, FIRST)
        if final is not None and (t >= end or t % 4 == 0):
            with torch.no_grad():
                for layer, keep in zip(layers, final, strict=True):
                    layer["E"].mul_(keep)

        for update, layer, scored in zip(ours, layers, smooth, strict=True):
            assert int(update.step) == t
            for key, value in layer.items():
                torch.testing.assert_close(getattr(update, key), value, rtol=1e-9, atol=1e-12)
                state = [getattr(update, f"{kind}_{key}") for kind in ("sensitivity", "uncertainty")]
                torch.testing.assert_close(state, scored[key], rtol=1e-9, atol=1e-15)
        counts.append(kept(model))
    assert counts[:3] == [12, 12, 12]
    assert counts[7] == int(3 * (2 + 2 * (7 / 12) ** 3))
    assert counts[-6:] == [RANK * LAYERS] * 6


def test_pruned_triplets_may_come_back_before_the_end():
    model = spectune.adapt(network(), METHOD)
    batches, seen = data(), []
    optimizer = train(model, batches[:8])
    pruned = [update.E == 0 for update in updates(model)]
    train(model, batches[8:9], optimizer)
    seen = [bool((update.E[p] != 0).all()) for update, p in zip(updates(model), pruned, strict=True)]
    assert sum(int(p.sum()) for p in pruned) == 12 - int(3 * (2 + 2 * (7 / 12) ** 3))
    assert all(seen)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_gradient_accumulation_counts_optimizer_steps(accumulate):
    model = spectune.adapt(network(), METHOD)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02)
    for x, y in data():
        optimizer.zero_grad()
        for part_x, part_y in zip(x.chunk(accumulate), y.chunk(accumulate), strict=True):
            (F.mse_loss(model(part_x), part_y) / accumulate).backward()
        optimizer.step()
    assert {int(update.step) for update in updates(model)} == {STEPS}
    assert kept(model) == RANK * LAYERS


def test_its_state_travels_in_the_state_dict():
    batches = data()
    model = spectune.adapt(network(), METHOD)
    optimizer = train(model, batches[:9])
    state, optimizer_state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, batches[9:], optimizer)

    resumed = spectune.adapt(network(), METHOD)
    resumed.load_state_dict(state)
    optimizer = torch.optim.AdamW(trainable(resumed), lr=0.02)
    optimizer.load_state_dict(optimizer_state)
    train(resumed, batches[9:], optimizer)
    for key, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value)
    assert kept(resumed) == RANK * LAYERS


def test_inside_a_dora_it_prunes_as_well():
    model = spectune.adapt(network(), DoRA(METHOD))
    train(model, data())
    assert kept(model) == RANK * LAYERS


def test_an_attached_adapter_that_trains_is_pruned_again():
    model = spectune.adapt(network(), METHOD)
    train(model, data()[:5])
    adapter = spectune.extract(model)
    frozen = spectune.attach(network(), adapter)
    assert not trainable(frozen)
    assert not updates(frozen)
    again = spectune.attach(network(), adapter, trainable=True)
    train(again, data())
    assert kept(again) == RANK * LAYERS


def test_beside_another_method_the_budget_is_over_its_own_layers():
    model = spectune.adapt(network(), METHOD, overrides={"2": "svf"})
    train(model, data())
    assert kept(model) == RANK * 2


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        ids = torch.randint(3, 96, (6,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("how", ["max_steps", "epochs"])
def test_transformers_trainer_tells_it_the_length(how, tmp_path):
    model = tiny.llama()
    spectune.adapt(model, AdaLoRA(rank=2, interval=2), ["q_proj", "v_proj", "down_proj"])
    length: Any = {"max_steps": 12} if how == "max_steps" else {"num_train_epochs": 4}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        **length,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        transformers.Trainer(model=model, args=arguments, train_dataset=Rows()).train()
    assert {int(update.step) for update in updates(model)} == {12}
    assert kept(model) == 2 * 6
