"""A model's safetensors files, read a few rows at a time."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Shaped
from torch import Tensor

from spectr.adapters.expert import open_safetensors
from spectr.errors import ModelError, SpectrError, collecting, raise_together

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
BLOCK = 1 << 20  # numbers that are read of a tensor at a time, at most
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2}
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_HUB_ID = re.compile(r"^(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?$")
_WHAT = "a folder with a transformers model in safetensors, or a Hub id like org/repo"

Rows = Callable[[str], Iterator[Shaped[Tensor, "..."]]]


class Header(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str
    file: str

    @property
    def bytes(self) -> int:
        """Its size, in the file's dtype."""
        return math.prod(self.shape) * _BYTES.get(self.dtype, 1)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model on disk.

    Attributes:
        folder: Where its files are.
        tensors: Headers by tensor name.
        files: Names of the safetensors files.
    """

    folder: Path
    tensors: Mapping[str, Header]
    files: tuple[str, ...]

    @property
    def model_class(self) -> str | None:
        """The transformers class that saved it, if its configuration names one."""
        known = json.loads((self.folder / "config.json").read_text(encoding="utf-8")).get("architectures")
        return str(known[0]) if known else None

    @contextmanager
    def open(self) -> Iterator[Rows]:
        """Map all files and yield ``rows(name)``, which iterates over a tensor in blocks of whole rows.

        A block holds at most 2^20 numbers (or one row) in the file's dtype, on the CPU.
        """
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(open_safetensors(self.folder / name, kind=ModelError)) for name in self.files
            }

            def rows(name: str) -> Iterator[Tensor]:
                header = self.tensors[name]
                file = files[header.file]
                if not header.shape:
                    yield file.get_tensor(name)
                    return
                part, step = file.get_slice(name), block_rows(header.shape)
                for start in range(0, header.shape[0], step):
                    yield part[start : start + step]

            yield rows


def block_rows(shape: tuple[int, ...]) -> int:
    """Rows in one block of a tensor of that shape."""
    return max(1, BLOCK // max(1, math.prod(shape[1:])))


def read_checkpoint(folder: Path) -> Checkpoint:
    """The headers of a model's tensors; no weights are read.

    Raises:
        ModelError: There are no safetensors weights, the index is damaged, or files are missing or damaged; lists all
            faults.
    """
    files = _files(folder)
    tensors: dict[str, Header] = {}
    problems: list[SpectrError] = []
    for name in files:
        with collecting(problems), open_safetensors(folder / name, kind=ModelError) as file:
            parts = {key: file.get_slice(key) for key in list(file.keys())}
            tensors |= {k: Header(tuple(p.get_shape()), p.get_dtype(), name) for k, p in parts.items()}
    raise_together(f"{folder} cannot be read", problems, ModelError)
    return Checkpoint(folder=folder, tensors=tensors, files=files)


def _files(folder: Path) -> tuple[str, ...]:
    if (folder / INDEX).is_file():
        return tuple(sorted(set(_weight_map(folder / INDEX).values())))
    if (folder / WEIGHTS).is_file():
        return (WEIGHTS,)
    pickles = [name for name in _PICKLES if (folder / name).exists()]
    why = f" holds its weights only as a pickle file ({pickles[0]}), which can run code" if pickles else None
    raise ModelError(
        f"{folder}{why or f' has no {WEIGHTS} and no {INDEX}'}",
        expected=_WHAT,
        do="if you trust it, load it with transformers and save it again" if pickles else "check the path",
    )


def _weight_map(path: Path) -> dict[str, str]:
    try:
        files: Any = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        right = bool(files) and all(isinstance(name, str) and Path(name).name == name for name in files.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        right = False
    if not right:
        raise ModelError(f"{path} has no weight_map of file names", do="download or save the model again")
    return files


def locate_model(source: str | Path) -> Path:
    """The folder of a model; downloads it if ``source`` is a Hub id (``org/repo``, optionally with ``@revision``).

    Raises:
        ModelError: The folder does not exist, and the Hub did not return the repository.
    """
    folder = Path(os.path.expanduser(source))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} has no config.json", expected=_WHAT, do="check the path")
        return folder
    match = _HUB_ID.match(str(source))
    if folder.is_file() or not match or folder.is_absolute() or str(source).startswith("."):
        what = f"{source} is a file" if folder.is_file() else f"there is no folder {source}"
        raise ModelError(what, expected=_WHAT, do="check the path")
    return _from_hub(match["repo"], match["revision"])


def _from_hub(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["config.json", WEIGHTS, INDEX, "model-*.safetensors"]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the client raises its own errors, httpx's and the system's
        raise ModelError(
            f"'{repo}' is not a folder, and the Hub did not return it: {type(error).__name__}",
            expected=_WHAT,
            do="check the name, the network, and whether the repository needs a login (hf auth login)",
        ) from error
