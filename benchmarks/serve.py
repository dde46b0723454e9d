"""Tokens a second of a server with 0 to 64 adapters, each request naming another one, beside other servers.

SmolLM2-135M over HTTP on this machine; every request asks for the same number of tokens, so many at once.  The adapters
are LoRAs of rank 8 on all 210 linears, or SVFs, with random values.  `alone` is `generate` with one request after the
other.  transformers' server knows no adapters: it is measured with the base.  vLLM serves the same folders, LoRAs by
itself and SVFs by our plug-in.

    python benchmarks/serve.py [--adapters 0 1 16 64] [--method lora:rank=8] [--requests 32] [--at-once 16]
        [--tokens 32] [--threads 1] [--transformers] [--vllm PYTHON] [--dtype fp32] [--name serve]

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
import psutil
import torch
import uvicorn

import spectune
from _machine import save
from spectune.adapters.adapter import Adapter
from spectune.bases.generation import generate
from spectune.layers.adapted import adapted_layers
from spectune.serving.jobs import Limits
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
    began, before = time.perf_counter(), time.process_time()
    for prompt in PROMPTS[:2]:
        generate(model, tokenizer, [prompt], max_new_tokens=args.tokens)
    found["alone"] = {
        "tokens_per_second": round(2 * args.tokens / (time.perf_counter() - began), 2),
        "tokens_per_processor_second": round(2 * args.tokens / (time.process_time() - before), 2),
    }
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
        names = [f"a{i}" for i in range(count)] or ["base"]
        found[str(count)] = measure(args, url, names, psutil.Process())
        found[str(count)]["seconds_to_load"] = round(loaded, 2)
        print(count, found[str(count)], flush=True)
        server.should_exit = True
        thread.join()
        for version in shelf.versions:
            spectune.detach(model, version.slot)
    return found


def measure(args: argparse.Namespace, url: str, names: list[str], process: psutil.Process) -> dict[str, Any]:
    """Ask a server, once for it to be warm; tell the processor's time that it took too, ours with the client's."""
    asyncio.run(ask(url, names, min(4, args.at_once), args.at_once, 2))
    before = processor_seconds(process)
    found = asyncio.run(ask(url, names, args.requests, args.at_once, args.tokens))
    seconds = processor_seconds(process) - before
    return {**found, "tokens_per_processor_second": round(args.requests * args.tokens / seconds, 2)}


def processor_seconds(process: psutil.Process) -> float:
    """Return the processor's time that a process and those that it began have had."""
    return sum(sum(one.cpu_times()[:2]) for one in (process, *process.children(recursive=True)))


@contextlib.contextmanager
def running(command: list[str], port: int, **environment: str) -> Iterator[tuple[str, psutil.Process]]:
    """Run another server; yield its URL, when it answers, and its process."""
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(command, stdout=told, stderr=told, env={**os.environ, **environment})
        try:
            for _ in range(2400):
                time.sleep(0.5)
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                if process.poll() is not None:
                    told.seek(0)
                    raise RuntimeError(told.read()[-2000:])
            yield url, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(60)


def transformers_serve(args: argparse.Namespace, base: Path) -> dict[str, Any]:
    """Measure transformers' server with the base."""
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[args.dtype]
    begin = "from transformers.cli.transformers import main; main()"
    options = ["--continuous-batching", "--port", "8377", "--dtype", dtype]
    with running([sys.executable, "-c", begin, "serve", str(base), *options], 8377) as (url, process):
        return measure(args, url, [str(base)], process)


def vllm_serve(args: argparse.Namespace, base: Path, folder: Path) -> dict[str, Any]:
    """Measure vLLM with the same adapters."""
    most, dtype = max(args.adapters), {"fp32": "float32", "bf16": "bfloat16"}[args.dtype]
    options = ["--model", str(base), "--port", "8378", "--dtype", dtype, "--max-model-len", "512", "--enforce-eager"]
    options += ["--max-num-seqs", str(args.at_once), "--max-num-batched-tokens", "512", "--no-enable-prefix-caching"]
    options += ["--enable-lora", "--max-lora-rank", "8", "--max-loras", str(min(most, args.at_once))]
    options += ["--max-cpu-loras", str(most), "--lora-modules", *(f"a{i}={folder / f'a{i}'}" for i in range(most))]
    command = [args.vllm, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server", *options]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    found = {}
    with running(command, 8378, **environment) as (url, process):
        for count in args.adapters:
            names = [f"a{i}" for i in range(count)] or [str(base)]
            found[str(count)] = measure(args, url, names, process)
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
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="serve")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of other servers
    told = {k: v for k, v in vars(args).items() if k not in ("name", "transformers", "vllm")}
    results: dict[str, Any] = {"settings": told}
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
