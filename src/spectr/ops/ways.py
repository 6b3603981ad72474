"""The ways in which C and torch can compute a layer, and which of them serves how many tokens.

A way is named by who computes the base layer and how the experts are added:

========== ======================================================================================
rows       all in C, which reads each weight once and multiplies it with every token
lanes      all in C, by blocks of rows and tokens
tiles      all in C, by the processor's matrix unit
torch+rows torch's product for the base layer, the experts as by ``rows``; so ``torch+lanes`` and ``torch+tiles``
torch+sums torch's products for the base layer and ``A x``, then the chosen experts' outputs one by one
torch+dense torch's products for the base layer, ``A x`` and all ``B``, with zeros for what is not chosen
float+sums as ``torch+sums``, of bfloat16 whose products are made in float32
float+dense as ``torch+dense``, likewise
torch      no kernel
========== ======================================================================================
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Mapping
from typing import NamedTuple

import torch

from spectr.errors import SpectrError

TOKENS = (1, 4, 16, 64, 256)  # that are timed; other counts use the nearest
TORCH = "torch"
_AT_ONCE = ("rows", "lanes", "tiles")
WAYS = (*_AT_ONCE, *(f"torch+{how}" for how in (*_AT_ONCE, "sums", "dense")), "float+sums", "float+dense")
_SWITCH = "SPECTR_KERNELS"

Table = tuple[str, ...]  # a way for each of TOKENS


class Shape(NamedTuple):
    """What the time of a layer depends on.

    Attributes:
        dtype: Of everything.
        inputs: Of the layer.
        outputs: Of the layer.
        rank: Of each expert.
        experts: How many there are.
        k: How many of them a token takes; 0 where weights are fixed.
    """

    dtype: torch.dtype
    inputs: int
    outputs: int
    rank: int
    experts: int
    k: int

    @property
    def key(self) -> str:
        """A name in a file. Numbers of experts that differ by less than a third or so share one."""
        dtype, inputs, outputs, rank, experts, k = self
        step = 1 << max(experts.bit_length() - 2, 0)
        return f"{str(dtype).removeprefix('torch.')} {inputs} {outputs} {rank} {experts // step * step} {k}"


def place_of(tokens: int) -> int:
    """The place in a :data:`Table` for this number of tokens."""
    return min(tokens.bit_length() // 2, len(TOKENS) - 1)


def after_base(way: str) -> bool:
    """Whether a way can take the base layer's output from anybody."""
    return way.startswith(TORCH)


def fastest(times: list[Mapping[str, float]], among: Callable[[str], bool] = bool) -> Table:
    """The fastest way for each number of tokens, in seconds by way; torch where nothing is known."""
    return tuple(min(filter(among, seconds), key=seconds.__getitem__, default=TORCH) for seconds in times)


class Wanted(NamedTuple):
    """A way that the user wants.

    Attributes:
        way: Its name.
        most: Tokens up to which it is wanted; ``None``: any number.
    """

    way: str
    most: int | None


def switched_off() -> bool:
    """Whether the user wants no kernels."""
    return os.environ.get(_SWITCH) == "0"


def wanted() -> tuple[Wanted, ...]:
    """What the user wants in place of the fastest: ``SPECTR_KERNELS=rows:16,torch+sums``.

    Raises:
        SpectrError: There is no such way.
    """
    text = os.environ.get(_SWITCH, "")
    wishes = []
    for part in text.split(",") if text not in ("", "0", "1") else ():
        way, _, most = part.strip().partition(":")
        if way not in (*WAYS, TORCH) or not (most.isdecimal() or not most):
            raise SpectrError(
                f"{_SWITCH}={text}",
                expected=f"0, 1, or implementations, each with the most tokens it serves: rows:16,torch+sums; they are "
                f"{', '.join((*WAYS, TORCH))}",
            )
        wishes.append(Wanted(way, int(most) if most else None))
    return tuple(wishes)


def as_wanted(wishes: tuple[Wanted, ...], possible: Container[str]) -> Table:
    """For each number of tokens the first of the wishes that is possible and wanted there; else torch."""
    return tuple(
        next((way for way, most in wishes if way in possible and (most is None or tokens <= most)), TORCH)
        for tokens in TOKENS
    )


def described(table: Table) -> str:
    """A table for reports, as ``rows for 1, 4, 16 tokens, torch+sums for 64, 256``."""
    counts: dict[str, list[str]] = {}
    for way, tokens in zip(table, TOKENS, strict=True):
        counts.setdefault(way, []).append(str(tokens))
    return ", ".join(f"{way} for {' '.join(some)}" for way, some in counts.items()) + " tokens"
