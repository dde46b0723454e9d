"""Before anything is answered: the key, the host, the kind and the size of a body; after it, a line in the log."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException

from spectune.serving.answers import failure

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("spectune.serving.access")
_OPEN = ("/", "/health")  # what anybody may ask for
_MOST_DRAINED, _SECONDS_DRAINED = 16, 30.0  # of a body that is too large: times what is taken
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Guard:
    """Middleware that lets a request pass or says why not.

    A body must be called JSON, which pages of other sites cannot send without asking first; and where the server is for
    this machine alone, the request must name it so, or such a page could reach it under a name of its own.

    Args:
        app: what answers.
        key: that requests must bring; None asks for none.
        most_bytes: of a body.
        hosts: names that requests may call the server; empty for any.
        seen: called with path, status and seconds of every request.
    """

    def __init__(
        self,
        app: ASGIApp,
        key: str | None,
        most_bytes: int,
        hosts: Collection[str] = (),
        seen: Callable[[str, int, float], None] | None = None,
    ) -> None:
        self._app, self._most, self._hosts, self._seen = app, most_bytes, hosts, seen
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500
        notes: dict[str, object] = scope.setdefault("state", {})
        read = 0

        async def receive_bounded() -> Message:
            nonlocal read
            message = await receive()
            if message["type"] == "http.request":
                read += len(message.get("body", b""))
                if read > self._most:
                    await _drain(receive, message, _MOST_DRAINED * self._most)
                    raise HTTPException(413, self._too_large)
            return message

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refused = self._refused(scope)
            if refused is not None:
                if refused[0] == 413:
                    await _drain(receive, {"type": "http.request", "more_body": True}, _MOST_DRAINED * self._most)
                await _send(send_noted, *refused)
            else:
                await self._app(scope, receive_bounded, send_noted)
        except Exception:  # an answer was sent where none had begun
            log.exception("an unforeseen error")
        finally:
            seconds = time.perf_counter() - began
            told = " ".join(f"{k}={v}" for k, v in notes.items() if k in ("model", "prompt_tokens", "tokens", "gone"))
            path = scope["path"].encode("unicode_escape").decode()[:200]
            log.info("%s %s %d %.0fms %s", scope["method"], path, status, 1000 * seconds, told)
            if self._seen is not None:
                self._seen(getattr(scope.get("route"), "path", "other"), status, seconds)

    def _refused(self, scope: Scope) -> tuple[int, dict[str, object]] | None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if (
            self._hosts
            and host.rpartition("]")[0].lstrip("[") not in self._hosts
            and host.partition(":")[0] not in self._hosts
        ):
            return 421, failure(f"this server is not called {host[:80]!r}", "invalid_request_error", "wrong_host")
        if (
            self._key is not None
            and scope["path"] not in _OPEN
            and not self._has_key(headers.get(b"authorization", b""))
        ):
            return 401, failure(
                "no API key, or another one: send it as 'Authorization: Bearer KEY'",
                "invalid_request_error",
                "invalid_api_key",
            )
        if scope["method"] in ("POST", "PUT", "PATCH"):
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":
                return 415, failure(
                    "the body must be JSON: send 'Content-Type: application/json'", "invalid_request_error"
                )
            length = headers.get(b"content-length", b"0")
            if length.isdigit() and int(length) > self._most:
                return 413, failure(self._too_large, "invalid_request_error")
        return None

    def _has_key(self, given: bytes) -> bool:
        scheme, _, key = given.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key or b"")

    @property
    def _too_large(self) -> str:
        return f"the body has more than {self._most:,} bytes, which is what is read"


async def _drain(receive: Receive, message: Message, most_bytes: int) -> None:
    """Read what is left of a body and throw it away, within bounds.

    A connection that is closed while bytes of its client lie unread is reset, and the answer may be lost with it.
    """

    async def rest() -> None:
        read, last = 0, message
        while last["type"] == "http.request" and last.get("more_body") and read <= most_bytes:
            last = await receive()
            read += len(last.get("body", b""))

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(rest(), _SECONDS_DRAINED)


async def _send(send: Send, status: int, document: dict[str, object]) -> None:
    body = json.dumps(document).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
    # the rest of a body that nobody reads would be taken for the next request
    headers += [(b"connection", b"close")] if status == 413 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
