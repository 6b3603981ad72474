"""Merge several experts before anything runs: into a PEFT adapter, or into the base model's weights.

recipe = Recipe(experts=("agnews", "sst2"), method=Ties(density=0.2), weights=(1.0, 0.5))
merged = merge_adapter(library, recipe, rank=16)
save_merged_adapter(merged, library, "runs/merged")

All computations use the products ``delta_t = scale_t B_t A_t``, module by module, in float32.
"""

from spectr.merging.dare import Dare, DareTies
from spectr.merging.into_base import MergedBase, merge_into
from spectr.merging.knots import Knots
from spectr.merging.linear import Average, GenKnowSub, Linear, Products
from spectr.merging.lowrank import LowRank
from spectr.merging.merge import MergedAdapter, merge_adapter, merged_modules
from spectr.merging.method import Method, Site, get_method, method_names
from spectr.merging.publish import save_merged_adapter, save_merged_model
from spectr.merging.recipe import Recipe, make_recipe
from spectr.merging.subtract import residual_experts
from spectr.merging.ties import Ties

__all__ = [
    "Average",
    "Dare",
    "DareTies",
    "GenKnowSub",
    "Knots",
    "Linear",
    "LowRank",
    "MergedAdapter",
    "MergedBase",
    "Method",
    "Products",
    "Recipe",
    "Site",
    "Ties",
    "get_method",
    "make_recipe",
    "merge_adapter",
    "merge_into",
    "merged_modules",
    "method_names",
    "residual_experts",
    "save_merged_adapter",
    "save_merged_model",
]
