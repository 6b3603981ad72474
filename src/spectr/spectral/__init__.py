"""Pure torch mathematics: spectral alignment, and stacks of aligned experts.

Legend of shape suffixes, here and in all numerics: ``T`` tokens, ``E`` experts, ``R`` rank, ``P`` all ranks of a
stack's experts one after the other, ``I`` inputs, ``O`` outputs, ``N`` a batch of factor pairs.
"""

from spectr.spectral.align import Aligned, align
from spectr.spectral.prototypes import Codes, Prototypes
from spectr.spectral.rotate import Rotation, rotate
from spectr.spectral.stack import (
    AlignedExpert,
    InputState,
    Prepared,
    Share,
    SideData,
    Stack,
    State,
    norms,
    remade,
    segment_norms,
)

__all__ = [
    "Aligned",
    "AlignedExpert",
    "Codes",
    "InputState",
    "Prepared",
    "Prototypes",
    "Rotation",
    "Share",
    "SideData",
    "Stack",
    "State",
    "align",
    "norms",
    "remade",
    "rotate",
    "segment_norms",
]
