"""A mixture's weights as numbers of a search: gradients, names and the adapter that it is."""

import pytest
import torch

from spectune import FewShot, SpectuneError
from spectune.transformer2.mix import Mix, layer_groups
from spectune.transformer2.shots import mean_likelihood, population_likelihood
from transformer2 import cases


@pytest.mark.parametrize("by", ["global", "layer", "projection"])
@pytest.mark.parametrize("methods", [("svf",) * 3, ("lora:rank=2", "lora_xs:rank=4", "svft")], ids=["svf", "mixed"])
def test_the_gradient_is_that_of_finite_differences(tmp_path, by, methods):
    pool = cases.pool(tmp_path, methods)
    pool.model.double()
    groups = layer_groups(pool.library.adapter("ahoy").layers, by)
    kinds = tuple(dict.fromkeys(groups.values()))
    mix = Mix(cases.NAMES, by, groups, kinds, torch.rand(len(kinds), 3))
    weights = mix.weights.clone().requires_grad_()
    mean_likelihood(pool, [mix.mixture(weights)], cases.shots()).sum().backward()
    assert weights.grad is not None
    for group, k in ((0, 0), (len(kinds) - 1, 2)):
        step = torch.zeros_like(mix.weights)
        step[group, k] = 1e-3
        pair = [mix.mixture(mix.weights + sign * step) for sign in (1, -1)]
        up, down = population_likelihood(pool, pair, cases.shots()) * len(cases.SHOTS)
        assert float(up - down) / 2e-3 == pytest.approx(float(weights.grad[group, k]), rel=2e-2, abs=2e-3)


def test_what_a_population_put_on_the_model_takes_gradients(tmp_path):
    pool = cases.pool(tmp_path, ("svf", "lora:rank=2", "svf"))
    population_likelihood(pool, [{"ahoy": 0.5, "plus": 0.5}], cases.shots())  # in inference mode
    found = FewShot(cases.SHOTS, search="gradient", iterations=2).find(pool, cases.tokenizer())
    assert found.evaluations == 2


def test_a_name_given_twice_counts_once(tmp_path):
    pool = cases.pool(tmp_path)
    found = FewShot(cases.SHOTS, names=["ahoy", "ahoy"], population=3, elites=1, iterations=1).find(
        pool, cases.tokenizer()
    )
    assert found.names == ("ahoy",)


def test_a_mixture_of_nothing_is_no_adapter(tmp_path):
    mix = Mix(cases.NAMES, "global", {}, ("all",), torch.zeros(1, 3))
    with pytest.raises(SpectuneError, match="the base alone does best"):
        mix.adapter(cases.library(tmp_path))
