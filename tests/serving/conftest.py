"""Engines that end with the test, and an application over one that is none."""

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from serving.servers import shelf_of, tiny, words
from serving.told import Told
from spectune.serving.app import Service, make_app
from spectune.serving.asking import Reader
from spectune.serving.batch import Batch
from spectune.serving.engine import Engine
from spectune.serving.jobs import Limits
from spectune.serving.shelf import Shelf


@pytest.fixture
def begin():
    """Begin engines, and end them after the test."""
    engines = []

    def begun(model, shelf=None, **limits):
        engine = Engine(Batch(model, lays_out=True), shelf or Shelf(model), 0, Limits(**limits))
        engines.append(engine)
        engine.start()
        return engine

    yield begun
    for engine in engines:
        engine.stop(30)
        assert not engine.alive


@pytest.fixture(scope="module")
def parts():
    model = tiny()
    return model, words(), shelf_of(model, 2)


@pytest.fixture
def served(parts):
    """Return an engine, its service, and a function that asks the application."""
    model, tokenizer, shelf = parts
    engine: Any = Told(shelf)
    service = Service(engine, Reader(model, tokenizer), "tiny")
    app = make_app(service, page=b"<p>home")

    def ask(method, path, body=None):
        async def asking():
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                return await client.request(method, path, json=body)

        return asyncio.run(asking())

    return SimpleNamespace(engine=engine, service=service, ask=ask)
