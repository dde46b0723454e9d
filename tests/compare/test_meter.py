"""Steps and memory as they are measured."""

import gc
from types import SimpleNamespace

import torch

from spectune.compare.meter import Peak, StepTimes


def test_a_step_is_measured_until_the_device_has_done_it(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    for device in (torch.device("cpu"), torch.device("cuda")):
        times = StepTimes()
        times.on_step_begin(SimpleNamespace(device=device), None, None)
        times.on_step_end(SimpleNamespace(device=device), None, None)
        assert len(times.seconds) == 1
    assert waited == [torch.device("cuda")] * 2


def test_the_peak_leaves_out_what_the_trial_before_held():
    before: list = [torch.ones(2**24)]
    before.append(before)
    del before
    peak = Peak()
    gc.collect()
    held = torch.ones(2**24)
    assert peak.bytes() is None or peak.bytes() > 0.8 * held.nbytes
