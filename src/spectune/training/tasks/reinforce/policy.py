"""The policy gradient: advantages within a group, and the loss whose gradient it is."""

from __future__ import annotations

from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK = 256  # tokens whose distributions over the vocabulary are held at once, in fp32


def advantages(rewards: Tensor, normalize: bool = False) -> Tensor:
    """Return how much better each completion is than the others of its prompt.

    A_i = r_i - mean_{j != i} r_j, the leave-one-out baseline of RLOO (arXiv 2402.14740), which leaves the policy
    gradient unbiased; divided by the rewards' standard deviation in the group (GRPO, arXiv 2402.03300) if asked for.
    A group of equal rewards has none.

    Args:
        rewards: (prompts, samples), two samples or more.
        normalize: divide by the standard deviation.
    """
    samples = rewards.shape[1]
    centered = rewards - rewards.mean(1, keepdim=True)
    if normalize:
        spread = rewards.std(1, keepdim=True)
        return torch.where(spread > 1e-6, centered / spread.clamp(min=1e-6), 0.0)
    # r_i - mean over the others = (r_i - mean over all) n / (n - 1)
    return centered * (samples / (samples - 1))


class PolicyLoss(NamedTuple):
    """The loss, and the mean over completions of the sum over tokens of KL(policy || reference), in nats, if known."""

    loss: Tensor
    kl: Tensor | None


def policy_loss(
    logits: Tensor,
    reference: Tensor | None,
    tokens: Tensor,
    owner: Tensor,
    advantage: Tensor,
    *,
    kl: float = 0.0,
    temperature: float = 1.0,
) -> PolicyLoss:
    """Return -1/N sum_i [A_i log p(y_i | x_i) - kl sum_t KL(p(. | x_i, y_i,<t) || q(. | x_i, y_i,<t))].

    Its gradient is REINFORCE's with a baseline.  The KL divergence to the reference q is that of Transformer-squared
    (arXiv 2501.06252), exact over the vocabulary at every token instead of estimated from the one that was drawn; its
    gradient leaves out that the policy also chooses which prefixes come up.

    Args:
        logits: (tokens, vocabulary), of the policy at each completion token.
        reference: the same of the reference; None leaves the divergence out, whose coefficient must be 0 then.
        tokens: (tokens,), those that were drawn.
        owner: (tokens,), the completion that each belongs to.
        advantage: (completions,).
        kl: its coefficient.
        temperature: that the completions were drawn at.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    divergence = total
    others = repeat(None) if reference is None else reference.split(_CHUNK)
    pieces = (x.split(_CHUNK) for x in (logits, tokens, advantage[owner]))
    for *piece, other in zip(*pieces, others, strict=reference is not None):
        # recomputed in the backward pass: fp32 over the vocabulary is large
        gain, kl_piece = checkpoint(_statistics, *piece, other, temperature, use_reentrant=False)
        total, divergence = total + gain, divergence + kl_piece
    count = len(advantage)
    if reference is None:
        return PolicyLoss(-total / count, None)
    return PolicyLoss((kl * divergence - total) / count, divergence.detach() / count)


def _statistics(
    logits: Tensor, tokens: Tensor, advantage: Tensor, reference: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor | float]:
    log_p = torch.log_softmax(logits.float() / temperature, -1)
    gain = (advantage * log_p.gather(-1, tokens[:, None])[:, 0]).sum()
    if reference is None:
        return gain, 0.0
    log_q = torch.log_softmax(reference.float() / temperature, -1)
    return gain, (log_p.exp() * (log_p - log_q)).sum()
