"""What an adapter holds besides factors of linear layers: trained modules, embedding rows and factors, biases."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]

_ROWS = re.compile(r"^(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.[^.]+)?$")
_EMBEDDING = re.compile(r"^(?P<module>.+)\.lora_embedding_(?P<side>[AB])(?:\.[^.]+)?$")
_WHOLE = re.compile(r"^(?P<module>.+?)(?:\.base_layer)?\.(?P<parameter>[^.]+)$")
# Parts of names that torch.compile, FSDP and activation checkpointing add.
_WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PREFIX = re.compile(r"^(?:(?:module\.)?base_model\.model\.)+")  # several of models that were wrapped twice


def plain_name(key: str) -> str:
    """A tensor's name in a file, as it is without what PEFT and others put around the model."""
    return _PREFIX.sub("", _WRAPPERS.sub("", key))


class SavedWhole(NamedTuple):
    """A parameter or buffer of the expert that replaces the base model's.

    Attributes:
        key: Its name in the file.
        shape: Its shape.
        shared: Whether all modules that share the base model's parameter get it, as when PEFT loads it into the base
            model. PEFT gives a module of ``modules_to_save`` its own parameter.
    """

    key: str
    shape: tuple[int, ...]
    shared: bool


class SavedRows(NamedTuple):
    """Trained rows of an embedding's weight, which replace the base model's.

    Attributes:
        key: Its name in the file, (tokens, features).
        tokens: Indices of the rows.
        features: Length of a row.
    """

    key: str
    tokens: tuple[int, ...]
    features: int


class SavedFactors(NamedTuple):
    """Factors of an embedding, whose update of the row of token ``t`` is ``scale * B @ A[:, t]``."""

    key_A: str
    key_B: str
    rank: int
    tokens: int
    features: int
    scale: float


@dataclass(kw_only=True)
class SavedParts:
    """What an expert holds for one module, by names in its file.

    Attributes:
        whole: By the name of the module's own parameter or buffer.
        rows: Trained rows, if any.
        factors: An embedding's factors, if any.
    """

    whole: dict[str, SavedWhole] = field(default_factory=dict)
    rows: SavedRows | None = None
    factors: SavedFactors | None = None

    @property
    def keys(self) -> list[str]:
        """All names in the file."""
        rows = [] if self.rows is None else [self.rows.key]
        factors = [] if self.factors is None else [self.factors.key_A, self.factors.key_B]
        return [*(one.key for one in self.whole.values()), *rows, *factors]

    def is_alive(self, read: Callable[[str], Tensor]) -> bool:
        """Whether it is more than factors whose product is zero; ``read`` returns the file's tensors by name."""
        there = {key: bool(read(key).any()) for key in self.keys}
        factors = self.factors is not None and there[self.factors.key_A] and there[self.factors.key_B]
        return bool(self.whole) or self.rows is not None or factors

    @property
    def numbers(self) -> int:
        """Number of parameters in the file."""
        count = sum(math.prod(one.shape) for one in self.whole.values())
        count += 0 if self.rows is None else len(self.rows.tokens) * self.rows.features
        return count + (
            0 if self.factors is None else self.factors.rank * (self.factors.tokens + self.factors.features)
        )


class SavedSettings(NamedTuple):
    """The part of a configuration that describes such tensors.

    Attributes:
        modules: Endings of the names of modules that were trained as a whole.
        biases: Whether the base model's biases were trained.
        tokens: Trained rows by the ending of the embedding's name; ``""`` for any embedding.
    """

    modules: tuple[str, ...] = ()
    biases: bool = False
    tokens: Mapping[str, tuple[int, ...]] = {}

    @staticmethod
    def of(raw: Mapping[str, Any]) -> SavedSettings:
        """Read PEFT's configuration."""
        given = raw.get("trainable_token_indices") or raw.get("token_indices") or {}
        tokens = given if isinstance(given, dict) else {"": given}
        return SavedSettings(
            tuple(raw.get("modules_to_save") or ()),
            raw.get("bias") == "all",
            {name: tuple(numbers) for name, numbers in tokens.items()},
        )

    def faults(self) -> Iterator[str]:
        """What is wrong with the settings."""
        for numbers in self.tokens.values():
            if not all(isinstance(number, int) and number >= 0 for number in numbers):
                yield f"trained tokens are {list(numbers)[:5]!r}, not token ids"
            elif len(set(numbers)) < len(numbers):
                yield "a trained token is listed twice"


