"""Training in two processes beside training in one, of the same batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from ecosystem_cases import ROWS, base
from peft import PeftModel
from transformers import AutoModelForCausalLM

import spectune

HERE = Path(__file__).parent
SECONDS = 600


def run(folder, processes, *asked):
    """Train in some processes, and return the losses; a run that does not end is stopped, with what each was doing."""
    folder.mkdir(parents=True)
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    command = [*launcher, str(processes), str(HERE / "one_process.py"), str(folder), *asked]
    with (folder / "log").open("w") as log:
        code = subprocess.run(command, cwd=HERE, stdout=log, stderr=log, env=os.environ, timeout=SECONDS).returncode
    assert code == 0, (folder / "log").read_text()[-3000:]
    return json.loads((folder / "losses.json").read_text())


def answers(folder):
    """Return what the model that was saved answers."""
    if not (folder / "adapter_config.json").exists():
        model = AutoModelForCausalLM.from_pretrained(folder)
    elif json.loads((folder / "adapter_config.json").read_text()).get("library_name") == "spectune":
        model = spectune.attach(base(), spectune.Adapter.load(folder))
    else:
        model = PeftModel.from_pretrained(base(), folder)
    with torch.no_grad():
        return model.eval()(ROWS).logits


def check(folder, how, kind, trainer):
    """Assert that two processes train what one trains."""
    alone = run(folder / "alone", 1, "plainly", kind, trainer)
    several = run(folder / "several", 2, how, kind, trainer)
    assert len(alone) == len(several) == 3
    assert all(abs(a - b) < 1e-2 for a, b in zip(alone, several, strict=True)), (alone, several)
    expected = answers(folder / "alone" / "saved")
    with torch.no_grad():
        assert (expected - base().eval()(ROWS).logits).abs().max() > 1e-2
    assert torch.allclose(answers(folder / "several" / "saved"), expected, atol=1e-2)
