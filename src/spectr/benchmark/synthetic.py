"""Experts that resemble real ones in spectrum and size, to measure with larger libraries."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from spectr.adapters.write import common_settings, write_adapter
from spectr.errors import LibraryError
from spectr.library import ExpertLibrary
from spectr.spectral import align

_SPREAD = 0.2  # standard deviation of the logarithm of an expert's size


@torch.no_grad()
def write_lookalikes(
    library: ExpertLibrary,
    folder: Path,
    count: int,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> ExpertLibrary:
    """Make a library of a given size: the real experts, and synthetic ones named ``synthetic-00001`` and so on.

    A synthetic expert has the singular values of one of the real ones, chosen at random, times ``exp(0.2 n)`` with one
    standard normal ``n`` for all of its modules, and random orthonormal directions. Real experts
    are not copied.

    Args:
        library: At least one real expert.
        folder: Receives the synthetic experts as PEFT folders. Existing ones are kept, so that a run that was stopped
            can continue.
        count: Total number of experts, at least the number of real ones.
        seed: Seed of the random numbers, which differ for each expert.
        progress: Receives (done, total) synthetic experts.

    Raises:
        LibraryError: ``count`` is less than the number of real experts, or a synthetic expert's name is taken.
    """
    check_count(library, count)
    missing = count - len(library)
    sources = {name: library[name].weights.parent for name in library}
    settings = common_settings(library[name] for name in library)
    with ExitStack() as files:
        readers = {name: files.enter_context(library[name].open()) for name in library}
        for number in range(1, missing + 1):
            target = folder / _name(number)
            sources[target.name] = target
            if not (target / "adapter_config.json").is_file():
                chance = torch.Generator().manual_seed(seed * 1_000_003 + number)
                model = library.names[int(torch.randint(len(library), (), generator=chance))]
                size = float(torch.exp(_SPREAD * torch.randn((), generator=chance, dtype=torch.float32)))
                factors = {module: _lookalike(readers[model](module), size, chance) for module in library[model].shapes}
                target.mkdir(parents=True, exist_ok=True)
                write_adapter(target, factors, settings)
            progress(number, missing)
    return ExpertLibrary.from_adapters(sources)


def check_count(library: ExpertLibrary, count: int) -> None:
    """Raise :class:`LibraryError` where a library cannot grow to this number of experts."""
    if count < len(library):
        raise LibraryError(
            f"{count} experts, but the library alone has {len(library)}", do=f"use at least {len(library)}"
        )
    for name in map(_name, range(1, count - len(library) + 1)):
        if name in library:
            raise LibraryError(f"the library has an expert '{name}'", do="rename it")


def _name(number: int) -> str:
    return f"synthetic-{number:05}"


def _lookalike(pair: tuple[Tensor, Tensor, float], size: float, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    A, B, scale = pair
    values = align(A.float(), B.float(), scale).S * size
    U, _ = torch.linalg.qr(torch.randn(len(B), len(values), generator=chance, dtype=torch.float32))
    V, _ = torch.linalg.qr(torch.randn(A.shape[1], len(values), generator=chance, dtype=torch.float32))
    return (U * values.sqrt()).to(B.dtype), (values.sqrt()[:, None] * V.mT).to(A.dtype)