NOTHING_SAVED = SavedSettings()


def read_saved(
    keys: Sequence[str], shapes: Shapes, settings: SavedSettings, scale_of: Callable[[str], float], faults: list[str]
) -> dict[str, SavedParts]:
    """By module, what a file holds besides factors of linear layers.

    Args:
        keys: Names of the tensors that are not such factors.
        shapes: Shapes of all tensors.
        settings: The configuration's settings.
        scale_of: The scale of a module's factors, by the module's name.
        faults: Receives what is wrong.
    """
    found: dict[str, SavedParts] = {}
    sides: dict[str, dict[str, str]] = {}
    for key in sorted(keys):
        name = plain_name(key)
        if match := _EMBEDDING.match(name):
            sides.setdefault(match["module"], {})[match["side"]] = key
        elif match := _ROWS.match(name):
            rows = _rows(key, match["module"], shapes[key], settings, faults)
            found.setdefault(match["module"], SavedParts()).rows = rows
        elif (match := _WHOLE.match(name)) and _is_whole(name, match, shapes[key], settings):
            own = _own(match["module"], settings)
            whole = SavedWhole(key, shapes[key], shared=not own)
            found.setdefault(match["module"], SavedParts()).whole[match["parameter"]] = whole
        else:
            faults.append(f"{key} is not a LoRA factor")
    for module, pair in sides.items():
        factors = _factors(module, pair, shapes, scale_of, faults)
        found.setdefault(module, SavedParts()).factors = factors
    return {module: found[module] for module in sorted(found)}


def _is_whole(name: str, match: re.Match[str], shape: tuple[int, ...], settings: SavedSettings) -> bool:
    """Whether PEFT writes such a tensor: of a trained module, a bias, or an embedding (``save_embedding_layers``)."""
    if "lora_" in name or "modules_to_save" in name or "original_module" in name:
        return False
    embedding = match["parameter"] == "weight" and len(shape) == 2
    return _own(match["module"], settings) or (settings.biases and "bias" in name) or embedding


def _own(module: str, settings: SavedSettings) -> bool:
    """Whether PEFT gives this module, or one that contains it, its own parameters; compares endings of names."""
    parts = module.split(".")
    around = (".".join(parts[: count + 1]) for count in range(len(parts)))
    return any(name.endswith(settings.modules) for name in around) if settings.modules else False


def _rows(
    key: str, module: str, shape: tuple[int, ...], settings: SavedSettings, faults: list[str]
) -> SavedRows | None:
    tokens = next((numbers for end, numbers in settings.tokens.items() if module.endswith(end)), ())
    if len(shape) != 2 or shape[0] != len(tokens):
        faults.append(f"{key} has the shape {shape} but the configuration lists {len(tokens)} trained tokens")
        return None
    return SavedRows(key, tokens, shape[1])


def _factors(
    module: str, pair: Mapping[str, str], shapes: Shapes, scale_of: Callable[[str], float], faults: list[str]
) -> SavedFactors | None:
    if len(pair) < 2:
        faults.append(f"{module} has only one factor")
        return None
    A, B = shapes[pair["A"]], shapes[pair["B"]]
    if len(A) != 2 or len(B) != 2 or A[0] != B[1]:
        faults.append(f"{module} has factors of shapes {A} and {B}, which do not match")
        return None
    return SavedFactors(pair["A"], pair["B"], A[0], A[1], B[0], scale_of(module))
