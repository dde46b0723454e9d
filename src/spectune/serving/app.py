"""The HTTP of a server: OpenAI's protocol, vLLM's names for loading adapters, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from spectune.adapters.adapter import Adapter
from spectune.errors import SpectuneError
from spectune.reading import reason
from spectune.serving.answering import Answering, failed_response
from spectune.serving.answers import ChatAnswer, CompletionAnswer
from spectune.serving.asking import Asked, Reader, weights_of
from spectune.serving.engine import Engine
from spectune.serving.jobs import Event, Job, TooSlow
from spectune.serving.metrics import Metrics
from spectune.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    LoadRequest,
    Refused,
    UnloadRequest,
    read_body,
)
from spectune.serving.shelf import AUTO, BASE, UnknownAdapter, Version
from spectune.transformer2.strategies import Decision

Choose = Callable[[str], Decision]  # of a prompt
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}


@dataclass
class Service:
    """What the routes need.

    Args:
        engine: answers.
        reader: makes rows of requests.
        name: of the base.
        seconds: that a request may take.
        choose: what answers a prompt, by a library's strategy; called between two steps of the engine.
        may_load: whether adapters may be loaded and unloaded by requests.
        metrics: of the engine.
    """

    engine: Engine
    reader: Reader
    name: str
    seconds: float | None = None
    choose: Choose | None = None
    may_load: bool = True
    began: int = field(default_factory=lambda: int(time.time()))
    encoding: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "spectune-encode"))

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engine)

    async def answer(self, request: Request, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
        """Return the answer to a chat or a completion."""
        body = read_body(await self._received(request), kind)
        notes = request.scope.setdefault("state", {})
        notes["model"] = repr(body.model[:80])
        weights = weights_of(body, self.engine.shelf)
        loop = asyncio.get_running_loop()
        make: Any = self.reader.chat if isinstance(body, ChatRequest) else self.reader.completion
        asked: Asked = await loop.run_in_executor(self.encoding, make, body)
        told: dict[str, object] = {}
        if weights is None:
            decision = await self._decide(body)
            weights = dict(decision.weights)
            told = {"decision": {"label": decision.label, "confidence": decision.confidence}}
        told = {"adapters": _plain(weights), **told}
        answer_kind = ChatAnswer if isinstance(body, ChatRequest) else CompletionAnswer
        usage = body.stream and body.stream_options.include_usage
        answer = answer_kind(
            body.model,
            told,
            asked.prompt_tokens,
            len(asked.rows),
            self.reader.tokenizer,
            usage=usage,
            cached=lambda: sum(row.cached for row in asked.rows[:: body.n]),
        )
        notes["prompt_tokens"] = asked.prompt_tokens
        events: asyncio.Queue[list[Event]] = asyncio.Queue()

        def deliver(some: list[Event]) -> None:
            with contextlib.suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(events.put_nowait, some)

        job = Job(asked.rows, weights, deliver, self.seconds)
        self.engine.submit(job)
        return Answering(self.engine, job, events, answer, body.stream, notes)

    async def _received(self, request: Request) -> bytes:
        try:
            return await asyncio.wait_for(request.body(), self.seconds)
        except asyncio.TimeoutError:
            raise TooSlow(f"the body of the request did not come within {self.seconds} s") from None

    async def _decide(self, body: ChatRequest | CompletionRequest) -> Decision:
        if isinstance(body, ChatRequest):
            prompt = _last_of_user(body)
        else:
            prompt = body.prompt if isinstance(body.prompt, str) else None
        if not prompt:
            raise Refused("a library chooses for one prompt that is a text: give one, or name the adapters", "model")
        choose = self.choose
        assert choose is not None
        return await asyncio.wrap_future(self.engine.call(lambda: choose(prompt)))

    # -- adapters

    def models(self) -> list[dict[str, object]]:
        """Return what can be asked for, the base first."""
        head = {"object": "model", "created": self.began, "owned_by": "spectune", "root": self.name}
        found: list[dict[str, object]] = [{"id": BASE, **head, "parent": None, "max_model_len": self.reader.context}]
        found += [{"id": AUTO, **head, "parent": BASE}] if self.choose is not None else []
        return found + [
            {"id": v.name, **head, "parent": BASE, "adapter": _short(v)} for v in self.engine.shelf.versions
        ]

    def model(self, name: str) -> dict[str, object]:
        """Return one of them, an adapter with the names of its layers.

        Raises:
            UnknownAdapter: there is none of that name.
        """
        found = next((one for one in self.models() if one["id"] == name), None)
        version = next((v for v in self.engine.shelf.versions if v.name == name), None)
        if found is None:
            self.engine.shelf.parse(name)
            raise UnknownAdapter(f"{name[:80]!r} has no entry of its own; it is answered by what it names")
        if version is None:
            return found
        return {**found, "adapter": {**version.about, "resident": version.slot is not None}}

    async def load(self, request: Request) -> Response:
        """Load an adapter from a folder of the server's under a name."""
        body = read_body(await self._received(request), LoadRequest)
        self._check_may_load()
        shelf, name = self.engine.shelf, body.lora_name
        shelf.check_name(name)
        if not body.load_inplace:
            shelf.check_free(name)
        if not os.path.isdir(body.lora_path):  # Path's raises where a name is too long, or a folder closed
            raise Refused(f"there is no adapter's folder {body.lora_path[:200]!r} on the server", "lora_path")
        read = partial(Adapter.load, body.lora_path)
        version = Version(name, body.lora_path, read)
        try:
            await asyncio.wrap_future(self.engine.load(version, read, replace=body.load_inplace))
        except OSError as error:
            raise Refused(f"the adapter {name!r} cannot be read: {reason(error)}", "lora_path") from None
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        """Let no new request have an adapter."""
        body = read_body(await self._received(request), UnloadRequest)
        self._check_may_load()
        name = body.lora_name
        await asyncio.wrap_future(self.engine.call(lambda: self.engine.shelf.take(name)))
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    def _check_may_load(self) -> None:
        if not self.may_load:
            raise HTTPException(403, "this server loads and unloads no adapters by request")


