"""One training step of every method at its defaults as its authors' code takes it, written anew in float64.

Each algorithm starts from W (out x in) and the random numbers that the method drew, computes y = x W'^T in the authors'
own terms (dense matrices, their names for things), the loss and its gradient by autograd, the norm that gradients are
clipped to, and one step of AdamW by its formula.  Nothing of spectune is called in between.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import spectune
from spectune import SVF, SVFT, AdaLoRA, DoRA, LoRA, LoRAXS, MiLoRA, PiSSA, VeRA

SHAPES = {"wide": (9, 14), "tall": (14, 9)}
LR, CLIP, STEPS = 3e-3, 0.05, 3
Start = dict[str, Tensor]
Forward = Callable[[Tensor, Start], tuple[Tensor, Any]]  # x and trained tensors -> y, and a penalty or 0


def svd(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U, S, Vh


def lora(W: Tensor, ours: Start, frozen: Start) -> tuple[Start, Forward]:
    """loralib: (x A^T) B^T alpha / r, A by kaiming_uniform with a = sqrt 5, B zero."""
    bound = (6 / ((1 + 5) * W.shape[1])) ** 0.5
    assert ours["A"].abs().max() <= bound
    assert ours["A"].abs().max() > 0.7 * bound
    return {"A": ours["A"], "B": torch.zeros(W.shape[0], 8)}, lambda x, t: (
        x @ W.T + x @ t["A"].T @ t["B"].T * 16 / 8,
        0,
    )


def svf(W: Tensor, ours: Start, frozen: Start) -> tuple[Start, Forward]:
    """The paper: U diag(S z) V^T, z one."""
    U, S, Vh = svd(W)
    return {"z": torch.ones(len(S))}, lambda x, t: (x @ (U @ torch.diag(S * t["z"]) @ Vh).T, 0)


def svf_sigmoid(W: Tensor, ours: Start, frozen: Start) -> tuple[Start, Forward]:
    """self-adaptive-llms: U diag(S m) V^T sum(S) / sum(S m) with m = sigmoid(p), p = 0.1 + 0.01 randn."""
    U, S, Vh = svd(W)
    assert (ours["p"] - 0.1).abs().max() < 0.05

    def forward(x: Tensor, t: Start) -> tuple[Tensor, int]:
        mask = torch.sigmoid(t["p"])
        new = S * mask
        return x @ ((U @ torch.diag(new) @ Vh) * (S.sum() / new.sum())).T, 0

    return {"p": ours["p"]}, forward


def svft(W: Tensor, ours: Start, frozen: Start) -> tuple[Start, Forward]:
    """The paper, plain: U (diag(S) + diag(m)) V^T, m zero."""
    U, S, Vh = svd(W)
    return {"M": torch.zeros(len(S))}, lambda x, t: (x @ (U @ (torch.diag(S) + torch.diag(t["M"])) @ Vh).T, 0)


def svft_gate(W: Tensor, ours: Start, frozen: Start) -> tuple[Start, Forward]:
    """SVFT's code: sigmoid(gate) times m, gate zero, m by kaiming_normal of a row of its entries; bands by offset."""
    U, S, Vh = svd(W)
    U, Vh = aligned(U, Vh, frozen["Vh"])
    k, width = len(S), 8
    places = [(i, j) for o in range(-width, width + 1) for i in range(k) for j in range(k) if j - i == o]
    assert len(places) == len(ours["M"])
    std = (2 / len(places)) ** 0.5  # gain sqrt 2 over the root of the fan-in
    assert abs(float(ours["M"].std()) / std - 1) < 0.35

    def forward(x: Tensor, t: Start) -> tuple[Tensor, int]:
        M = torch.zeros(k, k)
        rows, columns = torch.tensor(places).T
        M = M.index_put((rows, columns), torch.sigmoid(t["g"]) * t["M"])
        return x @ (U @ (torch.diag(S) + M) @ Vh).T, 0

    return {"M": ours["M"], "g": torch.zeros(1)}, forward


