"""The models to compare, which share the base model's weights, and experts that resemble real ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from spectr.adapters.write import common_settings, write_adapter
from spectr.composition import Routed, compose
from spectr.composition.multi_router import weight_sharing_copy
from spectr.errors import CompositionError, LibraryError, MissingExtraError, did_you_mean
from spectr.library import ExpertLibrary
from spectr.ops import without_kernels
from spectr.routers import Router
from spectr.routers.abstention import always_choosing
from spectr.spectral import align

BASE, OURS, BY_TORCH = "base model", "spectr", "spectr without kernels"


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """One model to measure.

    Attributes:
        name: Its name in the table.
        model: A causal model from transformers.
        routed: The handle, if the model is composed.
    """

    name: str
    model: nn.Module
    routed: Routed | None = None


def ours(model: nn.Module, library: ExpertLibrary, router: Router) -> Subject:
    """The base model composed with the library."""
    routed = compose(weight_sharing_copy(model), library, always_choosing(router))
    return Subject(name=OURS, model=routed.model, routed=routed)


def by_torch(model: nn.Module, library: ExpertLibrary, router: Router) -> Subject:
    """The same, computed by torch alone."""
    with without_kernels():
        return replace(ours(model, library, router), name=BY_TORCH)


def peft_single(model: nn.Module, library: ExpertLibrary, top_k: int) -> Subject:
    """PEFT with the library's first adapter."""
    peft = _peft()
    folder = library[library.names[0]].weights.parent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a user can do nothing about PEFT's warnings here
        return Subject(
            name="peft, one adapter",
            model=peft.PeftModel.from_pretrained(weight_sharing_copy(model), str(folder)).eval(),
        )


def peft_arrow(model: nn.Module, library: ExpertLibrary, top_k: int) -> Subject:
    """PEFT's Arrow with all experts.

    Raises:
        CompositionError: The experts differ in rank or modules, which PEFT's Arrow does not support.
    """
    check_peers(["peft-arrow"], library)
    peft = _peft()
    folders = [str(library[name].weights.parent) for name in library]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arrow = peft.create_arrow_model(weight_sharing_copy(model), folders, arrow_config=peft.ArrowConfig(top_k=top_k))  # pyright: ignore
    return Subject(name="peft, Arrow", model=arrow.eval())


PEERS: Mapping[str, Callable[[nn.Module, ExpertLibrary, int], Subject]] = {
    "peft-single": peft_single,
    "peft-arrow": peft_arrow,
}


def get_peer(name: str) -> Callable[[nn.Module, ExpertLibrary, int], Subject]:
    """Get a peer by name.

    Raises:
        CompositionError: The name is unknown.
    """
    if name not in PEERS:
        raise CompositionError(f"unknown peer '{name}'", do=did_you_mean(name, PEERS))
    return PEERS[name]


def check_peers(names: Sequence[str], library: ExpertLibrary) -> None:
    """Check that peers are known, and can hold these experts.

    Raises:
        CompositionError: A name is unknown, or PEFT's Arrow is named and the experts differ in rank or modules.
    """
    for name in names:
        get_peer(name)
    if "peft-arrow" in names and not alike(library):
        raise CompositionError(
            "PEFT's Arrow cannot hold these experts: they differ in rank or modules",
            expected="experts that adapt the same modules with the same ranks",
            do="compare with a single adapter: --against peft-single",
        )


def alike(library: ExpertLibrary) -> bool:
    """Whether all experts have the same modules with the same ranks."""
    first, *others = ({module: shape.rank for module, shape in library[name].shapes.items()} for name in library)
    return all(other == first for other in others)


def _peft():
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError("a comparison with PEFT", "train") from error
    return peft


_SPREAD = 0.2  # standard deviation of the logarithm of an expert's size


@torch.no_grad()
def write_lookalikes(
    library: ExpertLibrary,
    folder: Path,
    count: int,
    *,
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
                chance = torch.Generator().manual_seed(number)
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
