"""Evidence: how well each expert fits a whole prompt. One file for each kind."""

from spectr.routers.evidence.base import Evidence, Found, Guide, ModuleEvidence, ModuleScores, Reader, Source
from spectr.routers.evidence.descriptions import DescriptionSimilarity
from spectr.routers.evidence.prototype_votes import PrototypeVotes
from spectr.routers.evidence.spectral_votes import SpectralVotes

__all__ = [
    "DescriptionSimilarity",
    "Evidence",
    "Found",
    "Guide",
    "ModuleEvidence",
    "ModuleScores",
    "PrototypeVotes",
    "Reader",
    "Source",
    "SpectralVotes",
]
