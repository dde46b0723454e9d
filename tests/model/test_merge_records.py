"""What merging puts in the place of tensors, and what it knows of them afterwards."""

import pytest
import torch
import torch.nn as nn

import spectune
from spectune.model.merge_records import RECORD, MergedLayer, MergedModule, MergedOwner, Placed, records_of


def test_what_was_tied_and_stays_equal_is_one_again_and_nothing_else():
    shared = nn.Parameter(torch.ones(2, 3), requires_grad=False)
    a, b, c, d = (nn.Embedding(2, 3) for _ in range(4))
    a.weight = b.weight = c.weight = shared
    placed = Placed()
    for module, value in ((a, 2.0), (b, 2.0), (c, 3.0), (d, 2.0)):
        old, made = placed.put(module, "weight", torch.full((2, 3), value))
        assert made is module.weight
        assert (old is shared) == (module is not d)
    assert a.weight is b.weight
    assert len({id(module.weight) for module in (a, b, c, d)}) == 3
    assert not a.weight.requires_grad
    assert d.weight.requires_grad
    assert len(placed.tensors) == 4


def test_a_layers_new_weight_is_that_of_what_was_tied_to_it():
    linear, table = nn.Linear(3, 2, bias=False), nn.Embedding(2, 3)
    table.weight = old = linear.weight
    placed = Placed()
    linear.weight = nn.Parameter(torch.full((2, 3), 5.0))
    placed.put_weight(old, linear.weight)
    placed.put(table, "weight", torch.full((2, 3), 5.0))
    assert table.weight is linear.weight


def test_a_buffer_is_a_copy_of_what_it_is_given():
    norm, given = nn.BatchNorm1d(3), torch.full((3,), 4.0)
    old, made = Placed().put(norm, "running_mean", given)
    given.zero_()
    assert not old.any()
    assert norm.running_mean is made
    assert made.tolist() == [4.0, 4.0, 4.0]


def test_records_are_found_by_their_kind_and_go_with_the_way_back():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3), nn.Linear(3, 2))
    spectune.adapt(model, "lora:rank=1", targets=["1"], modules_to_save=["0"])
    spectune.merge(model)
    assert [module for module, _ in records_of(model, MergedLayer)] == [model[1]]
    assert [module for module, _ in records_of(model, MergedModule)] == [model[0]]
    assert records_of(model, MergedOwner) == []
    spectune.unmerge(model)
    assert not any(RECORD in vars(module) for module in model.modules())


@pytest.mark.parametrize("how", ["in place", "past the version", "the bias", "another one"])
def test_a_layer_that_changed_is_known_however_it_was_written_to(how):
    model = spectune.merge(spectune.adapt(nn.Sequential(nn.Linear(4, 3)), "lora:rank=1"))
    ((layer, record),) = records_of(model, MergedLayer)
    record.check(layer)
    with torch.no_grad():
        if how == "in place":
            layer.weight[0, 0] += 1e-3
        elif how == "past the version":
            layer.weight.data[0, 0] += 1e-3
        elif how == "the bias":
            layer.bias.data.mul_(1.001)
        else:
            layer.weight = nn.Parameter(layer.weight.clone())
    with pytest.raises(spectune.SpectuneError, match="the merged weight of '0' is another one now"):
        record.check(layer)


def test_a_model_that_moved_to_another_dtype_and_back_is_the_same():
    model = spectune.merge(spectune.adapt(nn.Sequential(nn.Linear(4, 3)), "lora:rank=1"))
    ((layer, record),) = records_of(model, MergedLayer)
    model.double().float()
    record.check(layer)
    model.double()
    with pytest.raises(spectune.SpectuneError, match="another one now"):
        record.check(layer)
