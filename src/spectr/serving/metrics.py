"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from spectr.serving.engines.base import Engine, Step

BASE = "(base)"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """One server's counters, in a registry of their own."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        self.requests = Counter("spectr_requests", "Requests by status", ["endpoint", "status"], registry=own)
        self.running = Gauge("spectr_requests_running", "Requests that are being answered", registry=own)
        self.hangups = Counter("spectr_hangups", "Clients that left before their answer ended", registry=own)
        self.seconds = Histogram("spectr_request_seconds", "From a request to the end of its answer", registry=own)
        self.prompt = Counter("spectr_prompt_tokens", "Tokens of prompts", registry=own)
        self.generated = Counter("spectr_generated_tokens", "Tokens of answers", registry=own)
        tokens = f"Generated tokens, shared out among experts by weight; {BASE}: without any"
        self.tokens = Counter("spectr_tokens", tokens, ["expert"], registry=own)
        self.layers = Gauge("spectr_routed_layers", "Layers that are routed", registry=own)
        score = "How far an expert's norm is above the others', a robust z-score"
        self.suspicion = Gauge("spectr_expert_suspicion", score, ["expert"], registry=own)

    def describe(self, engine: Engine) -> None:
        """Set what is known without any request."""
        self.layers.set(len(engine.layers))
        for name, score in engine.suspicion.items():
            self.suspicion.labels(name).set(score)

    def forget(self, expert: str) -> None:
        """Drop what is no longer true of an expert that was removed; its tokens stay."""
        with suppress(KeyError):
            self.suspicion.remove(expert)

    def count_steps(self, experts: Sequence[str], steps: Sequence[Step]) -> None:
        """Share generated tokens out among the experts that did the work."""
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
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
