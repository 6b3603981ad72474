"""Decompositions of base weights, which take minutes for large models: made once, and kept in a library's folder.

``initial-factors/<kind>-<rank>-<module>.safetensors`` holds the factors, and the hash of the weight that they are of.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from spectr.atomic_write import replacing, save_readable
from spectr.spectral.initial import InitialFactors, olora_factors, pissa_factors

INITIAL_FOLDER = "initial-factors"
_FORMAT = "1"


def initial_factors(
    W_OI: Float[Tensor, "O I"], module: str, kind: str, rank: int, folder: Path | None, *, transposed: bool
) -> InitialFactors:
    """The initial factors of a weight, float32 on the CPU: read where they are kept, else made and kept.

    Args:
        W_OI: The weight, float32.
        module: Its layer's name.
        kind: ``"pissa"`` or ``"olora"``.
        rank: Of the factors.
        folder: Of the library; ``None`` keeps nothing.
        transposed: Whether the factors are those of ``W^T``, transposed.
    """
    if folder is None:
        return _made(W_OI, kind, rank, transposed)
    path = folder / INITIAL_FOLDER / f"{kind}-{rank}-{module}.safetensors"
    digest = hashlib.sha256(W_OI.contiguous().cpu().numpy().tobytes()).hexdigest()
    found = _read(path, digest)
    if found is None:
        found = _made(W_OI, kind, rank, transposed)
        with suppress(OSError):  # a library that cannot be written can still be used
            path.parent.mkdir(exist_ok=True)
            with replacing(path, scratch_in=folder) as scratch:  # where the library deletes leftovers
                save_readable({"A": found.A_RI, "B": found.B_OR}, scratch, {"format": _FORMAT, "weight": digest})
    return found


def _made(W_OI: Tensor, kind: str, rank: int, transposed: bool) -> InitialFactors:
    decompose = {"pissa": pissa_factors, "olora": olora_factors}[kind]
    A, B = decompose(W_OI.mT if transposed else W_OI, rank)
    A, B = (B.mT, A.mT) if transposed else (A, B)
    return InitialFactors(A.contiguous().cpu(), B.contiguous().cpu())


def _read(path: Path, digest: str) -> InitialFactors | None:
    """What is kept for this very weight; ``None`` for another one, and for a file that cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            if (facts.get("format"), facts.get("weight")) != (_FORMAT, digest):
                return None
            return InitialFactors(file.get_tensor("A"), file.get_tensor("B"))
    except Exception:  # safetensors raises its own types, OSError among them; the file is written again
        return None
