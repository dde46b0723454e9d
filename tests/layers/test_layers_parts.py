"""What stands in for an owner's tensor: what it tells by itself, what makes W', and what is refused."""

from typing import Any

import pytest
import torch
import torch.nn as nn

from spectune import SpectuneError
from spectune.layers.parts import StandIn, put_together, tensor_of
from spectune.layers.projections import ProjectionLinear, Rows


class Owner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.arange(6.0).view(2, 3))


class Counted(StandIn):
    """Stands for twice a tensor, has the product x @ W'^T, and counts how often W' was made."""

    made = 0

    @property
    def _held(self):
        return tensor_of(self._owner, self._key)

    @property
    def _remedy(self):
        return "it out"

    def _made(self, dtype=None):
        self.made += 1
        return (2 * self._held).to(dtype or self._held.dtype)

    def _product(self, func, x=None, weight=None, *more, **named):
        if func is torch.nn.functional.linear and weight is self:
            return x @ (2 * self._held).mT
        return None


@pytest.fixture
def stand_in() -> Any:
    return Counted(Owner(), "kernel")


def test_its_kind_is_told_without_a_look_at_values(stand_in):
    assert (stand_in.shape, stand_in.dim(), stand_in.numel(), len(stand_in)) == ((2, 3), 2, 6, 2)
    assert stand_in.dtype is torch.float32
    assert stand_in.requires_grad
    assert stand_in.to(torch.float32) is stand_in.float() is stand_in.contiguous() is stand_in
    assert stand_in.made == 0


def test_its_product_makes_no_weight_and_anything_else_does(stand_in):
    x, W = torch.randn(4, 3), 2 * torch.arange(6.0).view(2, 3)
    torch.testing.assert_close(torch.nn.functional.linear(x, stand_in), x @ W.mT)
    assert stand_in.made == 0
    for made in (stand_in + 1, 1 + stand_in, stand_in @ x.mT, -stand_in, stand_in[0], stand_in.sum(), abs(stand_in)):
        assert isinstance(made, torch.Tensor)
    assert stand_in.made == 7
    torch.testing.assert_close(1 - stand_in, 1 - W)
    torch.testing.assert_close(torch.cat([x, stand_in]), torch.cat([x, W]))  # inside of a list as well
    torch.testing.assert_close(torch.stack(tensors=[stand_in, stand_in])[1], W)


def test_another_dtype_is_one_of_what_is_made(stand_in):
    half = stand_in.to(torch.bfloat16)
    assert isinstance(half, torch.Tensor)
    assert half.dtype is torch.bfloat16
    assert stand_in.double().dtype is torch.float64


WRITES = {
    "data": lambda t: t.data,
    "a method in place": lambda t: t.add_(1),
    "a part of it": lambda t: t.__setitem__(0, 1.0),
    "out": lambda t: torch.add(torch.ones(2, 3), 1, out=t),
    "a function in place": lambda t: torch.relu_(t),
    "memory": lambda t: t.untyped_storage(),
}


@pytest.mark.parametrize("how", WRITES)
def test_nobody_writes_to_it(stand_in, how):
    with pytest.raises(SpectuneError, match="Owner uses its 'kernel' in a way that is not known with adapters"):
        WRITES[how](stand_in)
    assert torch.equal(stand_in._owner.kernel, torch.arange(6.0).view(2, 3))


def test_parts_of_one_tensor_are_put_into_one_copy_of_it():
    fused = nn.Linear(3, 4)
    first, second = ProjectionLinear(fused, "q", Rows(0, 2, 4)), ProjectionLinear(fused, "k", Rows(2, 2, 4))
    before = fused.weight.detach().clone()
    made = put_together([(first, torch.zeros(2, 3)), (second, torch.ones(2, 3))])
    ((owner, key),) = made
    assert owner is fused
    assert key == "weight"
    torch.testing.assert_close(made[owner, key], torch.tensor([0.0, 0.0, 1.0, 1.0])[:, None].expand(4, 3))
    assert torch.equal(fused.weight, before)
