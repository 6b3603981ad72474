"""Merge the chosen experts' factors first, then apply them."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

from spectr.combine.combination import Combination
from spectr.library.needs import EqualRanks


def factors() -> Combination:
    """The merged output factor applied to the merged ``A x``."""
    return Combination(merge_factors, needs=(EqualRanks("factors"),))


def raw_factors() -> Combination:
    """Like :func:`factors`, with the adapters' own factors, as they were trained, instead of the router's."""
    return Combination(merge_raw_factors, needs=(EqualRanks("raw-factors"),), raw=True)


def merge_factors(
    h_TP: Float[Tensor, "*T P"],
    weights_TE: Float[Tensor, "*T E"],
    B_OP: Float[Tensor, "O P"],
    owner_P: Int[Tensor, " P"],
) -> Float[Tensor, "*T O"]:
    """``(sum_t w_t B_t) (sum_t w_t h_t)``, the form in the paper's experiments. Needs equal ranks.

    An expert's own term has the weight ``w_t^2`` (``1 / k^2``). The cross terms ``B_t h_u`` depend on the signs of the
    singular vectors; see :func:`spectr.spectral.align`.

    Args:
        h_TP: ``A x`` of every expert.
        weights_TE: Weight of every expert; zero if it is not chosen.
        B_OP: Output factors of every expert.
        owner_P: The expert of each column of ``B_OP``.

    Source: SpectR eq. 10 to 12.
    """
    return linear(merged_products(h_TP, weights_TE), B_OP)


def merge_raw_factors(
    h_TP: Float[Tensor, "*T P"],
    weights_TE: Float[Tensor, "*T E"],
    B_OP: Float[Tensor, "O P"],
    owner_P: Int[Tensor, " _"],
) -> Float[Tensor, "*T O"]:
    """``(sum_t w_t c_t B_t) (sum_t w_t A_t x)`` with the factors of the adapters' files. Needs equal ranks.

    The cross terms ``B_t A_u`` depend on the basis that each adapter was trained in, which an adapter with the same
    update need not share. The scale ``c_t`` belongs to ``B_t``; among experts of one scale its place makes no
    difference.

    Args:
        h_TP: ``A_t x`` of every expert.
        weights_TE: Weight of every expert; zero if it is not chosen.
        B_OP: ``c_t B_t`` of every expert.
        owner_P: Not used, as ranks are equal.

    Source: mttl, the authors' library of Arrow and mu (Ostapenko et al., 2024), by its default
    ``lora_merge_after=False``.
    """
    return linear(merged_products(h_TP, weights_TE), B_OP)


def merged_products(h_TP: Float[Tensor, "*T P"], weights_TE: Float[Tensor, "*T E"]) -> Float[Tensor, "*T P"]:
    """The factor of the output factors in :func:`merge_factors`: ``w_t sum_u w_u h_u`` at the place of expert t."""
    weights_TE = weights_TE.to(h_TP.dtype)
    h_TER = h_TP.unflatten(-1, (weights_TE.shape[-1], -1))
    merged_TR = (weights_TE[..., None, :] @ h_TER).squeeze(-2)
    return (weights_TE[..., None] * merged_TR[..., None, :]).flatten(-2)
