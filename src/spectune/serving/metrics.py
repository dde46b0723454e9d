"""What a server tells Prometheus of itself."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from spectune.serving.engine import Engine


class Metrics:
    """Counts requests, and looks at the engine when it is asked.

    Args:
        engine: the engine.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._registry = engine, CollectorRegistry()
        labels = ("path", "status")
        self._requests = Counter("spectune_requests", "Requests answered.", labels, registry=self._registry)
        self._seconds = Histogram(
            "spectune_request_seconds",
            "Seconds from a request to the end of its answer.",
            ("path",),
            buckets=(0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600),
            registry=self._registry,
        )
        self._registry.register(self)

    def seen(self, path: str, status: int, seconds: float) -> None:
        """Take note of a request."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        """Return all in Prometheus' format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield what the engine says."""
        engine, prefixes = self._engine, self._engine.batch.prefixes
        for name, told, value in (
            ("rows", "Rows that are being answered.", engine.rows),
            ("waiting", "Requests that wait for a row.", engine.waiting),
            ("adapters", "Adapters that can be asked for.", len(engine.shelf.versions)),
            ("adapters_resident", "Adapters that are on the model.", engine.shelf.resident),
            ("prefix_bytes", "Bytes of keys and values of texts that were read.", prefixes.bytes if prefixes else 0),
            ("cache_bytes", "Bytes of keys and values.", engine.batch.bytes),
        ):
            yield GaugeMetricFamily(f"spectune_{name}", told, value=value)
        for name, told, value in (
            ("steps", "Steps of the batch.", engine.steps),
            ("prompt_tokens", "Tokens of prompts that were read.", engine.prompt_tokens),
            ("prompt_tokens_cached", "Tokens of prompts that were known.", prefixes.hits if prefixes else 0),
            ("tokens", "Tokens that were generated.", engine.tokens),
            ("adapter_evictions", "Adapters that were set aside.", engine.shelf.evictions),
            ("adapter_reads", "Adapters that were read again.", engine.shelf.reads),
        ):
            yield CounterMetricFamily(f"spectune_{name}", told, value=value)
