"""Two passes behind one call: each row by its own adapter, streaming, and the base where nothing suits."""

import pytest
import torch

import spectune
from spectune import FewShot, SpectuneError, Transformer2
from spectune.bases.generation import generate
from spectune.transformer2.strategies import Decision
from training.folder import save_folder
from transformer2 import cases

PROMPTS = ["say one", "what is two plus three", "ahoy", "hello"]


class Given:
    """Chooses what it was given."""

    def __init__(self, *weights):
        self.weights = weights

    def choose(self, prompts):
        return [Decision("given", w) for w, _ in zip(self.weights, prompts, strict=True)]


def expected(adapter, prompt, **settings):
    model = cases.tiny()
    if adapter is not None:
        spectune.attach(model, adapter)
    return generate(model, cases.tokenizer(), [prompt], **settings)[0]


def test_a_batch_has_one_adapter_a_row(tmp_path):
    library = cases.library(tmp_path, ("svf", "lora:rank=2", "svf"))
    rows = [{"ahoy": 1.0}, {"plus": 1.0}, {"ahoy": 0.5, "say": 0.5}, {}]
    two = Transformer2(cases.tiny(), library, strategy=Given(*rows), tokenizer=cases.tokenizer())
    answers = two.generate(PROMPTS, max_new_tokens=6)
    ahoy, plus, say = (library.adapter(name) for name in cases.NAMES)
    for answer, prompt, adapter in zip(answers, PROMPTS, (ahoy, plus, 0.5 * ahoy + 0.5 * say, None), strict=True):
        assert answer.tokens == expected(adapter, prompt, max_new_tokens=6).tokens
    assert len({tuple(a.tokens) for a in answers}) == 4
    assert [a.decision.weights for a in answers] == rows
    two.close()
    assert spectune.adapter_names(two.model) == []


def test_the_prompt_strategy_answers_with_a_label_of_the_library(tmp_path):
    two = Transformer2(cases.tiny(), cases.library(tmp_path), tokenizer=cases.tokenizer())
    decisions = two.choose(PROMPTS)
    for decision in decisions:
        assert decision.label in (*cases.NAMES, "none")
        assert decision.weights == ({} if decision.label == "none" else {decision.label: 1.0})
        assert sum(decision.scores.values()) == pytest.approx(1)
        assert max(decision.scores.values()) == decision.confidence
    after = two.generate(PROMPTS, max_new_tokens=3)
    for decision, answer, again in zip(decisions, after, two.choose(PROMPTS), strict=True):
        assert decision.label == answer.decision.label == again.label
        assert again.scores == pytest.approx(decision.scores, rel=1e-4)  # what answered leaves no trace


def test_the_models_own_adapter_answers_again_afterwards(tmp_path):
    model, tokens = cases.tiny(), cases.ids(1)
    spectune.attach(model, cases.adapter("lora:rank=2", seed=7), "own")
    two = Transformer2(model, cases.library(tmp_path), strategy=Given({"ahoy": 1.0}), tokenizer=cases.tokenizer())
    with torch.no_grad():
        before = model(tokens).logits
        two.generate(PROMPTS[:1], max_new_tokens=2)
        torch.testing.assert_close(model(tokens).logits, before)
        two.close()
        torch.testing.assert_close(model(tokens).logits, before)


def test_after_an_answer_a_plain_model_is_the_base(tmp_path):
    two = Transformer2(cases.tiny(), cases.library(tmp_path), strategy={"ahoy": 1.0}, tokenizer=cases.tokenizer())
    two.generate(PROMPTS[:1], max_new_tokens=2)
    with torch.no_grad():
        torch.testing.assert_close(two.model(cases.ids(1)).logits, cases.logits_of(None, cases.ids(1)))


def test_a_library_may_grow_while_it_answers(tmp_path):
    two = Transformer2(cases.tiny(), cases.library(tmp_path), tokenizer=cases.tokenizer())
    two.choose(PROMPTS)
    two.library.add("more", cases.adapter(seed=9), "is for more")
    grown = two.choose(PROMPTS)
    assert set(grown[0].scores) == {*cases.NAMES, "more", "none"}
    fresh = Transformer2(cases.tiny(), two.library, tokenizer=cases.tokenizer()).choose(PROMPTS)
    assert [d.scores for d in grown] == [pytest.approx(d.scores, rel=1e-4) for d in fresh]


def test_decisions_must_be_as_many_as_prompts(tmp_path):
    two = Transformer2(cases.tiny(), cases.library(tmp_path), tokenizer=cases.tokenizer())
    with pytest.raises(SpectuneError, match="1 decisions were given for 2 prompts"):
        two.generate(PROMPTS[:2], decisions=[Decision("none", {})])


