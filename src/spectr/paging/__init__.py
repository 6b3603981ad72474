"""Experts that stay on disk until a prompt needs them: a cache of limited size, and policies for eviction."""

from spectr.lazy import lazy
from spectr.paging.expert_cache import CacheStatistics, ExpertCache
from spectr.paging.policies import DEFAULT_POLICY, EvictionPolicy, Lfu, Lru, Polar, get_policy

__all__ = [
    "DEFAULT_POLICY",
    "CacheStatistics",
    "EvictionPolicy",
    "ExpertCache",
    "Lfu",
    "Lru",
    "Polar",
    "get_policy",
]
__getattr__ = lazy(
    __name__, {}, renamed={"Policy": "EvictionPolicy", "Shelf": "ExpertCache", "ShelfFigures": "CacheStatistics"}
)
