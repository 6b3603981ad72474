"""Routers: how a token's experts are scored and chosen. Each is a small frozen dataclass that is its configuration."""

from spectr.routers.arrow import Arrow
from spectr.routers.base import (
    GuidedRouter,
    LengthRouter,
    PagedRouter,
    ProbingRouter,
    PromptRouter,
    Router,
    ShortlistRouter,
    check_needs,
    first_lack,
    residents,
)
from spectr.routers.calibrated import Calibrated
from spectr.routers.glider import Glider
from spectr.routers.lag import Lag
from spectr.routers.oracle import Oracle
from spectr.routers.phatgoose import Phatgoose
from spectr.routers.registry import get_router, router_names
from spectr.routers.seqr import Seqr
from spectr.routers.shortlist import Shortlist
from spectr.routers.spectr import Spectr
from spectr.routers.uniform import Uniform

__all__ = [
    "Arrow",
    "Calibrated",
    "Glider",
    "GuidedRouter",
    "Lag",
    "LengthRouter",
    "Oracle",
    "PagedRouter",
    "Phatgoose",
    "ProbingRouter",
    "PromptRouter",
    "Router",
    "Seqr",
    "Shortlist",
    "ShortlistRouter",
    "Spectr",
    "Uniform",
    "check_needs",
    "first_lack",
    "get_router",
    "residents",
    "router_names",
]
