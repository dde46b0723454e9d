"""OpenAI's protocol, by OpenAI's own client: what it says, and where servers of adapters are known to have fallen."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from serving.servers import SAID, greedy, scripted, served, settled, shelf_of, tiny, words
from spectune.serving.shelf import Shelf
from spectune.serving.text import TextStream
from transformer2.cases import adapter

TALK = [{"role": "user", "content": "say ahoy"}]


def client_of(server, key="none"):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def server():
    """Serve a tiny model with eight adapters."""
    model = tiny()
    with served(model, words(), shelf_of(model)) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with client_of(server) as found:
        yield found


@pytest.fixture(scope="module")
def sayer():
    """Serve a model that says one thing, however long the prompt is."""
    model, tokenizer = scripted(begin=60)
    with served(model, tokenizer) as found:
        yield found


@pytest.fixture(scope="module")
def says(sayer):
    """Return a function that completes a prompt of the script's length."""
    with client_of(sayer) as client:

        def complete(**options):
            options = {"model": "base", "prompt": [5] * 60, "temperature": 0, "max_tokens": 200, **options}
            return client.completions.create(**options)

        yield complete


def alone(server, prompt, limit, name=None):
    """Return what `generate` alone makes of a prompt, as text."""
    model = server.engine.batch.model
    mixture = {v.slot: w for v, w in server.shelf.mixture(server.shelf.parse(name)).items()} if name else None
    tokens = server.engine.call(lambda: greedy(model, prompt, limit, mixture)).result(60)
    stream = TextStream(words(), prompt)
    return "".join([*map(stream.add, tokens), stream.end()])


def chat_prompt():
    tokenizer = words()
    text = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["base", "tiny", "a0", "a1:0.7+a2:-0.3", "base:1+a3:0.5"])
def test_a_chat_is_answered_by_what_it_names(server, client, name):
    if name == "tiny":
        server.shelf.base_names = ("base", "tiny")
    reply = client.chat.completions.create(model=name, messages=TALK, temperature=0, max_tokens=9)
    (choice,) = reply.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == alone(server, chat_prompt(), 9, None if name in ("base", "tiny") else name)
    assert choice.finish_reason == "length"
    assert reply.model == name
    assert reply.object == "chat.completion"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(chat_prompt()), 9)
    wanted = {"base": {}, "tiny": {}, "a0": {"a0": 1.0}, "base:1+a3:0.5": {"a3": 0.5}}
    assert reply.adapters == wanted.get(name, {"a1": 0.7, "a2": -0.3})


def test_a_stream_is_the_same_text(client):
    asked = {"model": "a1", "messages": TALK, "temperature": 0, "max_tokens": 9}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert all(chunk.usage is None for chunk in client.chat.completions.create(**asked, stream=True))


def test_several_prompts_and_replies_are_kept_apart(server, client):
    prompts = ["one two", "three", "a b c"]
    asked = {"model": "a2", "temperature": 0, "max_tokens": 6}
    reply = client.completions.create(**asked, prompt=prompts, n=2)
    tokens = [words()(p)["input_ids"] for p in prompts]
    assert [c.index for c in reply.choices] == list(range(6))
    assert [c.text for c in reply.choices] == [alone(server, p, 6, "a2") for p in tokens for _ in range(2)]
    assert reply.usage.prompt_tokens == sum(map(len, tokens))
    assert reply.usage.completion_tokens == 36
    streamed = [""] * 6
    for chunk in client.completions.create(**asked, prompt=prompts, n=2, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [c.text for c in reply.choices]
    as_tokens = client.completions.create(**asked, prompt=tokens)
    assert [c.text for c in as_tokens.choices] == streamed[::2]
    assert client.completions.create(**asked, prompt=tokens[0]).choices[0].text == streamed[0]


@pytest.mark.parametrize("stream", [False, True])
def test_a_character_of_several_tokens_comes_whole(says, stream):
    reply = says(stream=stream)
    texts = [chunk.choices[0].text for chunk in reply] if stream else [reply.choices[0].text]
    assert "".join(texts) == SAID
    assert not any("\ufffd" in text for text in texts)
    assert len(texts) > 10 or not stream


@pytest.mark.parametrize("stop", ["STOP", ["nothing", "wind: 🏴‍☠️"], "é"])
@pytest.mark.parametrize("stream", [False, True])
def test_nothing_of_a_stop_string_is_sent(says, sayer, stop, stream):
    reply = says(stop=stop, stream=stream)
    chunks = list(reply) if stream else [reply]
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert text == SAID[: SAID.index(stop if isinstance(stop, str) else stop[1])]
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert settled(sayer.engine)


def test_a_reply_ends_where_the_model_ends_it(says):
    reply = says(max_tokens=None)
    assert reply.choices[0].text == SAID
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens == len(SAID.encode()) + 1


@pytest.mark.parametrize("nothing", [{}, {"max_tokens": None}, {"max_completion_tokens": None}])
def test_without_a_limit_a_reply_goes_to_the_end_of_the_context(server, nothing):
    asked = {"model": "base", "messages": TALK, "temperature": 0, **nothing}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=60).json()
    assert reply["usage"]["total_tokens"] == 256
    assert reply["choices"][0]["finish_reason"] == "length"


