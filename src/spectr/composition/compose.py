"""The entry point: a model, a library and a router become one model."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from spectr.composition.base_checks import report_calibration
from spectr.composition.model_naming import naming_of
from spectr.composition.paged import Paged
from spectr.composition.routed import Guide, Progress, Routed
from spectr.errors import CompositionError
from spectr.layers.multi_routed import COMPOSED
from spectr.library import ExpertLibrary
from spectr.library.needs import CALIBRATED, DESCRIBED, NORMED
from spectr.paging import DEFAULT_POLICY, EvictionPolicy, get_policy
from spectr.routers import Router, Spectr, check_needs, residents
from spectr.routers.version1 import adapted

_EXPERT_MEMORY = 1 << 30


def compose(
    model: nn.Module,
    library: ExpertLibrary | str | Path,
    router: Router | None = None,
    *,
    progress: Progress = lambda *_: None,
    guide: Guide | None = None,
    expert_memory: int | None = None,
    policy: EvictionPolicy | None = None,
) -> Routed:
    """Route a model's linear layers through a library's experts, in place.

    ``model`` keeps its class, the names in its ``state_dict`` and its uses. Only linear layers that an expert adapts
    are wrapped. Experts are prepared in float32 and cast to the dtype of their layer. To distribute a model with
    accelerate, do so before you compose it.

    Args:
        model: A module with linear layers, usually a transformers model.
        library: The experts, or the path of their folder.
        router: Scores, selects and combines. By default :class:`Spectr`, with a ``top_k`` of at most the number of
            experts. For a calibrated library the commands use :class:`Calibrated` instead; pass it for the same choice.
        progress: Called with (done, total) layers.
        guide: Compares prompts with the library's descriptions, for :class:`Glider`; see
            :class:`spectr.guidance.QueryGuide`.
        expert_memory: For :class:`Shortlist`: bytes of memory for experts; the others stay on disk. Default 1 GiB.
        policy: For :class:`Shortlist`: which expert to evict when memory is full; by default
            :data:`spectr.paging.DEFAULT_POLICY`.

    Returns:
        A handle to restrict, extend and undo the composition.

    Raises:
        CompositionError: The model is composed already, or experts, router and library do not fit together. Nothing was
            changed.
        LibraryError: The library cannot be read.
        AdapterError: An expert's files are damaged.
    """
    library = library if isinstance(library, ExpertLibrary) else ExpertLibrary.open(library)
    router = Spectr(top_k=min(4, len(library))) if router is None else router
    model = getattr(model, "_orig_mod", model)  # the module inside a compiled model
    router = adapted(router)
    if isinstance(router, type) or not isinstance(router, Router):
        raise CompositionError(
            f"router={router!r} is not a router",
            expected="a router object, such as spectr.Spectr(top_k=4)",
            do="for a router by name: spectr.get_router('arrow')",
        )
    if any(isinstance(module, COMPOSED) for module in model.modules()):
        raise CompositionError("the model is composed already", do="call remove() on its handle first")
    library = library.named_for(naming_of(model))
    if CALIBRATED in router.needs or NORMED in router.needs:
        report_calibration(model, library.calibration)
    if router.policy is not None and router.policy.pages:
        memory = _EXPERT_MEMORY if expert_memory is None else expert_memory
        return Paged(
            model, library, router, progress, expert_memory=memory, policy=policy or get_policy(DEFAULT_POLICY)
        )
    if expert_memory is not None or policy is not None:
        raise CompositionError(
            f"{router} holds all experts in memory",
            expected="expert_memory and policy with the router Shortlist only",
            do="compose(model, library, spectr.Shortlist(), expert_memory=...)",
        )
    if DESCRIBED in router.needs:
        check_needs(router, library, residents(router, library.names))
        if guide is None:
            raise CompositionError(
                f"{router} compares prompts with descriptions, but there is no guide",
                do="compose(..., guide=spectr.guidance.QueryGuide.of(model, tokenizer))",
            )
    return Routed(model, library, router, progress, guide)
