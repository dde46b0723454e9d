"""Messages: what their formats call them, what is wrong with one, and which are learned."""

import json

import pytest

from spectune.errors import SpectuneError
from spectune.training.data.messages import (
    FLAGS,
    as_messages,
    check_calls,
    is_conversation,
    is_learned,
    message_fault,
    message_problem,
    other_fields,
    without_nulls,
)


def user(content="say", **more):
    return {"role": "user", "content": content, **more}


def assistant(content="ahoy", **more):
    return {"role": "assistant", "content": content, **more}


CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"from": "human", "value": "say"}, user()),
        ({"speaker": "GPT", "text": "ahoy"}, assistant()),
        ({"author": " Prompter ", "message": "say"}, user()),
        ({"role": "model", "content": "ahoy"}, assistant()),
        ({"role": "observation", "content": "4"}, {"role": "tool", "content": "4"}),
        ({"role": "developer", "content": "be kind"}, {"role": "developer", "content": "be kind"}),
        ({"role": "narrator", "content": "so"}, {"role": "narrator", "content": "so"}),
        ({"role": "user", "from": "x", "content": "say"}, user(**{"from": "x"})),  # which is another field
        ({"role": 5, "content": "say"}, {"role": 5, "content": "say"}),
    ],
)
def test_what_formats_call_roles_and_contents(given, expected):
    before = dict(given)
    assert as_messages([given]) == [expected]
    assert given == before


@pytest.mark.parametrize("value", [None, "say", {"role": "user"}, ["say"], [user(), None]])
def test_what_are_no_messages(value):
    assert as_messages(value) is None


def test_calls_that_are_written_as_json():
    one, other = {"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}
    (found,) = as_messages([{"from": "function_call", "value": json.dumps(one)}])
    assert found == assistant("", tool_calls=[{"type": "function", "function": one}])
    (found,) = as_messages([{"role": "tool_call", "content": json.dumps([one, other])}])
    assert [call["function"]["name"] for call in found["tool_calls"]] == ["f", "g"]
    (found,) = as_messages([assistant(None, tool_calls=json.dumps([CALL]))])
    assert found["tool_calls"] == [CALL]
    (found,) = as_messages([assistant(tool_calls=[{**CALL, "id": None, "function": {"name": "f", "b": None}}])])
    assert found["tool_calls"] == [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(SpectuneError, match="'tool_calls' is not valid JSON"):
        as_messages([assistant(tool_calls="f(")])


@pytest.mark.parametrize("said", ["f(1)", "5", '"f"', "[1, 2]"])
def test_a_call_that_is_no_object_is_the_assistants_text(said):
    (found,) = as_messages([{"from": "function_call", "value": said}])
    assert found == assistant(said)
    assert as_messages([{"from": "function_call"}]) == [{"role": "assistant"}]


def test_what_a_table_adds_is_taken_away():
    value = {"a": None, "b": [{"c": None, "d": 0}, None, "x"], "e": ""}
    assert without_nulls(value) == {"b": [{"d": 0}, None, "x"], "e": ""}


@pytest.mark.parametrize(
    "message",
    [
        user(), assistant(""), assistant(["a", {"type": "text", "text": "b"}]), assistant(None, tool_calls=[CALL]),
        {"role": "assistant", "tool_calls": [CALL]}, assistant(None, function_call={"name": "f"}),
        *(assistant(**{flag: value}) for flag in FLAGS for value in (0, 1, True, False, None)),
        user(weight=1), user(train=0), assistant(mask=None),
    ],
)  # fmt: skip
def test_messages_without_a_fault(message):
    assert message_fault(message) is None
    assert is_conversation([message])


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ("say", "each message needs a role and a content, both text"),
        ({"content": "say"}, "each message needs a role and a content, both text"),
        ({"role": "", "content": "say"}, "each message needs a role and a content, both text"),
        (assistant(None), "each message needs a role and a content, both text"),
        (assistant(None, tool_calls=[]), "each message needs a role and a content, both text"),
        (user([{"type": "image"}]), "a message's content has a part of the type 'image', and only text is learned"),
        (user([5]), "a message's content has a part of the type 'int', and only text is learned"),
        (assistant(weight=0.5), "a message's weight must be 0 or 1, not 0.5"),
        (assistant(train="yes"), "a message's train must be 0 or 1, not 'yes'"),
        (user(train=True), "a message of the user has train=True, and the assistant's are learned"),
        (assistant(mask=0), "a message has 'mask', which would change what is learned: say it by 'weight', 0 or 1"),
        (assistant(tool_calls="f"), "a message's tool_calls must be a list of calls, not 'f'"),
        (assistant(tool_calls=[5]), "a message's tool_calls must be a list of calls, not [5]"),
        (
            assistant(tool_calls=[{"function": "f"}]),
            "a message's tool_calls must be a list of calls, not [{'function': 'f'}]",
        ),
    ],
)
def test_what_is_wrong_with_a_message(message, fault):
    assert message_fault(message) == fault
    assert not is_conversation([user(), message])


def test_no_messages_are_no_conversation():
    assert not is_conversation([])
    assert not is_conversation(user())


def test_the_assistants_turns_are_learned_unless_they_are_marked():
    marks = [assistant(), assistant(weight=1), assistant(loss=True), assistant(weight=1, train=None)]
    assert all(map(is_learned, marks))
    marks = [user(), user(weight=1), assistant(weight=0), assistant(train=False), assistant(weight=1, loss=0)]
    assert not any(map(is_learned, marks))


@pytest.mark.parametrize(
    ("messages", "first", "problem"),
    [
        ([user(), assistant()], 0, None),
        ([user(), assistant()], 1, None),
        ([], 0, "messages must be a list of objects with role and content"),
        (user(), 0, "messages must be a list of objects with role and content"),
        ([assistant(weight=2)], 0, "a message's weight must be 0 or 1, not 2"),
        ([user(), assistant(weight=2)], 0, "a message's weight must be 0 or 1, not 2 (message 2)"),
        ([user(), user(), {"role": "tool", "content": ""}], 0,
         "messages has no assistant turn to learn from (roles: user, tool)"),
        ([assistant(), user()], 1, "messages has no assistant turn to learn from (roles: assistant, user)"),
        ([user(), assistant(weight=0)], 0,
         "messages has no assistant turn to learn from: each has weight 0 or train false"),
        ([assistant(), assistant(train=False)], 1,
         "messages has no assistant turn to learn from: each has weight 0 or train false"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_conversation(messages, first, problem):
    assert message_problem(messages, first) == problem


def test_other_fields_are_those_with_a_value():
    assert other_fields([user(name="x", weight=1), assistant(thinking=None, tool_calls=[CALL])]) == {
        "name", "tool_calls"
    }  # fmt: skip


def test_calls_must_be_in_what_the_template_writes():
    check_calls(assistant(tool_calls=[CALL]), "<call>f(a=1)</call>")
    check_calls(assistant(tool_calls=[{"name": "g"}, "text"]), "g")
    check_calls(assistant(), "")
    with pytest.raises(SpectuneError, match=r"the chat template does not write tool calls \(f\): take a model whose"):
        check_calls(assistant(tool_calls=[CALL]), "ahoy")