def test_contents_may_be_parts(client):
    parts = [{"type": "text", "text": "say "}, {"type": "text", "text": "ahoy"}]
    asked = {"model": "a0", "temperature": 0, "max_tokens": 5}
    replies = [
        client.chat.completions.create(**asked, messages=[{"role": "user", "content": content}])
        for content in (parts, "say ahoy")
    ]
    assert replies[0].choices == replies[1].choices
    picture = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    with pytest.raises(openai.BadRequestError, match="'image_url', and the model reads text alone"):
        client.chat.completions.create(**asked, messages=[{"role": "user", "content": picture}])


def test_log_probabilities_are_those_of_the_tokens(client):
    asked = {"model": "a0", "temperature": 0, "max_tokens": 5}
    chat = client.chat.completions.create(**asked, messages=TALK, logprobs=True, top_logprobs=3)
    content = chat.choices[0].logprobs.content
    assert len(content) == 5
    for one in content:
        assert one.logprob == one.top_logprobs[0].logprob <= 0
        assert bytes(one.bytes).decode() == one.token == one.top_logprobs[0].token
    chunks = client.chat.completions.create(**asked, messages=TALK, logprobs=True, top_logprobs=3, stream=True)
    streamed = [one for c in chunks if c.choices[0].logprobs for one in c.choices[0].logprobs.content]
    assert streamed == content
    text = client.completions.create(**asked, prompt="say", logprobs=2).choices[0]
    assert len(text.logprobs.tokens) == len(text.logprobs.token_logprobs) == 5
    assert [max(top.values()) for top in text.logprobs.top_logprobs] == text.logprobs.token_logprobs
    assert text.logprobs.text_offset[0] == 0


def test_a_seed_draws_the_same_again(client):
    asked = {"model": "a0", "messages": TALK, "max_tokens": 12, "temperature": 1.5, "n": 3}
    first, again = (
        [c.message.content for c in client.chat.completions.create(**asked, seed=5).choices] for _ in range(2)
    )
    assert first == again
    assert len(set(first)) == 3
    one = client.chat.completions.create(**{**asked, "n": 1}, seed=6, top_p=0.9, extra_body={"top_k": 5, "min_p": 0.01})
    assert one.usage.completion_tokens == 12


def test_biases_and_penalties_move_what_is_said(client):
    asked = {"model": "base", "prompt": "say", "temperature": 0, "max_tokens": 8}
    hello = words().convert_tokens_to_ids("hello")
    assert client.completions.create(**asked, logit_bias={str(hello): 100}).choices[0].text.split() == ["hello"] * 8
    varied = client.completions.create(**asked, logit_bias={str(hello): 100}, frequency_penalty=2.0)
    assert varied.choices[0].text.split() == ["hello"] * 8  # 16 are not 100
    with pytest.raises(openai.BadRequestError, match="no token of the model"):
        client.completions.create(**asked, logit_bias={"4000": 1})


