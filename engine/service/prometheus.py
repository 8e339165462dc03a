"""Metrics for Prometheus; needs the package prometheus_client (``pip install 'diffpo-engine[prometheus]'``)."""

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from engine.service.metrics import COUNTERS, DURATIONS, LEVELS

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)


class PrometheusMetrics:
    """Collectors named ``prefix``_requests_total{reason=...}, ``prefix``_queued and so on, in a registry of your choice.

    One for each AsyncRefiner; two in a registry need two prefixes. ``close`` takes the collectors out again.
    """

    def __init__(self, registry: CollectorRegistry | None = None, prefix: str = "diffpo") -> None:
        """``registry``: by default the one that prometheus_client's own exporters read."""
        self._registry = registry if registry is not None else REGISTRY
        self._counters = {
            name: Counter(f"{prefix}_{name}", text, ["reason"] if name == "requests" else [], registry=self._registry)
            for name, text in COUNTERS.items()
        }
        self._levels = {name: Gauge(f"{prefix}_{name}", text, registry=self._registry) for name, text in LEVELS.items()}
        self._durations = {
            name: Histogram(f"{prefix}_{name}", text, buckets=SECONDS, registry=self._registry)
            for name, text in DURATIONS.items()
        }

    def count(self, name: str, amount: int, reason: str | None = None) -> None:
        counter = self._counters[name]
        (counter if reason is None else counter.labels(reason=reason)).inc(amount)

    def level(self, name: str, value: int) -> None:
        self._levels[name].set(value)

    def observe(self, name: str, seconds: float) -> None:
        self._durations[name].observe(seconds)

    def close(self) -> None:
        """Removes the collectors from their registry."""
        for collector in (*self._counters.values(), *self._levels.values(), *self._durations.values()):
            self._registry.unregister(collector)
