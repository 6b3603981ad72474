"""Putting a library's experts into a model, and taking them out again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from spectr.adapters import Expert, has_gates, read_gates
from spectr.combine import drop, get_combination
from spectr.errors import CompositionError
from spectr.layers.linear import placement
from spectr.layers.opening import Opening
from spectr.layers.plan import make_plan
from spectr.layers.probe import Probe
from spectr.layers.prompt import PromptDecision, Reader, entry_of
from spectr.layers.routed import RoutedLinear
from spectr.layers.swap import swap_module
from spectr.library import Calibration, ExpertLibrary
from spectr.routers import GuidedRouter, ProbingRouter, PromptRouter, Router, Spectr
from spectr.routers.settings import combination_of, residents
from spectr.spectral import Prepared, Stack, align

Progress = Callable[[int, int], None]
Gates = Mapping[str, Mapping[str, Tensor]]


class Guide(Protocol):
    """Compares prompts with descriptions; :class:`spectr.guidance.QueryGuide` is one."""

    def reader(self, descriptions: Mapping[str, str], experts: Sequence[str]) -> Reader:
        """A function that is called as the model is and returns ``cos(e_t, q)``, (batch, experts)."""
        ...


class Routed:
    """A handle on a composed model: which experts it holds, and how to change that. Made by :func:`compose`.

    Every change is checked first and made then: a call that raises has changed nothing.

    Attributes:
        model: The composed model, the very object that was given.
        library: The experts that can be held.
        router: Decides for each token, or for each prompt.
        prompt: How a prompt is decided on, where the router does that; else ``None``.
        guide: Compares prompts with the experts' descriptions, where the router is guided; else ``None``.
    """

    prompt: PromptDecision | None = None

    def __init__(
        self, model: nn.Module, library: ExpertLibrary, router: Router, progress: Progress, guide: Guide | None = None
    ):
        self.model, self.library, self.router, self.guide = model, library, router, guide
        self._originals: dict[str, nn.Module] = {}
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
        self._hold(self._choose(library, self._allowed), library)
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
        self._hold(self._choose(library, allowed), library)
        self._allowed = allowed
        return self

    def remove(self) -> nn.Module:
        """Give the model its own modules back, the very same objects, and return it."""
        for name, original in self._originals.items():
            swap_module(self.model, name, original)
        self._originals, self._resident, self._removed = {}, (), True
        self._watch_prompts(())
        return self.model

    def _choose(self, library: ExpertLibrary, allowed: tuple[str, ...] | None) -> tuple[str, ...]:
        """The experts to hold; the router's demands on a library are checked on the whole one, not on a restriction."""
        resident = residents(self.router, library.names)
        if allowed is None:
            return resident
        kept = tuple(name for name in resident if name in allowed)
        if not kept:
            raise CompositionError(
                f"{self.router} needs {', '.join(resident)}, of which none is allowed",
                expected="an allow-list with at least one of them",
            )
        return kept

    def _hold(self, names: tuple[str, ...], library: ExpertLibrary, progress: Progress = lambda *_: None) -> None:
        """Make ``names`` the experts that the layers hold: plan, check and prepare first, swap at the end."""
        if self._removed:
            raise CompositionError("this handle was removed from its model", do="compose the model again")
        experts = {name: library[name] for name in names}
        plan = make_plan(self.model, list(experts.values()), self.router)
        calibrated = getattr(self.router, "calibrated", False)
        calibration = needed_calibration(library, list(experts.values())) if calibrated else None
        gates = needed_gates(library, list(experts.values())) if getattr(self.router, "gated", False) else None
        shares_A = getattr(self.router, "shares_A", False)  # whether they do depends on all that are there
        held = self.layers
        fresh: dict[str, RoutedLinear] = {}
        with ExitStack() as files:
            readers = {name: files.enter_context(expert.open()) for name, expert in experts.items()}
            for done, (module, users) in enumerate(plan.modules.items(), start=1):
                layer = held.get(module)
                known = layer.stack().parts() if layer and layer.is_as_prepared and not shares_A else {}
                parts = {name: known[name] for name in users if name in known}
                missing = {name: readers[name] for name in users if name not in parts}
                parts.update(prepare_module(missing, module, self.router, calibration, gates))
                base = layer.base if layer else self.model.get_submodule(module)
                device, dtype = placement(base, self.model)
                placed = {name: part.to(device, dtype) for name, part in parts.items()}
                fresh[module] = RoutedLinear(base, Stack.of(placed), self.router)
                progress(done, len(plan.modules))
        for module in set(held) - set(fresh):
            swap_module(self.model, module, self._originals.pop(module))
        for module, layer in fresh.items():
            self._originals.setdefault(module, layer.base)
            swap_module(self.model, module, layer)
        self._resident, self.library = names, library
        self._watch_prompts(names)

    def _watch_prompts(self, names: tuple[str, ...]) -> None:
        if self.prompt is not None:
            self.prompt.close()
            self.prompt = None
        if names and isinstance(self.router, PromptRouter) and self.router.level != "token":
            entry = entry_of(self.model)
            self.prompt = PromptDecision(entry, self.layers, self.router, names, self._reader(entry, names))

    def _reader(self, entry: nn.Module, names: tuple[str, ...]) -> Reader:
        """How a prompt is read: through the layers, or by the guide."""
        if isinstance(self.router, ProbingRouter):
            known = self.library.calibration
            opening = Opening(known.opening, known.turn, known.closing) if known else None
            usual = {"input_ids": known.input_ids, "attention_mask": known.real.long()} if known else None
            return Probe(entry, self.layers, self.router, names, opening, usual)
        assert self.guide is not None
        return self.guide.reader(self.library.descriptions, names)

    def __repr__(self) -> str:
        return f"Routed({len(self.layers)} layers, experts {', '.join(self.experts)}, {self.router})"


