"""Adapters on a hub: pushed with a card, and read again, by name, branch and token."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn as nn

import spectune
from adapters.fake_hub import TOKEN, hub
from spectune.adapters.hub import card_of

CLIENT = """
import json, sys, torch, torch.nn as nn, spectune
def base(): torch.manual_seed(0); return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
def moved(method, by):
    model = spectune.adapt(base(), method)
    for p in model.parameters(): p.data += by if p.requires_grad else 0.0
    return spectune.extract(model)
def same(a, b): return all(torch.equal(a.bind(base()).delta(n), b.bind(base()).delta(n)) for n in a.layers)
first, second = moved("svf", 0.1), moved("svf", 0.2)
said = {"url": first.push_to_hub("me/svf", metrics={"accuracy": 0.5}, datasets=["me/data"], notes="Of pirates.")}
second.push_to_hub("me/svf", revision="next")
said["main"] = same(spectune.Adapter.load("me/svf"), first)
said["next"] = same(spectune.Adapter.load("me/svf", revision="next"), second)
for key, ask in {
    "token": lambda: first.push_to_hub("me/other", token="hf_wrong"),
    "none": lambda: spectune.Adapter.load("me/none"),
    "revision": lambda: spectune.Adapter.load("me/svf", revision="old"),
}.items():
    try:
        ask()
    except spectune.SpectuneError as error:
        said[key] = str(error)
print(json.dumps(said))
"""


def test_an_adapter_goes_to_the_hub_and_back(tmp_path):
    with hub() as (address, repositories):
        environment = {
            **os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        ran = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", CLIENT], capture_output=True, text=True, env=environment, timeout=600
        )
        assert ran.returncode == 0, ran.stderr
        said = json.loads(ran.stdout.splitlines()[-1])
        assert said["main"] is True
        assert said["next"] is True
        assert "me/svf/commit/" in said["url"]
        assert "could not be pushed to" in said["token"]
        assert "may write there" in said["token"]
        assert "no adapter folder 'me/none' here" in said["none"]
        assert "no adapter folder 'me/svf' here" in said["revision"]
        files = repositories["me/svf"]["main"]
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    card = files["README.md"].decode()
    for part in ("- me/data", "| accuracy | 0.5 |", "Of pirates.", 'Adapter.load("me/svf")'):
        assert part in card


def test_a_name_that_is_no_folder_and_no_repository_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(spectune.SpectuneError, match="no adapter folder 'folder'"):
        spectune.Adapter.load("folder")
    with pytest.raises(spectune.SpectuneError, match=r"no adapter folder 'some/folder' here, and the hub has no"):
        spectune.Adapter.load("some/folder")  # offline


@pytest.mark.parametrize(
    ("method", "library", "ways"),
    [
        ("svf", "spectune", ["import spectune.peft", "AutoPeftModel", "--format merged"]),
        ("lora:rank=2", "peft", ["AutoPeftModel", "--enable-lora"]),
        ("vera:rank=2", "spectune", ["import spectune.peft", "AutoPeftModel", "--format merged"]),
    ],
)
def test_a_card_says_what_works(method, library, ways):
    torch.manual_seed(0)
    adapter = spectune.extract(spectune.adapt(nn.Sequential(nn.Linear(6, 5)), method))
    adapter.base_model = "me/base"
    card = card_of(adapter, "me/adapter")
    assert f"library_name: {library}\nbase_model: me/base\n" in card
    for way in ways:
        assert way in card
    assert ("AutoPeftModel" in card) == ("AutoPeftModel" in ways)
