"""What does not fit into memory is told before anything is loaded."""

import pytest

from spectune import SpectuneError
from spectune.compare.config import CompareConfig
from spectune.compare.room import check_room

WEIGHTS = 134_515_008 * 4  # of SmolLM2-135M in float32


def comparison(**values):
    return CompareConfig(model="smollm2-135m", data="d", dtype="fp32", device="cpu", **values)


def test_the_base_does_not_fit():
    with pytest.raises(
        SpectuneError, match=r"weights of smollm2-135m take 538 MB, and 500 MB are free: give dtype=bf16"
    ):
        check_room(comparison(), free=500 * 10**6)
    with pytest.raises(SpectuneError, match=r"workers=2, "):
        check_room(comparison(workers=4), free=3 * WEIGHTS)


def test_full_fine_tuning_alone_does_not_fit():
    assert check_room(comparison(), free=4 * WEIGHTS) == ["full"]
    assert check_room(comparison(methods=["lora"]), free=4 * WEIGHTS) == []
    assert check_room(comparison(), free=6 * WEIGHTS) == []