def test_a_fixed_mixture_and_a_found_one(tmp_path):
    library = cases.library(tmp_path)
    weights = {"ahoy": 0.7, "plus": 0.3}
    two = Transformer2(cases.tiny(), library, strategy=weights, tokenizer=cases.tokenizer())
    mixed = 0.7 * library.adapter("ahoy") + 0.3 * library.adapter("plus")
    assert two.generate(["say one"], max_new_tokens=5)[0].tokens == expected(mixed, "say one", max_new_tokens=5).tokens
    shots = [{"prompt": "say one", "completion": "two"}, {"prompt": "say two", "completion": "three"}]
    search = FewShot(shots, by="layer", population=6, elites=2, iterations=2)
    found = Transformer2(cases.tiny(), library, strategy=search, tokenizer=cases.tokenizer())
    assert found.generate(PROMPTS[:2], max_new_tokens=2)[0].decision.label == "mixture"


def test_streaming_gives_the_text_as_it_comes(tmp_path):
    class Streamer:
        def __init__(self):
            self.got = []

        def put(self, value):
            self.got += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Streamer()
    two = Transformer2(cases.tiny(), cases.library(tmp_path), strategy={"ahoy": 1.0}, tokenizer=cases.tokenizer())
    (answer,) = two.generate([[{"role": "user", "content": "say one"}]], max_new_tokens=5, streamer=streamer)
    assert streamer.ended
    assert streamer.got[-len(answer.tokens) :] == answer.tokens


def test_of_a_conversation_the_last_question_decides(tmp_path):
    class Seen(Given):
        def choose(self, prompts):
            self.prompts = prompts
            return super().choose(prompts)

    seen = Seen({})
    two = Transformer2(cases.tiny(), cases.library(tmp_path), strategy=seen, tokenizer=cases.tokenizer())
    roles = [("system", "say"), ("user", "one"), ("assistant", "two"), ("user", "three")]
    two.generate([[{"role": role, "content": text} for role, text in roles]], max_new_tokens=1)
    assert seen.prompts == ["three"]


def test_the_tokenizer_is_found_where_the_model_was_loaded(tmp_path):
    folder = save_folder(tmp_path / "model")
    model, _ = spectune.load_base(folder, "fp32")
    library = spectune.Library(tmp_path / "library")
    library.add("ahoy", cases.adapter(model=spectune.load_base(folder, "fp32")[0]))
    two = Transformer2(model, library.path, strategy={"ahoy": 1.0})
    assert two.generate(["say one"], max_new_tokens=2)[0].tokens
    with pytest.raises(SpectuneError, match="does not say where its tokenizer is"):
        Transformer2(cases.tiny(), cases.library(tmp_path / "other"))


def test_mistakes_are_told(tmp_path):
    library, tokenizer = cases.library(tmp_path), cases.tokenizer()
    with pytest.raises(SpectuneError, match="strategy must be 'prompt', 'classifier', a mixture or FewShot"):
        Transformer2(cases.tiny(), library, strategy="luck", tokenizer=tokenizer)
    with pytest.raises(SpectuneError, match="has no adapter 'ahoi'"):
        Transformer2(cases.tiny(), library, strategy={"ahoi": 1.0}, tokenizer=tokenizer)
    two = Transformer2(cases.tiny(), library, tokenizer=tokenizer)
    for prompts in ([], "say one"):
        with pytest.raises(SpectuneError, match="takes a list of prompts"):
            two.generate(prompts)
    with pytest.raises(SpectuneError, match="context holds 256"):
        Transformer2(cases.tiny(), library, strategy={}, tokenizer=tokenizer).generate(["one " * 300])


def test_a_library_of_many_is_loaded_as_it_is_asked_for(tmp_path):
    names = [f"a{i}" for i in range(40)]
    library = cases.library(tmp_path, ["svf"] * 40, names)
    two = Transformer2(cases.tiny(), library, strategy={"a7": 1.0}, tokenizer=cases.tokenizer())
    assert two.pool.bytes == 0
    two.generate(["say one"], max_new_tokens=1)
    assert two.pool.bytes == 4 * library.record("a7").parameters
    for name in names:
        two.pool.activate({name: 1.0})
    with torch.no_grad():
        expected_logits = cases.logits_of(library.adapter("a39"), cases.ids(1))
        torch.testing.assert_close(two.model(cases.ids(1)).logits, expected_logits, rtol=1e-4, atol=1e-4)
    assert len(spectune.adapter_names(two.model)) == two.pool.slots
