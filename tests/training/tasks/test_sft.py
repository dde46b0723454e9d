"""What supervised fine-tuning learns of a record."""

import pytest

from spectune.training.data.encoding import encode_one
from training.data.test_records import CHAT, SFT
from training.folder import make_tokenizer


def learned(example, tokenizer):
    return [tokenizer.decode([t]) for t, s in zip(*example, strict=True) if s]


def test_only_assistant_turns_are_learned_with_their_end():
    tokenizer = make_tokenizer()
    assert learned(encode_one(CHAT, tokenizer), tokenizer) == ["ahoy</s>", "two</s>"] or learned(
        encode_one(CHAT, tokenizer), tokenizer
    ) == ["ahoy", "</s>", "two", "</s>"]


def test_completion_and_end_are_learned_but_not_the_prompt():
    tokenizer = make_tokenizer()
    example = encode_one({"prompt": "one plus one is", "completion": "two"}, tokenizer)
    assert learned(example, tokenizer) == ["two", "</s>"]


def test_conversational_prompt_and_completion():
    tokenizer = make_tokenizer()
    record = {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:2]}
    assert encode_one(record, tokenizer) == encode_one({"messages": CHAT["messages"][:2]}, tokenizer)


def test_the_assistants_turns_in_a_prompt_are_not_learned():
    tokenizer = make_tokenizer()
    record = {"prompt": CHAT["messages"][:3], "completion": CHAT["messages"][3:]}
    assert SFT.problem(record) is None
    assert "".join(learned(encode_one(record, tokenizer), tokenizer)) == "two</s>"
    assert "completion: messages has no assistant turn" in SFT.problem({**record, "completion": CHAT["messages"][:1]})


@pytest.mark.parametrize("other", ["one two three", None])
def test_what_is_checked_is_what_is_learned(other):
    tokenizer = make_tokenizer()
    pair = {"prompt": "one plus one is", "completion": "two"}
    for record in (CHAT, pair):
        assert SFT.problem({**record, "text": other}) is None
        assert encode_one({**record, "text": other}, tokenizer) == encode_one(record, tokenizer)
    assert encode_one({"messages": None, **pair}, tokenizer) == encode_one(pair, tokenizer)
    assert "has the keys 'prompt'; it needs" in SFT.problem({"prompt": "one", "completion": None, "text": None})


def test_all_of_a_text_is_learned():
    tokenizer = make_tokenizer()
    assert all(encode_one({"text": "one two three"}, tokenizer).supervised)
