"""A server's counters, for Prometheus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from spectr.serving.engines.engine import Engine, Step

BASE = "(base)"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """One server's counters, in a separate registry."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        self.requests = Counter("spectr_requests", "Requests by status", ["endpoint", "status"], registry=own)
        self.running = Gauge("spectr_requests_running", "Requests that are being answered", registry=own)
        self.hangups = Counter("spectr_hangups", "Clients that disconnected before their answer ended", registry=own)
        self.seconds = Histogram("spectr_request_seconds", "Time from a request to the end of its answer", registry=own)
        self.prompt = Counter("spectr_prompt_tokens", "Prompt tokens", registry=own)
        self.generated = Counter("spectr_generated_tokens", "Answer tokens", registry=own)
        tokens = f"Generated tokens by expert, split by weight; {BASE}: no expert"
        self.tokens = Counter("spectr_tokens", tokens, ["expert"], registry=own)
        self.layers = Gauge("spectr_routed_layers", "Routed layers", registry=own)
        score = "Robust z-score of an expert's norm among all experts"
        names = ("spectr_expert_outlier_score", "spectr_expert_suspicion")  # and its old name
        self.outlier_scores = [Gauge(name, score, ["expert"], registry=own) for name in names]

    def describe(self, engine: Engine) -> None:
        """Set values that are known without any request."""
        self.layers.set(len(engine.layers))
        for name, score in engine.outlier_scores.items():
            for gauge in self.outlier_scores:
                gauge.labels(name).set(score)

    def forget(self, expert: str) -> None:
        """Drop values of a removed expert; its tokens stay."""
        with suppress(KeyError):
            for gauge in self.outlier_scores:
                gauge.remove(expert)

    def count_steps(self, experts: Sequence[str], steps: Sequence[Step]) -> None:
        """Split generated tokens among the experts that were used."""
        totals: dict[str, float] = {}
        for step in steps:
            for name, share in step.shares.items():
                totals[name] = totals.get(name, 0.0) + share
        if not experts:
            totals[BASE] = float(len(steps))
        for name, total in totals.items():
            self.tokens.labels(name).inc(total)

    def count_usage(self, usage: Mapping[str, object]) -> None:
        """Add a request's ``usage``."""
        for counter, key in ((self.prompt, "prompt_tokens"), (self.generated, "completion_tokens")):
            number = usage.get(key)
            counter.inc(number if isinstance(number, int) else 0)

    def text(self) -> bytes:
        """All counters in Prometheus' format."""
        return generate_latest(self.registry)
