"""The trainer by itself, on two small layers: what it divides by, what it counts, and what it does not go on with."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from transformers import EarlyStoppingCallback, TrainingArguments

import spectune
from spectune import SpectuneError
from spectune.training.trainer.sampling import BLANK
from spectune.training.trainer.trainer import AdapterTrainer, rising

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")
IGNORE = -100


class Squares:
    """A task: the squared distance of each answer from its label, and which answers were above zero."""

    config = SimpleNamespace(fused=False)
    gathered = ("above",)

    def sums(self, model, inputs):
        there = inputs["labels"] != IGNORE
        answers = model(inputs["input_ids"])[..., 0]
        loss = (answers - inputs["labels"].float()).square()[there].sum()
        return {"loss": loss, "items": there.sum(), "above": (answers[there] > 0).detach()}

    def metrics(self, sums):
        return {"loss": float(sums["loss"] / sums["items"]), "above": int(sums["above"].sum())}


def examples(count, seed=0):
    """Return examples of three items, of which one in four is not learned."""
    g = torch.Generator().manual_seed(seed)
    drawn = [(torch.randn(3, 4, generator=g), torch.randint(0, 5, (3,), generator=g)) for _ in range(count)]
    for i, (_, labels) in enumerate(drawn):
        if i % 4 == 0:
            labels[1:] = IGNORE
    return [{"input_ids": x, "labels": labels} for x, labels in drawn]


def collate(batch):
    return {key: torch.stack([example[key] for example in batch]) for key in batch[0]}


def network():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    return spectune.adapt(model, spectune.DoRA(spectune.LoRA(rank=2, alpha=2)))


def trainer(tmp_path, model=None, task=None, count=10, callbacks=None, group_lr=None, **settings):
    fixed = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "remove_unused_columns": False, "seed": 3}
    given = {
        "save_strategy": "no",
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "per_device_train_batch_size": 2,
        **settings,
    }
    return AdapterTrainer(
        model or network(),
        TrainingArguments(output_dir=str(tmp_path), **fixed, **given),
        train_dataset=examples(count),
        eval_dataset=examples(7, seed=1),
        data_collator=collate,
        task=task or Squares(),
        group_lr=group_lr,
        callbacks=callbacks,
    )


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_a_step_in_parts_is_by_the_mean_over_all_its_items(tmp_path):
    """Plain gradient descent: p - lr * the gradient of the sum of losses over all items, divided by their number."""
    batch = collate(examples(6))
    model, rate = network(), 0.1
    sums = Squares().sums(model, batch)
    (sums["loss"] / sums["items"]).backward()
    expected = {n: p.detach() - rate * p.grad for n, p in model.named_parameters() if p.requires_grad}
    model, more = network(), {"gradient_accumulation_steps": 3, "max_grad_norm": 0.0, "weight_decay": 0.0}
    trainer(tmp_path, model, count=6, max_steps=1, optim="sgd", learning_rate=rate, **more).train()
    torch.testing.assert_close(trained(model), expected, rtol=1e-5, atol=1e-6)


def test_a_measure_is_over_items_and_not_over_batches(tmp_path):
    run = trainer(tmp_path, per_device_eval_batch_size=3)  # of seven examples
    with torch.no_grad():
        whole = Squares().sums(run.model.eval(), collate(examples(7, seed=1)))
    found = run.evaluate()
    assert found["eval_loss"] == pytest.approx(float(whole["loss"] / whole["items"]), rel=1e-5)
    assert found["eval_above"] == int(whole["above"].sum())
    assert run.evaluate(metric_key_prefix="test")["test_loss"] == found["eval_loss"]


def test_losses_of_a_batch_alone_and_of_a_whole_step(tmp_path):
    run, batch = trainer(tmp_path), collate(examples(3))
    sums = Squares().sums(run.model, batch)
    alone, told = run.compute_loss(run.model, dict(batch), return_outputs=True)
    assert alone.item() == pytest.approx(sums["loss"].item() / int(sums["items"]))
    assert told["items"] == sums["items"]
    assert run.compute_loss(run.model, dict(batch), num_items_in_batch=torch.tensor(40)).item() == pytest.approx(
        sums["loss"].item() / 40
    )


def test_a_blank_batch_counts_for_nothing(tmp_path):
    run, batch = trainer(tmp_path), collate(examples(3))
    blank = {**batch, BLANK: True}
    assert int(run._get_num_items_in_batch([batch, blank], torch.device("cpu"))) == 9 - 2
    run.model.train()
    loss, sums = run.compute_loss(run.model, blank, True, torch.tensor(7))
    assert (loss.item(), int(sums["items"]), len(sums["above"])) == (0.0, 0, 0)
    loss.backward()
    assert not any(p.grad.any() for p in run.model.parameters() if p.grad is not None)
    assert run.total_tokens() == 0


def test_tokens_are_those_that_were_trained_on(tmp_path):
    class Tokens(Squares):
        def sums(self, model, inputs):
            told = {"tokens": torch.tensor(100)} if "told" in inputs else {}
            return {**super().sums(model, inputs), **told}

    run, batch = trainer(tmp_path, task=Tokens()), collate(examples(2))
    ways = [
        ({"cu_seq_lens_q": torch.tensor([0, 3, 7])}, 7),
        ({"cu_seq_lens_k": torch.tensor([0, 9]), "cu_seq_lens_q": torch.tensor([0, 5])}, 9),
        ({"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}, 3),
        ({}, 2 * 3 * 4),
        ({"told": torch.ones(())}, 100),
    ]
    so_far = 0
    for inputs, tokens in ways:
        run.model.train()
        run.compute_loss(run.model, {**batch, **inputs})
        so_far += tokens
        assert run.total_tokens() == so_far
        run.model.eval()
        run.compute_loss(run.model, {**batch, **inputs})
        assert run.total_tokens() == so_far


def test_tensors_by_their_name_have_rates_of_their_own(tmp_path):
    run = trainer(tmp_path, learning_rate=0.01, weight_decay=0.2, group_lr={"magnitude": 0.5})
    optimizer = run.create_optimizer()
    assert run.create_optimizer() is optimizer
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    own = {name.rpartition(".")[2]: rates[id(p)] for name, p in run.model.named_parameters() if p.requires_grad}
    assert own == {"magnitude": 0.5, "A": 0.01, "B": 0.01}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.2}
    with pytest.raises(SpectuneError, match="group_lr: no trained tensor is named 'magnitudes'; did you mean 'magnit"):
        trainer(tmp_path, group_lr={"magnitudes": 0.5}).create_optimizer()


@pytest.mark.parametrize("kind", ["linear", "constant_with_warmup", "cosine"])
def test_a_warm_up_begins_above_zero(tmp_path, kind):
    run = trainer(tmp_path, learning_rate=0.2, warmup_steps=3, lr_scheduler_type=kind)
    optimizer = run.create_optimizer()
    schedule = run.create_scheduler(10, optimizer)
    assert run.create_scheduler(10, optimizer) is schedule
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    left = {
        "linear": lambda t: 1 - t,
        "constant_with_warmup": lambda t: 1.0,
        "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    }[kind]
    assert rates == pytest.approx([0.05, 0.1, 0.15, *(0.2 * left(step / 7) for step in range(7))])


def test_without_a_warm_up_the_schedule_is_transformers_own(tmp_path):
    run = trainer(tmp_path, learning_rate=0.2)
    schedule = run.create_scheduler(4, run.create_optimizer())
    assert schedule.get_last_lr() == [0.2, 0.2]  # of what decays and of what does not


def test_the_rising_factor():
    assert [rising(lambda step: 0.5, 3)(step) for step in range(5)] == [0.25, 0.5, 0.75, 0.5, 0.5]


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    class Broken(Squares):
        def sums(self, model, inputs):
            sums = super().sums(model, inputs)
            return {**sums, "loss": sums["loss"] * math.nan}

    run = trainer(tmp_path, task=Broken(), max_steps=3, logging_strategy="steps", logging_steps=1)
    with pytest.raises(SpectuneError, match=r"^the loss became nan at step 1: lower the learning rate \(no checkpoint"):
        run.train()
    with pytest.raises(SpectuneError, match=r"^the held-out loss became nan at step"):
        run.evaluate()
    run._tr_loss = torch.tensor(math.inf)  # of steps that were not logged
    with pytest.raises(SpectuneError, match=r"^the loss became inf at step 1"):
        run.check_loss()


def test_an_adapter_that_is_not_finite_is_never_saved(tmp_path):
    run = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    original = run.training_step

    def step(model, *args, **kwargs):
        found = original(model, *args, **kwargs)
        if run.state.global_step == 1:
            next(p for p in model.parameters() if p.requires_grad).grad.fill_(math.inf)
        return found

    run.training_step = step
    with pytest.raises(SpectuneError, match=r"^the adapter became nan at step 2: .*checkpoint-1"):
        run.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_patience_goes_on_counting_with_this_runs_own(tmp_path):
    settings = {"eval_strategy": "steps", "load_best_model_at_end": True, "save_strategy": "steps"}
    settings |= {"metric_for_best_model": "loss", "max_steps": 4, "eval_steps": 1, "save_steps": 1}
    stopper = EarlyStoppingCallback(early_stopping_patience=2)
    run = trainer(tmp_path, callbacks=[stopper], **settings)
    run.state.stateful_callbacks = {
        "EarlyStoppingCallback": {
            "args": {"early_stopping_patience": 5},
            "attributes": {"early_stopping_patience_counter": 1},
        }
    }
    run._load_callback_state()
    assert (stopper.early_stopping_patience, stopper.early_stopping_patience_counter) == (2, 1)
    run.state.stateful_callbacks = {}
    run._load_callback_state()  # of a run without one
    assert stopper.early_stopping_patience_counter == 1


@pytest.mark.parametrize("why", ["patience", "steps"])
def test_a_run_that_had_ended_takes_no_step_when_it_goes_on(tmp_path, why):
    callbacks = [EarlyStoppingCallback(early_stopping_patience=2)] if why == "patience" else None
    run = trainer(tmp_path, callbacks=callbacks, max_steps=4)
    run.state.max_steps, run.state.global_step = 4, 4 if why == "steps" else 1
    for stopper in run._stoppers():
        stopper.early_stopping_patience_counter = 2
    run._run_epoch(epoch=0)  # which has nothing to run with
    assert run.control.should_training_stop
