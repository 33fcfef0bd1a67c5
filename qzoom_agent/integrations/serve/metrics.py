"""Counts for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from qzoom_agent.answer import Answer
from qzoom_agent.integrations.serve.episodes import EpisodePool


class Metrics:
    """The counts of one server."""

    def __init__(self, pool: EpisodePool) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter("qzoom_requests", "Requests by outcome", ["outcome"], registry=registry)
        self._seconds = Histogram("qzoom_request_seconds", "Seconds to an answer", registry=registry)
        self._visual = Counter("qzoom_visual_tokens", "Visual tokens of the views", ["view"], registry=registry)
        self._written = Counter("qzoom_written_tokens", "Tokens that the model wrote", registry=registry)
        self._calls = Counter("qzoom_zoom_calls", "Zoom calls of the model by outcome", ["outcome"], registry=registry)
        for name, text, value in (
            ("qzoom_running", "Requests under way", lambda: pool.running),
            ("qzoom_waiting", "Requests that wait for a place", lambda: pool.waiting),
        ):
            Gauge(name, text, registry=registry).set_function(value)

    def answered(self, answer: Answer, seconds: float) -> None:
        """Count an answer."""
        usage = answer.usage
        self._requests.labels(answer.status).inc()
        self._seconds.observe(seconds)
        self._visual.labels("coarse").inc(usage.coarse_tokens)
        self._visual.labels("crop").inc(usage.crop_tokens)
        self._written.inc(usage.written_tokens)
        for outcome, count in (("served", usage.served), ("refused", usage.refused), ("failed", usage.failed)):
            self._calls.labels(outcome).inc(count)

    def refused(self, outcome: str) -> None:
        """Count a request without an answer: its error's code or status, or "left"."""
        self._requests.labels(outcome).inc()

    def text(self) -> bytes:
        """Return all counts in Prometheus' text format."""
        return bytes(generate_latest(self._registry))
