"""Prompts that are shown with replies."""

from spectune.compare.answers import question
from spectune.training.replies import asked, spoken


def test_a_prompt_is_shown_once():
    chats = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]}
        for text, answer in [("one", "1"), ("one", "uno"), ("two", "2"), ("one", "1"), ("three", "3")]
    ]
    pairs = [{"prompt": "four", "completion": "4"}, {"prompt": "four", "completion": "vier"}, {"text": "five"}]
    found = asked([*chats, *pairs], 10)
    assert [one.answer for one in found] == ["1", "2", "3", "4"]
    assert len(asked(chats, 2)) == 2


def test_an_answer_may_be_in_parts():
    parts = ["say ", {"type": "text", "text": "one"}]
    chat = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}]}
    (found,) = asked([chat], 1)
    assert (found.answer, spoken(found.prompt)) == ("say one", "say one")
    assert question(chat)[1] == "say one"
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    assert question({"messages": [*chat["messages"][:1], call]})[1] == ""
