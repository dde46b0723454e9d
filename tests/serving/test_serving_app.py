"""The routes by themselves, over an engine that is none: statuses, documents, and what is asked of the engine."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from serving.at_once import at_once
from serving.servers import shelf_of, tiny, words
from spectune.errors import SpectuneError
from spectune.serving.app import Service, make_app
from spectune.serving.asking import Reader
from spectune.serving.jobs import Busy, Closing, Event, TooSlow
from spectune.serving.shelf import Shelf, UnknownAdapter, Unreadable


class Engine:
    """Answers each request with what it was told to say, or fails as it was told to."""

    def __init__(self, shelf: Any) -> None:
        self.shelf, self.alive = shelf, True
        self.events: list[Event] = [Event(0, "ahoy", (), 2, None), Event(0, " there", (), 3, "stop")]
        self.error: Exception | None = None
        self.jobs: list[Any] = []
        self.cancelled: list[Any] = []

    def submit(self, job: Any) -> None:
        if self.error is not None:
            raise self.error
        self.jobs.append(job)
        for event in self.events:
            job.deliver([event])

    def cancel(self, job: Any) -> None:
        self.cancelled.append(job)

    def call(self, function: Any) -> Any:
        return at_once(function)

    def load(self, version: Any, read: Any, *, replace: bool = False) -> Any:
        return self.call(lambda: self.shelf.put(version.name, read(), version.path, replace=replace))


@pytest.fixture(scope="module")
def parts():
    model = tiny()
    return model, words(), shelf_of(model, 2)


@pytest.fixture
def served(parts):
    """Return an engine, its service, and a function that asks the application."""
    model, tokenizer, shelf = parts
    engine: Any = Engine(shelf)
    service = Service(engine, Reader(model, tokenizer), "tiny")
    app = make_app(service, page=b"<p>home")

    def ask(method, path, body=None):
        async def asking():
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                return await client.request(method, path, json=body)

        return asyncio.run(asking())

    return SimpleNamespace(engine=engine, service=service, ask=ask)


TALK = {"model": "a0", "messages": [{"role": "user", "content": "say"}]}


def test_a_chat_is_what_the_engine_says(served):
    found = served.ask("POST", "/v1/chat/completions", TALK).json()
    (choice,) = found["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("ahoy there", "stop")
    assert found["usage"]["completion_tokens"] == 3
    (job,) = served.engine.jobs
    assert job.weights == {"a0": 1.0}
    assert found["usage"]["prompt_tokens"] == len(job.rows[0].prompt)
    assert served.engine.cancelled == [job]  # its rows are free, whatever became of it


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


def test_models_are_the_base_and_the_adapters(served):
    found = served.ask("GET", "/v1/models").json()["data"]
    assert [(one["id"], one["root"], one["parent"]) for one in found] == [
        ("base", "tiny", None), ("a0", "tiny", "base"), ("a1", "tiny", "base")
    ]  # fmt: skip
    assert found[0]["max_model_len"] == 256
    one = served.ask("GET", "/v1/models/a0").json()
    assert len(one["adapter"]["layers"]) == found[1]["adapter"]["layers"]
    assert one["adapter"]["resident"]
    assert served.ask("GET", "/v1/models/base").json() == found[0]
    for name, told in (
        ("a9", "there is no adapter 'a9'"),
        ("a0:0.5+a1:1", "has no entry of its own; it is answered by"),
    ):
        reply = served.ask("GET", f"/v1/models/{name}")
        assert reply.status_code == 404
        assert told in reply.json()["error"]["message"]


def test_loading_and_unloading_may_be_switched_off(served):
    served.service.may_load = False
    for path, body in (
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "."}),
        ("/v1/unload_lora_adapter", {"lora_name": "a0"}),
    ):
        reply = served.ask("POST", path, body)
        assert reply.status_code == 403
        assert reply.json()["error"]["message"] == "this server loads and unloads no adapters by request"
    assert {version.name for version in served.engine.shelf.versions} == {"a0", "a1"}


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ({"lora_name": "base", "lora_path": "."}, 400, "'base' cannot be an adapter's name here"),
        ({"lora_name": "a0", "lora_path": "."}, 400, "an adapter 'a0' is loaded already"),
        (
            {"lora_name": "x", "lora_path": "/no/such/place"},
            400,
            "there is no adapter's folder '/no/such/place' on the",
        ),
        ({"lora_name": "x", "lora_path": "p" * 5000}, 400, "there is no adapter's folder"),
        ({"lora_name": "x", "lora_path": "a\0b"}, 400, "there is no adapter's folder"),
        ({"lora_name": "x"}, 400, "'lora_path': field required"),
    ],
)
def test_loads_that_are_refused(served, body, status, told):
    reply = served.ask("POST", "/v1/load_lora_adapter", body)
    assert reply.status_code == status
    assert told in reply.json()["error"]["message"]


def test_a_library_chooses_by_the_last_that_the_user_said(served):
    asked = []

    def choose(prompt):
        asked.append(prompt)
        return SimpleNamespace(weights={"a1": 0.5}, label="sea", confidence=0.75)

    served.service.choose = choose
    served.engine.shelf = Shelf(tiny(), auto=True)
    messages = [
        {"role": "user", "content": "first"}, {"role": "assistant", "content": "ahoy"},
        {"role": "user", "content": [{"type": "text", "text": "say "}, {"type": "text", "text": "one"}]},
    ]  # fmt: skip
    found = served.ask("POST", "/v1/chat/completions", {"model": "auto", "messages": messages}).json()
    assert found["decision"] == {"label": "sea", "confidence": 0.75}
    assert found["adapters"] == {"a1": 0.5}
    served.ask("POST", "/v1/completions", {"model": "auto", "prompt": "say two"})
    assert asked == ["say one", "say two"]
    reply = served.ask("POST", "/v1/completions", {"model": "auto", "prompt": [5, 6]})
    assert reply.status_code == 400
    assert "a library chooses for one prompt that is a text" in reply.json()["error"]["message"]
    assert [one["id"] for one in served.ask("GET", "/v1/models").json()["data"]] == ["base", "auto"]


def test_health_and_home(served):
    assert served.ask("GET", "/health").json() == {"status": "ok"}
    served.engine.alive = False
    reply = served.ask("GET", "/health")
    assert (reply.status_code, reply.json()) == (503, {"status": "ended"})
    home = served.ask("GET", "/")
    assert home.content == b"<p>home"
    assert "default-src 'none'" in home.headers["content-security-policy"]
    assert served.ask("GET", "/nothing").status_code == 404
