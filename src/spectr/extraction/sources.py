"""Which tensors in a checkpoint's files form a model's parameters, by transformers' own conversions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectr.extraction.checkpoint import Checkpoint, Header, Rows, block_rows

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

    def held(self, checkpoint: Checkpoint) -> int:
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
    """The conversions of a model's checkpoints; those of one object serve one checkpoint, as some have a memory."""

    def __init__(self, model: Any):
        self._model = model
        self._rename: Any  # its types are narrower than what transformers itself gives it
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
