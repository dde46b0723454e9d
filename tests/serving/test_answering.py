"""Answers whole and in pieces, and the statuses and sentences of what fails."""

import json

import pytest

from serving.told import TALK
from spectune.errors import SpectuneError
from spectune.serving.jobs import Busy, Closing, Event, TooSlow
from spectune.serving.shelf import UnknownAdapter, Unreadable


def test_a_stream_is_its_pieces_and_an_end(served):
    reply = served.ask("POST", "/v1/completions", {"model": "base", "prompt": "say", "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == "ahoy there"


ERRORS = [
    (UnknownAdapter("there is no adapter 'x'"), 404, "model_not_found"),
    (Busy("9 requests wait already"), 429, "too_many_requests"),
    (TooSlow("it took too long"), 408, "timeout"),
    (Unreadable("it cannot be had again"), 503, "adapter_unreadable"),
    (Closing("the server is being shut down"), 503, "shutting_down"),
    (SpectuneError("the prompt is too long"), 400, None),
    (MemoryError(), 503, None),
    (ZeroDivisionError("a secret"), 500, None),
]


@pytest.mark.parametrize(("error", "status", "code"), ERRORS)
def test_what_fails_has_a_status_and_a_sentence(served, error, status, code):
    served.engine.error = error
    reply = served.ask("POST", "/v1/chat/completions", TALK)
    assert reply.status_code == status
    assert reply.json()["error"]["code"] == code
    assert (reply.headers.get("retry-after") == "1") == (status in (429, 503))
    if status == 500:
        assert (
            reply.json()["error"]["message"] == "this should not have happened (ZeroDivisionError); the log says more"
        )
    elif not isinstance(error, MemoryError):
        assert reply.json()["error"]["message"] == str(error)


def test_a_request_that_fails_once_it_has_begun_says_so_in_either_way(served):
    served.engine.events = [Event(0, "ahoy", (), 1, None), Event(0, error=TooSlow("it took too long"))]
    reply = served.ask("POST", "/v1/chat/completions", TALK)
    assert (reply.status_code, reply.json()["error"]["message"]) == (408, "it took too long")
    reply = served.ask("POST", "/v1/chat/completions", {**TALK, "stream": True})
    assert reply.status_code == 200  # which was sent by then
    *_, last, end = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    assert json.loads(last)["error"]["message"] == "it took too long"
    assert end == "[DONE]"
