"""The contracts of cores and methods, kept by all that come with spectune and by one of somebody else's."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from spectune.layers.core_ops import band_entries
from spectune.layers.cores import Banded, Core, Dense, Diagonal, Sparse
from spectune.layers.factors import Factors
from spectune.methods import METHODS
from spectune.methods.base import Method
from spectune.methods.registry import register
from spectune.spectral import Request
from spectune.testing import CoreContract, MethodContract


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@dataclass(frozen=True)
class Blocks(Core):
    """C = a block for each of n groups of columns, values (n, b, b) or (batch, n, b, b)."""

    values: torch.Tensor

    def apply(self, t):
        return self._product(t, self.values.mT)

    def transposed(self, t):
        return self._product(t, self.values)

    def gradients(self, t, grad, of_values):
        n, b = self.values.shape[-3:-1]
        blocks = grad.reshape(-1, n, b).permute(1, 2, 0) @ t.reshape(-1, n, b).transpose(0, 1) if of_values else None
        return self.transposed(grad), blocks

    def _product(self, t, blocks):
        blocks = blocks.to(t.dtype)
        n, b = blocks.shape[-3:-1]
        lead = blocks.shape[:-3]
        rows = t.reshape(*lead, -1, n, b).transpose(-2, -3)
        return (rows @ blocks).transpose(-2, -3).reshape(t.shape)


class BlockSVF(Method):
    """The largest singular vectors mixed in groups: W' = W + U blocks(M) V^T."""

    name: ClassVar[str] = "block_svf"
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = "W + U blocks(M) V^T; M trains"
    learning_rate: ClassVar[float] = 1e-2
    core_only: ClassVar[bool] = True

    def shapes(self, out_features, in_features):
        side = min(out_features, in_features) // 3
        return {"M": (3, side, side)}

    def request(self):
        return Request("full")

    def basis(self, weight, decomposition):
        U, _, Vh = decomposition
        kept = min(weight.shape) // 3 * 3
        return {"U": U[:, :kept].contiguous(), "V": Vh[:kept].contiguous()}

    def initial(self, shapes, basis):
        return {"M": torch.zeros(shapes["M"])}

    def factors(self, t):
        return Factors(t["U"], t["V"], Blocks(t["M"]))


BlockSVF = dataclass(frozen=True)(BlockSVF)


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    register(BlockSVF)
    yield
    METHODS.pop(BlockSVF.name, None)


class TestDiagonal(CoreContract):
    size = 6

    def example(self):
        return Diagonal(randn(6))


class TestBanded(CoreContract):
    size = 7

    def example(self):
        return Banded(randn(band_entries(7, 2)), 7, 2)


class TestSparse(CoreContract):
    size = 6

    def example(self):
        return Sparse(randn(5), torch.tensor([0, 1, 5, 2, 2]), torch.tensor([3, 1, 0, 2, 4]), 6)


class TestDense(CoreContract):
    size = 5

    def example(self):
        return Dense(randn(5, 5))


class TestBlocks(CoreContract):
    size = 12

    def example(self):
        return Blocks(randn(3, 4, 4))


def case(text):
    from spectune.methods import parse

    return type(f"Test_{text}", (MethodContract,), {"method": parse(text)})


TestLoRA = case("lora:rank=3,alpha=5")
TestSVF = case("svf")
TestSVFT = case("svft:pattern=banded,width=2")
TestPiSSA = case("pissa:rank=3")
TestMiLoRA = case("milora:rank=3,dropout=0.0")
TestLoRAXS = case("lora_xs:rank=3")
TestDoRA = case("dora:rank=3")
TestDoRAofSVF = case("dora:inner=svf")
TestAdaLoRA = case("adalora:rank=3,total_steps=9")
TestVeRA = case("vera:rank=3")


class TestBlockSVF(MethodContract):
    method = BlockSVF()
