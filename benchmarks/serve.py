"""Tokens a second of a server with 0 to 64 adapters, each request naming another one, beside other servers.

SmolLM2-135M over HTTP on this machine; every request asks for the same number of tokens, so many at once.  The adapters
are LoRAs of rank 8 on all 210 linears, or SVFs, with random values.  `alone` is `generate` with one request after the
other.  transformers' server knows no adapters: it is measured with the base.  vLLM serves the same folders, LoRAs by
itself and SVFs by our plug-in.

    python benchmarks/serve.py [--adapters 0 1 16 64] [--method lora:rank=8] [--requests 32] [--at-once 16]
        [--tokens 32] [--transformers] [--vllm PYTHON] [--dtype fp32] [--name serve]

Args:
    --vllm: the interpreter of an environment that has vLLM, and spectune for other methods than LoRA.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import torch
import uvicorn

import spectune
from _machine import save
from spectune.adapters.adapter import Adapter
from spectune.bases.generation import generate
from spectune.layers.adapted import adapted_layers
from spectune.serving.engine import Limits
from spectune.serving.run import Settings, build
from spectune.serving.shelf import Shelf

PROMPTS = [f"Tell me in a few words what number {i} is good for, and who would want to have it." for i in range(64)]


def make(model: Any, method: str, count: int, folder: Path) -> None:
    """Write random adapters "a0", "a1", ... into a folder."""
    spectune.adapt(model, method, name="made")
    made = [p for layer in adapted_layers(model).values() for p in layer.adapters["made"].parameters()]
    start = [p.detach().clone() for p in made]
    for i in range(count):
        with torch.no_grad():
            for p, s in zip(made, start, strict=True):
                p.copy_(s + 0.01 * torch.randn_like(s))
        spectune.extract(model, "made").save(folder / f"a{i}")
    spectune.detach(model, "made")


async def ask(url: str, names: list[str], count: int, at_once: int, tokens: int) -> dict[str, float]:
    """Ask for replies, so many at once; return tokens a second and seconds to the first token."""
    firsts, between, turns = list[float](), list[float](), asyncio.Semaphore(at_once)

    async def one(client: httpx.AsyncClient, i: int) -> int:
        body = {
            "model": names[i % len(names)],
            "messages": [{"role": "user", "content": PROMPTS[i % len(PROMPTS)]}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
        }
        async with turns:
            began = last = time.perf_counter()
            said = 0
            async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as reply:
                reply.raise_for_status()
                async for line in reply.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    choices = json.loads(line[6:]).get("choices") or [{}]
                    if (choices[0].get("delta") or {}).get("content"):
                        said += 1
                        now = time.perf_counter()
                        (between if said > 1 else firsts).append(now - (last if said > 1 else began))
                        last = now
            return said

    async with httpx.AsyncClient(timeout=300) as client:
        began = time.perf_counter()
        said = await asyncio.gather(*(one(client, i) for i in range(count)))
        seconds = time.perf_counter() - began
    return {
        "replies_with_text": sum(n > 0 for n in said),
        "tokens_per_second": round(count * tokens / seconds, 2),
        "median_seconds_to_first": round(median(firsts), 3),
        "median_seconds_per_token": round(median(between), 4),
        "seconds": round(seconds, 2),
    }


def quiet(folder: Path, dtype: str) -> tuple[Any, Any]:
    """Return a model that never ends a reply by itself and its tokenizer, and write both for other servers."""
    model, tokenizer = spectune.load_base("smollm2-135m", dtype)
    model.generation_config.eos_token_id = model.config.eos_token_id = None  # every reply has all of its tokens
    tokenizer.eos_token, tokenizer.chat_template = None, tokenizer.chat_template.replace("<|im_end|>", "")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def ours(args: argparse.Namespace, model: Any, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Measure our server."""
    found: dict[str, Any] = {}
    began = time.perf_counter()
    for prompt in PROMPTS[:2]:
        generate(model, tokenizer, [prompt], max_new_tokens=args.tokens)
    found["alone"] = {"tokens_per_second": round(2 * args.tokens / (time.perf_counter() - began), 2)}
    for count in args.adapters:
        shelf = Shelf(model)
        began = time.perf_counter()
        for i in range(count):
            shelf.put(f"a{i}", Adapter.load(folder / f"a{i}"), folder)
        loaded = time.perf_counter() - began
        settings = Settings(limits=Limits(rows=args.at_once), prefix_bytes=0)
        app, _ = build(model, tokenizer, shelf, name="smollm2-135m", settings=settings)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        found[str(count)] = measure(args, url, [f"a{i}" for i in range(count)] or ["base"])
        found[str(count)]["seconds_to_load"] = round(loaded, 2)
        print(count, found[str(count)], flush=True)
        server.should_exit = True
        thread.join()
        for version in shelf.versions:
            spectune.detach(model, version.slot)
    return found


