"""What Prometheus reads: every figure is the engine's own, and requests are counted by path and status."""

from types import SimpleNamespace
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from spectune.serving.metrics import Metrics


def engine(prefixes: Any = None) -> Any:
    shelf = SimpleNamespace(versions=["a", "b", "c"], resident=2, evictions=5, reads=4)
    batch = SimpleNamespace(prefixes=prefixes, bytes=4096)
    return SimpleNamespace(rows=3, waiting=7, shelf=shelf, batch=batch, steps=11, prompt_tokens=13, tokens=17)


def read(metrics):
    """Return values by name and labels, as Prometheus' own parser reads them."""
    families = text_string_to_metric_families(metrics.text().decode())
    return {(s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples}


def test_figures_are_the_engines():
    found = read(Metrics(engine(SimpleNamespace(bytes=100, hits=19))))
    expected = {
        "rows": 3, "waiting": 7, "adapters": 3, "adapters_resident": 2, "prefix_bytes": 100, "cache_bytes": 4096,
        "steps_total": 11, "prompt_tokens_total": 13, "prompt_tokens_cached_total": 19, "tokens_total": 17,
        "adapter_evictions_total": 5, "adapter_reads_total": 4,
    }  # fmt: skip
    assert {name: found[f"spectune_{name}",] for name in expected} == expected


def test_they_are_looked_at_when_they_are_asked_for():
    busy = engine()
    metrics = Metrics(busy)
    assert read(metrics)["spectune_prefix_bytes",] == 0
    busy.tokens = 23
    assert read(metrics)["spectune_tokens_total",] == 23


def test_requests_are_counted_and_timed():
    metrics = Metrics(engine())
    for status, seconds in ((200, 0.02), (200, 3.0), (404, 0.001)):
        metrics.seen("/v1/models", status, seconds)
    metrics.seen("/health", 200, 1000.0)
    found = read(metrics)
    path = ("path", "/v1/models")
    assert found["spectune_requests_total", path, ("status", "200")] == 2
    assert found["spectune_requests_total", path, ("status", "404")] == 1
    assert found["spectune_request_seconds_count", path] == 3
    assert found["spectune_request_seconds_sum", path] == 3.021
    below = {bound: found["spectune_request_seconds_bucket", ("le", bound), path] for bound in ("0.01", "0.05", "5.0")}
    assert below == {"0.01": 1, "0.05": 2, "5.0": 3}
    last = ("path", "/health")
    assert found["spectune_request_seconds_bucket", ("le", "600.0"), last] == 0
    assert found["spectune_request_seconds_bucket", ("le", "+Inf"), last] == 1


def test_two_servers_of_one_process_count_apart():
    first, second = Metrics(engine()), Metrics(engine())
    first.seen("/health", 200, 0.1)
    assert ("spectune_requests_total", ("path", "/health"), ("status", "200")) not in read(second)