def _short(version: Version) -> dict[str, object]:
    return {**version.about, "layers": len(version.about["layers"]), "resident": version.slot is not None}


def _plain(weights: Any) -> dict[str, object]:
    """Return weights as JSON: numbers, or for each layer a number."""
    return {
        name: {k: float(v) for k, v in weight.items()} if isinstance(weight, dict) else float(weight)
        for name, weight in weights.items()
    }


def _last_of_user(body: ChatRequest) -> str | None:
    said = next((m.get("content") for m in reversed(body.messages) if m.get("role") == "user"), None)
    if isinstance(said, list):
        return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in said)
    return said if isinstance(said, str) else None


def make_app(service: Service, *, page: bytes = b"") -> FastAPI:
    """Return the application of a service.

    Args:
        service: what answers.
        page: what is at /.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.engine.stop, 30)
        service.encoding.shutdown(wait=False)

    app = FastAPI(title="spectune serve", openapi_url=None, lifespan=lifespan)

    @app.exception_handler(ClientDisconnect)
    async def left(_: Request, error: Exception) -> Response:
        return Response(status_code=499)

    @app.exception_handler(SpectuneError)
    @app.exception_handler(HTTPException)
    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return failed_response(error)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await service.answer(request, ChatRequest)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await service.answer(request, CompletionRequest)

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        return {"object": "list", "data": service.models()}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, object]:
        return service.model(name)

    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Response:
        return await service.load(request)

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Response:
        return await service.unload(request)

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"}) if service.engine.alive else JSONResponse({"status": "ended"}, 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/")
    async def home() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=_PAGE_HEADERS)

    return app
