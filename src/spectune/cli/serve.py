"""spectune serve"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import typer

from spectune.cli.shared import (
    DEVICE,
    DTYPE,
    LIBRARY,
    MODEL,
    REMOTE_CODE,
    SHOTS,
    STRATEGY,
    load_transformer2,
    need_library,
)
from spectune.errors import SpectuneError, need


def serve(
    model: str = MODEL,
    adapter: list[str] = typer.Option(
        [], "--adapter", "-a", metavar="NAME=ADAPTER", help="An adapter's folder, by a name; may be repeated."
    ),
    library: Path | None = LIBRARY,
    strategy: str | None = STRATEGY,
    shots: Path | None = SHOTS,
    host: str = typer.Option("127.0.0.1", help="Where to listen; this machine alone unless said otherwise."),
    port: int = typer.Option(8000, min=0, max=65535, help="Where to listen; 0 takes one that is free."),
    api_key: str | None = typer.Option(
        None, envvar="SPECTUNE_API_KEY", help="What requests must bring as a Bearer token."
    ),
    max_adapters: int | None = typer.Option(
        None, min=1, help="Adapters in memory at once; others are read when they are asked for. By default all."
    ),
    max_batch: int = typer.Option(16, min=1, max=1024, help="Replies that are written at once."),
    prefix_cache: int | None = typer.Option(
        None,
        min=0,
        help="Bytes of keys and values kept of texts that others may begin with; 0 keeps none. By default a tenth of "
        "the memory that is free.",
    ),
    max_waiting: int = typer.Option(1024, min=0, help="Requests that may wait; more are told to come again (429)."),
    max_tokens: int | None = typer.Option(None, min=1, help="Of a reply, whatever is asked for."),
    max_body: int = typer.Option(4 << 20, min=1024, help="Bytes of a request's body."),
    timeout: float = typer.Option(600.0, min=0.1, help="Seconds that a request may take, waiting included."),
    allow_origin: list[str] = typer.Option([], help="A site whose pages may ask (CORS); may be repeated."),
    load: bool = typer.Option(True, "--load/--no-load", help="Let requests load and unload adapters."),
    dtype: str | None = DTYPE,
    device: str | None = DEVICE,
    trust_remote_code: bool = REMOTE_CODE,
) -> None:
    """Serve a base with adapters over OpenAI's HTTP protocol, each request with the adapter or mixture it names.

    spectune serve smollm2-135m -a pirate=runs/pirate
    spectune serve runs/chats
    """
    for package in ("uvicorn", "fastapi", "prometheus_client"):
        need(package, "spectune serve", "'spectune[serve]'")
    from spectune.adapters.adapter import Adapter
    from spectune.bases.devices import default_device
    from spectune.bases.loading import load_base
    from spectune.bases.runs import named
    from spectune.serving import run
    from spectune.serving.jobs import Limits

    base, own, packed = named(model)
    if packed is not None:
        raise SpectuneError(f"{model} was trained on a base in {packed}, and a server's base is whole: train it so")
    folders = _by_name([*([own] if own is not None and library is None else []), *adapter])
    sources: dict[str, Any] = {name: partial(Adapter.load, folder) for name, folder in folders.items()}
    if api_key is not None and not api_key.strip():
        raise SpectuneError("the API key is empty; leave --api-key and SPECTUNE_API_KEY out, or give one")
    settings = run.Settings(
        host=host,
        port=port,
        key=api_key,
        limits=Limits(rows=max_batch, waiting=max_waiting),
        most_tokens=max_tokens,
        most_bytes=max_body,
        seconds=timeout,
        origins=tuple(allow_origin),
        may_load=load,
        most_adapters=max_adapters,
        prefix_bytes=prefix_cache,
    )
    with run.listen(host, port) as listening:  # before the model is loaded
        two = None
        if library is not None:
            two = load_transformer2(model, library, strategy, shots, (), dtype, device, trust_remote_code)
            loaded, tokenizer = two.model, two.tokenizer
            for name in two.library.names:
                if name in sources:
                    raise SpectuneError(f"the library has an adapter {name!r} too: give the other another name")
                sources[name] = partial(two.library.adapter, name)
        else:
            need_library(strategy=strategy, shots=shots)
            options = {"device": device or default_device(), "trust_remote_code": trust_remote_code}
            loaded, tokenizer = load_base(base, dtype, **options)
        run.serve(loaded, tokenizer, sources, name=base, settings=settings, listening=listening, two=two)


def _by_name(texts: list[str]) -> dict[str, str]:
    """Return the adapters' folders by the names that they are asked by."""
    folders: dict[str, str] = {}
    for text in texts:
        name, folder = _named(text)
        if name in folders:
            raise SpectuneError(f"two adapters are to be called {name!r}: give each a name of its own")
        folders[name] = folder
    return folders


def _named(text: str) -> tuple[str, str]:
    """Return the name and the folder of `NAME=ADAPTER`; a folder alone is called by its own name."""
    name, equals, folder = text.partition("=")
    if not equals:
        name, folder = Path(text).resolve().name, text
    if not name or not folder:
        raise SpectuneError(f"{text!r} is not NAME=ADAPTER")
    return name, folder
