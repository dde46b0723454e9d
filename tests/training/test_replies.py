"""Prompts that are shown with replies."""

from spectune.training.replies import asked


def test_a_prompt_is_shown_once():
    chats = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]}
        for text, answer in [("one", "1"), ("one", "uno"), ("two", "2"), ("one", "1"), ("three", "3")]
    ]
    pairs = [{"prompt": "four", "completion": "4"}, {"prompt": "four", "completion": "vier"}, {"text": "five"}]
    found = asked([*chats, *pairs], 10)
    assert [one.answer for one in found] == ["1", "2", "3", "4"]
    assert len(asked(chats, 2)) == 2
