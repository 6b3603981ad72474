"""What the gateway needs of an engine: it accepts a request's experts, and reports which experts were chosen.

The gateway is an ASGI middleware around an engine's own OpenAI-compatible application. For each request it makes a
:class:`Ticket`, lets the engine write it into the request's body (:meth:`Engine.admit`), sends that body to the
application with the ticket's id as ``x-request-id``, and asks for the routing with each answer or chunk
(:meth:`Engine.steps`). At the end of the request, for any reason, it calls :meth:`Engine.finish`.

    key and request -> Ticket -> admit(body) -> the engine's application -> answer -> steps(answer) -> client
                                                                                   -> finish(ticket)

The gateway passes ``POST /v1/chat/completions``, ``POST /v1/completions`` and ``GET /health`` to the application, and
answers all other requests itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

Recording = Literal["none", "shares", "layers"]


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """What an engine receives about one request. Only the gateway makes it, never a client.

    Attributes:
        id: Unique for this request; the application sees it as the header ``x-request-id``. Never the client's.
        experts: The experts that may be chosen, in alphabetical order: the key's experts, restricted by the request.
            Empty means the base model alone. Always a subset of :attr:`Engine.experts`.
        router: One of :attr:`Engine.routers`. With a single expert every router gives it all weight.
        salt: Equal for two tickets if and only if their experts and router are equal. An engine with a prefix cache
            must never share an entry between different salts.
        record: What :meth:`Engine.steps` must report: nothing, each token's shares, or also each layer's decision.
    """

    id: str
    experts: tuple[str, ...]
    router: str
    salt: str = ""
    record: Recording = "none"


class Step(NamedTuple):
    """The routing of one generated token, which is that of the step that produced it.

    The first generated token has the routing of the prompt's last position.

    Attributes:
        shares: For each expert that was used, its weight summed over the routed layers, divided by the number of
            :attr:`Engine.layers`. The sum is at most one.
        layers: With ``record="layers"``, the experts that were chosen at each of :attr:`Engine.layers`, as
            ``{name: (weight, score)}``; else empty.
        p: For a router that decides for whole prompts, the share of ordinary prompts whose best expert fits as well as
            this prompt's, if known. If it is large, possibly no expert is used.
    """

    shares: Mapping[str, float]
    layers: Sequence[Mapping[str, tuple[float, float]]] = ()
    p: float | None = None


@runtime_checkable
class Engine(Protocol):
    """An engine as the gateway sees it. All methods run on the event loop's thread and must not block it."""

    @property
    def base_model(self) -> str:
        """The name of the base model alone."""
        ...

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts that new requests may get, in alphabetical order."""
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
        """The fields of both endpoints' requests that the application knows. A field that resembles one of them or one
        of ours, but is none, is refused as misspelt."""
        ...

    @property
    def outlier_scores(self) -> Mapping[str, float]:
        """Experts whose norm is an outlier, with a robust z-score; empty if there are none."""
        ...

    def admit(self, ticket: Ticket, body: Mapping[str, Any]) -> dict[str, Any]:
        """The body of a request for the application; from now on the ticket is in force.

        ``body`` is validated and without our fields (``experts``, ``router``, ``return_routing``). Its ``model`` is the
        client's, which the gateway puts back into the answers. This method must set ``model`` to the application's name
        of the composed model. It must overwrite or refuse every field with which a client could set what the ticket
        sets (in vLLM ``vllm_xargs``, ``cache_salt`` and others). An engine that passes the ticket on outside of the
        body (by the header ``x-request-id``) keeps it until :meth:`finish`.

        Raises:
            RefusalError: The engine cannot serve this request. Nothing is kept.
        """
        ...

    def steps(self, ticket: Ticket, answer: dict[str, Any]) -> Mapping[int, Sequence[Step]]:
        """The routing of the tokens that were generated since the last call for this ticket, by choice index.

        Called with every complete answer or SSE chunk, parsed, before it goes to the client, unless ``ticket.record``
        is ``"none"``. The engine may read the routing from ``answer`` and must then delete what is not part of
        the API. Tokens whose text is not complete yet (part of a character) may come with a later chunk. The chunk with
        a ``finish_reason``, or a complete answer, brings all remaining tokens.
        """
        ...

    def finish(self, ticket: Ticket) -> None:
        """The request has ended: answered, refused, failed, or its client disconnected. Called exactly once after
        :meth:`admit`; never raises. Generation that is still running for it may be stopped."""

    async def discard(self, name: str) -> None:
        """Remove an expert. It leaves :attr:`experts` at once. Returns after its weights have left the memory, which
        may wait for requests that use it.

        Raises:
            SpectrError: There is no such expert, or it is the last one.
        """

    def metrics(self) -> bytes:
        """The engine's own Prometheus text, which is shown after ours; empty if it has none."""
        ...
