"""Base against adapter: measures by hand, both answers side by side, and what is said and drawn of them."""

import json
from html import unescape
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import spectune
from spectune.bases.classifiers import Prediction
from spectune.errors import SpectuneError
from spectune.training.config import load_config
from spectune.training.data import encode_one
from spectune.training.evaluate import _in_words, better, evaluate, verdict, write_page
from spectune.training.record import write_run
from spectune.training.tasks import make_task
from training.folder import save_folder

RECORDS = [{"prompt": f"say the {n}", "completion": f"ahoy {n} and {n}"} for n in ("one", "two", "three", "four")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, data, and a run whose adapter was drawn and never trained."""
    place = tmp_path_factory.mktemp("evaluated")
    save_folder(place / "model")
    (place / "data.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    (place / "other.jsonl").write_text("\n".join(map(json.dumps, RECORDS[:3])))
    config = load_config(None, [
        f"model={place / 'model'}", f"data={place / 'data.jsonl'}", f"output={place / 'run'}", "held_out=0.5",
        "dtype=fp32", "device=cpu", "method=lora:rank=2", "batch_size=2", "fused=false",
    ])  # fmt: skip
    parts = make_task(config).read()
    model, _ = spectune.load_base(place / "model", "fp32")
    spectune.adapt(model, "lora:rank=2", ["q_proj", "down_proj"])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith("B"):
            torch.nn.init.normal_(parameter, std=0.3)
    write_run(config, place / "run", parts, {})
    spectune.extract(model).save(place / "run")
    return place


def loss_by_hand(place, records, adapter):
    model, tokenizer = spectune.load_base(place / "model", "fp32")
    if adapter:
        spectune.attach(model, spectune.Adapter.load(place / "run"))
    total, count = 0.0, 0
    for record in records:
        tokens, supervised = encode_one(record, tokenizer)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens])).logits[0, :-1]
        learned = torch.tensor(supervised[1:])
        total += F.cross_entropy(logits[learned], torch.tensor(tokens[1:])[learned], reduction="sum").item()
        count += int(learned.sum())
    return total / count


def test_both_sides_are_measured_on_data_of_ones_own_and_answer_prompts(place):
    document = evaluate(
        place / "run", ["say one"], data=str(place / "other.jsonl"), examples=2, max_new_tokens=3, device="cpu"
    )
    assert (document["records"], document["task"], document["method"]) == (3, "sft", "lora:rank=2")
    for side in ("base", "adapter"):
        expected = loss_by_hand(place, RECORDS[:3], side == "adapter")
        assert document["measures"][side]["loss"] == pytest.approx(expected, rel=1e-4)
    assert [(reply["prompt"], reply["data"]) for reply in document["replies"]] == [
        ("say the one", "ahoy one and one"), ("say the two", "ahoy two and two"), ("say one", None),
    ]  # fmt: skip
    assert document["notes"] == []


def test_what_was_held_out_is_measured_and_a_change_of_the_data_is_told(place, tmp_path):
    document = evaluate(place / "run", examples=0, device="cpu")
    assert (document["records"], document["replies"], document["notes"]) == (2, [], [])
    before = (place / "data.jsonl").read_text()
    (place / "data.jsonl").write_text(before.replace("ahoy four", "ahoy ahoy"))
    try:
        notes = evaluate(place / "run", examples=0, device="cpu")["notes"]
    finally:
        (place / "data.jsonl").write_text(before)
    assert notes == ["the data is not what the run was trained on any more: held-out records may have been learned"]


def test_runs_that_are_not_there(place, tmp_path):
    with pytest.raises(SpectuneError, match=r"there is no folder .*rum; did you mean 'run'\?"):
        evaluate(place / "rum")
    with pytest.raises(SpectuneError, match=r"is not the folder of a run: it has no config\.yaml; `spectune train` ma"):
        evaluate(tmp_path)
    with pytest.raises(SpectuneError, match="there is no folder"):
        evaluate(tmp_path / "some" / "where")


@pytest.mark.parametrize(
    ("name", "less"),
    [
        ("loss", True),
        ("eval_loss", True),
        ("mse", True),
        ("mae", True),
        ("kl", True),
        ("reward_bad", True),
        ("accuracy", False),
        ("pearson", False),
    ],
)
def test_which_side_is_better(name, less):
    assert better(name, 0.5, 0.4) == less
    assert better(name, 0.5, 0.6) != less
    assert not better(name, 0.5, 0.5)


def document(base, adapted, **more):
    found = {"run": "runs/chats", "model": "a <model>", "records": 1234, "replies": [], "harness": {}, "notes": []}
    return {**found, "measures": {"base": base, "adapter": adapted} if base else {}, **more}


def test_the_verdict_is_of_the_first_measure_beside_the_loss():
    found = document({"loss": 1.0, "macro_f1": 0.5}, {"loss": 2.0, "macro_f1": 0.75})
    assert verdict(found) == ("on 1,234 held-out records the adapter is better than its base: macro f1 0.500 -> 0.750")
    found = document({"loss": 1.0}, {"loss": 1.25})
    assert verdict(found) == "on 1,234 held-out records the adapter is not better than its base: loss 1.000 -> 1.250"
    assert verdict(document({}, {})) == "nothing was measured"


def test_predictions_in_words():
    shares = {"a": 0.25, "b": 0.75}
    assert _in_words(Prediction("b", shares)) == "b (75%)"
    assert _in_words(Prediction("b", shares, ["a", "b"])) == "a (25%), b (75%)"
    assert _in_words(Prediction("b", shares, [])) == "none"
    assert _in_words(Prediction("score", {}, None, 0.123456)) == "0.123"


def test_the_page_holds_texts_as_they_are(tmp_path):
    more = {
        "replies": [{"prompt": "<b>say</b>", "data": None, "base": "one & two", "adapter": "x" * 3000}],
        "harness": {"base": {"piqa": {"acc": 0.5}}},
        "notes": ["the data is <not> there"],
    }
    write_page(document({"loss": 1.0}, {"loss": 0.5}, **more), tmp_path / "eval.html")
    page = (tmp_path / "eval.html").read_text(encoding="utf-8")
    assert "<h1>a &lt;model&gt; and chats</h1>" in page
    assert "&lt;b&gt;say&lt;/b&gt;" in page
    assert "x" * 2001 not in page
    assert "1.000 → 0.500" in page
    assert "piqa: {'acc': 0.5}" in unescape(page)  # once: what is escaped twice is read as &#x27;
    assert "the data is <not> there" in unescape(page)
    write_page(document({}, {}), tmp_path / "none.html")
    page = (tmp_path / "none.html").read_text(encoding="utf-8")
    assert "nothing was measured" in page
    assert "Side by side" not in page


def test_tasks_of_the_harness_are_run_with_each_side(place, monkeypatch):
    active = []

    class Harness:
        def simple_evaluate(self, model, tasks):
            with torch.no_grad():
                active.append(model.pretrained(input_ids=torch.tensor([[5, 6]])).logits)
            return {"results": {task: {"acc": float(len(active))} for task in tasks}}

    parts = {"lm_eval": Harness(), "lm_eval.models.huggingface": SimpleNamespace(HFLM=SimpleNamespace)}
    monkeypatch.setattr("spectune.training.evaluate.need", lambda name, *_: parts[name])
    found = evaluate(place / "run", tasks=["piqa"], data=str(place / "other.jsonl"), examples=0, device="cpu")
    assert found["harness"] == {"base": {"piqa": {"acc": 1.0}}, "adapter": {"piqa": {"acc": 2.0}}}
    model, _ = spectune.load_base(place / "model", "fp32")
    torch.testing.assert_close(active[0], model(input_ids=torch.tensor([[5, 6]])).logits)
    spectune.attach(model, spectune.Adapter.load(place / "run"))
    torch.testing.assert_close(active[1], model(input_ids=torch.tensor([[5, 6]])).logits)
