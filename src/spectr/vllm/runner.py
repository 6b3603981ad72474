"""Hooks of vLLM's first model runner: masks before each step, reports after it, and a proof when a model is loaded."""

from __future__ import annotations

from functools import wraps
from typing import Any

import numpy as np

from spectr.errors import CompositionError
from spectr.vllm.cache_salt import REMOVE
from spectr.vllm.probes import Hearing, Row
from spectr.vllm.requests import Asked
from spectr.vllm.routing_records import Reporter
from spectr.vllm.worker_state import Session


def hook_runner() -> None:
    """Wrap the runner's methods; a runner of another model goes on as it was."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.worker_base import WorkerBase

    if hasattr(WorkerBase, REMOVE):
        return
    for kind in (GPUModelRunner, CPUModelRunner):
        if "load_model" in vars(kind):
            kind.load_model = _proving(kind.load_model)
    GPUModelRunner._prepare_inputs = _masking(GPUModelRunner._prepare_inputs)
    GPUModelRunner._bookkeeping_sync = _reporting(GPUModelRunner._bookkeeping_sync)
    WorkerBase.spectr_remove = _remove
    WorkerBase.spectr_status = _status
    WorkerBase.spectr_learn = _learn
    WorkerBase.spectr_verdict = _verdict


def session_of(runner: Any) -> Session | None:
    """The session of a runner whose model is routed."""
    return getattr(runner.vllm_config.quant_config, "_session", None)


def _proving(load_model: Any) -> Any:
    @wraps(load_model)
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.logger import init_logger

        result = load_model(self, *args, **kwargs)
        session = session_of(self)
        if session is not None:
            session.check()
            self.spectr_reporter = Reporter.of(session)
            logger = init_logger("vllm.spectr")
            logger.info("SpectR routes %d layers (%d modules) by %s among %s", *_words(session))
        elif self.vllm_config.model_config.quantization == "spectr":
            raise CompositionError("no layer is routed: the model has no linear layers of vLLM's", do="serve another")
        return result

    return load


def _words(session: Session) -> tuple[int, int, str, str]:
    told = session.status()
    return told["layers"], told["modules"], told["router"], ", ".join(told["experts"])


def _masking(prepare_inputs: Any) -> Any:
    @wraps(prepare_inputs)
    def prepare(self: Any, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
        result = prepare_inputs(self, scheduler_output, num_scheduled_tokens)
        session = session_of(self)
        if session is not None:
            batch = self.input_batch
            self.spectr_asked = [_asked(self, request) for request in batch.req_ids]
            counts = (batch.num_computed_tokens_cpu, num_scheduled_tokens, batch.num_prompt_tokens)
            rows = zip(batch.req_ids, self.spectr_asked, *(count.tolist() for count in counts), strict=False)
            session.write([Row(*row) for row in rows], self.requests)
        return result

    return prepare


def _asked(runner: Any, request: str) -> Asked:
    """What a request asks for; read once."""
    state = runner.requests[request]
    asked = getattr(state, "spectr_asked", None)
    if asked is None:
        params = state.sampling_params
        asked = state.spectr_asked = Asked.of(None if params is None else params.extra_args)
    return asked


def _reporting(bookkeeping: Any) -> Any:
    @wraps(bookkeeping)
    def keep(self: Any, *args: Any, **kwargs: Any) -> Any:
        reporter = getattr(self, "spectr_reporter", None)
        session = session_of(self)
        if session is not None and session.hearing is not None:
            session.hearing.end(session.removed)
        if reporter is not None and any(asked.routing for asked in self.spectr_asked):
            reporter.report(self)
        return bookkeeping(self, *args, **kwargs)

    return keep


def _remove(self: Any, name: str) -> dict[str, Any]:
    """Worker method: forget an expert; gives what is left."""
    session = _needed(self)
    session.remove(name)
    return session.status()


def _status(self: Any) -> dict[str, Any]:
    """Worker method: what is routed."""
    return _needed(self).status()


def _learn(self: Any, probes: list[str]) -> None:
    """Worker method: these probes say what is usual."""
    _hearing(self).learn(probes)


def _verdict(self: Any, probe: str) -> dict[str, float]:
    """Worker method: the experts' weights, or their prior, for a prompt that was read."""
    return _hearing(self).verdict(probe)


def _hearing(worker: Any) -> Hearing:
    hearing = _needed(worker).hearing
    if hearing is None:
        raise CompositionError("this engine's router does not decide on whole prompts", do="serve with calibrated")
    return hearing


def _needed(worker: Any) -> Session:
    session = session_of(worker.model_runner)
    if session is None:
        raise CompositionError("this engine's model is not routed", do='serve one with quant_method "spectr"')
    return session
