"""Tokens a second of a server with 0 to 64 adapters, each request naming another one, beside `transformers serve`.

SmolLM2-135M over HTTP on this machine; every request asks for the same number of tokens, so many at once.  The adapters
are LoRAs of rank 8 on all 210 linears, or SVFs, with random values.  `alone` is `generate` with one request after the
other.  transformers' server knows no adapters: it is measured with the base.

    python benchmarks/serve.py [--adapters 0 1 16 64] [--method lora:rank=8] [--requests 32] [--at-once 16]
        [--tokens 32] [--peer] [--dtype fp32] [--name serve]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import threading
import time
from typing import Any

import httpx
import torch
import uvicorn

import spectune
from _machine import save
from spectune.bases.generation import generate
from spectune.bases.loading import model_path
from spectune.layers.adapted import adapted_layers
from spectune.serving.engine import Limits
from spectune.serving.run import Settings, build
from spectune.serving.shelf import Shelf

PROMPTS = [f"Tell me in a few words what number {i} is good for, and who would want to have it." for i in range(64)]


def put(shelf: Shelf, method: str, count: int) -> None:
    """Put random adapters "a0", "a1", ... on a shelf."""
    model = shelf.model
    spectune.adapt(model, method, name="made")
    made = [p for layer in adapted_layers(model).values() for p in layer.adapters["made"].parameters()]
    start = [p.detach().clone() for p in made]
    for i in range(count):
        with torch.no_grad():
            for p, s in zip(made, start, strict=True):
                p.copy_(s + 0.01 * torch.randn_like(s))
        shelf.put(f"a{i}", spectune.extract(model, "made"), "made")
    spectune.detach(model, "made")


async def ask(url: str, names: list[str], count: int, at_once: int, tokens: int) -> dict[str, float]:
    """Ask for replies, so many at once; return tokens a second and seconds to the first token."""
    firsts, turns = [], asyncio.Semaphore(at_once)

    async def one(client: httpx.AsyncClient, i: int) -> int:
        body = {
            "model": names[i % len(names)],
            "messages": [{"role": "user", "content": PROMPTS[i % len(PROMPTS)]}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
        }
        async with turns:
            began, said = time.perf_counter(), 0
            async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as reply:
                reply.raise_for_status()
                async for line in reply.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    choices = json.loads(line[6:]).get("choices") or [{}]
                    if (choices[0].get("delta") or {}).get("content"):
                        said += 1
                        if said == 1:
                            firsts.append(time.perf_counter() - began)
            return said

    async with httpx.AsyncClient(timeout=300) as client:
        began = time.perf_counter()
        said = await asyncio.gather(*(one(client, i) for i in range(count)))
        seconds = time.perf_counter() - began
    return {
        "replies_with_text": sum(n > 0 for n in said),
        "tokens_per_second": round(count * tokens / seconds, 2),
        "median_seconds_to_first": round(sorted(firsts)[len(firsts) // 2], 3),
        "seconds": round(seconds, 2),
    }


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """Measure our server."""
    model, tokenizer = spectune.load_base("smollm2-135m", args.dtype)
    model.generation_config.eos_token_id = model.config.eos_token_id = None  # every reply has all of its tokens
    tokenizer.eos_token, tokenizer.chat_template = None, tokenizer.chat_template.replace("<|im_end|>", "")
    found: dict[str, Any] = {}
    began = time.perf_counter()
    for prompt in PROMPTS[:2]:
        generate(model, tokenizer, [prompt], max_new_tokens=args.tokens)
    found["alone"] = {"tokens_per_second": round(2 * args.tokens / (time.perf_counter() - began), 2)}
    for count in args.adapters:
        shelf = Shelf(model)
        began = time.perf_counter()
        if count:
            put(shelf, args.method, count)
        loaded = time.perf_counter() - began
        app, _ = build(
            model, tokenizer, shelf, name="smollm2-135m", settings=Settings(limits=Limits(rows=args.at_once))
        )
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        names = [f"a{i}" for i in range(count)] or ["base"]
        asyncio.run(ask(url, names, min(4, args.at_once), args.at_once, 2))
        found[str(count)] = asyncio.run(ask(url, names, args.requests, args.at_once, args.tokens))
        found[str(count)]["seconds_to_load"] = round(loaded, 2)
        print(count, found[str(count)], flush=True)
        server.should_exit = True
        thread.join()
        for version in shelf.versions:
            spectune.detach(model, version.slot)
    return found


def theirs(args: argparse.Namespace) -> dict[str, Any]:
    """Measure transformers' server with the base."""
    path, port = model_path("smollm2-135m"), 8377
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[args.dtype]
    begin = "from transformers.cli.transformers import main; main()"
    options = ["--continuous-batching", "--port", str(port), "--dtype", dtype]
    command = [sys.executable, "-c", begin, "serve", path, *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            for _ in range(120):
                time.sleep(0.5)
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                        break
                except httpx.TransportError:
                    if process.poll() is not None:
                        assert process.stderr is not None
                        return {"error": process.stderr.read()[-400:]}
            url = f"http://127.0.0.1:{port}"
            asyncio.run(ask(url, [path], 1, 1, 2))
            return asyncio.run(ask(url, [path], args.requests, args.at_once, args.tokens))
        finally:
            process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, nargs="*", default=[0, 1, 16, 64])
    parser.add_argument("--method", default="lora:rank=8")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--name", default="serve")
    args = parser.parse_args()
    results: dict[str, Any] = {
        "settings": {k: v for k, v in vars(args).items() if k not in ("name", "peer")},
        "ours": ours(args),
    }
    if args.peer:
        results["transformers_serve"] = theirs(args)
        print(results["transformers_serve"])
    print(save(args.name, results))


if __name__ == "__main__":
    main()
