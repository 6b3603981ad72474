"""Evidence: how well each expert fits a whole prompt. One file per kind."""

from spectr.routers.evidence.descriptions import DescriptionSimilarity
from spectr.routers.evidence.evidence import (
    ComparingGuide,
    Evidence,
    Found,
    Guide,
    ModuleEvidence,
    ModuleScores,
    Reader,
    Source,
)
from spectr.routers.evidence.prototype_means import PrototypeMeans
from spectr.routers.evidence.score_means import ScoreMeans

__all__ = [
    "ComparingGuide",
    "DescriptionSimilarity",
    "Evidence",
    "Found",
    "Guide",
    "ModuleEvidence",
    "ModuleScores",
    "PrototypeMeans",
    "Reader",
    "ScoreMeans",
    "Source",
]
