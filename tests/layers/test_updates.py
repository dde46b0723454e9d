"""Updates and the frozen tensors that they share."""

import pytest
import torch

from spectune import LoRA, SpectuneError
from spectune.layers.updates import Basis, Update


def test_what_is_looked_for_in_memory_is_not_what_a_call_before_left_there():
    basis, seen = Basis({"U": torch.zeros(2, 2)}), []
    for _ in range(300):
        basis.check_kept(lambda known: seen.append(tuple(known.tolist())) or known)
    assert len(set(seen)) == 300
    with pytest.raises(SpectuneError, match="would throw away"):
        basis.check_kept(torch.empty_like)


def test_matrices_of_a_basis_become_frozen_parameters_and_no_state_has_them():
    basis = Basis({"U": torch.ones(3, 2), "S": torch.ones(2), "places": torch.zeros(2, 2, dtype=torch.int64)})
    assert basis.state_dict() == {}
    basis.as_parameters()
    assert [name for name, _ in basis.named_parameters()] == ["U"]
    assert not basis.U.requires_grad
    assert basis.tensors().keys() == {"U", "S", "places"}


def test_an_update_tells_where_its_tensors_are():
    update = Update(LoRA(rank=2, dropout=0.5), {"A": torch.ones(2, 3), "B": torch.zeros(4, 2)}, weight=0.5)
    assert update.drops
    assert update.weight == 0.5
    for name, (held, key) in update.places().items():
        assert held[key] is update.tensor(name) is update.trained()[name]
        assert update.tensor(name).requires_grad
    assert update.ratio(update.trained(), None) is None  # LoRA is added
