"""PiSSA's and MiLoRA's B0 and A0 from a dense SVD (arXiv 2404.02948, 2406.09044), and what trains of them."""

import pytest
import torch
from starts import dense, start_of, weight

from spectune import MiLoRA, PiSSA, SpectuneError

BOTH = [PiSSA(rank=3), PiSSA(rank=3, alpha=7.5), MiLoRA(rank=3), MiLoRA(rank=3, alpha=1.5)]
either = pytest.mark.parametrize("method", BOTH, ids=lambda m: f"{m.name}-{m.alpha}")
SHAPES = [(9, 14), (14, 9)]


@either
@pytest.mark.parametrize("shape", SHAPES)
def test_b0_and_a0_are_the_triplets_with_half_of_each_value(method, shape):
    W = weight(*shape)
    frozen, t = start_of(method, W)
    assert not any(tensor.any() for tensor in t.values())
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    part = slice(0, 3) if method.which == "top" else slice(len(S) - 3, None)
    s, B0, A0 = method.scale, frozen["B0"], frozen["A0"]
    torch.testing.assert_close(s * B0 @ A0, U[:, part] @ torch.diag(S[part]) @ Vh[part])
    # the same lengths on both sides: B0^T B0 = A0 A0^T = S / s
    for gram in (B0.mT @ B0, A0 @ A0.mT):
        torch.testing.assert_close(gram, torch.diag(S[part] / s))
    torch.testing.assert_close(method.spectrum(frozen), S[part])


@either
def test_steps_are_those_of_training_b_and_a_themselves(method):
    W, target = weight(6, 8), weight(6, 8, 1)
    frozen, t = start_of(method, W)
    ours = {key: tensor.requires_grad_() for key, tensor in t.items()}
    theirs = [frozen["B0"].clone().requires_grad_(), frozen["A0"].clone().requires_grad_()]
    optimizers = torch.optim.Adam(ours.values(), lr=0.05), torch.optim.Adam(theirs, lr=0.05)
    for _ in range(5):
        B, A = theirs
        papers = W + method.scale * (B @ A - frozen["B0"] @ frozen["A0"])
        mine = W + dense(method.factors({**frozen, **ours}))
        torch.testing.assert_close(mine, papers)
        for optimizer, made in zip(optimizers, (mine, papers), strict=True):
            optimizer.zero_grad()
            (made - target).square().sum().backward()
            optimizer.step()


@either
def test_without_gradients_it_adds_what_its_factors_say(method):
    W, x, y = weight(7, 9), weight(5, 9, 1), weight(5, 7, 2)
    frozen, t = start_of(method, W)
    t = {**frozen, **{key: torch.randn_like(tensor) for key, tensor in t.items()}}
    expected = y + x @ dense(method.factors(t)).mT
    method.add(t, x, y)
    torch.testing.assert_close(y, expected)


def test_a_weight_with_less_room_gives_all_of_it_at_the_same_scale():
    method = PiSSA(rank=16, alpha=24).fit(5, 30)
    assert method.rank == 5
    assert method.scale == 1.5
    with pytest.raises(SpectuneError, match="rank"):
        PiSSA(rank=0)
