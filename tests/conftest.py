"""Every test is seeded, offline, on one thread unless OMP_NUM_THREADS says else, and keeps its caches to itself."""

import os
import random
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start too
os.environ["SPECTUNE_HOME"] = tempfile.mkdtemp(prefix="spectune-tests-")

import hypothesis
import numpy as np
import pytest
import torch

import imitations
import nearby  # noqa: F401

pytest_addoption = imitations.pytest_addoption
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

if not torch.cuda.is_available():  # the tests of the kernels then run them on the CPU, and no other test does
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["SPECTUNE_KERNELS"] = "off"


def pytest_configure(config):
    """Draw hypothesis' examples alike in every run, unless other random numbers are asked for."""
    imitations.begin(config)
    if sys.flags.warn_default_encoding:  # python -X warn_default_encoding: whatever of ours leaves one to the system
        config.addinivalue_line("filterwarnings", "error::EncodingWarning:spectune")
    name = "other seeds" if config.getoption("--seeds") else "alike"
    hypothesis.settings.register_profile(name, derandomize=name == "alike", database=None, deadline=None)
    hypothesis.settings.load_profile(name)


def pytest_ignore_collect(collection_path, config):
    """Leave out the files of other parts, unread."""
    which = config.getoption("--share")
    return True if which and collection_path.suffix == ".py" and collection_path not in imitations.part(which) else None


def pytest_collection_modifyitems(config, items):
    """Shuffle where asked to."""
    if config.getoption("--shuffle") is not None:
        imitations.shuffle(items, config.getoption("--shuffle"))


@pytest.fixture(autouse=True)
def _precision(monkeypatch):
    """Load models in float32 where a test gives no dtype: which one is faster here is a matter of time."""
    monkeypatch.setattr("spectune.bases.devices.multiplies_bfloat16", lambda: False)


@pytest.fixture(autouse=True)
def _seeded():
    """Draw the same numbers in every run."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
