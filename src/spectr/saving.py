"""Writing safetensors files that others can read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_readable(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; safetensors itself makes it readable by its owner alone."""
    save_file(dict(tensors), path, metadata=dict(metadata))
    path.chmod(0o644)
