"""Rewards by name: what is found, what is called with what, and what a wrong answer says."""

import sys

import numpy as np
import pytest
import torch

from spectune.errors import SpectuneError
from spectune.training.config import load_config
from spectune.training.tasks.reinforce.rewards import Reward, RewardError, load_reward, load_rewards

RECORDS = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2", "extra": 5}]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    return tmp_path


def test_a_function_of_the_working_directory_by_name(here):
    (here / "my_rewards.py").write_text(
        "class Group:\n    @staticmethod\n    def exact(completions, answer):\n"
        "        return [c == a for c, a in zip(completions, answer)]\n"
    )
    assert load_reward("my_rewards:Group.exact")(RECORDS, ["1", "1"]) == [1.0, 0.0]


def test_it_gets_the_columns_that_it_takes():
    seen = {}

    def everything(**columns):
        seen.update(columns)
        return [0, 1]

    Reward("r", everything)(RECORDS, ["x", "y"])
    assert seen == {"prompts": ["a", "b"], "completions": ["x", "y"], "answer": ["1", "2"], "extra": [None, 5]}
    assert Reward("r", lambda extra: [e or 0.5 for e in extra])(RECORDS, ["x", "y"]) == [0.5, 5.0]


def test_a_column_that_the_data_has_not():
    reward = Reward("r", lambda completions, anwser: [0.0])
    with pytest.raises(SpectuneError, match="takes 'anwser', which is no column of the data; did you mean 'answer'"):
        reward.check_columns(RECORDS)


@pytest.mark.parametrize("returned", [[0.5, 1], (0.5, 1), np.array([0.5, 1]), torch.tensor([0.5, 1])])
def test_what_holds_numbers_is_taken(returned):
    assert Reward("r", lambda completions: returned)(RECORDS, ["x", "y"]) == [0.5, 1.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "returned a NoneType; it must return a list of 2 finite numbers"),
        (0.5, "returned a float"),
        ([0.5], "returned 1 values"),
        (torch.zeros(2, 1), r"returned a Tensor of shape \(2, 1\)"),
        ([0.5, float("nan")], "gave nan for the completion 'y'"),
        ([0.5, "1"], "gave '1' for the completion 'y'"),
        ([None, None], "gave None for every completion"),
    ],
)
def test_what_does_not_is_refused(returned, message):
    with pytest.raises(RewardError, match="the reward r " + message):
        Reward("r", lambda completions: returned)(RECORDS, ["x", "y"])


def test_a_function_that_raises_is_named_with_its_line(here):
    (here / "raising.py").write_text("def f(completions):\n    return [1 / 0 for _ in completions]\n")
    message = r"raising:f raised ZeroDivisionError: division by zero \(raising.py, line 2\); it got 2 completions"
    with pytest.raises(RewardError, match=message):
        load_reward("raising:f")(RECORDS, ["x", "y"])


def test_names_that_lead_nowhere(here):
    (here / "found.py").write_text("exact_match = 1\n")
    (here / "needing.py").write_text("import not_there_at_all\n")
    (here / "broken.py").write_text("x = 1\nx.y\n")
    for name, message in [
        ("found", "is not module:function"),
        (":f", "is not module:function"),
        ("nowhere_to_be_found:f", "there is no module 'nowhere_to_be_found'"),
        ("found:exact_mach", "has no 'exact_mach'; did you mean 'exact_match'"),
        ("found:exact_match", "is a int, not a function"),
        ("needing:f", "needing needs the module 'not_there_at_all'"),
        ("broken:f", r"importing broken raised AttributeError: .* \(broken.py, line 2\)"),
    ]:
        with pytest.raises(SpectuneError, match=message):
            load_reward(name)


def test_none_is_no_opinion_and_numpys_booleans_are_numbers():
    assert Reward("r", lambda completions: [None, 1])(RECORDS, ["x", "y"]) == [0.0, 1.0]
    assert Reward("r", lambda completions: [np.bool_(True), np.float32(0.5)])(RECORDS, ["x", "y"]) == [1.0, 0.5]


def test_several_rewards_are_added_with_their_weights(here):
    (here / "several.py").write_text(
        "def one(completions):\n    return [1.0] * len(completions)\n"
        "def long(completions):\n    return [None if c == 'x' else 4 for c in completions]\n"
    )
    both = load_rewards(["several:one", "several:long"], [2, 0.5])
    assert both(RECORDS, ["x", "y"]) == [2.0, 4.0]
    assert load_rewards(["several:one", "several:long"])(RECORDS, ["x", "y"]) == [1.0, 5.0]
    assert load_rewards("several:one")(RECORDS, ["x", "y"]) == [1.0, 1.0]
    settings = ["model=m", "output=o", "data=d", "task=reinforce"]
    with pytest.raises(SpectuneError, match="reward_weights has 1 numbers for 2 rewards"):
        load_config(None, [*settings, "reward=[a:b, c:d]", "reward_weights=[1]"])


def test_a_conversation_is_completed_by_a_message():
    def reward(prompts, completions):
        assert prompts[0][-1]["role"] == "user"
        assert completions[0].split() == ["ahoy"]
        assert (completions[0][-1]["role"], completions[0][1:3], completions[0][0]) == ("assistant", "ho", "a")
        return [float(len(completion[0]["content"])) for completion in completions]

    record = {"prompt": [{"role": "user", "content": "say"}]}
    assert Reward("r", reward)([record], ["ahoy"]) == [4.0]
