"""A server from its beginning: the port, the adapters that can be had and those that cannot, a library's choice."""

import os
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest
from typer.testing import CliRunner

from serving.servers import served, shelf_of, tiny, words
from spectune.adapters.adapter import Adapter
from spectune.cli import app
from spectune.errors import SpectuneError
from spectune.serving import run
from spectune.serving.shelf import Shelf
from spectune.transformer2.two_pass import Transformer2
from training.folder import save_folder
from transformer2.cases import adapter, library

TALK = {"messages": [{"role": "user", "content": "say ahoy"}], "max_tokens": 6, "temperature": 0}


def test_a_port_that_is_in_use_is_said(monkeypatch):
    with run.listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(SpectuneError, match=rf"port {port} of '127.0.0.1' cannot be listened at .*another --port"):
            run.listen("127.0.0.1", port)

    def unknown(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(SpectuneError, match="another --port or --host"):
        run.listen("nowhere.invalid", 0)


def test_one_adapter_that_cannot_be_had_leaves_the_others(tmp_path):
    model, told = tiny(), []
    good, other, broken = (tmp_path / name for name in ("good", "other", "broken"))
    adapter("lora:rank=2").save(good)
    adapter("svf", model=tiny(hidden_size=64, num_attention_heads=2, num_key_value_heads=2)).save(other)
    adapter("svf").save(broken)
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    sources = {name: lambda name=name: Adapter.load(tmp_path / name) for name in ("other", "broken", "good", "none")}
    shelf = Shelf(model)
    run.put_adapters(shelf, sources, told.append)
    assert [version.name for version in shelf.versions] == ["good"]
    assert [re.match(r"the adapter '(\w+)' is not served: .", line)[1] for line in told] == ["other", "broken", "none"]


def test_a_server_of_which_no_adapter_can_be_had_does_not_begin(tmp_path):
    told = []
    sources = {name: lambda name=name: Adapter.load(tmp_path / name) for name in ("none", "nowhere")}
    with pytest.raises(SpectuneError, match="the adapter 'nowhere' is not served: there is no adapter folder"):
        run.put_adapters(Shelf(tiny()), sources, told.append)
    assert len(told) == 1


@pytest.mark.parametrize("strategy", [{"ahoy": 0.7, "say": 0.3}, "prompt"])
def test_auto_is_answered_by_what_the_library_chooses(tmp_path, strategy):
    model, tokenizer = tiny(), words()
    two = Transformer2(model, library(tmp_path), strategy=strategy, tokenizer=tokenizer)
    shelf = Shelf(model, auto=True)
    run.put_adapters(shelf, {n: lambda n=n: two.library.adapter(n) for n in two.library.names}, pytest.fail)
    with served(model, tokenizer, shelf, two) as found:

        def ask(name):
            return httpx.post(f"{found.url}/v1/chat/completions", json={"model": name, **TALK}, timeout=60).json()

        chosen = ask("auto")
        if isinstance(strategy, dict):
            assert chosen["adapters"] == strategy
            assert chosen["decision"] == {"label": "mixture", "confidence": None}
        else:
            assert chosen["decision"]["label"] in (*two.library.names, "none")
            assert 0 < chosen["decision"]["confidence"] <= 1
        named = ask("+".join(f"{n}:{w}" for n, w in chosen["adapters"].items()) or "base")
        assert named["choices"] == chosen["choices"]
        assert "decision" not in named
        assert [m["id"] for m in httpx.get(f"{found.url}/v1/models").json()["data"]][:2] == ["base", "auto"]
        no_prompt = httpx.post(f"{found.url}/v1/completions", json={"model": "auto", "prompt": [5, 6]})
        assert no_prompt.status_code == 400


def test_what_the_command_makes_of_its_arguments(tmp_path, monkeypatch):
    base, given = save_folder(tmp_path / "base"), {}
    adapter("svf", model=None).save(tmp_path / "one")
    monkeypatch.setattr(run, "serve", lambda *args, **named: given.update(named, sources=args[2]))

    def called(*words):
        return CliRunner().invoke(app, ["serve", str(base), "--port", "0", *words], env={"SPECTUNE_API_KEY": "k"})

    assert called("-a", f"pirate={tmp_path / 'one'}", "-a", str(tmp_path / "one"), "--max-batch", "3").exit_code == 0
    assert list(given["sources"]) == ["pirate", "one"]
    settings = given["settings"]
    assert (settings.host, settings.key, settings.limits.rows, settings.origins) == ("127.0.0.1", "k", 3, ())
    for wrong, told in (
        (["-a", "x=1", "-a", "x=2"], "two adapters are to be called 'x'"),
        (["-a", "=x"], "not NAME=ADAPTER"),
        (["--api-key", " "], "API key is empty"),
        (["--strategy", "prompt"], "give --library too"),
    ):
        failed = called(*wrong)
        assert isinstance(failed.exception, SpectuneError)
        assert told in str(failed.exception)


def test_the_page_asks_nothing_of_the_network():
    text = run.PAGE.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=.?https?:|//[a-z]+\.[a-z]|innerHTML|@import|eval\(", text)
    assert '<html lang="en">' in text
    model = tiny()
    with served(model, words(), shelf_of(model, 1), key="k") as found:
        page = httpx.get(found.url)
        assert page.status_code == 200
        assert page.text == text
        assert "default-src 'none'" in page.headers["content-security-policy"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGTERM")
def test_a_process_that_is_told_to_stop_ends_well(tmp_path):
    base = save_folder(tmp_path / "base")
    command = [sys.executable, "-W", "ignore", "-m", "spectune", "serve", str(base), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ}) as process:
        url = None
        for line in process.stderr:
            found = re.search(r"served at (http://\S+) with no adapter", line)
            if found:
                url = found[1]
                break
        assert url
        while True:
            try:
                reply = httpx.post(f"{url}/v1/chat/completions", json={"model": "base", **TALK}, timeout=60)
                break
            except httpx.ConnectError:
                continue
        assert reply.status_code == 200
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(60) in (0, -signal.SIGTERM)  # uvicorn passes the signal on when all is done
        assert "POST /v1/chat/completions 200" in rest
