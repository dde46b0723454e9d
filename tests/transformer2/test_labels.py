"""Labels scored by likelihood: as one long sequence would, and without the model's bias between labels."""

import pytest
import torch
import torch.nn.functional as F

from spectune import SpectuneError
from spectune.transformer2 import labels
from spectune.transformer2.labels import label_scores, label_tokens, labelling_prompt, opened, prompt_scores
from transformer2 import cases

PREFIXES = [[4, 9, 11], [7, 8, 9, 10, 11, 12, 13], [5]]


def by_hand(model, prefix, answer):
    """Return log p(answer | prefix) from one forward pass over both."""
    with torch.no_grad():
        log = F.log_softmax(model(torch.tensor([prefix + answer])).logits[0].float(), -1)
    return sum(float(log[len(prefix) - 1 + i, token]) for i, token in enumerate(answer))


@pytest.mark.parametrize("names", [["ahoy", "one plus two", "say hello"], ["one", "two"]], ids=["long", "single"])
def test_scores_are_those_of_the_whole_sequence(names):
    model, tokenizer = cases.tiny(), cases.tokenizer()
    scores = label_scores(model, tokenizer, PREFIXES, names)
    expected = [[by_hand(model, p, answer) for answer in label_tokens(tokenizer, names)] for p in PREFIXES]
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 15, 40])
def test_scores_do_not_depend_on_how_many_are_read_at_once(monkeypatch, tokens):
    model, tokenizer = cases.tiny(), cases.tokenizer()
    names = ["ahoy", "one plus two", "one", "say hello", "two"]
    at_once = label_scores(model, tokenizer, PREFIXES, names)
    monkeypatch.setattr(labels, "_TOKENS", tokens)
    torch.testing.assert_close(label_scores(model, tokenizer, PREFIXES, names), at_once, rtol=1e-4, atol=1e-4)


def test_a_prompt_without_content_favours_no_label(tmp_path):
    library = cases.library(tmp_path)
    scores, bias = prompt_scores(cases.tiny(), cases.tokenizer(), library, ["N/A", "...", ""])
    assert bias.shape == (4,)
    assert (bias.max() - bias.min()) > 0.1  # what the model likes to say anyway
    torch.testing.assert_close(scores.exp().mean(0), torch.ones(4), rtol=1e-4, atol=1e-4)


def test_the_question_tells_names_and_descriptions(tmp_path):
    question = labelling_prompt(cases.library(tmp_path), "say one")
    assert "- ahoy: is for ahoy\n" in question
    assert "- none: anything else\n" in question
    assert question.endswith("Message: say one")
    assert "ahoy" not in labelling_prompt(cases.library(tmp_path / "again"), "say one", descriptions=False)


def test_a_question_longer_than_the_context_is_told(tmp_path):
    library = cases.library(tmp_path)
    tokens = opened(cases.tokenizer(), labelling_prompt(library, "one " * 300))
    with pytest.raises(SpectuneError, match=r"holds 256: shorten .* or use the classifier strategy"):
        label_scores(cases.tiny(), cases.tokenizer(), [tokens], ["one"])
