"""Index a library: what routing among very many experts needs of each, computed once and stored."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from spectr.adapters import BaseLayers, Expert
from spectr.calibration import read_inputs
from spectr.composition.base_checks import check_texts, report_names
from spectr.composition.model_naming import naming_of
from spectr.errors import CompositionError, SpectrError
from spectr.grouping import chunks, grouped
from spectr.layers.base_layers import ModelLayers
from spectr.layers.plan import make_plan
from spectr.library import Calibration, ExpertLibrary
from spectr.library.index import INDEX_FOLDER, IndexedModule, IndexEntry
from spectr.library.needs import CALIBRATED
from spectr.routers import Spectr
from spectr.spectral import Rotation, align, rotate
from spectr.spectral.precision import without_autocast

Progress = Callable[[int, int, str], None]
_TOGETHER = 32  # experts per pass over the inputs, which are larger than the experts
_PROCESSES = 8

Layout = tuple[IndexedModule, ...]


@without_autocast()
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

    Experts with an index are skipped, so that an interrupted run resumes and a new expert costs as much as the first.
    The base model reads the texts once.

    Args:
        model: The base model, not composed.
        library: Calibrated experts.
        folder: The library's folder, where entries are stored; without it they exist only in the returned library.
        fresh: Index all experts again.
        progress: Called with (done, total, expert).

    Returns:
        The library with its index.

    Raises:
        CompositionError: Experts are not calibrated, or they or their tokenizers do not fit the model.
        LibraryError: An entry on disk is damaged.
    """
    named = library.named_for(naming_of(model))
    missing = {name: named[name] for name in check_index(named, fresh=fresh)}
    if not missing:
        return library
    make_plan(model, list(missing.values()), Spectr(top_k=1))
    check_texts(model, missing.values())
    report_names(model, missing.values())
    for expert in missing.values():
        expert.check_factors_alone("an index", CompositionError)
    known = library.calibration
    assert known is not None
    modules = sorted({module for expert in missing.values() for module in expert.shapes})
    inputs: dict[str, Float[Tensor, "T I"]] = {}

    def keep(module: str, x_TI: Any) -> None:  # a tensor, (T, I): an index covers linear layers only
        inputs[module] = x_TI.float() - known.means[module].to(x_TI.device)

    read_inputs(model, [module for module in modules if module not in known.unmeasured], known.said, keep)
    to = None if folder is None else Path(folder)
    base = ModelLayers(model, library.folder)
    work = _Parts(missing, to, lambda part: _entries(part, library, base, inputs, known))
    workers = _workers(work, inputs.values())
    entries: dict[str, IndexEntry | Path] = {}
    for made in DataLoader(
        work, batch_size=None, num_workers=workers, multiprocessing_context="fork" if workers else None
    ):
        if isinstance(made, SpectrError):  # raised here, so that its message has no prefix
            raise made
        for name, entry in made.items():
            entries[name] = entry
            progress(len(entries), len(missing), name)
    return library.with_index(library.index.joined(entries))


def check_index(library: ExpertLibrary, *, fresh: bool = False) -> list[str]:
    """The experts to index: those without an index, or all.

    Raises:
        CompositionError: They are not calibrated.
    """
    missing = [name for name in library if fresh or not library.indexed(name)]
    if missing:
        CALIBRATED.check(library, missing)
    return missing


class _Parts(Dataset[Any]):
    """Entries of consecutive experts; entries for a folder are written where they are computed."""

    def __init__(self, experts: Mapping[str, Expert], folder: Path | None, make: Callable[..., dict[str, IndexEntry]]):
        self.parts = list(map(dict, chunks(list(experts.items()), _TOGETHER)))
        self.folder, self.make = folder, make

    def __len__(self) -> int:
        return len(self.parts)

    @torch.no_grad()
    def __getitem__(self, place: int) -> dict[str, IndexEntry | Path] | SpectrError:
        try:
            made = self.make(self.parts[place])
        except SpectrError as error:
            return error
        if self.folder is None:
            return {**made}
        paths = {name: self.folder / INDEX_FOLDER / f"{name}.safetensors" for name in made}
        for name, entry in made.items():
            entry.save(paths[name])
        return {**paths}


def _workers(work: _Parts, inputs: Iterable[Tensor]) -> int:
    """Number of additional processes; none for few experts. The work has many small steps, which threads run in turn.

    The processes are forked, so that they share the inputs. Only inputs on a CPU can be shared.
    """
    forks = sys.platform == "linux" and all(x.device.type == "cpu" for x in inputs)
    if not forks or work.folder is None or len(work) < 2:
        return 0
    return min(len(work), len(os.sched_getaffinity(0)), _PROCESSES)


class _Aligned(NamedTuple):
    """Modules of one shape of one expert."""

    turned: Rotation
    holds_N: Bool[Tensor, " N"]  # for which of these modules the vectors exist
    first_NI: Float[Tensor, "N I"]  # the first row of V^T of each


