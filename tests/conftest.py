"""Every test is seeded, offline, on one thread, and keeps what it caches to itself."""

import os
import random
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start too
os.environ["SPECTUNE_HOME"] = tempfile.mkdtemp(prefix="spectune-tests-")

import numpy as np
import pytest
import torch

torch.set_num_threads(1)

if not torch.cuda.is_available():  # the tests of the kernels then run them on the CPU, and no other test does
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["SPECTUNE_KERNELS"] = "off"


@pytest.fixture(autouse=True)
def _seeded():
    """Draw the same numbers in every run."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
