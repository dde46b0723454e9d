"""Operands of kernels in every dtype and layout, and how near to float64 an answer has to be."""

import torch
from hypothesis import strategies as st

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
LAYOUTS = st.sampled_from(["plain", "transposed", "every other", "a part", "repeated"])


def draw(shape, dtype, layout="plain", seed=0):
    """Random numbers in a layout: strides that are swapped, longer than they need be, or zero."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)

    *batch, n, k = shape
    if layout == "transposed":
        return numbers(*batch, k, n).mT
    if layout == "every other":
        return numbers(*batch, 2 * n, 2 * k)[..., ::2, ::2]
    if layout == "a part":
        return numbers(*batch, n + 3, k + 5)[..., 1 : n + 1, 2 : k + 2]
    if layout == "repeated":
        return numbers(*batch, 1, k).expand(shape)
    return numbers(*shape)


def check(ours, exact, magnitude, dtype):
    """Compare with float64: a few roundings of what was added up, in the coarsest dtype on the way."""
    assert ours.shape == exact.shape
    error = (ours.double() - exact).abs()
    bound = 4 * torch.finfo(dtype).eps * magnitude + torch.finfo(dtype).tiny
    assert (error <= bound).all(), (error / bound).max().item()
