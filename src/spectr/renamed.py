"""Old names of modules. They work for one version, with a warning that names the new one (docs/old-names.md)."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODULES = {
    "spectr.adapters.keys": "spectr.adapters.read",
    "spectr.adapters.source": "spectr.adapters.read",
    "spectr.benchmark.report": "spectr.benchmark.comparison",
    "spectr.cli.opened": "spectr.cli.model_loading",
    "spectr.composed": "spectr.composed_model",
    "spectr.composition.readers": "spectr.composition.subset_probes",
    "spectr.composition.watching": "spectr.composition.recorder",
    "spectr.evaluation.answers": "spectr.evaluation.score",
    "spectr.evaluation.experiments.base": "spectr.evaluation.experiments.setup",
    "spectr.evaluation.experiments.compared": "spectr.evaluation.experiments.setup",
    "spectr.evaluation.finding": "spectr.evaluation.expert_recall",
    "spectr.evaluation.shares": "spectr.evaluation.paired_statistics",
    "spectr.evaluation.similarity": "spectr.evaluation.experiments.similarity",
    "spectr.extraction.report": "spectr.extraction.outcome",
    "spectr.layers.certain": "spectr.prompts.bounds",
    "spectr.layers.grouped": "spectr.ops.grouped",
    "spectr.layers.kernels": "spectr.ops",
    "spectr.layers.kernels.rough": "spectr.ops.screening",
    "spectr.layers.kernels.whole": "spectr.ops.fused_linear",
    "spectr.layers.opening": "spectr.prompts.chat_template",
    "spectr.layers.outputs": "spectr.ops.outputs",
    "spectr.layers.probe": "spectr.prompts.probe",
    "spectr.layers.prompt": "spectr.prompts.decision",
    "spectr.merging.base": "spectr.merging.into_base",
    "spectr.merging.registry": "spectr.merging.method",
    "spectr.paging.shelf": "spectr.paging.expert_cache",
    "spectr.plots.family": "spectr.plots.figures",
    "spectr.plots.html": "spectr.plots.pages",
    "spectr.plots.report": "spectr.plots.pages",
    "spectr.saving": "spectr.atomic_write",
    "spectr.serving.answers": "spectr.serving.responses",
    "spectr.serving.engines.conducting": "spectr.serving.engines.batch_scheduling",
    "spectr.serving.extras": "spectr.serving.api_fields",
    "spectr.serving.faults": "spectr.serving.validation",
    "spectr.serving.stopping": "spectr.serving.shutdown",
    "spectr.serving.suspicion": "spectr.serving.outliers",
    "spectr.spectral.basis": "spectr.spectral.align",
    "spectr.tasks.chosen": "spectr.tasks.sources",
    "spectr.training.interrupt": "spectr.training.fit",
    "spectr.training.report": "spectr.training.publish",
    "spectr.vllm.deciding": "spectr.vllm.prompt_decisions",
    "spectr.vllm.hearing": "spectr.vllm.probes",
    "spectr.vllm.recording": "spectr.vllm.routing_records",
    "spectr.vllm.salt": "spectr.vllm.cache_salt",
    "spectr.vllm.served": "spectr.vllm.router_set",
    "spectr.vllm.session": "spectr.vllm.worker_state",
    "spectr.vllm.shards": "spectr.vllm.tensor_parallel",
    "spectr.vllm.ways": "spectr.vllm.score_transforms",
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
        warnings.warn(f"the module {spec.name} is {name} now", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(name)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has run already, and keeps its own specification."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def new_name(old: str) -> str | None:
    """What a module is called now; ``None`` for a name that is not an old one."""
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
    """Have Python resolve old names; before others do, as an old package's modules would be found a second time."""
    if not any(isinstance(finder, _Renamed) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Renamed())
