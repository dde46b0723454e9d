"""An adapter trained on one processor attaches on another: decompositions there differ by rounding, and so do updates.

The other processor is a process in which every library keeps to what a processor without vector units can do, on two
threads, whose sums are in another order.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import spectune
from spectra import with_spectrum

HERE = Path(__file__).parents[1]
PLAIN = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
