"""Problems of reasoning-gym: seeded, unlike each other, scored by the environment."""

import pytest

from spectune.errors import SpectuneError
from spectune.training.tasks.reinforce.environments import Environment

SUMS = {"max_terms": 2, "max_digits": 1}


def test_problems_are_seeded_and_no_question_comes_twice():
    first, again, other = (Environment("chain_sum", SUMS, 50, seed).records() for seed in (3, 3, 1000))
    assert first == again != other
    assert len({record["prompt"] for record in first}) == len(first) == 50


def test_a_small_environment_gives_what_it_has():
    one = {"min_terms": 1, "max_terms": 1, "max_digits": 1}
    assert len(Environment("chain_sum", one, 100).records()) == 10


def test_the_score_is_the_environments():
    environment = Environment("chain_sum", SUMS, 10)
    records = environment.records()[:2]
    index = [record["index"] for record in records]
    right, wrong = records[0]["answer"], "none"
    assert environment.score([right, wrong], index) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("chain_smu", {}, "unknown environment 'chain_smu'; did you mean 'chain_sum'"),
        ("chain_sum", {"max_term": 2}, "chain_sum has no option 'max_term'; did you mean 'max_terms'"),
        ("chain_sum", {"max_terms": 1}, "does not take .*max_terms must be >= min_terms"),
        ("chain_sum", {"seed": 1}, "has no option 'seed'"),
    ],
)
def test_mistakes(name, options, message):
    with pytest.raises(SpectuneError, match=message):
        Environment(name, options, 10)
