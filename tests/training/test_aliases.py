"""Keys under the names that other tools have for them."""

import pytest

from spectune import SpectuneError
from spectune.training import aliases
from spectune.training.aliases import aliased, hint
from spectune.training.config import TrainConfig
from spectune.training.registry import task_keys

KNOWN = {*TrainConfig.model_fields, *task_keys()}


def test_every_name_of_another_tool_stands_for_a_key_that_there_is():
    assert aliases._SAME.keys() <= KNOWN
    assert not aliases._OURS.keys() & KNOWN
    assert not aliases._INSTEAD.keys() & (KNOWN | aliases._OURS.keys())


def test_a_setting_comes_under_our_name_and_others_stay():
    given = {"learning_rate": 1e-3, "epochs": 2, "nonsense": 1}
    assert aliased(given, KNOWN) == {"lr": 1e-3, "epochs": 2, "nonsense": 1}


@pytest.mark.parametrize("given", [{"lr": 1, "learning_rate": 2}, {"num_epochs": 1, "num_train_epochs": 2}])
def test_a_setting_under_two_names_is_refused(given):
    with pytest.raises(SpectuneError, match="are the same setting: give one of them"):
        aliased(given, KNOWN)


def test_a_number_of_records_is_no_share():
    assert aliased({"val_set_size": 0.1}, KNOWN) == {"held_out": 0.1}
    with pytest.raises(SpectuneError, match="val_set_size: 100 is not a share"):
        aliased({"val_set_size": 100}, KNOWN)


def test_what_is_said_in_another_way_is_told():
    assert hint("load_in_4bit") == ": write quantize: nf4 for 4 bits, int8 for 8"
    assert hint("lr") == ""
