"""From adapters to the shares of a module's stack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

import torch
from torch import Tensor

from spectr.adapters import BaseLayers, Expert, Factors, Update, read_gates
from spectr.errors import CompositionError
from spectr.grouping import grouped
from spectr.library import Calibration, ExpertLibrary
from spectr.library.needs import CALIBRATED, GATED, NORMED, some_of
from spectr.ops import report_once
from spectr.routers import PromptPolicy
from spectr.routers.evidence import ModuleEvidence
from spectr.routers.router import Router
from spectr.spectral import Aligned, AlignedExpert, Rotation, Share, SideData, Stack, align, remade
from spectr.spectral.precision import without_autocast
from spectr.spectral.sparsify import drop

_SHOWN = 3


@dataclass(frozen=True)
class SideTable:
    """What a router needs to know about experts at modules.

    Attributes:
        calibration: Calibration of the experts.
        gates: Gates by expert and module, float32.
    """

    calibration: Calibration | None = None
    gates: Mapping[str, Mapping[str, Tensor]] | None = None

    def of(self, expert: str, module: str) -> SideData:
        """The data of one expert at one module."""
        mean_I, rms, norm = (None,) * 3 if self.calibration is None else self.calibration.of(expert, module)
        return SideData(mean_I, rms, None if self.gates is None else self.gates[expert][module], norm)


NO_SIDE_DATA = SideTable()


def side_data(router: Router, library: ExpertLibrary, names: Sequence[str]) -> SideTable:
    """The data that a router needs of these experts; :func:`spectr.routers.router.check_needs` checked that it exists.

    Raises:
        AdapterError: A gates file is damaged.
    """
    gated = GATED in router.needs
    return SideTable(
        library.calibration if CALIBRATED in router.needs or NORMED in router.needs else None,
        {name: read_gates(library[name]) for name in names} if gated else None,
    )


@torch.no_grad()
def prepare_module(
    readers: Mapping[str, Callable[[str], Update]], module: str, router: Router, side: SideTable = NO_SIDE_DATA
) -> dict[str, Share]:
    """Align the experts of one module, in one batch per rank, and let the router prepare each.

    Args:
        readers: Readers by expert, from :meth:`spectr.adapters.Expert.open_on`.
        module: The module's name.
        router: Prepares the experts.
        side: The library's data about them.
    """
    updates = {name: read(module) for name, read in readers.items()}
    factors = {name: update.factors for name, update in updates.items()}
    if any(pair.A.ndim > 2 for pair in factors.values()):
        return {name: _fused_share(pair, name, module, router, side) for name, pair in factors.items()}
    prepared = {}
    for names in grouped((len(pair.A), name) for name, pair in factors.items()).values():
        A_NRI = torch.stack([factors[name].A.float() for name in names])
        B_NOR = torch.stack([factors[name].B.float() for name in names])
        scale_N = torch.tensor([factors[name].scale for name in names], dtype=torch.float32)
        aligned = align(A_NRI, B_NOR, scale_N)
        for i, name in enumerate(names):
            one = Aligned(*(t[i] for t in aligned))
            prepared[name] = _share(one, updates[name], name, module, router, side)
    return prepared


@without_autocast()
@torch.no_grad()
def prepare_expert(
    expert: Expert,
    base: BaseLayers,
    rotations: Mapping[str, Rotation],
    router: Router,
    side: SideTable = NO_SIDE_DATA,
) -> dict[str, Share]:
    """All modules of one expert, aligned by known rotations; the shares of :func:`prepare_module`."""
    prepared = {}
    with expert.open_on(base) as read:
        for module in expert.shapes:
            update = read(module)
            known = rotations.get(module)
            one = align(*update.factors) if known is None else known.applied(*update.factors)
            prepared[module] = _share(one, update, expert.name, module, router, side)
    return prepared


def _fused_share(pair: Factors, name: str, module: str, router: Router, side: SideTable) -> Share:
    """The share of an expert at a fused parameter: its matrices' shares, in order."""
    aligned = align(pair.A, pair.B, pair.scale)
    shares = [
        _share(Aligned(*each), Update(Factors(A, B, pair.scale)), name, module, router, side)
        for *each, A, B in zip(*aligned, pair.A, pair.B, strict=True)
    ]
    own = remade(shares[0].own, map(torch.stack, zip(*(share.own for share in shares), strict=True)))
    return Share(torch.stack([share.A for share in shares]), torch.stack([share.B for share in shares]), own)


