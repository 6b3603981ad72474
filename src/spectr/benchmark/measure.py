"""Timing models in turn, and the most memory that a call holds at once."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from spectr.benchmark.subjects import Subject
from spectr.models.cache import growing_cache
from spectr.prompts.cache_records import is_recurrent, states_in

State = Mapping[str, Any]  # what a model remembers of a prompt, by the name of the argument that takes it

_EMPTY: State = {}
_CALL = "the call that is measured"


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is timed.

    Attributes:
        prompt: Tokens of the prompt.
        batch: Rows.
        steps: Tokens that are decoded after it, one by one; 0 times the prompt itself.
    """

    prompt: int
    batch: int = 1
    steps: int = 0

    @property
    def name(self) -> str:
        """As a table's heading says it."""
        return f"decoding, batch {self.batch}" if self.steps else f"prompt of {self.prompt}, batch {self.batch}"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Of one model and work: seconds of each round (of one decoded token, or of one prompt), and bytes.

    Attributes:
        seconds: One number for each round.
        peak: Most bytes that one call held at once beyond what was there before it.
    """

    seconds: tuple[float, ...]
    peak: int

    @property
    def median(self) -> float:
        """Seconds, the median of all rounds."""
        return statistics.median(self.seconds)

    def over(self, other: Timing) -> float:
        """How many times ``other`` it takes: the median over rounds of the ratio within a round."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


@torch.inference_mode()
def measure(
    subjects: Sequence[Subject],
    works: Sequence[Work],
    *,
    rounds: int,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Mapping[tuple[str, str], Timing]:
    """Time every model at every work, in turn: each round times all of them, beginning with another one.

    The prompt before tokens that are decoded is read by the first model, for all of them; what a model decides on it
    is held while it decodes.

    Args:
        subjects: Causal models of transformers, all of one architecture.
        works: What each of them does.
        rounds: How often; one more comes first and is not counted, and one under the memory profiler.
        progress: Receives (done, total, what).

    Returns:
        A timing for each (model's name, work's name).
    """
    found: dict[tuple[str, str], list[float]] = {}
    peaks: dict[tuple[str, str], int] = {}
    decoded = [work for work in works if work.steps]
    first = subjects[0].model
    filled = {work.name: _filled(first, _ids(first, work)) for work in decoded}
    caches: dict[tuple[str, str], State] = {
        (subject.name, work.name): _taken(filled[work.name], subject, work) for subject in subjects for work in decoded
    }
    total, done = (rounds + 2) * len(subjects) * len(works), 0
    for turn in range(-2, rounds):
        for place in range(len(subjects)):
            subject = subjects[(place + max(turn, 0)) % len(subjects)]
            for work in works:
                key = (subject.name, work.name)
                cache = caches.get(key, _EMPTY)
                if turn == -1:
                    peaks[key] = peak_bytes(subject.model, work, cache)
                else:
                    seconds = timed(subject.model, work, cache)
                    if turn >= 0:
                        found.setdefault(key, []).append(seconds)
                done += 1
                progress(done, total, f"{subject.name}, {work.name}")
    return {key: Timing(seconds=tuple(seconds), peak=peaks[key]) for key, seconds in found.items()}


def timed(model: nn.Module, work: Work, cache: State = _EMPTY) -> float:
    """Seconds of one prompt, or of one decoded token after the prompt in ``cache``, which stays as it is."""
    ids = _ids(model, work)
    if not work.steps:
        return _seconds(lambda: _read(model, ids), ids)
    cache, last = copy.deepcopy(cache), ids[:, -1:]
    mask = torch.ones(work.batch, work.prompt + work.steps, dtype=torch.long, device=ids.device)
    masked = not any(map(is_recurrent, cache.values()))  # a state has folded in what came before

    def decode() -> None:
        for step in range(work.steps):
            seen = {"attention_mask": mask[:, : work.prompt + step + 1]} if masked else {}
            model(input_ids=last, use_cache=True, **cache, **seen)

    return _seconds(decode, ids) / work.steps


def peak_bytes(model: nn.Module, work: Work, cache: State = _EMPTY) -> int:
    """The most bytes that a call as of :func:`timed` holds at once beyond what was there before it."""
    ids = _ids(model, work)

    def begin() -> dict[str, Any]:
        if not work.steps:
            return {"input_ids": ids, "use_cache": True, "logits_to_keep": 1}
        return {"input_ids": ids[:, -1:], "use_cache": True, **copy.deepcopy(cache)}

    if ids.is_cuda:
        call = begin()
        torch.cuda.reset_peak_memory_stats(ids.device)
        before = torch.cuda.memory_allocated(ids.device)
        model(**call)
        return torch.cuda.max_memory_allocated(ids.device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call = begin()  # profiled too: what a call frees is counted only if its making was seen
        with record_function(_CALL):
            model(**call)
    events = profiler.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    began = next(e.start_ns() for e in events if e.name() == _CALL)
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")  # pyright: ignore
    return max(accumulate((size for when, size in changes if when >= began), initial=0))


def _ids(model: nn.Module, work: Work) -> Tensor:
    words = model.config.get_text_config().vocab_size  # pyright: ignore
    chance = torch.Generator().manual_seed(work.prompt * 1000 + work.batch)
    ids = torch.randint(words, (work.batch, work.prompt), generator=chance)
    return ids.to(next(model.parameters()).device)


def _taken(cache: State, subject: Subject, work: Work) -> State:
    """The cache for a subject, with what it decides on the prompt."""
    if subject.routed is None:
        return cache
    own = copy.deepcopy(cache)
    for state in own.values():
        subject.routed.adopt(state, _ids(subject.model, work))
    return own


def _filled(model: nn.Module, ids: Tensor) -> State:
    cache = growing_cache(model)
    given = {} if cache is None else {"past_key_values": cache}
    return dict(states_in(_read(model, ids, **given)))


def _read(model: nn.Module, ids: Tensor, **cache: Any) -> Any:
    return model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache)


def _seconds(run: Callable[[], Any], ids: Tensor) -> float:
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    began = time.perf_counter()
    run()
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    return time.perf_counter() - began
