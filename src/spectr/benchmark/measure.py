"""Times of models, measured in turn, and the peak memory of a call."""

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
from spectr.layers.linear_layers import input_device
from spectr.models.cache import growing_cache
from spectr.prompts.cache_records import is_recurrent, states_in

State = Mapping[str, Any]  # a model's state after a prompt, by the name of the argument that takes it

_EMPTY: State = {}
_CALL = "the call that is measured"


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work to time.

    Attributes:
        prompt: Length of the prompt in tokens.
        batch: Batch size.
        steps: Number of tokens to decode after it, one by one. With 0, the prompt itself is timed.
    """

    prompt: int
    batch: int = 1
    steps: int = 0

    @property
    def name(self) -> str:
        """The name in a table's heading."""
        return f"decoding, batch {self.batch}" if self.steps else f"prompt of {self.prompt}, batch {self.batch}"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Times and memory for one model and work. Times are for one decoded token or one prompt.

    Attributes:
        seconds: The time in each round.
        peak: Peak memory of one call in bytes, beyond what was there before.
    """

    seconds: tuple[float, ...]
    peak: int

    @property
    def median(self) -> float:
        """The median of all rounds, in seconds."""
        return statistics.median(self.seconds)

    def over(self, other: Timing) -> float:
        """The time relative to ``other``: the median over rounds of the ratio within a round."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


@torch.inference_mode()
def measure(
    subjects: Sequence[Subject],
    works: Sequence[Work],
    *,
    rounds: int,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Mapping[tuple[str, str], Timing]:
    """Time every model with every work, in turn. Each round times all models and starts with another one.

    Before decoding, the first model reads the prompt for all of them. What a model decides on the prompt holds while
    it decodes.

    Args:
        subjects: Causal models from transformers with one architecture.
        works: The work that each of them does.
        rounds: Number of rounds. Two more are not counted: a first one, and one with the memory profiler.
        progress: Receives (done, total, what).

    Returns:
        A timing for each pair of model name and work name.
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
    for number in range(-2, rounds):
        for place in range(len(subjects)):
            subject = subjects[(place + max(number, 0)) % len(subjects)]
            for work in works:
                key = (subject.name, work.name)
                cache = caches.get(key, _EMPTY)
                if number == -1:
                    peaks[key] = peak_bytes(subject.model, work, cache)
                else:
                    seconds = timed(subject.model, work, cache)
                    if number >= 0:
                        found.setdefault(key, []).append(seconds)
                done += 1
                progress(done, total, f"{subject.name}, {work.name}")
    return {key: Timing(seconds=tuple(seconds), peak=peaks[key]) for key, seconds in found.items()}


def timed(model: nn.Module, work: Work, cache: State = _EMPTY) -> float:
    """Seconds for one prompt, or for one decoded token after the prompt in ``cache``. The cache is unchanged."""
    ids = _ids(model, work)
    if not work.steps:
        return _seconds(lambda: _read(model, ids), ids)
    cache, last = copy.deepcopy(cache), ids[:, -1:]
    mask = torch.ones(work.batch, work.prompt + work.steps, dtype=torch.long, device=ids.device)
    masked = not any(map(is_recurrent, cache.values()))  # a recurrent state contains all earlier tokens

    def decode() -> None:
        for step in range(work.steps):
            seen = {"attention_mask": mask[:, : work.prompt + step + 1]} if masked else {}
            model(input_ids=last, use_cache=True, **cache, **seen)

    return _seconds(decode, ids) / work.steps


def peak_bytes(model: nn.Module, work: Work, cache: State = _EMPTY) -> int:
    """Peak memory in bytes of a call as in :func:`timed`, beyond what was there before."""
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
        call = begin()  # profiled too: freed memory counts only if its allocation was seen
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
    return ids.to(input_device(model))


def _taken(cache: State, subject: Subject, work: Work) -> State:
    """The cache for a subject, with its decisions on the prompt."""
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
