"""SpectR: one language model and a folder of LoRA experts become one model that chooses experts for each token or
prompt.

library = spectr.ExpertLibrary.open("experts/")
routed = spectr.compose(model, library, router=spectr.Spectr(top_k=4))
"""

from importlib.metadata import version
from typing import TYPE_CHECKING

from spectr.lazy import lazy
from spectr.renamed import install

if TYPE_CHECKING:
    from spectr import (
        evaluation as evaluation,
        extraction as extraction,
        guidance as guidance,
        merging as merging,
        models as models,
        paging as paging,
        plots as plots,
        tasks as tasks,
        training as training,
    )
    from spectr.calibration import calibrate
    from spectr.composed_model import load_composed, save_composed
    from spectr.composition import Routed, compose
    from spectr.errors import SpectrError
    from spectr.indexing import build_index
    from spectr.layers import RoutedLinear, Trace, trace
    from spectr.library import ExpertLibrary
    from spectr.routers import (
        Arrow,
        Calibrated,
        Glider,
        Lag,
        Oracle,
        Phatgoose,
        PromptPolicy,
        Router,
        Seqr,
        SeqrNormalised,
        Shortlist,
        Spectr,
        Uniform,
        get_router,
        router_names,
    )

_HOMES = {
    "calibration": ("calibrate",),
    "composed_model": ("load_composed", "save_composed"),
    "composition": ("Routed", "compose"),
    "errors": ("SpectrError",),
    "indexing": ("build_index",),
    "layers": ("RoutedLinear", "Trace", "trace"),
    "library": ("ExpertLibrary",),
    "routers": (
        "Arrow",
        "Calibrated",
        "Glider",
        "Lag",
        "Oracle",
        "Phatgoose",
        "PromptPolicy",
        "Router",
        "Seqr",
        "SeqrNormalised",
        "Shortlist",
        "Spectr",
        "Uniform",
        "get_router",
        "router_names",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = ("evaluation", "extraction", "guidance", "merging", "models", "paging", "plots", "tasks", "training")

__version__ = version("spectr-lora")
install()
__all__ = [
    "Arrow",
    "Calibrated",
    "ExpertLibrary",
    "Glider",
    "Lag",
    "Oracle",
    "Phatgoose",
    "PromptPolicy",
    "Routed",
    "RoutedLinear",
    "Router",
    "Seqr",
    "SeqrNormalised",
    "Shortlist",
    "Spectr",
    "SpectrError",
    "Trace",
    "Uniform",
    "__version__",
    "build_index",
    "calibrate",
    "compose",
    "get_router",
    "load_composed",
    "router_names",
    "save_composed",
    "trace",
]


__getattr__ = lazy(__name__, dict.fromkeys(_MODULES, "") | _HOME_OF)


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})
