"""Indexing a library: what routing among very many experts needs of each, made once and kept beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.adapters import Expert, Factors
from spectr.calibration import read_inputs
from spectr.composition import needed_calibration
from spectr.layers.plan import make_plan
from spectr.library import Calibration, ExpertLibrary
from spectr.library.index import INDEX_FOLDER, IndexedModule, IndexEntry
from spectr.routers import Spectr
from spectr.spectral import Rotation, align, rotate

Progress = Callable[[int, int, str], None]
_TOGETHER = 8  # experts that read the inputs at once, which are larger than they are
_THREADS = 2  # one reads and writes while the other computes


@torch.no_grad()
def build_index(
    model: Any,
    library: ExpertLibrary,
    folder: str | Path | None = None,
    *,
    fresh: bool = False,
    progress: Progress = lambda *_: None,
) -> ExpertLibrary:
    """Align each expert once and measure its prototypes on the calibration's texts, for :class:`spectr.Shortlist`.

    Experts that are indexed already are left alone, so that a killed run goes on, and an expert more costs as much as
    the first. The base model reads the texts once.

    Args:
        model: The base model, not composed.
        library: Calibrated experts.
        folder: The library's folder, where entries are kept; without it they are only in the library returned.
        fresh: Index all experts anew.
        progress: Is told (done, total, expert).

    Returns:
        The library with its index.

    Raises:
        CompositionError: Experts are not calibrated, or do not fit the model.
        LibraryError: An entry on disk is damaged.
    """
    missing = [name for name in library if fresh or not library.indexed(name)]
    if not missing:
        return library
    experts = {name: library[name] for name in missing}
    make_plan(model, list(experts.values()), Spectr(top_k=1))
    known = needed_calibration(library, list(experts.values()))
    modules = sorted({module for expert in experts.values() for module in expert.shapes})
    inputs: dict[str, Float[Tensor, "T I"]] = {}

    def keep(module: str, x_TI: Float[Tensor, "T I"]) -> None:
        inputs[module] = x_TI.float() - known.means[module].to(x_TI.device)

    read_inputs(model, modules, known, keep)
    entries: dict[str, IndexEntry] = {}

    def make(names: Sequence[str]) -> dict[str, IndexEntry]:
        made = _entries({name: experts[name] for name in names}, library, inputs, known)
        if folder is not None:
            for name, entry in made.items():
                entry.save(Path(folder) / INDEX_FOLDER / f"{name}.safetensors")
        return made

    parts = [missing[start : start + _TOGETHER] for start in range(0, len(missing), _TOGETHER)]
    with ThreadPoolExecutor(_THREADS) as pool:
        for made in pool.map(make, parts):
            for name, entry in made.items():
                entries[name] = entry
                progress(len(entries), len(missing), name)
    return library.with_index(library.index.joined(entries))


def _entries(
    experts: Mapping[str, Expert],
    library: ExpertLibrary,
    inputs: Mapping[str, Float[Tensor, "T I"]],
    known: Calibration,
) -> dict[str, IndexEntry]:
    """Entries of some experts, which read the texts' inputs together."""
    aligned = {name: _aligned(_read(expert)) for name, expert in experts.items()}
    rms: dict[str, dict[str, float]] = {name: {} for name in experts}
    for module in sorted({module for _, prototypes in aligned.values() for module in prototypes}):
        owners = [name for name, (_, prototypes) in aligned.items() if module in prototypes]
        v_EI = torch.stack([aligned[name][1][module] for name in owners]).to(inputs[module].device)
        values_E = (inputs[module] @ v_EI.mT).square().mean(0).sqrt()
        for name, value in zip(owners, values_E.tolist(), strict=True):
            rms[name][module] = value
    return {
        name: _entry(expert, *aligned[name], rms[name], library.sha256(name), known.digest)
        for name, expert in experts.items()
    }


def _entry(
    expert: Expert,
    rotations: Mapping[str, Rotation],
    prototypes: Mapping[str, Float[Tensor, " I"]],
    rms: Mapping[str, float],
    sha256: str,
    calibration: str,
) -> IndexEntry:
    codes, steps, errors = {}, {}, {}
    alike: dict[int, list[str]] = {}
    for module, v_I in prototypes.items():
        alike.setdefault(len(v_I), []).append(module)
    for modules in alike.values():
        v_MI = torch.stack([prototypes[module] for module in modules])
        step_M1 = (v_MI.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
        code_MI = (v_MI / step_M1).round()
        codes |= zip(modules, code_MI.to(torch.int8), strict=True)
        steps |= zip(modules, step_M1[:, 0].tolist(), strict=True)
        errors |= zip(modules, (v_MI - step_M1 * code_MI).norm(dim=1).tolist(), strict=True)
    shapes = expert.shapes
    return IndexEntry(
        modules=tuple(IndexedModule(m, shapes[m].rank, shapes[m].inputs, shapes[m].outputs) for m in prototypes),
        sha256=sha256,
        calibration=calibration,
        codes_C=torch.cat([codes[module] for module in prototypes]),
        steps_M=torch.tensor([steps[module] for module in prototypes]),
        error_M=torch.tensor([errors[module] for module in prototypes]),
        rms_M=torch.tensor([rms[module] for module in prototypes]),
        rotations=lambda: rotations,
    )


def _read(expert: Expert) -> dict[str, Factors]:
    with expert.open() as read:
        return {module: read(module) for module in sorted(expert.shapes)}


def _aligned(factors: Mapping[str, Factors]) -> tuple[dict[str, Rotation], dict[str, Float[Tensor, " I"]]]:
    """Rotations, where there are any, and the first row of ``V^T`` of every module; modules of one shape at once."""
    alike: dict[tuple[int, ...], list[str]] = {}
    for module, pair in factors.items():
        alike.setdefault((*pair.A.shape, len(pair.B)), []).append(module)
    rotations, prototypes = {}, {}
    for modules in alike.values():
        A_NRI = torch.stack([factors[m].A for m in modules]).float()
        B_NOR = torch.stack([factors[m].B for m in modules]).float()
        scale_N = torch.tensor([factors[m].scale for m in modules])
        turned, holds_N = rotate(A_NRI, B_NOR, scale_N)
        first_NI = (turned.right[:, :1] @ A_NRI).squeeze(1)
        for i, module in enumerate(modules):
            if holds_N[i]:
                rotations[module] = Rotation(*(part[i].clone() for part in turned))
                prototypes[module] = first_NI[i]
            else:
                prototypes[module] = align(A_NRI[i], B_NOR[i], scale_N[i]).Vh[0]
    return rotations, dict(sorted(prototypes.items()))
