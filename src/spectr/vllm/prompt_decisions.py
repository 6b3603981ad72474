"""Decisions for whole prompts: the base model reads each one before the routed model answers it."""

from __future__ import annotations

import asyncio
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Collection
from typing import Any

from spectr.composition.subset_probes import calibration_texts
from spectr.errors import CompositionError
from spectr.library import ExpertLibrary
from spectr.vllm.requests import EXPERTS, PROBE, ROUTER, SKIPPED, VERDICT

_KEPT = 4096  # requests whose p is stored
DECIDES = "SPECTR_DECIDES"  # set if prompts are decided on before the engine answers; no graph depends on it


class Decider:
    """Wraps an engine's ``generate`` to add a verdict to requests whose router decides on prompts.

    The engine reads the prompt as a separate request (:mod:`spectr.vllm.probes`). If the verdict is one
    expert, the answer is that of a request for this expert, with the same masks and cache salt.

    Args:
        client: vLLM's ``AsyncLLM``, whose ``generate`` is replaced.
        library: The experts, and the texts of the calibration.
        routers: Names of the routers that decide on prompts.
        probe_tokens: Maximum number of tokens to read of a prompt.

    Attributes:
        p: For each request, the share of ordinary prompts with at least as much evidence for an expert, if known.
    """

    def __init__(self, client: Any, library: ExpertLibrary, routers: Collection[str], probe_tokens: int):
        self._opening, self._null = calibration_texts(library.calibration)
        self._routers, self._limit = frozenset(routers), probe_tokens
        self._client, self._plain = client, client.generate
        self.p = OrderedDict[str, float]()
        client.generate = self.generate

    async def read_null(self) -> None:
        """Let the engine read the texts that prompts are compared with."""
        texts: dict[str, list[int]] = {}
        for batch in self._null.batches:
            rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
            texts |= {uuid.uuid4().hex: ids[real.bool()].tolist() for ids, real in rows}
        await self._client.collective_rpc("spectr_read_null", args=(list(texts), self._null.ordinary))
        await asyncio.gather(*(self._read(probe, ids, {}) for probe, ids in texts.items()))

    async def generate(self, prompt: Any, sampling_params: Any, request_id: str, **options: Any) -> AsyncIterator[Any]:
        """See ``AsyncLLM.generate``."""
        extra = dict(sampling_params.extra_args or {})
        if extra.get(ROUTER) in self._routers and len(extra.get(EXPERTS) or ()) > 1:
            among = {ROUTER: extra[ROUTER], EXPERTS: extra.pop(EXPERTS)}
            verdict, p = await self._decide(prompt, among)
            self._keep(request_id, p)
            sampling_params = sampling_params.clone()
            sampling_params.extra_args = extra | ({EXPERTS: list(verdict)} if len(verdict) < 2 else {VERDICT: verdict})
        async for output in self._plain(prompt, sampling_params, request_id, **options):
            yield output

    def _keep(self, request_id: str, p: float | None) -> None:
        self.p.pop(request_id, None)
        if p is not None:
            self.p[request_id] = p
        while len(self.p) > _KEPT:
            self.p.popitem(last=False)

    async def _decide(self, prompt: Any, among: dict[str, Any]) -> tuple[dict[str, float], float | None]:
        ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
        if not ids:
            raise CompositionError("a router for prompts needs a text prompt", do="use a single expert")
        probe = uuid.uuid4().hex
        await self._read(probe, list(ids), among)
        [verdict, *_] = await self._client.collective_rpc("spectr_verdict", args=(probe,))
        return verdict[0], verdict[1]

    async def _read(self, probe: str, ids: list[int], among: dict[str, Any]) -> None:
        from vllm.sampling_params import SamplingParams

        turn, skipped = self._opening.counted(ids, self._limit)
        params = SamplingParams(
            max_tokens=1,
            temperature=0,
            detokenize=False,
            skip_reading_prefix_cache=True,  # cached tokens pass no layer
            extra_args={PROBE: probe, SKIPPED: skipped, **among},
        )
        async for _ in self._plain({"prompt_token_ids": turn}, params, f"probe-{probe}"):
            pass