def test_tools_go_to_the_template():
    template = (
        "{% for t in tools or [] %}<s>{{ t['function']['name'] }} {% endfor %}"
        "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }} {% endfor %}<s>assistant "
    )
    model, tokenizer = tiny(), words()
    tools = [{"type": "function", "function": {"name": "plus", "parameters": {}}}]
    with served(model, tokenizer) as found, client_of(found) as client:
        asked = {"model": "base", "messages": TALK, "max_tokens": 1}
        with pytest.raises(openai.BadRequestError, match="knows no tools"):
            client.chat.completions.create(**asked, tools=tools)
        plain = client.chat.completions.create(**asked).usage.prompt_tokens
        tokenizer.chat_template = template
        assert client.chat.completions.create(**asked, tools=tools).usage.prompt_tokens == plain + 2
        assert client.chat.completions.create(**asked, tools=tools, tool_choice="none").usage.prompt_tokens == plain
        with pytest.raises(openai.BadRequestError, match="cannot be enforced"):
            client.chat.completions.create(**asked, tools=tools, tool_choice="required")


@pytest.mark.parametrize("name", ["a9", "pirat", "a0:0.5+nobody", "A0"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_name_is_never_answered_by_the_base(client, name, stream):
    with pytest.raises(openai.NotFoundError, match="there is no adapter") as caught:
        client.chat.completions.create(model=name, messages=TALK, max_tokens=1, stream=stream)
    assert caught.value.code == "model_not_found"
    if name in ("a9", "A0"):
        assert "did you mean 'a" in str(caught.value)


BAD = [
    ({"model": "a0:x"}, "must be a number"),
    ({"model": "a0:nan"}, "must be a number"),
    ({"model": "a0:1e400+a1"}, "must be a number"),
    ({"model": "a0:"}, "must be a number"),
    ({"model": "a0:1_0"}, "must be a number"),
    ({"model": "a0:\u0663"}, "must be a number"),
    ({"model": "a0+"}, "lacks a name"),
    ({"model": "+a0"}, "lacks a name"),
    ({"model": "a0+a0"}, "named twice"),
    ({"model": ""}, "'model' is not given"),
    ({"model": None}, "'model' is not given"),
    ({"model": 3}, "'model'"),
    ({"messages": []}, "'messages'"),
    ({"messages": None}, "'messages'"),
    ({"messages": [{"content": "x"}]}, "no role"),
    ({"messages": ["x"]}, "'messages"),
    ({"messages": [{"role": "user", "content": 3}]}, "content of messages"),
    ({"messages": [{"role": "user"}]}, "has no content"),
    ({"messages": [{"role": "user", "content": "one " * 300}]}, "context holds 256"),
    ({"temperature": -1}, "'temperature'"),
    ({"temperature": "hot"}, "'temperature'"),
    ({"max_tokens": 0}, "'max_tokens'"),
    ({"max_tokens": True}, "'max_tokens'"),
    ({"n": 0}, "'n'"),
    ({"n": 100000}, "'n'"),
    ({"top_p": 1.5}, "'top_p'"),
    ({"max_token": 3}, "did you mean 'max_tokens'"),
    ({"response_format": {"type": "json_object"}}, "not held to a schema"),
    ({"stop": 3}, "'stop"),
    ({"top_logprobs": 2}, "needs 'logprobs'"),
    ({"adapter_weights": {"a0": "much"}}, "must be a number"),
    ({"model": "a1", "adapter_weights": {"a0": 1}}, "not both"),
]


@pytest.mark.parametrize(("change", "told"), BAD, ids=[json.dumps(c)[:40] for c, _ in BAD])
def test_what_is_not_understood_is_said_in_a_sentence(server, change, told):
    asked = {"model": "base", "messages": TALK, "max_tokens": 2, **change}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=asked)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert told in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("prompt", [[], "", [[]], [1, "a"], [[1], "a"], {"a": 1}, 5, [99999], [-1], [[1.5]], None])
def test_prompts_that_are_none(server, prompt):
    reply = httpx.post(f"{server.url}/v1/completions", json={"model": "base", "prompt": prompt})
    assert reply.status_code == 400, reply.text
    assert "prompt" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", b'{"a": 1, "a": 2}', b"[" * 100000, b'"' + b"x" * 9 + b'"']
)
def test_bodies_that_are_none(server, body):
    reply = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert "body" in reply.json()["error"]["message"]


def test_mixtures_as_lorax_gives_them(server):
    asked = {"messages": TALK, "temperature": 0, "max_tokens": 6}

    def said(**more):
        reply = httpx.post(f"{server.url}/v1/chat/completions", json={**asked, **more}).json()
        return reply["choices"], reply["adapters"]

    plain = said(model="a0:0.7+a1:0.3")
    assert said(adapter_weights={"a0": 0.7, "a1": 0.3}) == plain
    assert said(model="base", adapter_parameters={"ids": ["a0", "a1"], "weights": [0.7, 0.3]}) == plain


def test_models_are_listed(client):
    names = [model.id for model in client.models.list()]
    assert names == ["base", *(f"a{i}" for i in range(8))]
    assert client.models.retrieve("a1").parent == "base"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("a99")


def test_what_is_served_under_a_name_may_change(tmp_path, server, client):
    adapter("lora:rank=2", seed=50).save(tmp_path / "new")
    load = {"lora_name": "new", "lora_path": str(tmp_path / "new")}

    def post(what, body):
        return httpx.post(f"{server.url}/v1/{what}", json=body)

    assert post("load_lora_adapter", load).text == "Success: LoRA adapter 'new' added successfully."
    assert client.chat.completions.create(model="new", messages=TALK, max_tokens=2).adapters == {"new": 1.0}
    again = post("load_lora_adapter", load)
    assert again.status_code == 400
    assert "loaded already" in again.text
    assert post("load_lora_adapter", {**load, "load_inplace": True}).status_code == 200
    assert post("unload_lora_adapter", {"lora_name": "new"}).status_code == 200
    assert post("unload_lora_adapter", {"lora_name": "new"}).status_code == 404
    for name, path, told in (
        ("base", load["lora_path"], "cannot be an adapter's name"),
        ("a b", load["lora_path"], "cannot be an adapter's name"),
        ("none", str(tmp_path / "none"), "no adapter's folder"),
        ("none", str(tmp_path), "adapter_config.json"),
        ("none", "a" * 10000, "no adapter's folder"),
    ):
        refused = post("load_lora_adapter", {"lora_name": name, "lora_path": path})
        assert refused.status_code == 400
        assert told in refused.json()["error"]["message"]
    adapter("lora:rank=2", model=tiny(initializer_range=0.5)).save(tmp_path / "other")
    reply = post("load_lora_adapter", {"lora_name": "other", "lora_path": str(tmp_path / "other")})
    assert reply.status_code == 400


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_row(stream):
    model, tokenizer = scripted(seconds=0.002)
    with served(model, tokenizer) as found:
        body = json.dumps(
            {"model": "base", "prompt": [5], "max_tokens": 3500, "stream": stream, "n": 4, "ignore_eos": True}
        )
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", int(found.url.rpartition(":")[2]))) as line:
            line.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            while found.engine.rows < 4 or found.engine.steps < 5:
                time.sleep(0.01)
            if stream:
                assert b"data:" in line.recv(100000)
        assert settled(found.engine)
        assert found.engine.tokens < 10000
        with client_of(found) as client:
            assert client.completions.create(model="base", prompt=[5], max_tokens=2).usage.completion_tokens == 2


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_an_unload_waits_for_nobody_and_what_was_cut_off_holds_no_adapter(n, stream):
    model, tokenizer = scripted(seconds=0.002)
    shelf = Shelf(model)
    shelf.put("a0", adapter("lora:rank=2", model=scripted()[0]), "made")
    with served(model, tokenizer, shelf) as found:
        body = {"model": "a0", "prompt": [5], "max_tokens": 3500, "stream": stream, "n": n, "ignore_eos": True}
        data = json.dumps(body)
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", int(found.url.rpartition(":")[2]))) as line:
            line.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n{data}".encode())
            while found.engine.rows < n or found.engine.steps < 5:
                time.sleep(0.01)
            gone = httpx.post(f"{found.url}/v1/unload_lora_adapter", json={"lora_name": "a0"}, timeout=30)
            assert gone.status_code == 200
            assert found.shelf.resident == 1  # for those that run
        assert settled(found.engine)
        found.engine.call(lambda: None).result(30)
        assert found.shelf.resident == 0
        assert httpx.post(f"{found.url}/v1/completions", json={**body, "stream": False}).status_code == 404


def test_adapters_that_were_set_aside_answer_again_or_say_why_not(tmp_path):
    model = tiny()
    shelf = Shelf(model, most=1)
    with served(model, words(), shelf) as found:
        said = {}
        for name in ("x", "y"):
            adapter("lora:rank=2", seed=len(said) + 60).save(tmp_path / name)
            load = {"lora_name": name, "lora_path": str(tmp_path / name)}
            assert httpx.post(f"{found.url}/v1/load_lora_adapter", json=load, timeout=60).status_code == 200
            ask = {"model": name, "messages": TALK, "max_tokens": 6, "temperature": 0}
            said[name] = httpx.post(f"{found.url}/v1/chat/completions", json=ask).json()["choices"]
        entries = httpx.get(f"{found.url}/v1/models").json()["data"]
        assert [e["adapter"]["resident"] for e in entries if "adapter" in e] == [False, True]
        again = httpx.post(f"{found.url}/v1/chat/completions", json={**ask, "model": "x"}).json()["choices"]
        assert again == said["x"] != said["y"]
        for file in (tmp_path / "y").iterdir():
            file.unlink()
        failed = httpx.post(f"{found.url}/v1/chat/completions", json=ask)
        assert failed.status_code == 503
        assert failed.json()["error"]["code"] == "adapter_unreadable"
        both = httpx.post(f"{found.url}/v1/chat/completions", json={**ask, "model": "x+y"})
        assert both.status_code == 400
        assert "are held at once" in both.json()["error"]["message"]
        metrics = httpx.get(f"{found.url}/metrics").text
        assert "spectune_adapters_resident 1.0" in metrics
        assert "spectune_adapter_reads_total 1.0" in metrics


def test_of_loads_of_one_name_at_once_one_is_served(tmp_path, server):
    adapter("lora:rank=2", seed=51).save(tmp_path / "twice")
    load = {"lora_name": "twice", "lora_path": str(tmp_path / "twice")}
    with ThreadPoolExecutor(4) as pool:
        post = lambda _: httpx.post(f"{server.url}/v1/load_lora_adapter", json=load, timeout=60).status_code  # noqa: E731
        assert sorted(pool.map(post, range(4))) == [200, 400, 400, 400]
    assert httpx.post(f"{server.url}/v1/unload_lora_adapter", json={"lora_name": "twice"}).status_code == 200


def test_how_much_of_a_prompt_was_known_is_told(client):
    asked = {"model": "a5", "prompt": "one two three " * 20, "temperature": 0, "max_tokens": 4}
    first, again = (client.completions.create(**asked) for _ in range(2))
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens == 48
    assert again.choices[0].text == first.choices[0].text


def test_a_reader_who_is_slow_gets_all(sayer):
    asked = {"model": "base", "prompt": [5] * 60, "temperature": 0, "max_tokens": 40, "stream": True}
    with httpx.stream("POST", f"{sayer.url}/v1/completions", json=asked) as reply:
        text = ""
        for line in reply.iter_lines():
            time.sleep(0.01)
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
    assert line == "" or line == "data: [DONE]"
    assert SAID.startswith(text)
    assert len(text.encode()) >= 37


def test_time_is_bounded():
    model, tokenizer = scripted(seconds=0.002)
    with served(model, tokenizer, seconds=0.3) as found, client_of(found) as client:
        asked = {"model": "base", "prompt": [5], "max_tokens": 3500, "extra_body": {"ignore_eos": True}}
        with pytest.raises(openai.APIStatusError, match="no complete reply within"):
            client.completions.create(**asked)
        with pytest.raises(openai.APIError, match="no complete reply within"):
            list(client.completions.create(**asked, stream=True))
        with socket.create_connection(("127.0.0.1", int(found.url.rpartition(":")[2]))) as line:
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            line.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            assert b" 408 " in line.recv(1000)
        assert settled(found.engine)


def test_the_base_alone_needs_no_adapter():
    model = tiny()
    with served(model, words(), Shelf(model)) as found, client_of(found) as client:
        assert client.chat.completions.create(model="base", messages=TALK, max_tokens=3).usage.completion_tokens == 3
        with pytest.raises(openai.NotFoundError, match="start with --library"):
            client.chat.completions.create(model="auto", messages=TALK)
