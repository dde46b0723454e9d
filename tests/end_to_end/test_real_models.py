"""The embedded models on embedded data."""

import json
import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

import spectune
from spectune.bases import sources
from spectune.cli import app
from spectune.layers.adapted import adapted_layers

METHODS = [("svf", "2e-2"), pytest.param("pissa:rank=16", "2e-3", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("method", "lr"), METHODS)
def test_the_demo_learns_and_its_adapter_gives_the_same_tokens_in_a_new_process(method, lr, tmp_path):
    arguments = ["demo", "--method", method, "--lr", lr, "--steps", "3", "--batch-size", "6", "--held", "6"]
    result = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "out"), "--json", "--dtype", "fp32"])
    assert result.exit_code == 0, result.output + repr(result.exception)
    shown = json.loads(result.stdout)
    assert shown["loss_after"] < 0.95 * shown["loss_before"]
    assert shown["before"] != shown["after"]
    if method == "svf":
        assert shown["adapter_bytes"] < 1_000_000
        assert shown["trained_parameters"] == 97_920
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_minilm_learns_what_questions_ask_for_and_classifies_from_the_command_line(tmp_path):
    unique = sorted(dict.fromkeys(sources.questions()))
    random.Random(0).shuffle(unique)
    rows = [{"text": text, "label": label.partition(":")[0]} for label, text in unique]
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows[:700]))
    settings = ["task=classify", "model=minilm-l6", f"data={data}", f"output={tmp_path / 'out'}", "held_out=0.25"]
    settings += ["method=svf", "lr=5e-2", "batch_size=8", "max_steps=60", "dtype=fp32", "device=cpu", "--json"]
    result = CliRunner().invoke(app, ["train", *settings])
    assert result.exit_code == 0, result.output + repr(result.exception)
    after = json.loads(result.stdout)["held_out_after"]
    majority = max(Counter(row["label"] for row in rows).values()) / len(rows)
    assert after["accuracy"] > majority + 0.2
    asked = ["classify", "minilm-l6", "Where is the Orinoco River ?", "-a", str(tmp_path / "out"), "--json"]
    found = json.loads(CliRunner().invoke(app, asked).stdout)
    assert set(found[0]["probabilities"]) == {row["label"] for row in rows}


def test_the_quick_preset_compares_on_minilm_to_a_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smaller = ["methods=[lora,svf]", "seeds=1", "lrs=1", "max_steps=2", "batch_size=2", "workers=1", "device=cpu"]
    smaller += ["validation=0.02", "test=0.04", "general=null"]
    result = CliRunner().invoke(app, ["compare", "--preset", "quick", *smaller, "--json"])
    assert result.exit_code == 0, result.output + repr(result.exception)
    document = json.loads(result.stdout)
    assert (document["model"], document["failures"]) == ("minilm-l6", [])
    assert {row["method"] for row in document["methods"] if row["ran"]} == {"lora", "svf"}
    out = tmp_path / "runs" / "compare-quick"
    assert len((out / "question-types.jsonl").read_text().splitlines()) == 700
    assert document["answer"][0] in (out / "report.html").read_text()
    for name in ("report.json", "report.csv", "pareto.png", "pareto.svg", "curves.png", "curves.svg"):
        assert (out / name).stat().st_size > 0


def test_svf_covers_all_210_linears_of_smollm2_and_leaves_it_as_it_was():
    model, tokenizer = spectune.load_base("smollm2-135m", "fp32")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        expected = model(**inputs).logits
        spectune.adapt(model, spectune.SVF())
        assert len(adapted_layers(model)) == 210
        torch.testing.assert_close(model(**inputs).logits, expected, atol=0, rtol=0)
    spectune.detach(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def sentiment():
    return [(text, float(rating > 0)) for text, rating in sources.reviews().items() if abs(rating) > 1.5][::8]


@pytest.mark.parametrize("method", ["svf", "lora:rank=4"])
def test_minilm_learns_sentiment_in_a_plain_loop(method):
    model, tokenizer = spectune.load_base("minilm-l6", "fp32")
    pairs = sentiment()[:120]
    labels = torch.tensor([label for _, label in pairs])
    texts = tokenizer([t for t, _ in pairs], padding=True, truncation=True, max_length=32, return_tensors="pt")
    spectune.adapt(model, method)
    head = torch.nn.Linear(384, 1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": parameters, "lr": 2e-3}, {"params": head.parameters(), "lr": 1e-2}])

    def loss(rows):
        states = model(texts["input_ids"][rows], attention_mask=texts["attention_mask"][rows]).last_hidden_state
        return F.binary_cross_entropy_with_logits(head(states[:, 0]).squeeze(1), labels[rows])

    everything = torch.arange(len(pairs))
    with torch.no_grad():
        start = loss(everything)
    for step in range(16):
        optimizer.zero_grad()
        loss(everything[step % 6 :: 6]).backward()
        optimizer.step()
    with torch.no_grad():
        assert loss(everything) < 0.9 * start
