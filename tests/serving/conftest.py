"""Engines that end with the test."""

import pytest

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
