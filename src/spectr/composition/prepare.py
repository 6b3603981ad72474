"""From adapters to the shares of a module's stack, and what a library has to bring for that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from spectr.adapters import Expert, Factors, has_gates, read_gates
from spectr.combine import get_combination
from spectr.errors import CompositionError
from spectr.library import Calibration, ExpertLibrary
from spectr.routers.base import Router
from spectr.routers.settings import combination_of
from spectr.routers.shortlist import Shortlist
from spectr.spectral import Aligned, Prepared, Rotation, align
from spectr.spectral.sparsify import drop

Gates = Mapping[str, Mapping[str, Tensor]]


@torch.no_grad()
def prepare_module(
    readers: Mapping[str, Callable[[str], Factors]],
    module: str,
    router: Router,
    calibration: Calibration | None = None,
    gates: Gates | None = None,
) -> dict[str, Prepared]:
    """Align the experts of one module, those of one rank in one batch, and let the router prepare each."""
    factors = {name: read(module) for name, read in readers.items()}
    groups: dict[int, list[str]] = {}
    for name, pair in factors.items():
        groups.setdefault(pair.A.shape[0], []).append(name)
    prepared = {}
    for names in groups.values():
        A_NRI = torch.stack([factors[name].A.float() for name in names])
        B_NOR = torch.stack([factors[name].B.float() for name in names])
        scale_N = torch.tensor([factors[name].scale for name in names])
        aligned = align(A_NRI, B_NOR, scale_N)
        for i, name in enumerate(names):
            one = Aligned(*(t[i] for t in aligned))
            prepared[name] = _prepared(one, factors[name], name, module, router, calibration, gates)
    return prepared


@torch.no_grad()
def prepare_expert(
    expert: Expert,
    rotations: Mapping[str, Rotation],
    router: Router,
    calibration: Calibration | None = None,
    gates: Gates | None = None,
) -> dict[str, Prepared]:
    """All modules of one expert, aligned by the rotations that are known; the shares of :func:`prepare_module`."""
    prepared = {}
    with expert.open() as read:
        for module in expert.shapes:
            pair = read(module)
            known = rotations.get(module)
            one = align(*pair) if known is None else known.applied(*pair)
            prepared[module] = _prepared(one, pair, expert.name, module, router, calibration, gates)
    return prepared


def _prepared(
    aligned: Aligned,
    pair: Factors,
    name: str,
    module: str,
    router: Router,
    calibration: Calibration | None,
    gates: Gates | None,
) -> Prepared:
    part = router.prepare(aligned)
    if getattr(router, "shares_A", False):
        part = part.rooted(pair.A.float(), pair.B.float() * pair.scale)
    density = get_combination(combination_of(router)).density
    if density < 1:
        part = part._replace(B=drop(part.B, density, seed=0, expert=name, module=module))
    if calibration is not None:
        part = part.calibrated(*calibration.of(name, module))
    if gates is not None:
        part = part.gated(gates[name][module])
    return part


def needed_calibration(library: ExpertLibrary, experts: Sequence[Expert]) -> Calibration:
    """The library's calibration, which has to cover these experts.

    Raises:
        CompositionError: Some were not calibrated.
        LibraryError: Some have other weights by now than the library says.
    """
    calibration = library.calibration
    with ThreadPoolExecutor() as pool:  # files are hashed in it
        covered = pool.map(lambda expert: calibration is not None and calibration.covers(expert), experts)
    missing = [expert for expert, known in zip(experts, covered, strict=True) if not known]
    for expert in missing:
        library.check_weights(expert)
    if missing or calibration is None:
        raise CompositionError(
            f"not calibrated: {', '.join(expert.name for expert in missing)}",
            expected="experts whose answers to the base model's own texts are known",
            do=f"spectr library calibrate --library {library.origin}, or "
            "library.with_calibration(spectr.calibrate(model, library, tokenizer))",
        )
    return calibration


def needed_descriptions(library: ExpertLibrary) -> None:
    """Raise :class:`CompositionError` unless every expert of the library is described in words."""
    missing = [name for name in library if name not in library.descriptions]
    if missing:
        raise CompositionError(
            f"not described: {', '.join(missing)}",
            expected="a sentence for each expert that says what it is for, as GLIDER compares prompts with these",
            do=f"spectr library describe --library {library.origin}, or library.with_descriptions({{...}})",
        )


def needed_gates(library: ExpertLibrary, experts: Sequence[Expert]) -> Gates:
    """The trained gates of these experts, by expert and module, float32.

    Raises:
        CompositionError: Some have none.
        AdapterError: A file of gates is damaged.
    """
    missing = [expert.name for expert in experts if not has_gates(expert)]
    if missing:
        raise CompositionError(
            f"no gates were trained for: {', '.join(missing)}",
            expected="experts with gates of their own, as PHATGOOSE routes by them",
            do=f"spectr train gates --library {library.origin} --data-root DATA; the routers glider-spectr and "
            "glider-global need none",
        )
    return {expert.name: read_gates(expert) for expert in experts}


def needed_index(library: ExpertLibrary, names: Sequence[str], *, in_full: bool = False) -> None:
    """Raise :class:`CompositionError` unless these experts are in the library's index, as they are.

    Args:
        library: Experts.
        names: Some of them.
        in_full: Whether their prototypes have to be there in full.
    """
    if library.calibration is None:
        raise CompositionError(
            "the library is not calibrated",
            expected="a calibrated and indexed library, as the router shortlist decides by its figures",
            do=f"spectr library calibrate --library {library.origin}, then spectr library index with the same",
        )
    missing = [name for name in names if not library.indexed(name)]
    if missing:
        first = f"spectr library calibrate --library {library.origin}, then "
        first = "" if all(map(library.calibrated, missing)) else first
        raise CompositionError(
            f"not indexed: {_some(missing)}",
            expected="experts whose prototypes and alignment are stored, as the router shortlist needs them",
            do=f"{first}spectr library index --library {library.origin}, or spectr.build_index(model, library)",
        )
    old = [name for name in names if library.index[name].full_C is None] if in_full else []
    if old:
        raise CompositionError(
            f"indexed by an older version, in 8 bits alone: {_some(old)}",
            expected="prototypes in full, for shortlists that are certain",
            do=f"spectr library index --library {library.origin} --fresh, or 8 bits",
        )


def heard_modules(library: ExpertLibrary, names: Sequence[str], router: Shortlist) -> set[str]:
    """The modules that may take part in the decision for a shortlist of indexed experts.

    Raises:
        CompositionError: An expert adapts none of those that the router names.
    """
    layouts = {some: [module.name for module in modules] for modules, some in library.index.alike(names).items()}
    ends = tuple(f".{part}" for part in router.heard)
    heard = {module for modules in layouts.values() for module in modules if not ends or f".{module}".endswith(ends)}
    silent = [name for some, modules in layouts.items() if heard.isdisjoint(modules) for name in some]
    if silent:
        parts = sorted({module.rpartition(".")[2] for modules in layouts.values() for module in modules})
        raise CompositionError(
            f"heard={router.heard}, and of modules named so none is adapted by {_some(sorted(silent))}",
            expected=f"of {', '.join(parts)} such that each expert adapts one",
        )
    return heard


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
