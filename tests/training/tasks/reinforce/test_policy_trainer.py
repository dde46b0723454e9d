"""The trainer of rollouts: means since the last line, rewards that say nothing, and what became of each problem."""

import json
import math
import warnings
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from spectune import SpectuneError
from spectune.training.tasks.reinforce.policy_trainer import PolicyTrainer
from spectune.training.tasks.reinforce.rewards import RewardError
from spectune.training.trainer.sampling import BLANK
from training.trainer.test_trainer import Squares, collate, examples, network

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")


class Rewarded(Squares):
    """A task whose rewards are the labels' values, and differ where they are said to."""

    gathered = ()

    def __init__(self):
        self.outcomes: list[dict[str, object]] = []
        self.signal, self.fails = 1, False

    def sums(self, model, inputs):
        if self.fails:
            raise RewardError("the reward 'mine' failed: no such answer")
        sums = super().sums(model, inputs)
        self.outcomes += [{"first": int(labels[0])} for labels in inputs["labels"]]
        reward = inputs["labels"].clamp(min=0).sum()
        return {"loss": sums["loss"], "items": sums["items"], "reward": reward, "signal": torch.tensor(self.signal)}

    def metrics(self, sums):
        return {key: float(sums[key] / sums["items"]) for key in ("loss", "reward")}


@pytest.fixture
def made(tmp_path):
    task: Any = Rewarded()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, per_device_eval_batch_size=3,
        remove_unused_columns=False,
    )  # fmt: skip
    run = PolicyTrainer(network(), arguments, eval_dataset=examples(7), data_collator=collate, task=task)
    return run, task


def step(run, batch):
    run.model.train()
    return run.compute_loss(run.model, dict(batch), num_items_in_batch=torch.tensor(10))


def test_a_line_has_the_means_since_the_last_one(made):
    run, task = made
    batches = [collate(examples(4)), collate(examples(3, seed=5))]
    sums = [task.sums(run.model, batch) for batch in batches]
    for batch, expected in zip(batches, sums, strict=True):
        assert float(step(run, batch).detach()) == pytest.approx(expected["loss"].item() / 10)
    logs = {"loss": 0.5}
    run.log(logs)
    items = sum(int(each["items"]) for each in sums)
    assert logs["reward"] == pytest.approx(sum(int(each["reward"]) for each in sums) / items)
    assert logs["loss"] == pytest.approx(sum(each["loss"].item() for each in sums) / items)
    again = {"loss": 0.5}
    run.log(again)  # nothing came since
    assert "reward" not in again
    step(run, batches[0])
    other = {"eval_reward": 1.0}
    run.log(other)  # of an evaluation, which is another line
    assert "reward" not in other
    run.log(again)
    assert again["reward"] == pytest.approx(int(sums[0]["reward"]) / int(sums[0]["items"]))


def test_an_evaluation_is_no_part_of_a_line(made):
    run, _ = made
    run.model.eval()
    run.compute_loss(run.model, collate(examples(3)), num_items_in_batch=torch.tensor(10))
    assert run._since_log == {}


def test_a_reward_that_fails_names_the_step_and_what_is_kept(made):
    run, task = made
    task.fails, run.state.global_step = True, 6
    with pytest.raises(SpectuneError) as failed:
        step(run, collate(examples(2)))
    assert str(failed.value) == "the reward 'mine' failed: no such answer (at step 7; no checkpoint yet)"
    assert isinstance(failed.value.__cause__, RewardError)


def test_rewards_that_never_differ_are_told_of_once(made):
    run, task = made
    batch = collate(examples(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for signal in [*[0] * 9, 1, *[0] * 9]:  # one that differs begins the count anew
            task.signal = signal
            step(run, batch)
    with pytest.warns(UserWarning, match="in 10 batches no prompt had completions of different rewards"):
        step(run, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(25):
            step(run, batch)


def test_what_became_of_each_problem_is_written_beside_the_measures(made, tmp_path):
    run, task = made
    run.state.global_step = 12
    held = examples(7)
    for _ in range(2):  # each evaluation is written anew
        found = run.evaluate()
        lines = (tmp_path / "outcomes" / "step-12.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [{"first": int(each["labels"][0])} for each in held]
    whole = task.sums(run.model, collate(held))
    assert found["eval_reward"] == pytest.approx(int(whole["reward"]) / int(whole["items"]))
    assert "eval_loss" not in found  # which a policy has none of
    assert not math.isnan(found["eval_reward"])


def test_a_stand_in_leaves_no_outcome(made):
    run, task = made
    sums = run._sums(run.model, {**collate(examples(2)), BLANK: True})
    assert task.outcomes == []
    assert not any(value.any() for value in sums.values())
    run._sums(run.model, collate(examples(2)))
    assert len(task.outcomes) == 2


def test_outcomes_that_cannot_be_written_name_what_is_kept(made, tmp_path, monkeypatch):
    run, _ = made

    def full(path, write):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("spectune.training.tasks.reinforce.policy_trainer.write_atomically", full)
    with pytest.raises(SpectuneError, match="no checkpoint yet"):
        run.evaluate()
