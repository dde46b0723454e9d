"""A sample of the architectures that `make sweep` tries, and in the slow suite all of them."""

import pytest

import spectune
from sweep import run, zoo
from sweep.check import REFUSED, RIGHT, SKIPPED, WRONG, Verdict, check

SAMPLE = ["gemma2", "gpt_neox", "electra", "bart", "vit", "swinv2", "switch_transformers", "xlnet"]


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_sample_of_architectures(kind):
    verdict = check(*zoo.build(kind))
    assert verdict[:2] == (RIGHT, RIGHT), verdict.why
    assert verdict.layers


def test_a_save_that_changes_an_adapter_is_found(monkeypatch):
    save = spectune.Adapter.save
    monkeypatch.setattr("spectune.Adapter.save", lambda self, path: save(0.5 * self, path))
    verdict = check(*zoo.build("llama"))
    assert verdict.whole == WRONG
    assert "saved and loaded" in verdict.why


def test_the_page_says_what_came_of_each():
    found = {
        "llama": Verdict(RIGHT, REFUSED, 14, 2, "rows depend on each other"),
        "bert": Verdict(WRONG, "", 12, 0, "merged: off by 1"),
        "vit": Verdict(SKIPPED, "", 0, 0, "ValueError: no | size"),
    }
    text = run.page(found)
    assert "3 tried, 2 of them built" in text
    assert "| llama | LlamaForCausalLM | causal | 14 | 2 | right | refused | rows depend on each other |" in text
    assert text.index("| bert |") < text.index("| llama |")
    assert r"| vit | ViTForImageClassification | ValueError: no \| size |" in text


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(zoo.classes()))
def test_every_architecture(kind):
    verdict = run.try_one(kind)
    if verdict.whole == SKIPPED:
        pytest.skip(verdict.why)
    assert verdict.whole != WRONG, verdict.why
