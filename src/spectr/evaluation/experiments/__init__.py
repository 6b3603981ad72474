"""The paper's experiments, one file each; a new one is a file and a line here."""

from typing import TYPE_CHECKING

from spectr.errors import DataError
from spectr.lazy import lazy
from spectr.registry import Registry

if TYPE_CHECKING:
    from spectr.evaluation.experiments.setup import ExperimentSetup, Result

_NAMES = (
    "quality",
    "similarity",
    "tokens",
    "routing",
    "ranks",
    "multitask",
    "heldout",
    "wording",
    "mixed",
    "robustness",
    "agreement",
    "costs",
)

EXPERIMENTS: "Registry[Result]" = Registry(
    kind="experiment",
    group="spectr.experiments",
    error=DataError,
    entries={name: f"spectr.evaluation.experiments.{name}:{name}" for name in _NAMES},
)

__all__ = ["EXPERIMENTS", "ExperimentSetup", "Result"]
__getattr__ = lazy(__name__, {"ExperimentSetup": "setup", "Result": "setup"}, renamed={"Bench": "ExperimentSetup"})
