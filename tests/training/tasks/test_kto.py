"""The loss of single answers is KTO's, packed or padded, and a run learns which answers are good."""

import json

import pytest
import torch

import spectune
from spectune.errors import SpectuneError
from spectune.training.config import load_config
from spectune.training.run import train
from spectune.training.tasks.kto import Kto
from training.folder import make_model, make_tokenizer, save_folder
from training.tasks.test_dpo import log_probability

USER, GOOD, BAD = (
    [{"role": role, "content": text}]
    for role, text in (("user", "say"), ("assistant", "ahoy"), ("assistant", "the two"))
)
JUDGED = [
    {"prompt": "one plus two is", "completion": "three", "label": True},
    {"prompt": "say", "completion": "ahoy and hello", "label": False},
    {"prompt": USER, "completion": GOOD, "label": 1},
    {"prompt": USER, "completion": BAD, "label": "false"},
]


def make(**more):
    return Kto(load_config(None, ["model=m", "data=d", "output=o", "task=kto", *(f"{k}={v}" for k, v in more.items())]))


@pytest.fixture(scope="module")
def models():
    """A base and the same model with an adapter that does something."""
    base, model = make_model().eval(), make_model().eval()
    spectune.adapt(model, "svf")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return base, model


def independent(base, model, judged, beta, good, bad):
    """Return the losses one sequence at a time and with two models, and the divergence."""
    with torch.no_grad():
        apart = [log_probability(model, each.other) - log_probability(base, each.other) for each in judged]
    z = torch.stack(apart).mean().clamp(min=0)
    losses = []
    for each in judged:
        r = log_probability(model, each.example) - log_probability(base, each.example)
        losses.append(good * (1 - (beta * (r - z)).sigmoid()) if each.good else bad * (1 - (beta * (z - r)).sigmoid()))
    return torch.stack(losses), z


@pytest.mark.parametrize("padded", [False, True])
def test_the_loss_is_the_one_computed_one_sequence_at_a_time(models, padded, monkeypatch):
    task, tokenizer = make(beta=0.3, undesirable_weight=1.5), make_tokenizer()
    base, model = models
    judged = task.encode(JUDGED, model, tokenizer, 64).examples
    assert [each.good for each in judged] == [True, False, True, False]
    if padded:
        monkeypatch.setattr("spectune.training.data.packing.PACKED_LIMIT", 0)
    batch = task.collator(model, tokenizer)(judged)
    assert ("position_ids" in batch) != padded
    sums = task.sums(model, dict(batch))
    losses, _ = independent(base, model, judged, 0.3, 1.0, 1.5)
    torch.testing.assert_close(sums["loss"], losses.sum(), atol=1e-4, rtol=1e-4)
    sums["loss"].backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    losses.sum().backward()
    theirs = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    assert ours
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    measures = task.metrics({key: value.detach() for key, value in sums.items()})
    assert measures["loss"] == pytest.approx(float(losses.detach().mean()), abs=1e-4)
    assert measures["reward_margin"] == pytest.approx(measures["reward_good"] - measures["reward_bad"])
    assert 0 <= measures["reward_accuracy"] <= 1


def test_the_divergence_is_measured_on_the_answers_of_other_prompts():
    task, tokenizer = make(), make_tokenizer()
    judged = task.encode(JUDGED, make_model(), tokenizer, 64).examples
    for each, after in zip(judged, [*judged[1:], judged[0]], strict=True):
        prompt, answer = each.example.supervised.index(True), after.example.supervised.index(True)
        assert each.other.tokens == each.example.tokens[:prompt] + after.example.tokens[answer:]


def test_a_run_learns_which_answers_are_good(tmp_path):
    save_folder(tmp_path / "model")
    words = [("ahoy", True), ("the", False)]
    rows = [
        {"prompt": f"say {n}", "completion": word, "label": good}
        for n in ("one", "two", "three", "four")
        for word, good in words
    ]
    data = tmp_path / "judged.jsonl"
    data.write_text("\n".join(map(json.dumps, rows * 4)))
    settings = [f"model={tmp_path / 'model'}", f"data={data}", "task=kto", f"output={tmp_path / 'out'}", "dtype=fp32"]
    result = train(load_config(None, [*settings, "method=lora:rank=4", "lr=1e-2", "epochs=6", "held_out=0.25"]))
    assert result.before["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert result.after["reward_margin"] > 0.1
    assert result.after["reward_accuracy"] > result.before["reward_accuracy"]
    assert result.after["loss"] < result.before["loss"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "say", "chosen": "a", "rejected": "b"}, "task: dpo learns from pairs"),
        ({"prompt": "say", "completion": "a", "label": "maybe"}, "label must be true or false, not 'maybe'"),
        ({"prompt": "say", "completion": "a"}, "it needs 'prompt', 'completion' and 'label'"),
        ({"prompt": USER, "completion": "a", "label": 2}, "label must be true or false, not 2"),
    ],
)
def test_records_of_another_form(record, message):
    assert message in str(make().problem(record))


def test_answers_that_are_all_good_are_for_another_task():
    with pytest.raises(SpectuneError, match="every answer has the label true: task: kto needs both; task: sft"):
        make().look([JUDGED[0]] * 3, [])
    task = make()
    task.look([JUDGED[0]] * 6 + [JUDGED[1]], [])
    assert "undesirable_weight=6 makes it 1" in task.notes[0]
