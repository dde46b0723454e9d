"""A crowd: each request is answered as it would be alone, through loading, cut connections and all that clients do."""

import asyncio
import os
import random

import httpx
import psutil
import pytest

from serving.servers import greedy, served, settled, tiny, words
from spectune.serving.jobs import Limits
from spectune.serving.shelf import Shelf
from spectune.serving.text import TextStream
from transformer2.cases import adapter


def mixture_of(i, adapters):
    """Return the model that a request names."""
    if i % 11 == 10:
        return "base"
    return f"a{i % adapters}" if i % 3 else f"a{i % adapters}:0.7+a{(i + 1) % adapters}:-0.4"


async def crowd(url, asked, folder, at_once):
    """Send all requests, and mischief between them; return what each was answered."""
    turns, answers, wrong = asyncio.Semaphore(at_once), {}, []

    async def reply(client, i, body):
        async with turns:
            kind = i % 10
            if kind == 7:  # hangs up in the middle
                async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
                    async for _ in answer.aiter_lines():
                        return
            elif kind == 8:
                for bad in (b"{", b'{"model": "nobody", "prompt": "one"}', b'"' + b"x" * 70000 + b'"'):
                    answer = await client.post(
                        "/v1/completions", content=bad, headers={"content-type": "application/json"}
                    )
                    wrong.append(answer.status_code)
                answers[i] = (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"]
            elif kind == 9:  # reads slowly
                text = ""
                async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
                    async for line in answer.aiter_lines():
                        await asyncio.sleep(0.002)
                        text += httpx.Response(200, text=line[6:]).json()["choices"][0]["text"] if "{" in line else ""
                answers[i] = text
            else:
                answers[i] = (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"]

    async def churn(client):
        for i in range(10):
            load = {"lora_name": "moving", "lora_path": str(folder / f"m{i % 2}"), "load_inplace": True}
            assert (await client.post("/v1/load_lora_adapter", json=load)).status_code == 200
            moving = {"model": "moving", "prompt": "one", "max_tokens": 30}
            going = asyncio.ensure_future(client.post("/v1/completions", json=moving))
            await asyncio.sleep(0.05)
            assert (await client.post("/v1/unload_lora_adapter", json={"lora_name": "moving"})).status_code == 200
            assert (await going).status_code in (200, 404)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        await asyncio.gather(churn(client), *(reply(client, i, body) for i, body in asked.items()))
    return answers, wrong


@pytest.mark.parametrize(
    ("count", "adapters"), [(60, 4), pytest.param(1000, 50, marks=pytest.mark.slow)], ids=["some", "a thousand"]
)
def test_each_of_a_crowd_is_answered_as_alone(tmp_path, count, adapters):
    model, tokenizer, draw = tiny(), words(), random.Random(0)
    shelf = Shelf(model)
    for i in range(adapters):
        shelf.put(f"a{i}", adapter("svf" if i % 2 else "lora:rank=2", seed=i + 1), "made")
    for i in range(2):
        adapter("lora:rank=2", seed=100 + i).save(tmp_path / f"m{i}")
    prompts = [[draw.randrange(3, 26) for _ in range(draw.randrange(1, 20))] for _ in range(count)]
    asked = {
        i: {"model": mixture_of(i, adapters), "prompt": p, "max_tokens": 1 + i % 12, "temperature": 0}
        for i, p in enumerate(prompts)
    }
    with served(model, tokenizer, shelf, limits=Limits(rows=16, waiting=2000), most_bytes=60000) as found:
        answers, wrong = asyncio.run(crowd(found.url, asked, tmp_path, count))
        assert settled(found.engine)
        found.engine.call(lambda: None).result(60)
        before = psutil.Process(os.getpid()).memory_info().rss
        if count > 100:  # once more, and the process is no larger
            answers |= asyncio.run(crowd(found.url, asked, tmp_path, count))[0]
            assert psutil.Process(os.getpid()).memory_info().rss < 1.1 * before
        assert settled(found.engine)
        found.engine.call(lambda: None).result(60)  # the step in which the last row ended is over
        assert found.engine.batch.bytes == 0
        assert len(shelf._on_model) == adapters
    assert set(answers) == {i for i in range(count) if i % 10 != 7}
    assert set(wrong) == {400, 404, 413}
    for i, text in answers.items():
        body = asked[i]
        mixture = {v.slot: w for v, w in shelf.mixture(shelf.parse(body["model"])).items()}
        stream = TextStream(tokenizer, body["prompt"])
        tokens = greedy(model, body["prompt"], body["max_tokens"], mixture)
        assert text == "".join([*map(stream.add, tokens), stream.end()])
