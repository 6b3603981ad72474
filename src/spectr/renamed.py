"""Old names of modules, options and attributes: they work one version longer (docs/reference/old-names.md)."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from inspect import signature
from types import ModuleType
from typing import Any, TypeVar

from spectr.errors import CompositionError

T = TypeVar("T")

MODULES = {
    "spectr.adapters.causes": "spectr.adapters.read",
    "spectr.adapters.config": "spectr.adapters.adapter_config",
    "spectr.adapters.fused": "spectr.adapters.updates",
    "spectr.adapters.fused_names": "spectr.adapters.naming",
    "spectr.adapters.initial": "spectr.adapters.adapter_config",
    "spectr.adapters.keys": "spectr.adapters.read",
    "spectr.adapters.source": "spectr.adapters.read",
    "spectr.benchmark.plan": "spectr.benchmark.comparison",
    "spectr.benchmark.report": "spectr.benchmark.comparison",
    "spectr.benchmark.synthetic": "spectr.benchmark.subjects",
    "spectr.cli.asked": "spectr.evaluation.evaluation_plan",
    "spectr.cli.chat": "spectr.cli.generate",
    "spectr.cli.demo": "spectr.cli.route",
    "spectr.cli.gates": "spectr.cli.train",
    "spectr.cli.guides": "spectr.cli.model_loading",
    "spectr.cli.opened": "spectr.cli.model_loading",
    "spectr.cli.rows": "spectr.cli.options",
    "spectr.combine.base": "spectr.combine.combination",
    "spectr.combine.dare": "spectr.spectral.sparsify",
    "spectr.combine.options": "spectr.combine.parsing",
    "spectr.composed": "spectr.composed_model",
    "spectr.composed.settings": "spectr.composed_model.quantization_config",
    "spectr.composition.junction": "spectr.composition.router_batch",
    "spectr.composition.readers": "spectr.composition.subset_probes",
    "spectr.composition.several": "spectr.composition.multi_router",
    "spectr.composition.steering": "spectr.composition.request_batch",
    "spectr.composition.watching": "spectr.composition.recorder",
    "spectr.evaluation.answers": "spectr.evaluation.score",
    "spectr.evaluation.encode": "spectr.evaluation.choices",
    "spectr.evaluation.experiments.base": "spectr.evaluation.experiments.setup",
    "spectr.evaluation.experiments.compared": "spectr.evaluation.experiments.setup",
    "spectr.evaluation.finding": "spectr.evaluation.expert_recall",
    "spectr.evaluation.metrics": "spectr.evaluation.score",
    "spectr.evaluation.plan": "spectr.evaluation.evaluation_plan",
    "spectr.evaluation.run": "spectr.evaluation.experiment_runs",
    "spectr.evaluation.section_5": "spectr.evaluation.experiments.costs",
    "spectr.evaluation.shares": "spectr.evaluation.paired_statistics",
    "spectr.evaluation.similarity": "spectr.evaluation.experiments.similarity",
    "spectr.evaluation.summary": "spectr.evaluation.experiment_runs",
    "spectr.extraction.memory": "spectr.extraction.extraction_settings",
    "spectr.extraction.peft_reading": "spectr.extraction.extract",
    "spectr.extraction.report": "spectr.extraction.outcome",
    "spectr.extraction.settings": "spectr.extraction.extraction_settings",
    "spectr.extraction.sources": "spectr.extraction.checkpoint",
    "spectr.extraction.write": "spectr.extraction.outcome",
    "spectr.layers.certain": "spectr.prompts.bounds",
    "spectr.layers.decision": "spectr.layers.expert_factors",
    "spectr.layers.factors": "spectr.layers.expert_factors",
    "spectr.layers.fork": "spectr.layers.multi_routed",
    "spectr.layers.grouped": "spectr.ops.grouped",
    "spectr.layers.kernels": "spectr.ops",
    "spectr.layers.kernels.base": "spectr.ops.backend",
    "spectr.layers.kernels.rough": "spectr.ops.screening",
    "spectr.layers.kernels.whole": "spectr.ops.fused_linear",
    "spectr.layers.linear": "spectr.layers.linear_layers",
    "spectr.layers.opening": "spectr.prompts.chat_template",
    "spectr.layers.outputs": "spectr.ops.add_outputs",
    "spectr.layers.probe": "spectr.prompts.probe",
    "spectr.layers.prompt": "spectr.prompts.decision",
    "spectr.layers.routed": "spectr.layers.routed_linear",
    "spectr.library.calibration": "spectr.library.calibration_file",
    "spectr.library.descriptions": "spectr.library.description_file",
    "spectr.library.texts": "spectr.adapters.text_facts",
    "spectr.merging.base": "spectr.merging.into_base",
    "spectr.merging.plan": "spectr.merging.recipe",
    "spectr.merging.registry": "spectr.merging.method",
    "spectr.merging.residual": "spectr.merging.subtract",
    "spectr.models.load": "spectr.models.base_model",
    "spectr.paging.shelf": "spectr.paging.expert_cache",
    "spectr.plots.family": "spectr.plots.figures",
    "spectr.plots.html": "spectr.plots.pages",
    "spectr.plots.png": "spectr.plots.figures",
    "spectr.plots.report": "spectr.plots.pages",
    "spectr.plots.tokens": "spectr.plots.token_weights",
    "spectr.routers.base": "spectr.routers.router",
    "spectr.routers.config": "spectr.routers.router_config",
    "spectr.routers.options": "spectr.routers.setting_texts",
    "spectr.routers.registry": "spectr.routers.registries",
    "spectr.routers.settings": "spectr.routers.setting_checks",
    "spectr.saving": "spectr.atomic_write",
    "spectr.serving.answers": "spectr.serving.asgi",
    "spectr.serving.engines.base": "spectr.serving.engines.engine",
    "spectr.serving.engines.batching": "spectr.serving.engines.generation",
    "spectr.serving.engines.conducting": "spectr.serving.engines.batch_scheduling",
    "spectr.serving.engines.requests": "spectr.serving.engines.batch_scheduling",
    "spectr.serving.errors": "spectr.serving.api_errors",
    "spectr.serving.extras": "spectr.serving.api_fields",
    "spectr.serving.faults": "spectr.serving.api_errors",
    "spectr.serving.page": "spectr.serving.gateway",
    "spectr.serving.policy": "spectr.serving.catalog",
    "spectr.serving.responses": "spectr.serving.asgi",
    "spectr.serving.settings": "spectr.serving.server_settings",
    "spectr.serving.shutdown": "spectr.serving.gateway",
    "spectr.serving.stopping": "spectr.serving.gateway",
    "spectr.serving.suspicion": "spectr.serving.outliers",
    "spectr.serving.usage": "spectr.serving.asgi",
    "spectr.serving.validation": "spectr.serving.api_errors",
    "spectr.spectral.basis": "spectr.spectral.align",
    "spectr.tasks.check": "spectr.tasks.task",
    "spectr.tasks.chosen": "spectr.tasks.rows",
    "spectr.tasks.sources": "spectr.tasks.rows",
    "spectr.training.checkpoint": "spectr.training.fit",
    "spectr.training.gates": "spectr.training.gate_training",
    "spectr.training.interrupt": "spectr.training.fit",
    "spectr.training.plan": "spectr.training.training_plan",
    "spectr.training.publish": "spectr.training.adapter",
    "spectr.training.report": "spectr.training.adapter",
    "spectr.training.run": "spectr.training.training_run",
    "spectr.training.settings": "spectr.training.training_settings",
    "spectr.versions": "spectr.hashing",
    "spectr.vllm.cache_salt": "spectr.vllm.runner",
    "spectr.vllm.config": "spectr.vllm.quantization",
    "spectr.vllm.deciding": "spectr.vllm.prompt_decisions",
    "spectr.vllm.hearing": "spectr.vllm.probes",
    "spectr.vllm.method": "spectr.vllm.quantization",
    "spectr.vllm.packed": "spectr.vllm.layer",
    "spectr.vllm.product": "spectr.vllm.layer",
    "spectr.vllm.recording": "spectr.vllm.routing_records",
    "spectr.vllm.routing": "spectr.vllm.layer_routing",
    "spectr.vllm.salt": "spectr.vllm.runner",
    "spectr.vllm.score_transforms": "spectr.vllm.layer_routing",
    "spectr.vllm.served": "spectr.vllm.router_set",
    "spectr.vllm.session": "spectr.vllm.worker_state",
    "spectr.vllm.shards": "spectr.vllm.tensor_parallel",
    "spectr.vllm.ways": "spectr.vllm.layer_routing",
}


class _Renamed(MetaPathFinder, Loader):
    """Resolves an old name to the module itself, so that both names are one object."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See ``importlib``."""
        return ModuleSpec(fullname, self) if new_name(fullname) is not None else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module of the new name."""
        name = new_name(spec.name)
        assert name is not None
        warnings.warn(f"the module {spec.name} is now {name}", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(name)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: the module has run already, and keeps its own specification."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def new_name(old: str) -> str | None:
    """The current name of a module; ``None`` for a name that is not an old one."""
    if not old.startswith("spectr."):
        return None
    head, tail = old, ""
    while head:
        if head in MODULES:
            return MODULES[head] + tail
        head, _, last = head.rpartition(".")
        tail = f".{last}{tail}"
    return None


def install() -> None:
    """Make Python resolve old names, before other finders: an old package's modules would be found a second time."""
    if not any(isinstance(finder, _Renamed) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Renamed())