def measure(args: argparse.Namespace, url: str, names: list[str]) -> dict[str, Any]:
    """Ask a server, once for it to be warm."""
    asyncio.run(ask(url, names, min(4, args.at_once), args.at_once, 2))
    return asyncio.run(ask(url, names, args.requests, args.at_once, args.tokens))


@contextlib.contextmanager
def running(command: list[str], port: int, **environment: str) -> Iterator[str]:
    """Run another server; yield its URL when it answers."""
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(command, stdout=told, stderr=told, env={**os.environ, **environment})
        try:
            for _ in range(600):
                time.sleep(0.5)
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                if process.poll() is not None:
                    told.seek(0)
                    raise RuntimeError(told.read()[-2000:])
            yield url
        finally:
            process.terminate()
            process.wait(60)


def transformers_serve(args: argparse.Namespace, base: Path) -> dict[str, Any]:
    """Measure transformers' server with the base."""
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[args.dtype]
    begin = "from transformers.cli.transformers import main; main()"
    options = ["--continuous-batching", "--port", "8377", "--dtype", dtype]
    with running([sys.executable, "-c", begin, "serve", str(base), *options], 8377) as url:
        return measure(args, url, [str(base)])


def vllm_serve(args: argparse.Namespace, base: Path, folder: Path) -> dict[str, Any]:
    """Measure vLLM with the same adapters."""
    dtype, found = {"fp32": "float32", "bf16": "bfloat16"}[args.dtype], {}
    for count in args.adapters:
        loras = [f"a{i}={folder / f'a{i}'}" for i in range(count)]
        options = ["--model", str(base), "--port", "8378", "--dtype", dtype, "--max-model-len", "512"]
        options += ["--max-num-seqs", str(args.at_once), "--no-enable-prefix-caching"]
        if count:
            options += ["--enable-lora", "--max-lora-rank", "8", "--max-loras", str(min(count, args.at_once))]
            options += ["--max-cpu-loras", str(max(count, args.at_once)), "--lora-modules", *loras]
        command = [args.vllm, "-m", "vllm.entrypoints.openai.api_server", *options]
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
        with running(command, 8378, **environment) as url:
            found[str(count)] = measure(args, url, [f"a{i}" for i in range(count)] or [str(base)])
        print("vllm", count, found[str(count)], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, nargs="*", default=[0, 1, 16, 64])
    parser.add_argument("--method", default="lora:rank=8")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--transformers", action="store_true")
    parser.add_argument("--vllm")
    parser.add_argument("--name", default="serve")
    args = parser.parse_args()
    told = {k: v for k, v in vars(args).items() if k not in ("name", "transformers", "vllm")}
    results: dict[str, Any] = {"settings": {**told, "threads": torch.get_num_threads()}}
    with tempfile.TemporaryDirectory() as place:
        base, folder = Path(place) / "base", Path(place) / "adapters"
        model, tokenizer = quiet(base, args.dtype)
        if max(args.adapters):
            make(model, args.method, max(args.adapters), folder)
        results["ours"] = ours(args, model, tokenizer, folder)
        if args.transformers:
            results["transformers_serve"] = transformers_serve(args, base)
            print("transformers", results["transformers_serve"], flush=True)
        if args.vllm:
            results["vllm"] = vllm_serve(args, base, folder)
    print(save(args.name, results))


if __name__ == "__main__":
    main()
