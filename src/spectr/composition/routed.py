"""Putting a library's experts into a model, and taking them out again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spectr.adapters import Expert
from spectr.composition.base_checks import check_texts, report_names
from spectr.composition.factor_sets import FactorSets
from spectr.composition.find_weight_reads import find_weight_reads
from spectr.composition.place_saved import saved_modules
from spectr.composition.prepare import prepare_module, report_unmeasured, side_data, stacked
from spectr.composition.subset_probes import Readers
from spectr.errors import CompositionError
from spectr.layers.base_layers import ModelLayers
from spectr.layers.linear_layers import placement
from spectr.layers.parameter_layer import ParameterLayer
from spectr.layers.plan import Plan, make_plan
from spectr.layers.routed_linear import RoutedLinear
from spectr.layers.saved_module import SavedModule
from spectr.layers.swap import layer_at, plain_module, swap_module
from spectr.library import ExpertLibrary
from spectr.ops import report_once
from spectr.prompts.calls import Calls
from spectr.prompts.decision import PromptDecision
from spectr.prompts.exclusion import Exclusion
from spectr.prompts.probe import Probe, Scorer
from spectr.routers import Router, check_needs, residents, token_router
from spectr.routers.abstention import policy_for, why_off
from spectr.routers.evidence import Guide, Reader
from spectr.routers.router import takes_one
from spectr.spectral.precision import without_autocast

Progress = Callable[[int, int], None]


class Routed:
    """A handle on a composed model: which experts it holds, and how to change that. Made by :func:`compose`.

    Every change is checked first and made then: a call that raises has changed nothing.

    Attributes:
        model: The composed model, the very object that was given.
        library: The experts that can be held.
        router: Decides for each token, or for each prompt.
        prompt: How a prompt is decided on, where the router does that; else ``None``.
        policy: The router's policy for prompts, as it is in this library; ``None`` where each token decides.
        guide: Compares prompts with the experts' descriptions, where the evidence needs that; else ``None``.
    """

    prompt: PromptDecision | None = None

    def __init__(
        self, model: nn.Module, library: ExpertLibrary, router: Router, progress: Progress, guide: Guide | None = None
    ):
        self.model, self.library, self.router, self.guide = model, library, router, guide
        self.policy, self._token_router = policy_for(router, library), token_router(router)
        if (remark := why_off(router, library)) is not None:
            report_once(remark)
        self._reads = find_weight_reads(model)
        self._originals: dict[str, nn.Module] = {}
        self._calls: Calls | None = None
        self._exclusion = Exclusion()
        self._allowed: tuple[str, ...] | None = None
        self._removed = False
        self._hold(residents(router, library.names), library, progress)

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts that can be chosen now, in alphabetical order."""
        return self._resident

    @property
    def layers(self) -> dict[str, RoutedLinear]:
        """The routed layers by name, in the model's order."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, RoutedLinear)}

    @property
    def scorers(self) -> Mapping[str, Scorer]:
        """What scores the experts at each layer, where the evidence of a prompt comes from such scores."""
        return self.layers

    def reader(self, probe: Probe) -> Reader:
        """What reads prompts by means of a probe."""
        return probe

    def allow(self, experts: Iterable[str] | None) -> Routed:
        """Restrict routing to some experts; ``None`` allows the whole library again.

        What is not allowed leaves the model's memory: selections and outputs are those of a library that holds only
        the allowed ones. Where fewer than the router's ``top_k`` are allowed, all of them are taken.

        Raises:
            CompositionError: No expert is named, or the router cannot work without those left out.
            LibraryError: A name is not in the library.
        """
        names = None if experts is None else _allow_list(experts)
        if names is not None:
            self.library.check(*names)
        self._hold(self._choose(self.library, names), self.library)
        self._allowed = names
        return self

    def add(self, name: str, source: str | Path) -> Routed:
        """Add an expert from a PEFT folder or Hub id while the model lives; the library on disk stays as it is.

        Under a restriction (:meth:`allow`) it has to be allowed before it is used.

        Raises:
            LibraryError: The name is taken.
            AdapterError: The adapter cannot be used.
            CompositionError: It does not fit the model.
        """
        library = self.library.with_expert(name, source)
        self._hold(self._choose(library, self._allowed), library, others=True)
        return self

    def discard(self, name: str) -> Routed:
        """Forget an expert while the model lives; the library on disk stays as it is.

        Raises:
            LibraryError: There is no such expert.
            CompositionError: It is the last one that is allowed, or the router cannot work without it.
        """
        library = self.library.without(name)
        allowed = None if self._allowed is None else tuple(other for other in self._allowed if other != name)
        if not (library.names if allowed is None else allowed):
            raise CompositionError(f"'{name}' is the last expert", do="call remove() to get the base model back")
        self._hold(self._choose(library, allowed), library, others=True)
        self._allowed = allowed
        return self

    def remove(self) -> nn.Module:
        """Give the model its own modules back, the very same objects, and return it."""
        with self._changing():
            self.release()
            for name, original in self._originals.items():
                swap_module(self.model, name, original)
            self._originals, self._resident, self._removed = {}, (), True
            self.prompt = None
        return self.model

    def adopt(self, cache: Any, input_ids: Tensor) -> None:
        """Have a cache that another model filled go on as if this one had filled it, and decide on its prompt.

        Args:
            cache: Of transformers. Its keys and values stay those of the other model.
            input_ids: The tokens that it holds, (batch, tokens).

        Raises:
            CompositionError: The handle was removed from its model.
        """
        if self._calls is None:
            raise CompositionError("this handle was removed from its model", do="compose the model again")
        self._calls.adopt(cache, input_ids)

    def release(self) -> None:
        """Stop deciding for the model's calls; the caller sets the routing of each."""
        if self._calls is not None:
            self._calls.close()
            self._calls = None

    def take(self) -> None:
        """Decide for the model's calls again, after :meth:`release`."""
        if self._calls is None and not self._removed:
            self._take_calls()

    def _take_calls(self, key: str | None = None) -> None:
        """Decide for the model's calls again."""
        modules = [name for name, layer in self.layers.items() if not isinstance(layer.base, ParameterLayer)]
        unknown, own = self._reads.unknown(modules), {module: dict(vars(module)) for module in self.model.modules()}
        try:
            self._calls = Calls(
                self.model, self._resident, self.prompt, key=key, exclusion=self._exclusion, unknown=unknown
            )
        except BaseException:
            for module, attributes in own.items():
                vars(module).clear()
                vars(module).update(attributes)
            raise

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """A change of the model and of this handle, which is undone if it raises."""
        with self._exclusion.changing():
            if self._calls is not None:
                self._calls.batches.check_idle()
            before, originals = dict(vars(self)), dict(self._originals)
            modules = {module: dict(module._modules) for module in self.model.modules()}
            try:
                yield
            except BaseException:
                self._undo(before | {"_originals": originals}, modules)
                raise

    def _undo(self, before: dict[str, Any], modules: Mapping[nn.Module, dict[str, nn.Module | None]]) -> None:
        calls: Calls | None = before["_calls"]
        if self._calls is not calls:
            self.release()
        for module, children in modules.items():
            module._modules.clear()
            module._modules.update(children)
        vars(self).update(before)
        if calls is not None and calls.closed:
            self._calls = None
            self._take_calls(calls.key)

    def _choose(self, library: ExpertLibrary, allowed: tuple[str, ...] | None) -> tuple[str, ...]:
        """The experts to hold; the router's demands on a library are checked on the whole one, not on a restriction."""
        resident = residents(self.router, library.names)
        if allowed is None:
            return resident
        kept = tuple(name for name in resident if name in allowed)
        if not kept:
            raise CompositionError(
                f"{self.router} needs one of {', '.join(resident)}, but none is allowed",
                expected="an allow-list with at least one of them",
            )
        return kept

    @without_autocast()
    def _hold(
        self,
        names: tuple[str, ...],
        library: ExpertLibrary,
        progress: Progress = lambda *_: None,
        *,
        others: bool = False,
    ) -> None:
        """Make ``names`` the experts that can be chosen: plan, check and prepare first, swap at the end.

        Whatever raises leaves the model and this handle as they were.

        Args:
            names: Of the library.
            library: It replaces the handle's.
            progress: Receives (done, total) layers.
            others: Whether a name may mean another expert than before, so that no cache can be continued.
        """
        if self._removed:
            raise CompositionError("this handle was removed from its model", do="compose the model again")
        with self._changing():
            saved = self._saved_modules(names, library)
            fresh = {**saved, **self._make_layers(names, library, progress, saved)}
            for module in set(self._originals) - set(fresh):
                swap_module(self.model, module, self._originals.pop(module))
            for module, layer in fresh.items():
                self._originals.setdefault(module, plain_module(swap_module(self.model, module, layer)))
            self._resident, self.library = names, library
            self.prompt = self._decision(names)
            key = None if self._calls is None or others else self._calls.key
            self.release()
            self._take_calls(key)

    def _saved_modules(self, names: tuple[str, ...], library: ExpertLibrary) -> dict[str, SavedModule]:
        """Modules that these experts have trained as a whole, or that are not called; nothing is changed yet."""
        experts, uncalled = {name: library[name] for name in names}, self._reads.outside
        if not any(expert.saved or not uncalled.isdisjoint(expert.shapes) for expert in experts.values()):
            return {}
        self._plan(list(experts.values()))
        return saved_modules(self.model, experts, self.router, uncalled)

    def _plan(self, experts: Sequence[Expert]) -> Plan:
        one = len(experts) == 1 or takes_one(self.router)
        return make_plan(self.model, experts, self.router, uncalled=self._reads.outside, changes_weights=one)

    def _make_layers(
        self, names: tuple[str, ...], library: ExpertLibrary, progress: Progress, saved: Mapping[str, SavedModule]
    ) -> dict[str, RoutedLinear]:
        """Routed layers for the modules that these experts adapt, around what was saved; nothing is changed yet."""
        experts = {name: library[name] for name in names}
        plan = self._plan(list(experts.values()))
        check_texts(self.model, experts.values())
        report_names(self.model, experts.values())
        for expert in experts.values():
            if expert.left_out:
                report_once(expert.remark_left_out)
        check_needs(self.router, library, names)
        report_unmeasured(self.policy, library, plan.modules)
        side = side_data(self._token_router, library, names)
        before, use = self.layers, None if self.policy is None else self.policy.use
        layers, router = ModelLayers(self.model, library.folder), self._token_router
        fresh: dict[str, RoutedLinear] = {}
        with ExitStack() as files:
            readers = {name: files.enter_context(expert.open_on(layers)) for name, expert in experts.items()}
            for done, (module, users) in enumerate(plan.modules.items(), start=1):
                layer = before.get(module)
                known = router.shares(layer.stack()) if layer and layer.can_share else {}
                parts = {name: known[name] for name in users if name in known}
                missing = {name: readers[name] for name in users if name not in parts}
                parts.update(prepare_module(missing, module, router, side))
                base = saved.get(module) or layer_at(self.model, module)
                device, dtype = placement(base, self.model)
                placed = {name: part.to(device, dtype) for name, part in parts.items()}
                fresh[module] = RoutedLinear(base, stacked(router, placed), router, use=use)
                progress(done, len(plan.modules))
        return fresh

    def _decision(self, names: tuple[str, ...]) -> PromptDecision | None:
        """How a prompt is decided on; ``None`` where tokens decide."""
        if self.policy is None:
            return None
        read = Readers(self).of(names)
        return PromptDecision(self.policy, names, read, FactorSets(self.layers.values()))

    def __repr__(self) -> str:
        return f"Routed({len(self.layers)} layers, experts {', '.join(self.experts)}, {self.router})"


def _allow_list(experts: Iterable[str]) -> tuple[str, ...]:
    names = (experts,) if isinstance(experts, str) else tuple(experts)
    if not names:
        raise CompositionError(
            "the allow-list is empty",
            expected="at least one expert",
            do="name experts, or allow(None) for all; remove() gives the base model back",
        )
    return tuple(sorted(set(names)))
