"""Hooks in vLLM: cache salts by sets of experts; in its first model runner masks before a step, reports after it."""

from __future__ import annotations

from functools import wraps
from typing import Any

import numpy as np

from spectr.errors import CompositionError
from spectr.vllm.probes import Probes, Row
from spectr.vllm.requests import RequestOptions
from spectr.vllm.routing_records import Reporter
from spectr.vllm.worker_state import WorkerState

REMOVE = "spectr_remove"
_removed: set[str] = set()  # experts removed from the engine of this process


def salt_requests() -> None:
    """Add each request's set of experts to its cache salt, where the engine core makes the salt."""
    from vllm.v1.request import Request

    if getattr(Request.__init__, "salts", False):
        return
    original = Request.__init__

    @wraps(original)
    def salted(self: Any, *args: Any, **options: Any) -> None:
        params = options["sampling_params"] if "sampling_params" in options else (args[2] if len(args) > 2 else None)
        salt = RequestOptions.of(getattr(params, "extra_args", None)).salt(_removed)
        if salt:
            own = options.get("cache_salt")
            options["cache_salt"] = f"{salt}|{own}" if own else salt
        original(self, *args, **options)

    salted.salts = True  # pyright: ignore[reportAttributeAccessIssue]
    Request.__init__ = salted


def follow_removals() -> None:
    """Change the salt of requests that come after the removal of an expert."""
    from vllm.v1.engine.core import EngineCore

    if getattr(EngineCore.collective_rpc, "follows", False):
        return
    original = EngineCore.collective_rpc

    @wraps(original)
    def followed(self: Any, method: Any, timeout: float | None = None, args: tuple = (), kwargs: Any = None) -> Any:
        if method == REMOVE and args:
            _removed.add(str(args[0]))
        return original(self, method, timeout, args, kwargs)

    followed.follows = True  # pyright: ignore[reportAttributeAccessIssue]
    EngineCore.collective_rpc = followed


def hook_runner() -> None:
    """Wrap the runner's methods. Runners of other models work as before."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.worker_base import WorkerBase

    if hasattr(WorkerBase, REMOVE):
        return
    for kind in (GPUModelRunner, CPUModelRunner):
        if "load_model" in vars(kind):
            kind.load_model = _checking(kind.load_model)
    GPUModelRunner._prepare_inputs = _masking(GPUModelRunner._prepare_inputs)
    GPUModelRunner._bookkeeping_sync = _reporting(GPUModelRunner._bookkeeping_sync)
    WorkerBase.spectr_remove = _remove
    WorkerBase.spectr_status = _status
    WorkerBase.spectr_read_null = _read_null
    WorkerBase.spectr_verdict = _verdict


def state_of(runner: Any) -> WorkerState | None:
    """The state of a runner whose model is routed."""
    return getattr(runner.vllm_config.quant_config, "_worker_state", None)


def _checking(load_model: Any) -> Any:
    @wraps(load_model)
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.logger import init_logger

        result = load_model(self, *args, **kwargs)
        state = state_of(self)
        if state is not None:
            state.check()
            self.spectr_reporter = Reporter.of(state)
            logger = init_logger("vllm.spectr")
            logger.info("SpectR routes %d layers (%d modules) by %s among %s", *_words(state))
        elif self.vllm_config.model_config.quantization == "spectr":
            raise CompositionError("no layer is routed: the model has no vLLM linear layers", do="serve another model")
        return result

    return load


def _words(state: WorkerState) -> tuple[int, int, str, str]:
    status = state.status()
    return status["layers"], status["modules"], status["router"], ", ".join(status["experts"])


def _masking(prepare_inputs: Any) -> Any:
    @wraps(prepare_inputs)
    def prepare(self: Any, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
        result = prepare_inputs(self, scheduler_output, num_scheduled_tokens)
        state = state_of(self)
        if state is not None:
            batch = self.input_batch
            self.spectr_options = [_options_of(self, request) for request in batch.req_ids]
            counts = (batch.num_computed_tokens_cpu, num_scheduled_tokens, batch.num_prompt_tokens)
            rows = zip(batch.req_ids, self.spectr_options, *(count.tolist() for count in counts), strict=False)
            state.write([Row(*row) for row in rows], self.requests)
        return result

    return prepare


def _options_of(runner: Any, request: str) -> RequestOptions:
    """A request's routing options, read once."""
    running = runner.requests[request]
    options = getattr(running, "spectr_options", None)
    if options is None:
        params = running.sampling_params
        options = running.spectr_options = RequestOptions.of(None if params is None else params.extra_args)
    return options


def _reporting(bookkeeping: Any) -> Any:
    @wraps(bookkeeping)
    def keep(self: Any, *args: Any, **kwargs: Any) -> Any:
        reporter = getattr(self, "spectr_reporter", None)
        state = state_of(self)
        if state is not None and state.probes is not None:
            state.probes.end(state.removed)
        if reporter is not None and any(options.routing for options in self.spectr_options):
            reporter.report(self)
        return bookkeeping(self, *args, **kwargs)

    return keep


def _remove(self: Any, name: str) -> dict[str, Any]:
    """Worker method: remove an expert, and return the new status."""
    state = _routed_state(self)
    state.remove(name)
    return state.status()


def _status(self: Any) -> dict[str, Any]:
    """Worker method: see :meth:`WorkerState.status`."""
    return _routed_state(self).status()


def _read_null(self: Any, probes: list[str], ordinary: bool) -> None:
    """Worker method: see :meth:`Probes.read_null`."""
    _probes_of(self).read_null(probes, ordinary)


def _verdict(self: Any, probe: str) -> tuple[dict[str, float], float | None]:
    """Worker method: see :meth:`Probes.verdict`."""
    numbers, p = _probes_of(self).verdict(probe)
    return numbers, p  # plain types, which pass from process to process


def _probes_of(worker: Any) -> Probes:
    probes = _routed_state(worker).probes
    if probes is None:
        raise CompositionError("this engine's router does not decide on whole prompts", do="serve with calibrated")
    return probes


def _routed_state(worker: Any) -> WorkerState:
    state = state_of(worker.model_runner)
    if state is None:
        raise CompositionError("this engine's model is not routed", do='serve a model with quant_method "spectr"')
    return state
