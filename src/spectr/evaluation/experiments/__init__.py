"""The paper's experiments, one file each; a new one is a file and a line here."""

from spectr.evaluation.experiments.agreement import agreement
from spectr.evaluation.experiments.base import Bench, Result
from spectr.evaluation.experiments.costs import costs
from spectr.evaluation.experiments.heldout import heldout
from spectr.evaluation.experiments.mixed import mixed
from spectr.evaluation.experiments.multitask import multitask
from spectr.evaluation.experiments.quality import quality
from spectr.evaluation.experiments.ranks import ranks
from spectr.evaluation.experiments.robustness import robustness
from spectr.evaluation.experiments.routing import routing
from spectr.evaluation.experiments.similarity import similarity
from spectr.evaluation.experiments.tokens import tokens
from spectr.evaluation.experiments.wording import wording

EXPERIMENTS = {
    "quality": quality,
    "similarity": similarity,
    "tokens": tokens,
    "routing": routing,
    "ranks": ranks,
    "multitask": multitask,
    "heldout": heldout,
    "wording": wording,
    "mixed": mixed,
    "robustness": robustness,
    "agreement": agreement,
    "costs": costs,
}

__all__ = ["EXPERIMENTS", "Bench", "Result"]
