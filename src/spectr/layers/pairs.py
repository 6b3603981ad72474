"""Tokens as a mixture of experts (MoE) reads them: one row for each token and each MoE expert that it goes to.

Legend: N tokens, K MoE experts of each token, S = N K pairs, J MoE experts, I inputs, E LoRA experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from spectr.layers.batch_routing import FixedWeights, LayerCall, spread


class Pairs(NamedTuple):
    """The input of a fused parameter, whose matrix ``j`` is MoE expert ``j``'s; pairs of one MoE expert lie together.

    Attributes:
        x_SI: What each pair's matrix is multiplied with.
        matrix_S: The pair's MoE expert.
        place_S: Where it was among the tokens' MoE experts: ``n K + k``.
        counts: By MoE expert its number of pairs.
        slots: K.
        tokens_NH: The tokens' hidden states, by which it is known which tokens of the batch they are.
    """

    x_SI: Float[Tensor, "S I"]
    matrix_S: Int[Tensor, " S"]
    place_S: Int[Tensor, " S"]
    counts: tuple[int, ...]
    slots: int
    tokens_NH: Float[Tensor, "N H"]

    @staticmethod
    def of(x_NI: Float[Tensor, "N I"], index_NK: Int[Tensor, "N K"], matrices: int) -> Pairs:
        """The pairs of tokens with the MoE experts that a gate gave them."""
        matrix_S, place_S = index_NK.flatten().sort(stable=True)
        slots = index_NK.shape[-1]
        counts = matrix_S.bincount(minlength=matrices).tolist()
        return Pairs(x_NI[place_S // slots], matrix_S, place_S, tuple(counts), slots, x_NI)

    @property
    def token_S(self) -> Int[Tensor, " S"]:
        """Each pair's token."""
        return self.place_S // self.slots

    def products(self, A_JPI: Float[Tensor, "J P I"]) -> Float[Tensor, "S P"]:
        """``A_j x`` of each pair."""
        return torch.cat([self.x_SI[rows] @ A_JPI[j].mT for j, rows in self.groups()])

    def groups(self) -> Iterator[tuple[int, slice]]:
        """The MoE experts that have pairs, each with the place of these; where there are none, the first."""
        start = 0
        if not sum(self.counts):
            yield 0, slice(0, 0)
        for matrix, count in enumerate(self.counts):
            if count:
                yield matrix, slice(start, start + count)
            start += count

    def some(self, kept_N: Bool[Tensor, " N"]) -> Pairs:
        """The pairs of some tokens, with new token numbers."""
        kept_S = kept_N[self.token_S]
        number_N = kept_N.cumsum(0) - 1
        place_S = self.place_S[kept_S]
        place_S = number_N[place_S // self.slots] * self.slots + place_S % self.slots
        matrix_S = self.matrix_S[kept_S]
        counts = matrix_S.bincount(minlength=len(self.counts)).tolist()
        return Pairs(self.x_SI[kept_S], matrix_S, place_S, tuple(counts), self.slots, self.tokens_NH[kept_N])

    def by_token(self, rows_SX: Float[Tensor, "S X"]) -> Float[Tensor, "N K X"]:
        """Numbers of the pairs in the order of the tokens and their MoE experts."""
        ordered = torch.empty_like(rows_SX).index_copy(0, self.place_S, rows_SX)
        return ordered.unflatten(0, (-1, self.slots))

    def calls(self, call: LayerCall, layer: nn.Module) -> Iterator[tuple[Float[Tensor, "_ I"], slice, LayerCall]]:
        """For each MoE expert its inputs, their places, and what holds for them, of what holds for rows of a batch."""
        whole = _mapped(call, lambda rows_BTX: self._rows(rows_BTX, layer))._replace(observe=None)
        for matrix, rows in self.groups():
            part = _mapped(whole, lambda some, rows=rows: some if some.shape[1] == 1 else some[:, rows])
            own = (None if factors is None else factors.of_matrix(matrix) for factors in (call.factors, call.shown))
            yield self.x_SI[rows], rows, part._replace(**dict(zip(("factors", "shown"), own, strict=True)))

    def _rows(self, rows_BTX: Tensor, layer: nn.Module) -> Tensor:
        if rows_BTX.shape[:2] == (1, 1):
            return rows_BTX
        rows_NX = spread(rows_BTX, layer, self.tokens_NH)
        return rows_NX[self.token_S][None] if len(rows_NX) > 1 else rows_NX[None]


LayerInput = Float[Tensor, "*T I"] | Pairs  # of a routed layer; pairs of one that holds several matrices


def _mapped(call: LayerCall, change: Callable[[Tensor], Tensor]) -> LayerCall:
    """A call with other rows of weights, priors and experts to choose from."""
    fixed = None if call.fixed is None else FixedWeights(*map(change, call.fixed))
    prior, among = (None if rows is None else change(rows) for rows in (call.prior_BTE, call.among_BTE))
    return call._replace(fixed=fixed, prior_BTE=prior, among_BTE=among)
