"""No key, no answer; nothing that is too large, from another site, or for a server of another name."""

import json
import logging
import re
import socket
import time

import httpx
import pytest

from serving.servers import served, shelf_of, tiny, words

TALK = {"model": "base", "messages": [{"role": "user", "content": "say ahoy"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def guarded():
    model = tiny()
    with served(
        model, words(), shelf_of(model, 1), key="sésame", most_bytes=2000, origins=["https://a.example"]
    ) as found:
        yield found


def post(server, path="/v1/chat/completions", body=None, key="sésame", **headers):
    headers = {k.replace("_", "-").encode(): v.encode() for k, v in headers.items()}
    if key is not None:
        headers[b"Authorization"] = f"Bearer {key}".encode()
    return httpx.post(f"{server.url}{path}", json=TALK if body is None else body, headers=headers)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/load_lora_adapter", "/nothing"])
@pytest.mark.parametrize("key", [None, "sesame", "sésame2", "sésam"])
def test_no_key_no_answer(guarded, path, key):
    reply = post(guarded, path, key=key)
    assert reply.status_code == 401
    assert reply.json()["error"]["code"] == "invalid_api_key"
    for other in ("/v1/models", "/metrics"):
        assert httpx.get(guarded.url + other).status_code == 401
    assert httpx.get(f"{guarded.url}/health").json() == {"status": "ok"}


def test_with_the_key_there_is_one(guarded):
    assert post(guarded).status_code == 200
    assert post(guarded, "/nothing").status_code == 404


def test_a_body_that_is_too_large_is_not_read(guarded):
    large = {**TALK, "user": "x" * 3000}
    assert post(guarded, body=large).status_code == 413

    def parts():
        for _ in range(100):
            yield b" " * 1000

    headers = {b"Authorization": "Bearer sésame".encode(), b"Content-Type": b"application/json"}
    assert httpx.post(f"{guarded.url}/v1/completions", content=parts(), headers=headers).status_code == 413
    assert post(guarded).status_code == 200


@pytest.mark.parametrize("told", [True, False], ids=["length told", "in chunks"])
def test_who_sends_too_much_is_told_so_and_not_cut_off(guarded, told):
    body = b"[" + b"1," * 12000 + b"1]"  # a dozen times what is read
    headers = {b"Authorization": "Bearer sésame".encode(), b"Content-Type": b"application/json"}
    for _ in range(10):
        content = body if told else iter([body[:500], body[500:]])
        reply = httpx.post(f"{guarded.url}/v1/completions", content=content, headers=headers)
        assert reply.status_code == 413
        assert "more than 2,000 bytes" in reply.json()["error"]["message"]


def test_pages_of_other_sites_cannot_ask(guarded):
    plain = httpx.post(
        f"{guarded.url}/v1/completions",
        content=json.dumps(TALK),
        headers={b"Authorization": "Bearer sésame".encode(), b"Content-Type": b"text/plain"},
    )
    assert plain.status_code == 415
    assert post(guarded, Host="evil.example").status_code == 421
    assert post(guarded, Host="[::1]:80").status_code == 200
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    for origin, allowed in (("https://a.example", True), ("https://b.example", False)):
        reply = httpx.options(f"{guarded.url}/v1/completions", headers={"Origin": origin, **asks})
        assert ("access-control-allow-origin" in reply.headers) == allowed


def test_without_a_word_no_other_site_is_allowed():
    with served(tiny(), words(), may_load=False) as found:
        reply = httpx.options(f"{found.url}/v1/models", headers={"Origin": "https://a.example"})
        assert "access-control-allow-origin" not in reply.headers
        load = {"lora_name": "x", "lora_path": "/"}
        assert httpx.post(f"{found.url}/v1/load_lora_adapter", json=load).status_code == 403


def test_the_log_has_a_line_without_contents(guarded, caplog):
    with caplog.at_level(logging.INFO, "spectune.serving"):
        post(guarded)
        httpx.get(f"{guarded.url}/health?secret=1")
        for _ in range(100):  # lines of requests before these may come late
            said = [record.getMessage() for record in caplog.records]
            if any(line.startswith("GET") for line in said):
                break
            time.sleep(0.02)
    answered = [line for line in said if line.startswith("POST /v1/chat/completions 200")]
    assert re.fullmatch(r"POST \S+ 200 \d+ms model='base' prompt_tokens=6 tokens=2", answered[-1])
    assert any(line.startswith("GET /health 200") for line in said)
    assert "ahoy" not in caplog.text
    assert "secret" not in caplog.text


def test_what_is_no_http_does_not_end_the_server(guarded):
    port = int(guarded.url.rpartition(":")[2])
    for said in (
        b"\x16\x03\x01\x02\x00",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port)) as line:
            line.sendall(said)
            line.settimeout(5)
            line.recv(1000)
    assert post(guarded).status_code == 200


def test_metrics_are_told(guarded):
    post(guarded)
    headers = {b"Authorization": "Bearer sésame".encode()}
    text = httpx.get(f"{guarded.url}/metrics", headers=headers).text
    values = dict(re.findall(r"^(spectune_\w+(?:\{[^}]*\})?) ([\d.e+]+)$", text, re.MULTILINE))
    assert float(values["spectune_adapters"]) == 1
    assert float(values["spectune_tokens_total"]) >= 2
    assert float(values["spectune_rows"]) == 0
    assert float(values['spectune_requests_total{path="/v1/chat/completions",status="200"}']) >= 1
