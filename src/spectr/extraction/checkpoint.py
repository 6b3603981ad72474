"""A model's safetensors files, read a few rows at a time, and which of their tensors form its parameters."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor

from spectr.adapters.expert import open_safetensors
from spectr.errors import ModelError, SpectrError, collecting, raise_together
from spectr.folders import json_object

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
        known = json_object(self.folder / "config.json").get("architectures")
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


Convert = Callable[[Sequence[Tensor]], Mapping[str, Tensor]]


class Source(NamedTuple):
    """The tensors of a parameter.

    Attributes:
        keys: Tensors in the files, in the order of joining.
        pattern: The conversion's pattern of each tensor; empty if a single tensor is the parameter.
        convert: Maps these tensors to parameters by name; ``None`` if a single tensor is the parameter.
    """

    keys: tuple[str, ...]
    pattern: tuple[str, ...] = ()
    convert: Convert | None = None


class Piece(NamedTuple):
    """A parameter or a part of it in a checkpoint: a tensor, or the result of converting several."""

    name: str
    source: Source
    shape: tuple[int, ...]

    @staticmethod
    def of(name: str, source: Source, checkpoint: Checkpoint) -> Piece:
        """The whole parameter."""
        headers = [checkpoint.tensors[key] for key in source.keys]
        if source.convert is None:
            return Piece(name, source, headers[0].shape)
        made = source.convert([torch.empty(header.shape, device="meta") for header in headers])
        return Piece(name, source, tuple(made[name].shape))

    @staticmethod
    def tensor(name: str, key: str, checkpoint: Checkpoint) -> Piece:
        """One of several tensors that are joined."""
        return Piece(name, Source((key,)), checkpoint.tensors[key].shape)

    def blocks(self, rows: Rows) -> Iterator[Tensor]:
        """Its blocks of whole rows; what is converted is read whole."""
        if self.source.convert is None:
            yield from rows(self.source.keys[0])
            return
        whole = self.source.convert([torch.cat(list(rows(key))) for key in self.source.keys])[self.name]
        step = block_rows(self.shape)
        for start in range(0, self.shape[0], step):
            yield whole[start : start + step]

    def memory(self, checkpoint: Checkpoint) -> int:
        """Bytes in memory at a time in addition to a block: what is converted, and the result."""
        headers = [checkpoint.tensors[key] for key in self.source.keys] if self.source.convert else []
        return 2 * sum(header.bytes for header in headers)


def find_sources(model: Any, tensors: Mapping[str, Header]) -> dict[str, Source]:
    """The tensors of each parameter; a tensor that belongs to no parameter is listed under its own name.

    Args:
        model: Of transformers, on the meta device.
        tensors: A checkpoint's.

    Source: ``convert_and_load_state_dict_in_model`` of ``transformers.core_model_loading``, which this follows.
    """
    state, renaming = model.state_dict(), _Renaming(model)
    found: dict[str, Source] = {}
    parts: dict[str, list[tuple[str, str]]] = {}
    for key in sorted(tensors, key=renaming.order):
        name, pattern = renaming.name(key, state)
        if pattern is None:
            found[name] = Source((key,))
        else:
            parts.setdefault(name, []).append((key, pattern))
    for name, pairs in parts.items():
        keys, patterns = zip(*pairs, strict=True)
        source = Source(keys, patterns, renaming.conversion(name, patterns))
        found |= dict.fromkeys(_targets(source, tensors), source)
    return found


def _targets(source: Source, tensors: Mapping[str, Header]) -> Collection[str]:
    """The parameters that a conversion makes; none where tensors are missing, so that it fails."""
    assert source.convert is not None
    try:
        return source.convert([torch.empty(tensors[key].shape, device="meta") for key in source.keys]).keys()
    except (RuntimeError, ValueError, IndexError):
        return ()


class _Renaming:
    """The conversions of a model's checkpoints; one object serves one checkpoint, since some conversions have state."""

    def __init__(self, model: Any):
        self._model = model
        self._rename: Any  # its annotations are narrower than what transformers passes
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key
        except ImportError:  # transformers 4, whose models have the names of their checkpoints
            self._rename, self.order = None, str
        else:
            # MoE experts are joined in the order of their numbers.
            self._rename, self.order = rename_source_key, dot_natural_key
            transforms = get_model_conversion_mapping(model)
            self._plain = [each for each in transforms if not isinstance(each, WeightConverter)]
            self._converters = [each for each in transforms if isinstance(each, WeightConverter)]
            self._by_pattern = {pattern: each for each in self._converters for pattern in each.source_patterns}

    def name(self, key: str, state: Mapping[str, Tensor]) -> tuple[str, str | None]:
        """The parameter that a tensor is, or is part of, and in the latter case by which pattern of a conversion."""
        prefix = self._model.base_model_prefix
        if self._rename is not None:
            name, pattern = self._rename(key, self._plain, self._converters, prefix, state)
            if name in state:
                return name, pattern
        options = (key, f"{prefix}.{key}", key.removeprefix(f"{prefix}."))
        return next((name for name in options if name in state), key), None

    def conversion(self, name: str, patterns: Sequence[str]) -> Convert:
        """The function from the tensors of these patterns to a conversion's parameters, one of them with this name."""

        def convert(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
            converter = deepcopy(self._by_pattern[patterns[0]])
            for tensor, pattern in zip(tensors, patterns, strict=True):
                converter.add_tensor(name, name, pattern, tensor)  # pyright: ignore[reportArgumentType]
            made = converter.convert(name, model=self._model, config=self._model.config)
            return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}

        return convert
