"""Each method's W' written from its paper, dense and in float64, sharing no code with spectune.

`dense(method, W, trained, basis)` returns W' (out x in), differentiable in `trained`.  `basis` (the layer's frozen
tensors) is read for two things that the papers leave open: the sign of a singular vector, and where a random or
top-k entry lies.
"""

import math

import torch

import spectune


def svd(W, rows=None, which="full"):
    """The SVD of W, each pair of vectors turned to the side on which the library's `rows` lie."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    if rows is not None:
        k = len(rows)
        U, S, Vh = (U[:, -k:], S[-k:], Vh[-k:]) if which == "bottom" else (U[:, :k], S[:k], Vh[:k])
        sign = (Vh * rows).sum(1).sign()
        U, Vh = U * sign, Vh * sign[:, None]
    return U, S, Vh


def lora(m, W, t, basis):
    return W + m.alpha / (math.sqrt(m.rank) if m.rslora else m.rank) * t["B"] @ t["A"]


def svf(m, W, t, basis):
    U, S, Vh = svd(W)
    if m.parametrization == "plain":
        return U @ torch.diag(S * t["z"]) @ Vh
    multiple = m.max_mult / (1 + torch.exp(-t["p"]))
    new = S * multiple
    return U @ torch.diag(new * (S.sum() / new.sum())) @ Vh


def svft(m, W, t, basis):
    U, S, Vh = svd(W, basis["Vh"])
    k = len(S)
    values = t["M"] / (1 + torch.exp(-t["g"])) if m.gate else t["M"]
    M = torch.zeros(k, k, dtype=W.dtype)
    if m.pattern == "plain":
        M = M + torch.diag(values)
    elif m.pattern == "banded":
        start = 0
        for offset in range(-m.width, m.width + 1):
            length = k - abs(offset)
            M = M + torch.diag(values[start : start + length], offset)
            start += length
        assert start == len(values)
    else:
        M = M.index_put((basis["rows"], basis["columns"]), values)
    return U @ (torch.diag(S) + M) @ Vh


def pissa(m, W, t, basis):
    s = 1.0 if m.alpha is None else m.alpha / m.rank
    U, S, Vh = svd(W, basis["A0"], "bottom" if isinstance(m, spectune.MiLoRA) else "top")
    B0, A0 = U @ torch.diag((S / s).sqrt()), torch.diag((S / s).sqrt()) @ Vh
    B, A = B0 + t["dB"], A0 + t["dA"]
    return W + s * (B @ A - B0 @ A0)


def lora_xs(m, W, t, basis):
    U, S, Vh = svd(W, basis["SVh"])
    return W + (1.0 if m.alpha is None else m.alpha / m.rank) * U @ t["R"] @ torch.diag(S) @ Vh


def adalora(m, W, t, basis):
    rank = math.ceil(1.5 * m.rank) if m.initial_rank is None else m.initial_rank
    return W + m.alpha / rank * t["P"] @ torch.diag(t["E"]) @ t["Q"]


def vera(m, W, t, basis):
    return W + torch.diag(t["b"]) @ basis["B"] @ torch.diag(t["d"]) @ basis["A"]


def dora(m, W, t, basis):
    V = dense(m.inner, W, t, basis)
    norm = V.pow(2).sum(1, keepdim=True).sqrt().detach()
    return t["magnitude"][:, None] * V / norm


def dense(method, W, trained, basis):
    formulas = {
        "lora": lora,
        "svf": svf,
        "svft": svft,
        "pissa": pissa,
        "milora": pissa,
        "lora_xs": lora_xs,
        "adalora": adalora,
        "vera": vera,
        "dora": dora,
    }
    return formulas[method.name](method, W, trained, basis)