_OPTIONS: dict[Any, dict[str, str | None]] = {}  # by class, the new names of its options


def options_renamed(**names: str | None) -> Callable[[type[T]], type[T]]:
    """Make a dataclass accept and show options by their old names, with a warning.

    Args:
        names: New names by old names; ``None`` for an option that was removed and has no effect.
    """

    def decorated(kind: type[T]) -> type[T]:
        make: Any = kind.__init__
        shown = signature(kind)

        def init(self: T, **options: Any) -> None:
            make(self, **current_options(kind, options))

        kind.__init__ = init
        kind.__signature__ = shown  # pyright: ignore[reportAttributeAccessIssue]
        _OPTIONS[kind] = names
        for old, new in names.items():
            if new is not None:
                setattr(kind, old, old_attribute(old, new))
        return kind

    return decorated


def old_attribute(old: str, new: str) -> property:
    """An attribute by its old name, with a warning."""
    return property(partial(_read, old=old, new=new), doc=f"The old name of ``{new}``.")


def current_options(make: Any, options: Mapping[str, Any], *, warn: bool = True) -> dict[str, Any]:
    """Options under their current names.

    Args:
        make: What takes the options: a class, or a partial of it.
        options: Values by name; ``"local.top_k"`` is a part of ``local``.
        warn: Whether to warn about old names; false for those in a file.
    """
    names = _OPTIONS.get(make.func if isinstance(make, partial) else make, {})
    current = {}
    for option, value in options.items():
        old, dot, rest = option.partition(".")
        new = names.get(old, old)
        if new is None:
            if warn:
                warnings.warn(f"the option {old} was removed and has no effect", DeprecationWarning, stacklevel=4)
            continue
        if new != old and warn:
            warnings.warn(f"the option {old} is now {new}", DeprecationWarning, stacklevel=4)
        if new + dot + rest in current or (new != old and new + dot + rest in options):
            raise CompositionError(f"{old} is now {new}, and both were given", do=f"remove {old}")
        current[new + dot + rest] = value
    return current


def _read(owner: Any, *, old: str, new: str) -> Any:
    warnings.warn(f"{type(owner).__name__}.{old} is now {new}", DeprecationWarning, stacklevel=2)
    return getattr(owner, new)
