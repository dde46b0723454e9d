"""DeepSpeed's ZeRO-2 and ZeRO-3, by transformers' trainer: two processes train what one trains; ours refuses."""

import pytest
from ecosystem_cases import KINDS
from several import check, run


@pytest.mark.parametrize(("stage", "kind"), [("zero2", "adapt"), ("zero2", "peft"), ("zero3", "peft")])
def test_two_processes_train_what_one_trains(stage, kind, tmp_path):
    check(tmp_path, stage, kind, "plain")


def test_what_cannot_be_saved_whole_is_told(tmp_path):
    with pytest.raises(AssertionError, match=r"sharded or offloaded cannot be saved merged"):
        run(tmp_path / "run", 2, "zero3", "adapt", "plain")


@pytest.mark.parametrize("kind", KINDS)
def test_ours_leaves_it_to_the_plain_trainer(kind, tmp_path):
    with pytest.raises(AssertionError, match=r"DeepSpeed writes its own: take the plain trainer"):
        run(tmp_path / "run", 1, "zero2", kind, "trainer_for")
