"""Tokens of texts: joined as in one text, behind what the tokenizer puts before each, and asked for together."""

import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from spectune.bases.tokens import (
    added_tokens,
    answered,
    answered_together,
    begun,
    continuing,
    decoded,
    end_of_text,
    first_added,
    ids,
    known,
    padding,
    text_tokens,
)
from training.data.families import TOKENIZERS, make
from training.folder import make_tokenizer


def with_template(template):
    """Return a tokenizer of words that puts something around every text."""
    tokenizer = make_tokenizer()
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


def number(tokenizer, *tokens):
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


def test_the_tokens_that_end_and_fill():
    tokenizer = make_tokenizer()
    assert (end_of_text(tokenizer), padding(tokenizer)) == (2, 0)
    tokenizer.pad_token = None
    assert padding(tokenizer) == 2
    tokenizer.eos_token = None
    assert (end_of_text(tokenizer), padding(tokenizer)) == (None, 0)


@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> <s> $A", "<s> $A </s>", "$A </s>"])
def test_a_text_begins_with_what_is_put_before_every_text_and_never_ends_with_what_is_put_behind(template):
    tokenizer = with_template(template)
    before = number(tokenizer, "<s>") * template.count("<s>")
    own = number(tokenizer, "say", "one")
    assert ids(tokenizer, "say one") == own
    assert ids(tokenizer, "") == []
    assert text_tokens(tokenizer, "say one") == [*before, *own]
    assert text_tokens(tokenizer, "") == before
    assert begun(tokenizer, [*before, *own]) == [*before, *own]  # it is there already


def test_what_asks_is_given_the_tokens_of_each_text_in_turn():
    tokenizer = make_tokenizer()

    def asking(*texts):
        found = []
        for text in texts:
            found.append((yield text))
        return found

    assert answered(tokenizer, asking("say", "one two")) == [ids(tokenizer, "say"), ids(tokenizer, "one two")]
    assert answered(tokenizer, asking()) == []
    calls = []

    class Counting:
        def __call__(self, texts, **options):
            calls.append(texts)
            return tokenizer(texts, **options)

    lists = [("say", "one"), ("say",), (), ("", "two", "three"), ("one", "")]
    found = answered_together(Counting(), [asking(*texts) for texts in lists])
    assert found == [[ids(tokenizer, text) for text in texts] for texts in lists]
    assert calls == [["say", "one"], ["one", "two"], "three"]  # each text once in a round, and none that is empty
    assert answered_together(Counting(), []) == []


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
@pytest.mark.parametrize(("before", "text"), [("hello", " world"), ("hello ", "world"), ("say:\n", "yes")])
def test_a_text_behind_another_leaves_its_tokens_as_they_are(kind, before, text):
    tokenizer = make("chatml", kind)
    tokens = ids(tokenizer, before)
    more = answered(tokenizer, continuing(tokenizer, before, tokens, text))
    joint = ids(tokenizer, before + text)
    if joint[: len(tokens)] == tokens and not text[0].isspace():
        assert more == joint[len(tokens) :]
    whole = decoded(tokenizer, [*tokens, *more])
    assert whole.split() == decoded(tokenizer, joint).split()
    assert answered(tokenizer, continuing(tokenizer, before, tokens, "")) == []


def added():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<a>", special=True), AddedToken("<a>b", special=False)])
    return tokenizer


def test_where_added_tokens_are_in_a_text():
    tokenizer = added()
    one, longer, end = number(tokenizer, "<a>", "<a>b", "</s>")
    assert added_tokens(tokenizer, "say <a> one<a>b</s>") == [(4, 7, one), (11, 15, longer), (15, 19, end)]
    assert added_tokens(tokenizer, "say one") == []
    assert first_added(tokenizer, "say <a>b</s>") == ("say ", longer)
    assert first_added(tokenizer, "say one") == ("say one", None)


def test_a_tokenizer_is_asked_again_once_it_is_another():
    tokenizer, asked = make_tokenizer(), []

    def answer():
        asked.append(1)
        return len(asked)

    assert [known(tokenizer, "it", answer) for _ in range(3)] == [1, 1, 1]
    assert known(tokenizer, "else", answer) == 2
    tokenizer.chat_template = "another"
    assert known(tokenizer, "it", answer) == 3
    tokenizer.add_tokens(["<new>"])
    assert known(tokenizer, "it", answer) == 4
    tokenizer.eos_token = None
    assert known(tokenizer, "it", answer) == 5
    assert known(make_tokenizer(), "it", answer) == 6
    before = added_tokens(tokenizer, "<newer>")
    tokenizer.add_tokens(["<newer>"])
    assert before == []
    assert len(added_tokens(tokenizer, "<newer>")) == 1
