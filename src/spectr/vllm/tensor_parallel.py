"""The part of a layer's factors that this rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.errors import CompositionError


@dataclass(frozen=True, kw_only=True)
class Split:
    """How tensor parallelism cuts one layer.

    Attributes:
        rank: This rank.
        ranks: The number of ranks.
        by_input: Whether each rank sees a part of the input (row-parallel), and the output is the sum over the ranks.
        parts: The length on this rank of each part of the layer's output.
        whole: The length of each part in the checkpoint.
        index: The number of the shard that this rank holds of each part.
    """

    rank: int
    ranks: int
    by_input: bool
    parts: tuple[int, ...]
    whole: tuple[int, ...]
    index: tuple[int, ...]

    @staticmethod
    def of(layer: Any, parts: Sequence[int]) -> Split:
        """The split of one of vLLM's linear layers, whose output on this rank has these parts."""
        from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear

        cut = isinstance(layer, (ColumnParallelLinear, RowParallelLinear))
        rank, ranks = (layer.tp_rank, layer.tp_size) if cut else (0, 1)
        by_input = isinstance(layer, RowParallelLinear) and ranks > 1
        copies = [1] * len(parts)
        if isinstance(layer, QKVParallelLinear):  # key and value heads may lie on several ranks
            copies = [1, layer.num_kv_head_replicas, layer.num_kv_head_replicas]
        shards = [1 if by_input else ranks // copy for copy in copies]
        return Split(
            rank=rank,
            ranks=ranks,
            by_input=by_input,
            parts=tuple(parts),
            whole=tuple(part * n for part, n in zip(parts, shards, strict=True)),
            index=tuple(0 if by_input else rank // copy for copy in copies),
        )

    def inputs(self, A_PI: Float[Tensor, "P I"]) -> Float[Tensor, "P J"]:
        """The columns of an input factor for this rank's part of the input."""
        if not self.by_input:
            return A_PI
        size = A_PI.shape[1] // self.ranks
        return A_PI[:, self.rank * size : (self.rank + 1) * size]

    def outputs(self, B_OP: Float[Tensor, "O P"], module: int, modules: int) -> Float[Tensor, "N Q"]:
        """This rank's share of an output factor.

        For a row-parallel layer, whose outputs are summed over the ranks, the share is some columns. For other layers
        it is the rows of this rank's shard.

        Args:
            B_OP: The output factor of one module.
            module: The module's number within the layer.
            modules: The number of modules in the layer.
        """
        if self.by_input:
            return B_OP[:, self.columns(B_OP.shape[1])]
        which = [module] if modules == len(self.parts) else list(range(len(self.parts)))
        start, rows = 0, []
        for part in which:
            first = start + self.index[part] * self.parts[part]
            rows.append(B_OP[first : first + self.parts[part]])
            start += self.whole[part]
        return torch.cat(rows)

    def columns(self, rows: int) -> slice:
        """The rows of ``h`` for which this rank adds products."""
        if not self.by_input:
            return slice(0, rows)
        return slice(rows * self.rank // self.ranks, rows * (self.rank + 1) // self.ranks)

    def places(self, modules: int) -> list[tuple[int, int]]:
        """Where each packed module's output begins on this rank, and its length."""
        if modules == 1:
            return [(0, sum(self.parts))]
        begins = [sum(self.parts[:part]) for part in range(len(self.parts))]
        return list(zip(begins, self.parts, strict=True))

    def check(self, name: str, modules: Sequence[str]) -> None:
        """Raise :class:`CompositionError` if the packed modules are not the layer's parts."""
        if len(modules) not in (1, len(self.parts)):
            raise CompositionError(
                f"layer {name} packs {', '.join(modules)} in {len(self.parts)} parts",
                expected="one part for each module",
                do="serve this model with --engine transformers",
            )
