"""Routers: how a token's experts are scored and chosen. Each is a small frozen dataclass that is its configuration."""

from spectr.lazy import lazy
from spectr.routers.arrow import Arrow
from spectr.routers.calibrated import Calibrated
from spectr.routers.evidence import (
    DescriptionSimilarity,
    Evidence,
    Found,
    ModuleEvidence,
    PrototypeMeans,
    ScoreMeans,
)
from spectr.routers.glider import Glider
from spectr.routers.lag import Lag
from spectr.routers.oracle import Oracle
from spectr.routers.phatgoose import Phatgoose
from spectr.routers.policy import PromptPolicy, PromptRouter, token_router
from spectr.routers.registries import get_router, router_names
from spectr.routers.router import LengthRouter, Router, ShortlistRouter, check_needs, first_lack, residents
from spectr.routers.seqr import Seqr
from spectr.routers.seqr_normalised import SeqrNormalised
from spectr.routers.shortlist import Shortlist
from spectr.routers.spectr import Spectr
from spectr.routers.uniform import Uniform
from spectr.routers.use import AddToScores, HoldWeights, KeepShortlist, MultiplyScores, Use

__all__ = [
    "AddToScores",
    "Arrow",
    "Calibrated",
    "DescriptionSimilarity",
    "Evidence",
    "Found",
    "Glider",
    "HoldWeights",
    "KeepShortlist",
    "Lag",
    "LengthRouter",
    "ModuleEvidence",
    "MultiplyScores",
    "Oracle",
    "Phatgoose",
    "PromptPolicy",
    "PromptRouter",
    "PrototypeMeans",
    "Router",
    "ScoreMeans",
    "Seqr",
    "SeqrNormalised",
    "Shortlist",
    "ShortlistRouter",
    "Spectr",
    "Uniform",
    "Use",
    "check_needs",
    "first_lack",
    "get_router",
    "residents",
    "router_names",
    "token_router",
]

__getattr__ = lazy(__name__, {}, renamed={"GuidedRouter": "PromptRouter", "ProbingRouter": "PromptRouter"})