def stacked(router: Router, shares: Mapping[str, Share]) -> Stack:
    """A router's stack of experts; for a fused parameter, the matrices' stacks, in order."""
    if not any(share.A.ndim > 2 for share in shares.values()):
        return router.stack(shares).with_outputs_of(shares)
    matrices = len(next(iter(shares.values())).A)
    stacks = [router.stack({n: share.mapped(itemgetter(j)) for n, share in shares.items()}) for j in range(matrices)]
    own = remade(stacks[0].own, map(torch.stack, zip(*(stack.own for stack in stacks), strict=True)))
    A_JPI, B_JOP = (torch.stack([getattr(stack, side) for stack in stacks]) for side in ("A_PI", "B_OP"))
    return replace(stacks[0], A_PI=A_JPI, B_OP=B_JOP, own=own)


def _share(aligned: Aligned, update: Update, name: str, module: str, router: Router, side: SideTable) -> Share:
    A, B, scale = update.factors
    expert, combination = AlignedExpert(aligned, A.float(), B.float() * scale), router.combination
    share = router.init_expert(expert, side.of(name, module))
    share = share._replace(gain_O=update.gain_O, shift_O=update.shift_O)
    if combination.raw:
        share = share._replace(raw_A=expert.A_RI, raw_B=expert.B_OR)
    density = combination.density
    return share if density == 1 else share._replace(B=drop(share.B, density, seed=0, expert=name, module=module))


def report_unmeasured(policy: PromptPolicy | None, library: ExpertLibrary, users: Mapping[str, Sequence[str]]) -> None:
    """Report experts without evidence, as no text of the calibration reaches what they adapt.

    Args:
        policy: Decides on prompts, if anything does.
        library: The experts.
        users: By routed module the names of its experts.
    """
    if policy is None or policy.evidence.reads == "words" or library.calibration is None:
        return
    unmeasured = library.calibration.unmeasured
    measured = {name for module, names in users.items() if module not in unmeasured for name in names}
    for name in sorted({name for names in users.values() for name in names} - measured):
        modules = [module for module, names in users.items() if name in names]
        report_once(
            f"expert '{name}' adapts only modules that no text of the calibration reaches "
            f"({some_of(modules, _SHOWN)}), so that prompts never choose it: choose it yourself, by prompt.using or by "
            "the router Oracle"
        )


def evidence_modules(library: ExpertLibrary, names: Sequence[str], evidence: ModuleEvidence) -> set[str]:
    """The modules that may be used in decisions about indexed experts.

    Raises:
        CompositionError: An expert adapts none of the modules that the evidence names.
    """
    layouts = {some: [module.name for module in modules] for modules, some in library.index.alike(names).items()}
    ends = tuple(f".{part}" for part in evidence.modules)
    unmeasured = frozenset() if library.calibration is None else library.calibration.unmeasured
    named = {module for modules in layouts.values() for module in modules if not ends or f".{module}".endswith(ends)}
    taken = named - unmeasured
    without = [name for some, modules in layouts.items() if taken.isdisjoint(modules) for name in some]
    unseen = sorted(name for some, modules in layouts.items() if unmeasured.issuperset(modules) for name in some)
    if unseen:
        raise CompositionError(
            f"no text of the calibration reaches what is adapted by {some_of(unseen, 5)}",
            expected="experts of modules that read a prompt",
            do="leave them out, or use the router Oracle for them",
        )
    if without:
        parts = sorted({module.rpartition(".")[2] for modules in layouts.values() for module in modules})
        raise CompositionError(
            f"modules={evidence.modules}, but {some_of(sorted(without), 5)} adapt no module with such a name",
            expected=f"names among {', '.join(parts)} such that each expert adapts one",
        )
    return taken
