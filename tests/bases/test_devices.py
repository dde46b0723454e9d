"""Devices and dtypes by name."""

import pytest
import torch

from spectune.bases import devices
from spectune.errors import SpectuneError


def test_auto_takes_bf16_only_where_it_is_fast(monkeypatch):
    monkeypatch.setattr(devices, "fast_bf16", lambda device: True)
    assert devices.resolve_dtype(None) == torch.bfloat16
    monkeypatch.setattr(devices, "fast_bf16", lambda device: False)
    assert devices.resolve_dtype("auto") == torch.float32


def test_names_of_dtypes():
    assert devices.resolve_dtype("bfloat16") == devices.resolve_dtype(torch.bfloat16) == torch.bfloat16
    with pytest.raises(SpectuneError, match="unknown dtype 'fp31'; did you mean 'fp32'"):
        devices.resolve_dtype("fp31")


def test_a_device_is_there_or_refused():
    assert devices.checked_device("cpu") == torch.device("cpu")
    assert devices.checked_device(None) == devices.default_device()
    with pytest.raises(SpectuneError, match="device=nonsense cannot be used here"):
        devices.checked_device("nonsense")


@pytest.mark.parametrize("has", [True, False])
def test_a_processor_is_asked_for_its_instructions_and_not_timed(monkeypatch, has):
    monkeypatch.setattr(devices, "multiplies_bfloat16", lambda: has)
    assert {devices.resolve_dtype("auto") for _ in range(3)} == {torch.bfloat16 if has else torch.float32}
