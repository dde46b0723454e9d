"""A machine's rates: measured, kept, and what a product takes by them."""

import pytest
import torch

import spectune
from spectune.methods import parse
from spectune.planning.machine import Machine, keep, this_machine


def test_measured_rates_are_kept_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECTUNE_HOME", str(tmp_path))
    monkeypatch.setattr("spectune.planning.probe.rates", lambda: {"fp32": 3e9})
    machine = this_machine()
    assert (machine.measured, machine.fp32, machine.threads) == (True, 3e9, torch.get_num_threads())
    machine.times["full None 9 9"] = 0.5
    keep(machine)
    monkeypatch.setattr("spectune.planning.probe.rates", lambda: pytest.fail("measured again"))
    assert this_machine() == machine
    (tmp_path / "machine.json").write_text("{")
    monkeypatch.setattr("spectune.planning.probe.rates", dict)
    assert this_machine().times == {}


def test_a_start_takes_longer_with_a_decomposition_and_in_proportion(monkeypatch):
    machine = Machine(measured=True)
    found = [machine.setup(parse(m), 24, 16, 10) for m in ("lora:rank=2", "svf")]
    assert min(found) > 0
    times = {"decomposition": 0.01, "basis": (0.003, 0.002)}  # whatever this machine takes
    for name, time in times.items():
        monkeypatch.setattr(f"spectune.planning.probe.{name}", lambda *shape, time=time: time)
    known = Machine(measured=True, layer=0.001)
    cheap, dear = (known.setup(parse(m), 24, 16, 10) for m in ("lora:rank=2", "svf"))
    assert cheap == pytest.approx(10 * 0.001, rel=0.01)
    assert dear == pytest.approx(10 * (known.layer + 0.01 / known.threads + 0.003) + 0.002, rel=0.01)
    assert {key.split()[0] for key in machine.times} == {"one_sided", "basis"}
    stored = Machine()
    assert stored.setup(spectune.SVF(), 4096, 4096, 2) == pytest.approx(2 * stored.setup(spectune.SVF(), 4096, 4096, 1))


def test_a_product_takes_what_one_of_its_shape_does(monkeypatch):
    timed = []
    monkeypatch.setattr("spectune.planning.probe.product", lambda *like: timed.append(like) or 1.0)
    machine = Machine(measured=True, overhead=0.0)
    plain = (False, False)
    small = machine.product(torch.float32, (1, 256, 512, 16), plain)
    assert small == 1.0
    assert machine.product(torch.float32, (1, 2048, 4096, 16), plain) == pytest.approx(8.0)  # eight of 1024 x 1024
    assert machine.product(torch.float32, (1, 250, 500, 16), plain) == pytest.approx(250 * 500 / (256 * 512))
    assert [like[1:5] for like in timed] == [(1, 256, 512, 16), (1, 1024, 1024, 16)]  # the third is like the first
    assert machine.product(torch.float32, (1, 0, 8, 8), plain) == 0.0


def test_stored_rates_are_lower_in_thin_products():
    machine = Machine()
    thin, thick = (machine.product(torch.float32, (1, 256, 512, n), (False, False)) / n for n in (8, 512))
    assert thin > 1.5 * thick
