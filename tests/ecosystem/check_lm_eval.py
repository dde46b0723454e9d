"""lm-evaluation-harness: an adapted model and an adapter's folder give the scores that the merged model gives."""

import pytest
import torch
from ecosystem_cases import KINDS, adapted, adapter_of, base, moved
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from transformers import AutoModelForCausalLM

import spectune
import spectune.peft
from training.folder import make_tokenizer

ASKED = [("one plus two is", " three"), ("say", " ahoy"), ("what is one", " one")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    base(vocab_size=len(tokenizer)).save_pretrained(folder)  # to which the harness cuts a model that is larger
    tokenizer.save_pretrained(folder)
    return str(folder)


def scores(harness):
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(ASKED)]
    return torch.tensor([score for score, _ in harness.loglikelihood(requests, disable_tqdm=True)])


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_merged_model(kind, folder, tmp_path):
    def new():
        return AutoModelForCausalLM.from_pretrained(folder).eval()

    def asked(model):
        return scores(HFLM(pretrained=model, tokenizer=make_tokenizer(), batch_size=2, device="cpu"))

    model = moved(adapted(new(), kind)).eval()
    adapter = adapter_of(model)
    merged = asked(spectune.merge(spectune.attach(new(), adapter)))
    assert (merged - asked(new())).abs().max() > 1e-3
    assert torch.allclose(asked(model), merged, atol=1e-3)
    if kind == "adapt":
        adapter.save(tmp_path / "adapter")
    else:
        model.save_pretrained(tmp_path / "adapter")
    assert torch.allclose(asked(PeftModel.from_pretrained(new(), tmp_path / "adapter")), merged, atol=1e-3)
    harness = HFLM(pretrained=folder, peft=str(tmp_path / "adapter"), batch_size=2, device="cpu", dtype="float32")
    assert torch.allclose(scores(harness), merged, atol=1e-3)  # lm_eval --model_args pretrained=...,peft=...
