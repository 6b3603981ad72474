"""What the gateway needs of an engine: it takes a request's experts, and reports which of them were chosen.

The gateway is an ASGI middleware around an engine's own OpenAI-compatible application. Of each request it makes a
:class:`Ticket`, has the engine write it into the request's body (:meth:`Engine.admit`), hands that body to the
application with the ticket's id as its ``x-request-id`` header, and asks for the routing with each answer or chunk that
comes back (:meth:`Engine.steps`). At the end, however it comes about, it calls :meth:`Engine.finish`.

    key and request -> Ticket -> admit(body) -> the engine's application -> answer -> steps(answer) -> client
                                                                                   -> finish(ticket)

Nothing else reaches the application: of its routes the gateway lets ``POST /v1/chat/completions``,
``POST /v1/completions`` and ``GET /health`` through, and answers the others itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

Recording = Literal["none", "shares", "layers"]


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """What an engine gets of one request. The gateway makes it; a client cannot.

    Attributes:
        id: Unique to this request; the header ``x-request-id`` that the application sees. Never the client's.
        experts: The granted set, those that may be chosen, in alphabetical order: the key's set, narrowed by the
            request. Empty: the base model alone, without any expert. Never more than :attr:`Engine.experts`.
        router: One of :attr:`Engine.routers`.
            (Of one expert every router gives it all weight.)
        salt: Equal for two tickets whose experts and router are equal, and different otherwise. An engine with a prefix
            cache must never let tickets of different salts share an entry.
        record: What :meth:`Engine.steps` is to tell: nothing, each token's shares, or also each layer's decision.
    """

    id: str
    experts: tuple[str, ...]
    router: str
    salt: str = ""
    record: Recording = "none"


class Step(NamedTuple):
    """The routing of one generated token: that of the step which produced it.

    The first generated token's is the routing of the prompt's last position.

    Attributes:
        shares: Of each expert that took part, its part of the layers' weight: its weight summed over the routed layers,
            divided by the number of :attr:`Engine.layers`. At most one in total.
        layers: With ``record="layers"``, for each of :attr:`Engine.layers` the experts that were chosen there, as
            ``{name: (weight, score)}``; else empty.
        p: Of a router that decides for whole prompts the share of ordinary prompts whose best expert fits as well as
            this prompt's, where that is known. Where it is large no expert may take part.
    """

    shares: Mapping[str, float]
    layers: Sequence[Mapping[str, tuple[float, float]]] = ()
    p: float | None = None


@runtime_checkable
class Engine(Protocol):
    """An engine as the gateway sees it. All methods are called on the event loop's thread and must not block it."""

    @property
    def base_model(self) -> str:
        """The name under which the base model alone is offered."""
        ...

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts that requests from now on may be granted, in alphabetical order."""
        ...

    @property
    def routers(self) -> tuple[str, ...]:
        """The routers that a request may name; the first one is the default."""
        ...

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the routed layers, in the model's order."""
        ...

    @property
    def fields(self) -> frozenset[str]:
        """The fields that the application knows of a request, of either endpoint; what looks like one of them, or of
        ours, and is none is refused as a slip."""
        ...

    @property
    def suspicion(self) -> Mapping[str, float]:
        """Of each expert whose norm is far out of the others', how far (a robust z-score); empty where none is."""
        ...

    def admit(self, ticket: Ticket, body: Mapping[str, Any]) -> dict[str, Any]:
        """A request's body as the application is to get it; from now on the ticket is in force.

        ``body`` was validated, and is without our own fields (``experts``, ``router``, ``return_routing``); its
        ``model`` is still the client's, which the gateway puts back into the answers. Must set ``model`` to what the
        application calls the composed model, and must overwrite or refuse every field by which a client could say
        itself what the ticket sets (for vLLM ``vllm_xargs``, ``cache_salt`` and the like). An engine that passes it
        on by other means than the body (by the header ``x-request-id``) keeps the ticket until :meth:`finish`.

        Raises:
            RefusalError: The engine cannot do that. Nothing is kept.
        """
        ...

    def steps(self, ticket: Ticket, answer: dict[str, Any]) -> Mapping[int, Sequence[Step]]:
        """The routing of the tokens that were generated since the last call for this ticket, by choice index.

        Called with every whole answer or SSE chunk, parsed, before it goes to the client, where ``ticket.record`` is
        not ``"none"``. The engine may read the routing out of ``answer`` and must then delete from it what is not the
        API's. Tokens whose text is still held back (part of a character) may come with a later chunk; with the chunk
        that has a ``finish_reason``, and with a whole answer, all remaining ones come.
        """
        ...

    def finish(self, ticket: Ticket) -> None:
        """The request is over: answered, refused, failed, or its client has hung up. Called exactly once after
        :meth:`admit`, and never raises. What is still being generated for it may be stopped."""

    async def discard(self, name: str) -> None:
        """Forget an expert. From the call on it is not in :attr:`experts`; returns when its weights have left memory,
        which may wait for the requests that were granted it.

        Raises:
            SpectrError: There is no such expert, or it is the last one.
        """

    def metrics(self) -> bytes:
        """The engine's own Prometheus text, to be shown after ours; empty where it has none."""
        ...
