"""A composed model whose experts stay on disk until a prompt needs them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import nn

from spectr.adapters import Expert, FactorShape
from spectr.composition.factor_sets import FactorSets, Table
from spectr.composition.prepare import evidence_modules, prepare_expert, side_data
from spectr.composition.routed import Progress, Routed
from spectr.composition.subset_probes import Readers
from spectr.errors import CompositionError
from spectr.layers.base_layers import ModelLayers
from spectr.layers.expert_factors import Factors
from spectr.layers.linear_layers import placement
from spectr.layers.plan import make_plan
from spectr.layers.routed_linear import RoutedLinear
from spectr.layers.saved_module import SavedModule
from spectr.library import ExpertLibrary
from spectr.paging import EvictionPolicy, ExpertCache
from spectr.prompts.bounds import CertainProbe, Certainty
from spectr.prompts.decision import PromptDecision
from spectr.prompts.probe import Probe, Scorer
from spectr.renamed import old_attribute
from spectr.routers import PrototypeMeans, Router, check_needs
from spectr.routers.evidence import Found
from spectr.spectral import Prototypes, Share


class Paged(Routed):
    """A handle on a model that decides on prompts with prototypes: like :class:`Routed`, with most experts on disk.

    Attributes:
        expert_cache: The experts in memory.
        prototypes: By module, the data for prompts' shortlists.
        certainty: Counts how exact lists were made, if the router makes exact lists; else nothing is counted.
    """

    expert_cache: ExpertCache
    certainty: Certainty
    prototypes: dict[str, Prototypes]
    shelf = old_attribute("shelf", "expert_cache")

    def __init__(
        self,
        model: nn.Module,
        library: ExpertLibrary,
        router: Router,
        progress: Progress,
        *,
        expert_memory: int,
        policy: EvictionPolicy,
    ):
        assert router.policy is not None
        evidence, self._use = router.policy.evidence, router.policy.use
        assert isinstance(evidence, PrototypeMeans)
        assert self._use.most is not None
        self._evidence, self._most, self._memory, self._eviction = evidence, self._use.most, expert_memory, policy
        self.certainty = Certainty()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="spectr-read-ahead")
        super().__init__(model, library, router, progress)
        try:
            self._probed.read_null()
        except BaseException:
            self.remove()
            raise

    def _saved_modules(self, names: tuple[str, ...], library: ExpertLibrary) -> dict[str, SavedModule]:
        return {}  # an index has no such experts

    def __getstate__(self) -> dict[str, Any]:
        """Experts on disk cannot be copied or pickled.

        Raises:
            CompositionError: Always.
        """
        raise CompositionError(
            f"a model composed with {self.router} can neither be copied nor pickled",
            do="compose the library again",
        )

    def _make_layers(
        self, names: tuple[str, ...], library: ExpertLibrary, progress: Progress, saved: Mapping[str, SavedModule]
    ) -> dict[str, RoutedLinear]:
        router, evidence = self._token_router, self._evidence
        check_needs(self.router, library, names)
        known = library.calibration
        assert known is not None
        uncalled = self._reads.outside
        plan = make_plan(self.model, _specimens(library, names, uncalled), router, uncalled=uncalled)
        layers = self.layers
        bases = {
            module: layers[module].base if module in layers else self.model.get_submodule(module)
            for module in plan.modules
        }
        self._places = {module: placement(base, self.model) for module, base in bases.items()}
        self._base_layers = ModelLayers(self.model, library.folder)
        self._check_memory(library, names)
        modules = evidence_modules(library, names, evidence)
        means = {module: known.means[module].to(self._places[module][0]) for module in modules}
        self.prototypes = library.index.prototypes(names, means, evidence.bits)
        self.expert_cache = ExpertCache(lambda name: self._load(self.library[name]), self._memory, self._eviction)
        fresh = {}
        for done, (module, base) in enumerate(bases.items(), start=1):
            fresh[module] = RoutedLinear(base, None, router, use=self._use)
            progress(done, len(bases))
        return fresh

    def _check_memory(self, library: ExpertLibrary, names: tuple[str, ...]) -> None:
        """Raise :class:`CompositionError` if the memory cannot hold a shortlist."""
        size = {module: dtype.itemsize for module, (_, dtype) in self._places.items()}
        layouts = library.index.alike(names)
        largest = max(sum(size.get(module.name, 0) * module.numbers for module in modules) for modules in layouts)
        listed = min(self._most, len(names))
        if largest * listed > self._memory:
            raise CompositionError(
                f"expert_memory={self._memory} bytes, but a shortlist holds {listed} of up to {largest} bytes",
                expected=f"at least {largest * listed} bytes ({largest * listed / (1 << 30):.3f} GiB)",
                do="raise --expert-memory, or use a shorter list: --set size=..., Shortlist(size=...)",
            )

    def _load(self, expert: Expert) -> dict[str, Share]:
        self.library.check_weights(expert)
        router, rotations = self._token_router, self.library.index[expert.name].rotations()
        side = side_data(router, self.library, [expert.name])
        shares = prepare_expert(expert, self._base_layers, rotations, router, side)
        return {module: share.to(*self._places[module]) for module, share in shares.items() if module in self._places}

    @property
    def scorers(self) -> Mapping[str, Scorer]:
        """See :class:`Routed`; here the prototypes."""
        return self.prototypes

    def reader(self, probe: Probe) -> Probe | CertainProbe:
        """See :class:`Routed`."""
        if not self._evidence.is_interval:
            return probe
        return CertainProbe(probe, self._evidence, self._most, self.certainty, self.policy and self.policy.abstain)

    def _factors(self, layers: Sequence[RoutedLinear], names: tuple[str, ...]) -> Table:
        """Every layer's factors of some experts, from memory or disk."""
        shares, router = self.expert_cache.fetch(names), self._token_router
        table: dict[RoutedLinear, Factors | None] = {}
        for layer in layers:
            module = self._modules[layer]
            here = {name: share[module] for name, share in shares.items() if module in share}
            stack = router.stack(here).with_outputs_of(here) if here else None
            table[layer] = None if stack is None else layer.factors_of(stack, fixed=self._use.fixes)
        return table

    def _decision(self, names: tuple[str, ...]) -> PromptDecision:
        self._modules = {layer: module for module, layer in self.layers.items()}
        probed = self._probed = Readers(self).of(names)

        def read(*args: object, **kwargs: object) -> Found:
            found = probed(*args, **kwargs)
            next_BK = found.evidence_BE.topk(min(2 * self._most, len(names)), dim=-1).indices[:, self._most :]
            self._reader.submit(self._read_ahead, [names[place] for place in next_BK.flatten().unique().tolist()])
            return found

        sets = FactorSets(self._modules, self._factors, single=1, gathered=1, serve_choices=True)
        assert self.policy is not None
        return PromptDecision(self.policy, names, read, sets)

    def _read_ahead(self, names: Sequence[str]) -> None:
        """Ask the operating system, if possible, to read these experts' files ahead."""
        if not hasattr(os, "posix_fadvise"):
            return
        for name in names:
            with self.library[name].weights.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _specimens(library: ExpertLibrary, names: Sequence[str], uncalled: Set[str]) -> list[Expert]:
    """One expert for each group with equal modules and sizes, from the index; opens no file.

    Experts that update layers which are not called are all included.
    """
    found = []
    for modules, together in library.index.alike(names).items():
        if any(module.name in uncalled for module in modules):
            found += [library[name] for name in together]
            continue
        shapes = {m.name: FactorShape(m.rank, m.inputs, m.outputs, 1.0, "", "") for m in modules}
        found.append(Expert(name=together[0], weights=Path(library.origin), shapes=shapes))
    return found
