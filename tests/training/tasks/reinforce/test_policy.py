"""The policy gradient against sums over all completions, and against autograd done plainly."""

import itertools

import pytest
import torch

from spectune.training.tasks.reinforce import policy
from spectune.training.tasks.reinforce.policy import advantages, policy_loss


def test_the_baseline_of_a_completion_is_the_mean_of_the_others():
    rewards = torch.randn(3, 4)
    found = advantages(rewards)
    for i, j in itertools.product(range(3), range(4)):
        others = [rewards[i, k] for k in range(4) if k != j]
        torch.testing.assert_close(found[i, j], rewards[i, j] - torch.stack(others).mean())


def test_normalized_advantages_have_unit_variance_and_equal_rewards_have_none():
    found = advantages(torch.tensor([[0.0, 1.0, 1.0, 0.0], [2.0, 2.0, 2.0, 2.0]]), normalize=True)
    torch.testing.assert_close(found[0].std(), torch.tensor(1.0))
    assert found[1].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_loss_divergence_and_gradient(monkeypatch, temperature):
    monkeypatch.setattr(policy, "_CHUNK", 3)
    logits, reference = torch.randn(7, 11, dtype=torch.float64, requires_grad=True), torch.randn(7, 11).double()
    tokens, owner = torch.randint(11, (7,)), torch.tensor([0, 0, 1, 2, 2, 2, 2])
    advantage = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
    found = policy_loss(logits, reference, tokens, owner, advantage, kl=0.3, temperature=temperature)

    p, q = (torch.softmax(x / temperature, -1) for x in (logits, reference))
    gain = sum(advantage[owner[t]] * p[t, tokens[t]].log() for t in range(7))
    divergence = sum((p[t] * (p[t] / q[t]).log()).sum() for t in range(7))
    expected = (0.3 * divergence - gain) / 3
    torch.testing.assert_close(found.loss.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.kl.double(), divergence.detach() / 3, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (found.loss, expected)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_without_a_reference_the_rest_is_the_same():
    logits, tokens, owner = (
        torch.randn(7, 11, requires_grad=True),
        torch.randint(11, (7,)),
        torch.tensor([0] * 3 + [1] * 4),
    )
    advantage = torch.tensor([1.0, -0.5])
    alone = policy_loss(logits, None, tokens, owner, advantage)
    beside = policy_loss(logits, torch.randn(7, 11), tokens, owner, advantage)
    assert alone.kl is None
    torch.testing.assert_close(alone.loss, beside.loss)
    torch.testing.assert_close(*(torch.autograd.grad(x.loss, logits)[0] for x in (alone, beside)))


def test_its_mean_is_the_gradient_of_the_expected_reward():
    """Over every pair of one-token completions, weighted by their probability: the baseline leaves no bias."""
    logits, worth = torch.randn(5, requires_grad=True), torch.randn(5)
    p = torch.softmax(logits, -1)
    (expected,) = torch.autograd.grad(-(p * worth).sum(), logits)
    mean = torch.zeros(5)
    for a, b in itertools.product(range(5), repeat=2):
        drawn = torch.tensor([a, b])
        loss = policy_loss(
            logits.expand(2, 5), torch.zeros(2, 5), drawn, torch.arange(2), advantages(worth[drawn][None])[0]
        ).loss
        mean += (p[a] * p[b]).detach() * torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(mean, expected, atol=1e-6, rtol=1e-4)
