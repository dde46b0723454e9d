"""Answers on their way to a client, whole or as a stream, and what is said where one fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from spectune.errors import SpectuneError, is_out_of_memory
from spectune.serving.answers import Answer, failure
from spectune.serving.engine import Engine
from spectune.serving.jobs import Busy, Closing, Event, Job, TooSlow
from spectune.serving.shelf import UnknownAdapter, Unreadable


class Answering(Response):
    """Sends an answer, and frees its rows as soon as the client is gone, whether it is streamed or not."""

    def __init__(
        self,
        engine: Engine,
        job: Job,
        events: asyncio.Queue[list[Event]],
        answer: Answer,
        stream: bool,
        notes: dict[str, object],
    ) -> None:
        super().__init__()
        self._engine, self._job, self._events, self._answer = engine, job, events, answer
        self._stream, self._notes = stream, notes

    async def __call__(self, scope: object, receive: Any, send: object) -> None:
        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        sending = asyncio.ensure_future((self._send_stream if self._stream else self._send_whole)(scope, receive, send))
        watching = asyncio.ensure_future(gone())
        try:
            await asyncio.wait({sending, watching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._engine.cancel(self._job)
            self._notes["tokens"] = self._answer.tokens
            if not sending.done():
                self._notes["gone"] = True
            for task in (sending, watching):
                task.cancel()
            results = await asyncio.gather(sending, watching, return_exceptions=True)
        error = results[0]
        if isinstance(error, Exception) and not isinstance(error, OSError):
            raise error

    async def _pieces(self) -> AsyncIterator[Event]:
        while not self._answer.complete:
            for event in await self._events.get():
                if event.error is not None:
                    raise event.error
                self._answer.take(event)
                yield event

    async def _send_whole(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            async for _ in self._pieces():
                pass
            response = JSONResponse(self._answer.whole())
        except Exception as error:
            response = failed_response(error)
        await response(scope, receive, send)

    async def _send_stream(self, scope: object, receive: object, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        headers += [(b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def say(*chunks: object) -> None:
            body = "".join(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n" for chunk in chunks)
            if body:
                await send({"type": "http.response.body", "body": body.encode(), "more_body": True})

        try:
            await say(*self._answer.first())
            async for event in self._pieces():
                await say(self._answer.chunk(event))
            await say(*self._answer.last())
        except OSError:
            raise
        except Exception as error:
            await say(_told(error)[1])
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def _told(error: Exception) -> tuple[int, dict[str, object]]:
    """Return the status and the document of an error."""
    bad = "invalid_request_error"
    if isinstance(error, UnknownAdapter):
        return 404, failure(str(error), bad, "model_not_found", "model")
    if isinstance(error, Busy):
        return 429, failure(str(error), "rate_limit_error", "too_many_requests")
    if isinstance(error, TooSlow):
        return 408, failure(str(error), bad, "timeout")
    if isinstance(error, Unreadable):
        return 503, failure(str(error), "server_error", "adapter_unreadable")
    if isinstance(error, Closing):
        return 503, failure(str(error), "server_error", "shutting_down")
    if isinstance(error, SpectuneError):
        return 400, failure(str(error), bad, None, getattr(error, "param", None))
    if isinstance(error, HTTPException):
        status: int = error.status_code
        return status, failure(str(error.detail), bad)
    if is_out_of_memory(error):
        return 503, failure("there is not enough memory for this now; ask for less, or again later", "server_error")
    return 500, failure(f"this should not have happened ({type(error).__name__}); the log says more", "server_error")


def failed_response(error: Exception) -> JSONResponse:
    """Return the answer to a request that has failed."""
    status, document = _told(error)
    return JSONResponse(document, status, {"retry-after": "1"} if status in (429, 503) else None)
