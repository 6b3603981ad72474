"""Indexing a library: what routing among very many experts needs of each, made once and kept beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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

    def make(name: str) -> tuple[str, IndexEntry]:
        entry = _entry(experts[name], library.sha256(name), inputs, known)
        if folder is not None:
            entry.save(Path(folder) / INDEX_FOLDER / f"{name}.safetensors")
        return name, entry

    with ThreadPoolExecutor(_THREADS) as pool:
        for done, (name, entry) in enumerate(pool.map(make, missing), start=1):
            entries[name] = entry
            progress(done, len(missing), name)
    return library.with_index(library.index.joined(entries))


def _entry(expert: Expert, sha256: str, inputs: Mapping[str, Float[Tensor, "T I"]], known: Calibration) -> IndexEntry:
    factors = _read(expert)
    rotations, prototypes = _aligned(factors)
    codes, steps, errors, rms = [], [], [], []
    for module, v_I in prototypes.items():
        step = max(float(v_I.abs().max()) / 127, 1e-30)
        code_I = (v_I / step).round().to(torch.int8)
        codes.append(code_I)
        steps.append(step)
        errors.append(float((v_I - step * code_I).norm()))
        rms.append(float((inputs[module] @ v_I.to(inputs[module].device)).square().mean().sqrt()))
    shapes = expert.shapes
    return IndexEntry(
        modules=tuple(IndexedModule(m, shapes[m].rank, shapes[m].inputs, shapes[m].outputs) for m in prototypes),
        sha256=sha256,
        calibration=known.digest,
        codes_C=torch.cat(codes),
        steps_M=torch.tensor(steps),
        error_M=torch.tensor(errors),
        rms_M=torch.tensor(rms),
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
