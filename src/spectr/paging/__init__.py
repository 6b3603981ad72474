"""Experts that stay on disk until a prompt calls for them: a cache of a stated size, and who has to leave it."""

from spectr.paging.expert_cache import Shelf, ShelfFigures
from spectr.paging.policies import DEFAULT_POLICY, Lfu, Lru, Polar, Policy, get_policy

__all__ = [
    "DEFAULT_POLICY",
    "Lfu",
    "Lru",
    "Polar",
    "Policy",
    "Shelf",
    "ShelfFigures",
    "get_policy",
]
