"""A server from its beginning to its end: a port, a model, adapters, and requests until it is told to stop."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from spectune.adapters.adapter import Adapter
from spectune.bases.tokens import padding
from spectune.errors import SpectuneError, need
from spectune.serving.asking import Reader
from spectune.serving.batch import Batch, check_joining
from spectune.serving.engine import Engine
from spectune.serving.jobs import Limits
from spectune.serving.prefixes import Prefixes
from spectune.serving.shelf import Shelf
from spectune.speed.laid_out import bytes_to_lay_out
from spectune.transformer2.two_pass import Transformer2

if TYPE_CHECKING:
    from starlette.types import ASGIApp
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SHARE = 0.5  # of the memory that is free, for keys and values
_SHARE_KEPT = 0.1  # of it, for those of texts that others may begin with
PAGE = Path(__file__).parent / "page.html"


@dataclass(frozen=True)
class Settings:
    """How a server is reached, and what it takes on.

    Args:
        host, port: where it listens; 0 is any port that is free.
        key: that requests must bring.
        limits: of the engine; its tokens are found out if not given.
        most_tokens: of a reply, whatever is asked for.
        most_bytes: of the body of a request.
        seconds: that a request may take.
        origins: of pages of other sites that may ask, or "*".
        may_load: whether requests may load and unload adapters.
        most_adapters: that are in memory at once; None is any number.
        prefix_bytes: of keys and values that are kept of texts that were read; 0 keeps none, None a share of memory.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    limits: Limits = field(default_factory=Limits)
    most_tokens: int | None = None
    most_bytes: int = 4 << 20
    seconds: float | None = 600.0
    origins: Sequence[str] = ()
    may_load: bool = True
    most_adapters: int | None = None
    prefix_bytes: int | None = None


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        SpectuneError: the port is in use, or the host is none of this machine.
    """
    listening = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(1024)
    except (OSError, OverflowError) as error:
        if listening is not None:
            listening.close()
        told = getattr(error, "strerror", None) or str(error)
        raise SpectuneError(
            f"port {port} of {host!r} cannot be listened at ({told}): give another --port or --host"
        ) from None
    return listening


def put_adapters(shelf: Shelf, sources: Mapping[str, Callable[[], Adapter]], say: Callable[[str], None]) -> None:
    """Put adapters on a shelf; one that cannot be had is told of, and the others are served.

    Args:
        shelf: the shelf.
        sources: by name, what reads an adapter.
        say: tells people.

    Raises:
        SpectuneError: none can be had, which is told of the last.
    """
    failed = 0
    for name, read in sources.items():
        try:
            shelf.put(name, read(), name, read=read)
        except (SpectuneError, OSError, MemoryError) as error:
            failed += 1
            told = f"the adapter {name!r} is not served: {error}"
            if failed == len(sources):
                raise SpectuneError(told) from None
            say(told)


def start_engine(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    shelf: Shelf,
    limits: Limits,
    prefix_bytes: int | None = None,
) -> Engine:
    """Return an engine that answers, with as many tokens at once as memory holds.

    Raises:
        SpectuneError: a model whose texts cannot join a batch.
    """
    free = _free_memory(model.device)
    laid = bytes_to_lay_out(model)
    lays_out = 2 * laid <= free
    free -= laid if lays_out else 0
    kept = int(_SHARE_KEPT * free) if prefix_bytes is None else prefix_bytes
    batch = Batch(model, Prefixes(kept) if kept else None, lays_out=lays_out)
    size = check_joining(model, tokenizer)
    if limits.tokens is None:
        limits = replace(limits, tokens=int(_SHARE * free / size))
    engine = Engine(batch, shelf, padding(tokenizer), limits)
    engine.start()
    return engine


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def serve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Mapping[str, Callable[[], Adapter]],
    *,
    name: str,
    settings: Settings,
    listening: socket.socket,
    two: Transformer2 | None = None,
    say: Callable[[str], None] = lambda told: print(told, file=sys.stderr, flush=True),
) -> None:
    """Answer requests until the process is told to stop.

    Args:
        model: the base.
        tokenizer: its tokenizer.
        sources: by name, what reads an adapter.
        name: of the base.
        settings: how it is reached.
        listening: a socket that listens.
        two: chooses for requests that ask for "auto".
        say: tells people.
    """
    uvicorn = need("uvicorn", "spectune serve", "'spectune[serve]'")
    shelf = Shelf(model, [name], auto=two is not None, most=settings.most_adapters)
    put_adapters(shelf, sources, say)
    app, _ = build(model, tokenizer, shelf, name=name, settings=settings, two=two)
    host, port = listening.getsockname()[:2]
    there = ", ".join(version.name for version in shelf.versions[:20]) or "no adapter"
    say(f"{name} is served at http://{f'[{host}]' if ':' in host else host}:{port} with {there}")
    if settings.key is None and settings.host not in ("localhost", "127.0.0.1", "::1"):
        say("anybody who reaches this address may ask, and load adapters: give --api-key")
    logging.getLogger("spectune.serving").addHandler(_log_handler())
    logging.getLogger("spectune.serving").setLevel(logging.INFO)
    config = http_config(app)
    uvicorn.Server(config).run(sockets=[listening])


def http_config(app: ASGIApp, **others: object) -> Any:
    """Return uvicorn's configuration for an application; `others` are more of it."""
    import uvicorn

    # Clients keep a connection for 5 (httpx, openai) to 60 seconds (proxies).  A server that closes it sooner, or just
    # then, resets the request that is on its way.
    quiet: dict[str, object] = {"log_config": None, "log_level": "warning", "access_log": False, "server_header": False}
    return uvicorn.Config(app, **{**quiet, "timeout_keep_alive": 75, "timeout_graceful_shutdown": 30, **others})


def build(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    shelf: Shelf,
    *,
    name: str,
    settings: Settings,
    two: Transformer2 | None = None,
) -> tuple[ASGIApp, Engine]:
    """Return the ASGI application of a server, and its engine, which has begun.

    Raises:
        SpectuneError: FastAPI is not installed, or the model's texts cannot join a batch.
    """
    for package in ("fastapi", "prometheus_client"):
        need(package, "spectune serve", "'spectune[serve]'")
    from starlette.middleware.cors import CORSMiddleware

    from spectune.serving.app import Service, make_app
    from spectune.serving.guard import LOOPBACK, Guard

    engine = start_engine(model, tokenizer, shelf, settings.limits, settings.prefix_bytes)
    choose = None if two is None else lambda prompt: two.choose([prompt])[0]
    reader = Reader(model, tokenizer, settings.most_tokens)
    service = Service(engine, reader, name, settings.seconds, choose, settings.may_load)
    app = make_app(service, page=PAGE.read_bytes() if PAGE.exists() else b"")
    hosts = LOOPBACK if settings.host in LOOPBACK else ()
    guarded = Guard(app, settings.key, settings.most_bytes, hosts, service.metrics.seen)
    if settings.origins:
        guarded = CORSMiddleware(guarded, settings.origins, allow_methods=["*"], allow_headers=["*"])
    return guarded, engine


def _log_handler() -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    return handler
