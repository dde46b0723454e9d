"""The routes by themselves, over an engine that is none: statuses, documents, and what is asked of the engine."""

from types import SimpleNamespace

import pytest

from serving.servers import tiny
from serving.told import TALK
from spectune.serving.shelf import Shelf


def test_a_chat_is_what_the_engine_says(served):
    found = served.ask("POST", "/v1/chat/completions", TALK).json()
    (choice,) = found["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("ahoy there", "stop")
    assert found["usage"]["completion_tokens"] == 3
    (job,) = served.engine.jobs
    assert job.weights == {"a0": 1.0}
    assert found["usage"]["prompt_tokens"] == len(job.rows[0].prompt)
    assert served.engine.cancelled == [job]  # its rows are free, whatever became of it


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
