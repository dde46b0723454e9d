"""Neither an import nor a test asks another machine for anything: see `nearby.py`, which holds that."""

import importlib
import pkgutil
import socket

import pytest

import spectune


def test_other_machines_are_out_of_reach():
    with pytest.raises(AssertionError, match="wants to talk to"):
        socket.create_connection(("example.org", 80), timeout=1)
    with pytest.raises(AssertionError, match=r"wants to talk to 192\.0\.2\.1"), socket.socket() as one:
        one.connect(("192.0.2.1", 80))


def test_every_module_can_be_imported_without_a_network():
    names = [module.name for module in pkgutil.walk_packages(spectune.__path__, "spectune.")]
    assert len(names) > 150
    for name in names:
        if not name.endswith("__main__") and ".kernels." not in name:  # of which those for a GPU need its packages
            importlib.import_module(name)