class _Measured(NamedTuple):
    """Modules of one shape, of experts that adapt the same modules."""

    full_ENI: Float[Tensor, "E N I"]
    codes_ENI: Int8[Tensor, "E N I"]
    steps_EN: Float[Tensor, "E N"]
    error_EN: Float[Tensor, "E N"]
    rms_EN: Float[Tensor, "E N"]


def _entries(
    experts: Mapping[str, Expert],
    library: ExpertLibrary,
    base: BaseLayers,
    inputs: Mapping[str, Float[Tensor, "T I"]],
    known: Calibration,
) -> dict[str, IndexEntry]:
    """Entries of some experts; experts with equal modules and sizes are measured together."""
    entries = {}
    for layout, together in grouped((_layout(expert), expert) for expert in experts.values()).items():
        alike = _alike(layout)
        aligned = [[_aligned(*factors) for factors in expert.stacked(alike, base)] for expert in together]
        groups = [_measured(*group, inputs) for group in zip(alike, zip(*aligned, strict=True), strict=True)]
        place = {module: i for i, module in enumerate(chain.from_iterable(alike))}
        order = [place[module.name] for module in layout]
        full_EC = _in_order([group.full_ENI for group in groups], order)
        codes_EC = _in_order([group.codes_ENI for group in groups], order)
        numbers = (torch.cat(parts, dim=1)[:, order] for parts in zip(*(group[2:] for group in groups), strict=True))
        for e, (expert, *row) in enumerate(zip(together, full_EC, codes_EC, *numbers, strict=True)):
            full_C, codes_C, steps_M, error_M, rms_M = (values.clone() for values in row)
            entries[expert.name] = IndexEntry(
                modules=layout,
                sha256=library.sha256(expert.name),
                calibration=known.said.digest,
                codes_C=codes_C,
                steps_M=steps_M,
                error_M=error_M,
                rms_M=rms_M,
                rotations=partial(_rotations, alike, [(one.turned, one.holds_N) for one in aligned[e]]),
                full_C=full_C,
            )
    return entries


def _layout(expert: Expert) -> Layout:
    shapes = sorted(expert.shapes.items())
    return tuple(IndexedModule(module, *shape[:3], len(shape.parts.tensors)) for module, shape in shapes)


def _in_order(groups: Sequence[Tensor], order: Sequence[int]) -> Tensor:
    """Each expert's rows of all modules, in the modules' order."""
    columns = [rows_EI for rows_ENI in groups for rows_EI in rows_ENI.unbind(1)]
    return torch.cat([columns[i] for i in order], dim=1)


def _alike(layout: Layout) -> list[list[str]]:
    """Names of modules, grouped by size."""
    return list(grouped((tuple(sizes), name) for name, *sizes in layout).values())


def _aligned(A: Float[Tensor, "N R I"], B: Float[Tensor, "N O R"], scale_N: Float[Tensor, " N"]) -> _Aligned:
    A_NRI, B_NOR = A.float(), B.float()
    turned, holds_N = rotate(A_NRI, B_NOR, scale_N)
    first_NI = (turned.right[:, :1] @ A_NRI).squeeze(1)
    for i in (~holds_N).nonzero()[:, 0].tolist():
        first_NI[i] = align(A_NRI[i], B_NOR[i], scale_N[i]).Vh[0]
    return _Aligned(turned, holds_N, first_NI)


def _measured(modules: list[str], aligned: Sequence[_Aligned], inputs: Mapping[str, Float[Tensor, "T I"]]) -> _Measured:
    first_ENI = torch.stack([one.first_NI for one in aligned])
    step_EN = (first_ENI.abs().amax(-1) / 127).clamp(min=1e-30)
    code_ENI = (first_ENI / step_EN[..., None]).round()
    rms_NE = [
        torch.zeros(len(v_EI))  # no text reaches the module: it is not scored
        if m not in inputs
        else torch.linalg.vector_norm(inputs[m] @ v_EI.to(inputs[m].device).mT, dim=0).cpu() / len(inputs[m]) ** 0.5
        for m, v_EI in zip(modules, first_ENI.unbind(1), strict=True)
    ]
    return _Measured(
        full_ENI=first_ENI,
        codes_ENI=code_ENI.to(torch.int8),
        steps_EN=step_EN,
        error_EN=torch.linalg.vector_norm(first_ENI - step_EN[..., None] * code_ENI, dim=-1),
        rms_EN=torch.stack(rms_NE, dim=1),
    )


def _rotations(
    alike: Sequence[Sequence[str]], found: Sequence[tuple[Rotation, Bool[Tensor, " N"]]]
) -> dict[str, Rotation]:
    """Rotations by module, for modules that one rotation can align."""
    rotations = {}
    for modules, (turned, holds_N) in zip(alike, found, strict=True):
        rows = zip(modules, holds_N.tolist(), *turned, strict=True)
        rotations |= {module: Rotation(*parts) for module, holds, *parts in rows if holds}
    return rotations
