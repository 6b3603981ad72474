"""The paper's experiments, one file each; a new one is a file and a line here."""

from typing import TYPE_CHECKING

from spectr.errors import DataError
from spectr.lazy import lazy
from spectr.registry import Registry

if TYPE_CHECKING:
    from spectr.evaluation.experiments.base import ExperimentSetup, Result

_HOME = "spectr.evaluation.experiments"

EXPERIMENTS: "Registry[Result]" = Registry(
    kind="experiment",
    group="spectr.experiments",
    error=DataError,
    entries={
        "quality": f"{_HOME}.quality:quality",
        "similarity": f"{_HOME}.similarity:similarity",
        "tokens": f"{_HOME}.tokens:tokens",
        "routing": f"{_HOME}.routing:routing",
        "ranks": f"{_HOME}.ranks:ranks",
        "multitask": f"{_HOME}.multitask:multitask",
        "heldout": f"{_HOME}.heldout:heldout",
        "wording": f"{_HOME}.wording:wording",
        "mixed": f"{_HOME}.mixed:mixed",
        "robustness": f"{_HOME}.robustness:robustness",
        "agreement": f"{_HOME}.agreement:agreement",
        "costs": f"{_HOME}.costs:costs",
    },
)

__all__ = ["EXPERIMENTS", "ExperimentSetup", "Result"]
__getattr__ = lazy(__name__, {"ExperimentSetup": "base", "Result": "base"}, renamed={"Bench": "ExperimentSetup"})
