"""Count the operations of a call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_flops(run: Callable[[], Any]) -> int:
    """Operations of the matrix products in a call; one multiply-add counts as 2."""
    aten = torch.ops.aten
    unknown = {aten._embedding_bag: _bag_flops, aten._embedding_bag_forward_only: _bag_flops, aten.addmm_: _addmm_flops}
    with FlopCounterMode(display=False, custom_mapping=unknown) as counter:
        run()
    return int(counter.get_total_flops())


def forward_flops(model: Any, input_ids: torch.Tensor) -> int:
    """Operations of one forward call without a cache, with logits for the last token only."""
    return count_flops(lambda: model(input_ids=input_ids, use_cache=False, logits_to_keep=1))


def _bag_flops(weights: tuple[int, int], rows: tuple[int, ...], *_: Any, **__: Any) -> int:
    """A weighted sum of rows, which torch's counter does not support."""
    return 2 * math.prod(rows) * weights[1]


def _addmm_flops(out: tuple[int, int], left: tuple[int, int], *_: Any, **__: Any) -> int:
    """An in-place addition of a product, which torch's counter does not support."""
    return 2 * out[0] * out[1] * left[1]