def compose(
    model: nn.Module,
    library: ExpertLibrary | str | Path,
    router: Router | None = None,
    *,
    progress: Progress = lambda *_: None,
    guide: Guide | None = None,
) -> Routed:
    """Route a model's linear layers through a library's experts, in place.

    ``model`` keeps its class, the names in its ``state_dict`` and all of its uses; only its linear layers that an
    expert adapts are wrapped. Experts are prepared in float32 and cast to the dtype of the layer they join. To spread a
    model by accelerate, do that first and compose then.

    Args:
        model: Any module with linear layers; transformers' models above all.
        library: The experts, or the path of their folder.
        router: Scores, selects and combines; :class:`Spectr` with its defaults if left out (and ``top_k`` at
            most the number of experts).
        progress: Is told (done, total) layers.
        guide: Compares prompts with the library's descriptions, for :class:`Glider`; see
            :class:`spectr.guidance.QueryGuide`.

    Returns:
        A handle to restrict, extend and undo.

    Raises:
        CompositionError: The model is composed already, the experts do not fit it, or the router does not fit the
            library. Nothing was changed.
        LibraryError: The library cannot be read.
        AdapterError: An expert's files are damaged.
    """
    library = library if isinstance(library, ExpertLibrary) else ExpertLibrary.open(library)
    router = Spectr(top_k=min(4, len(library))) if router is None else router
    model = getattr(model, "_orig_mod", model)  # of a compiled model: the module itself
    if isinstance(router, type) or not isinstance(router, Router):
        raise CompositionError(
            f"router={router!r} is no router",
            expected="a router object, such as spectr.Spectr(top_k=4)",
            do="for a router by name: spectr.get_router('arrow')",
        )
    if any(isinstance(module, RoutedLinear) for module in model.modules()):
        raise CompositionError("this model is composed already", do="call remove() on its handle first")
    if isinstance(router, GuidedRouter):
        needed_descriptions(library)
        if guide is None:
            raise CompositionError(
                f"{router} compares prompts with descriptions, and there is no guide",
                do="compose(..., guide=spectr.guidance.QueryGuide.of(model, tokenizer))",
            )
    return Routed(model, library, router, progress, guide)


@torch.no_grad()
def prepare_module(
    readers: Mapping[str, Callable],
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
        prepared.update({name: router.prepare(type(aligned)(*(t[i] for t in aligned))) for i, name in enumerate(names)})
    if getattr(router, "shares_A", False):
        scaled = {name: pair.B.float() * pair.scale for name, pair in factors.items()}
        prepared = {n: part.rooted(factors[n].A.float(), scaled[n]) for n, part in prepared.items()}
    rate = get_combination(combination_of(router)).drop_rate
    if rate:
        prepared = {n: part._replace(B=drop(part.B, rate, f"{module}/{n}")) for n, part in prepared.items()}
    if calibration is not None:
        prepared = {name: part.calibrated(*calibration.of(name, module)) for name, part in prepared.items()}
    if gates is not None:
        prepared = {name: part.gated(gates[name][module]) for name, part in prepared.items()}
    return prepared


def needed_calibration(library: ExpertLibrary, experts: Sequence[Expert]) -> Calibration:
    """The library's calibration, which has to cover these experts.

    Raises:
        CompositionError: Some were not calibrated, or have other weights by now.
    """
    calibration = library.calibration
    missing = [expert.name for expert in experts if calibration is None or not calibration.covers(expert)]
    if missing or calibration is None:
        raise CompositionError(
            f"not calibrated: {', '.join(missing)}",
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


def _allow_list(experts: Iterable[str]) -> tuple[str, ...]:
    names = (experts,) if isinstance(experts, str) else tuple(experts)
    if not names:
        raise CompositionError(
            "the allow-list is empty",
            expected="at least one expert",
            do="name experts, or allow(None) for all; remove() gives the base model back",
        )
    return tuple(sorted(set(names)))