def aligned(U: Tensor, Vh: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Turn each pair of vectors to the side that the library's lie on, which a decomposition leaves open."""
    sign = (Vh * rows).sum(1).sign()
    return U * sign, Vh * sign[:, None]


def principal(W: Tensor, ours: Start, frozen: Start, part: slice) -> tuple[Start, Forward]:
    U, S, Vh = svd(W)
    U, S, Vh = U[:, part], S[part], Vh[part]
    U, Vh = aligned(U, Vh, frozen["A0"])
    B0, A0 = U @ torch.diag(S.sqrt()), torch.diag(S.sqrt()) @ Vh
    rest = W - B0 @ A0

    def forward(x: Tensor, t: Start) -> tuple[Tensor, int]:  # the authors train B and A over what is left of W
        return x @ rest.T + x @ (A0 + t["dA"]).T @ (B0 + t["dB"]).T, 0

    return {"dA": torch.zeros_like(A0), "dB": torch.zeros_like(B0)}, forward


def pissa(W: Tensor, ours: Start, frozen: Start) -> tuple[Start, Forward]:
    """PiSSA: the r largest, alpha = r."""
    return principal(W, ours, frozen, slice(0, 4))


def milora(W: Tensor, ours: Start, frozen: Start) -> tuple[Start, Forward]:
    """MiLoRA: the r smallest, alpha = r."""
    return principal(W, ours, frozen, slice(min(W.shape) - 4, None))


def lora_xs(W: Tensor, ours: Start, frozen: Start) -> tuple[Start, Forward]:
    """LoRA-XS: B = U_r, A = S_r V_r^T frozen, R ~ N(0, 1e-5) between them, alpha = r."""
    U, S, Vh = svd(W)
    U, S, Vh = U[:, :4], S[:4], Vh[:4]
    U, Vh = aligned(U, Vh, frozen["SVh"])
    assert 0 < ours["R"].abs().max() < 5e-5
    return {"R": ours["R"]}, lambda x, t: (x @ W.T + x @ (torch.diag(S) @ Vh).T @ t["R"].T @ U.T, 0)


def dora(W: Tensor, ours: Start, frozen: Start) -> tuple[Start, Forward]:
    """DoRA: the norm of each row detached; (norm_scale - 1) W x + norm_scale B A x s on top of W x."""

    def forward(x: Tensor, t: Start) -> tuple[Tensor, int]:
        s = 8 / 4
        norm = torch.linalg.norm((W + t["B"] @ t["A"] * s).detach(), dim=1)
        scale = t["magnitude"] / norm
        plain = x @ W.T
        return plain + (scale - 1) * plain + scale * (x @ t["A"].T @ t["B"].T) * s, 0

    start = {"A": ours["A"], "B": torch.zeros(W.shape[0], 4), "magnitude": torch.linalg.norm(W, dim=1)}
    return start, forward


def adalora(W: Tensor, ours: Start, frozen: Start) -> tuple[Start, Forward]:
    """AdaLoRA: x (A E)^T B^T alpha / r0, and 0.1 times the mean over A and B of ||.||_F in the loss."""

    def forward(x: Tensor, t: Start) -> tuple[Tensor, Tensor]:
        eye = torch.eye(6)
        y = x @ W.T + x @ (t["Q"] * t["E"][:, None]).T @ t["P"].T * 16 / 6
        norms = [torch.linalg.norm(t["P"].T @ t["P"] - eye), torch.linalg.norm(t["Q"] @ t["Q"].T - eye)]
        return y, 0.1 * (norms[0] + norms[1]) / 2

    assert all(0 < ours[key].std() < 0.04 for key in ("P", "Q"))
    return {"P": ours["P"], "E": torch.zeros(6), "Q": ours["Q"]}, forward


def vera(W: Tensor, ours: Start, frozen: Start) -> tuple[Start, Forward]:
    """VeRA: b B d A x, b zero, d 0.1."""
    A, B = frozen["A"], frozen["B"]
    start = {"b": torch.zeros(W.shape[0]), "d": torch.full((6,), 0.1)}
    return start, lambda x, t: (x @ W.T + t["b"] * ((t["d"] * (x @ A.T)) @ B.T), 0)


CASES: dict[str, tuple[Any, Any]] = {
    "lora": (LoRA(), lora),
    "svf": (SVF(), svf),
    "svf sigmoid": (SVF(parametrization="sigmoid"), svf_sigmoid),
    "svft": (SVFT(), svft),
    "svft gate": (SVFT(pattern="banded", gate=True), svft_gate),
    "pissa": (PiSSA(rank=4), pissa),
    "milora": (MiLoRA(rank=4, dropout=0.0), milora),
    "lora_xs": (LoRAXS(rank=4), lora_xs),
    "dora": (DoRA(LoRA(rank=4, alpha=8)), dora),
    "adalora": (AdaLoRA(rank=4), adalora),
    "vera": (VeRA(rank=6), vera),
}


@pytest.mark.filterwarnings("ignore:AdaLoRA does not know the length of the run")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_steps_are_the_authors(case, shape, monkeypatch):
    method, authors = CASES[case]
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(2)
        out, into = SHAPES[shape]
        model: Any = nn.Sequential(nn.Linear(into, out, bias=False))
        nn.init.normal_(model[0].weight, std=0.4)
        W = model[0].weight.detach().clone()
        spectune.adapt(model, method)
        layer = model[0]
        (update,) = layer.adapters["default"]
        ours = update.trained()
        frozen = {key: value for key, value in layer.tensors(update).items() if key not in ours}
        start, forward = authors(W, {key: value.detach().clone() for key, value in ours.items()}, frozen)
        assert start.keys() == ours.keys()
        for key, value in start.items():
            torch.testing.assert_close(ours[key].detach(), value, rtol=1e-6, atol=1e-7)
        t = {key: value.detach().clone() for key, value in ours.items()}

        optimizer = torch.optim.AdamW(list(ours.values()), lr=LR, weight_decay=0.01)
        first, second = ({key: torch.zeros_like(value) for key, value in t.items()} for _ in range(2))
        for step in range(1, STEPS + 1):
            x, target = torch.randn(2, 5, into), torch.randn(2, 5, out)
            y = model(x)
            optimizer.zero_grad()
            (y - target).square().mean().backward()
            norm = nn.utils.clip_grad_norm_(list(ours.values()), CLIP)
            optimizer.step()

            leaves = {key: value.clone().requires_grad_() for key, value in t.items()}
            y2, penalty = forward(x, leaves)
            torch.testing.assert_close(y, y2, rtol=1e-6, atol=1e-7)
            loss = (y2 - target).square().mean() + penalty
            grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
            total = sum(g.square().sum() for g in grads.values()) ** 0.5
            torch.testing.assert_close(norm, total, rtol=1e-5, atol=1e-9)
            for key, g in grads.items():
                g = g * min(1.0, CLIP / (float(total) + 1e-6))
                first[key] = 0.9 * first[key] + 0.1 * g
                second[key] = 0.999 * second[key] + 0.001 * g**2
                mean, square = first[key] / (1 - 0.9**step), second[key] / (1 - 0.999**step)
                t[key] = t[key] * (1 - LR * 0.01) - LR * mean / (square.sqrt() + 1e-8)
                torch.testing.assert_close(ours[key].grad, g, rtol=1e-4, atol=1e-9)
                torch.testing.assert_close(ours[key].detach(), t[key], rtol=1e-4, atol=1e-6)
            t = {key: value.detach().clone() for key, value in ours.items()}  # so that rounding does not add up
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("penalty", "to_P", "to_Q"),
    [("mean_norm", (0.12, 0.16), (-0.05, 0.0)), ("sum_of_squares", (1.44, 1.92), (-0.15, 0.0))],
)
def test_adaloras_penalty_by_hand(penalty, to_P, to_Q):
    """The figures of docs/fidelity.md; E is zero, so that the loss has no gradient for P and Q."""
    model: Any = nn.Sequential(nn.Linear(2, 2)).double()
    spectune.adapt(model, AdaLoRA(rank=1, initial_rank=1, gamma=0.1, penalty=penalty))
    (update,) = model[0].adapters["default"]
    with torch.no_grad():
        update.P.copy_(torch.tensor([[1.2], [1.6]]))
        update.Q.copy_(torch.tensor([[0.5, 0.0]]))
    model(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(update.P.grad[:, 0], torch.tensor(to_P, dtype=torch.float64))
    torch.testing.assert_close(update.Q.grad[0], torch.tensor(to_Q, dtype=torch.float64))


def test_doras_dropout_by_hand():
    """The figures of docs/fidelity.md: 7 where x is kept, and W x = 2 where it is dropped."""
    model: Any = nn.Sequential(nn.Linear(1, 1, bias=False)).double()
    nn.init.constant_(model[0].weight, 2.0)
    spectune.adapt(model, DoRA(LoRA(rank=1, alpha=1, dropout=0.5)))
    (update,) = model[0].adapters["default"]
    with torch.no_grad():
        update.A.fill_(1.0)
        update.B.fill_(1.0)
        update.magnitude.fill_(4.5)
    model.train()
    y = model(torch.ones(64, 1, dtype=torch.float64)).detach().flatten()
    assert {round(float(value), 9) for value in y} == {2.0, 7.0}
    assert model.eval()(torch.ones(1, 1, dtype=torch.float64)).detach().item() == pytest.approx(4.5)
