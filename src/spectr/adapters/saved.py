"""What an adapter holds besides factors of linear layers: trained modules, rows and factors of embeddings, biases."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Shapes = Mapping[str, tuple[int, ...]]

_ROWS = re.compile(r"^(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.[^.]+)?$")
_EMBEDDING = re.compile(r"^(?P<module>.+)\.lora_embedding_(?P<side>[AB])(?:\.[^.]+)?$")
_WHOLE = re.compile(r"^(?P<module>.+?)(?:\.base_layer)?\.(?P<parameter>[^.]+)$")
_PREFIX = "base_model.model."


class SavedWhole(NamedTuple):
    """A parameter or buffer that the expert has in the place of the base model's.

    Attributes:
        key: In the file.
        shape: Its shape.
        shared: Whether every module that shares the base model's parameter gets it too, as when PEFT loads it into the
            base model; PEFT gives a module of ``modules_to_save`` a parameter of its own.
    """

    key: str
    shape: tuple[int, ...]
    shared: bool


class SavedRows(NamedTuple):
    """Trained rows of an embedding's weight, which replace those of the base model.

    Attributes:
        key: In the file, (tokens, features).
        tokens: The rows' numbers.
        features: Numbers of a row.
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
    """What an expert has for one module, by keys of its file.

    Attributes:
        whole: By name of the module's own parameter or buffer.
        rows: Trained rows, where there are some.
        factors: Of an embedding, where there are some.
    """

    whole: dict[str, SavedWhole] = field(default_factory=dict)
    rows: SavedRows | None = None
    factors: SavedFactors | None = None

    @property
    def keys(self) -> list[str]:
        """All of its keys of the file."""
        rows = [] if self.rows is None else [self.rows.key]
        factors = [] if self.factors is None else [self.factors.key_A, self.factors.key_B]
        return [*(one.key for one in self.whole.values()), *rows, *factors]

    @property
    def numbers(self) -> int:
        """How many numbers the file holds of it."""
        count = sum(_product(one.shape) for one in self.whole.values())
        count += 0 if self.rows is None else len(self.rows.tokens) * self.rows.features
        return count + (
            0 if self.factors is None else self.factors.rank * (self.factors.tokens + self.factors.features)
        )


class SavedSettings(NamedTuple):
    """The part of a configuration that says what such tensors are.

    Attributes:
        modules: Ends of names of modules that were trained as a whole.
        biases: Whether the base model's biases were trained.
        tokens: The trained rows, by the end of the embedding's name; ``""``: of any.
    """

    modules: tuple[str, ...] = ()
    biases: bool = False
    tokens: Mapping[str, tuple[int, ...]] = {}

    @staticmethod
    def of(raw: Mapping[str, Any]) -> SavedSettings:
        """From PEFT's configuration."""
        given = raw.get("trainable_token_indices") or raw.get("token_indices") or {}
        tokens = given if isinstance(given, dict) else {"": given}
        return SavedSettings(
            tuple(raw.get("modules_to_save") or ()),
            raw.get("bias") == "all",
            {name: tuple(numbers) for name, numbers in tokens.items()},
        )

    def faults(self) -> Iterator[str]:
        """What is wrong with them."""
        if not all(isinstance(name, str) for name in self.modules):
            yield f"modules_to_save is {list(self.modules)!r}"
        for numbers in self.tokens.values():
            if not all(isinstance(number, int) and number >= 0 for number in numbers):
                yield f"trained tokens are {list(numbers)[:5]!r}, not numbers of tokens"
            elif len(set(numbers)) < len(numbers):
                yield "a token is named twice among the trained tokens"


NOTHING_SAVED = SavedSettings()


def read_saved(
    keys: Sequence[str], shapes: Shapes, settings: SavedSettings, scale_of: Callable[[str], float], faults: list[str]
) -> dict[str, SavedParts]:
    """By module what a file holds besides factors of linear layers.

    Args:
        keys: Names of the tensors that are no such factors.
        shapes: Of all tensors.
        settings: Of the configuration.
        scale_of: The scale of a module's factors, by its name.
        faults: Gets what is wrong.
    """
    found: dict[str, SavedParts] = {}
    sides: dict[str, dict[str, str]] = {}
    for key in sorted(keys):
        name = key.removeprefix(_PREFIX)
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
    """Whether PEFT writes such a tensor: a trained module's, a bias, or an embedding's (``save_embedding_layers``)."""
    if "lora_" in name or "modules_to_save" in name or "original_module" in name:
        return False
    embedding = match["parameter"] == "weight" and len(shape) == 2
    return _own(match["module"], settings) or (settings.biases and "bias" in name) or embedding


def _own(module: str, settings: SavedSettings) -> bool:
    """Whether PEFT gives this module, or one that it is in, parameters of its own: by the ends of names."""
    parts = module.split(".")
    around = (".".join(parts[: count + 1]) for count in range(len(parts)))
    return any(name.endswith(settings.modules) for name in around) if settings.modules else False


def _rows(
    key: str, module: str, shape: tuple[int, ...], settings: SavedSettings, faults: list[str]
) -> SavedRows | None:
    tokens = next((numbers for end, numbers in settings.tokens.items() if module.endswith(end)), ())
    if len(shape) != 2 or shape[0] != len(tokens):
        faults.append(f"{key} has the shape {shape} where the configuration names {len(tokens)} trained tokens")
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
        faults.append(f"{module} has factors of shapes {A} and {B}, which do not go together")
        return None
    return SavedFactors(pair["A"], pair["B"], A[0], A[1], B[0], scale_of(module))


def _product(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
