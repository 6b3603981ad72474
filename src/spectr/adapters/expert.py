"""One expert: its factors by module name, read from a memory-mapped file on use."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor

from spectr.adapters.config import AdapterConfig
from spectr.adapters.saved import SavedParts
from spectr.errors import AdapterError, SpectrError, some_of


class Factors(NamedTuple):
    """One module's low-rank update ``delta = scale * B @ A``."""

    A: Float[Tensor, "rank inputs"]
    B: Float[Tensor, "outputs rank"]
    scale: float

    @property
    def is_zero(self) -> bool:
        """Whether the update changes nothing."""
        return not (self.A.any() and self.B.any() and self.scale)


class Stacked(NamedTuple):
    """Factors of N modules whose shapes are the same, in the file's dtype, on the CPU."""

    A_NRI: Float[Tensor, "N R I"]
    B_NOR: Float[Tensor, "N O R"]
    scale_N: Float[Tensor, " N"]


class FactorShape(NamedTuple):
    """What is known about a module's factors without reading them."""

    rank: int
    inputs: int
    outputs: int
    scale: float
    key_A: str
    key_B: str


@dataclass(frozen=True, kw_only=True)
class Expert:
    """A LoRA adapter under a name.

    Attributes:
        name: Unique within a library.
        weights: The safetensors file.
        shapes: By module name (as in ``model.named_modules()``), in alphabetical order.
        base_model: What the adapter says it was trained on.
        origin: Where it came from: a folder or a Hub id.
        saved: By module name what it has besides factors of linear layers, such as trained heads and embeddings.
        config: What its configuration says of ranks, scales and targets.
        left_out: Modules of the file that the configuration does not target; PEFT leaves them out too.
        file_names: By module the name that the file and what lies next to it have, where that is another one.
    """

    name: str
    weights: Path
    shapes: Mapping[str, FactorShape]
    base_model: str | None = None
    origin: str = ""
    saved: Mapping[str, SavedParts] = field(default_factory=dict)
    config: AdapterConfig | None = None
    left_out: Mapping[str, FactorShape] = field(default_factory=dict)
    file_names: Mapping[str, str] = field(default_factory=dict)

    @property
    def modules(self) -> tuple[str, ...]:
        """All modules that it changes, in alphabetical order."""
        return tuple(sorted({*self.shapes, *self.saved}))

    @property
    def ranks(self) -> tuple[int, ...]:
        """The different ranks, ascending."""
        return tuple(sorted({shape.rank for shape in self.shapes.values()}))

    @property
    def parameters(self) -> int:
        """Numbers in all factors and in all that is saved with them."""
        factors = sum(shape.rank * (shape.inputs + shape.outputs) for shape in self.shapes.values())
        return factors + sum(parts.numbers for parts in self.saved.values())

    def check_factors_alone(self, what: str, kind: type[SpectrError] = AdapterError) -> None:
        """Raise where the expert has more than factors of linear layers, for what takes these alone.

        Args:
            what: Takes them, such as ``"merging"``.
            kind: Of the error.
        """
        if self.saved:
            raise kind(
                f"expert '{self.name}' has trained {some_of(list(self.saved), 3, ' modules')} besides LoRA's factors, "
                f"and {what} takes factors alone",
                expected="an adapter of LoRA factors of linear layers",
                do="leave it out; spectr.compose applies it whole, under routers that take one expert a prompt",
            )

    @property
    def remark_left_out(self) -> str:
        """Which modules of the file are left out, in words."""
        return (
            f"expert '{self.name}': its configuration does not target {len(self.left_out)} modules of its file, which "
            f"are left out, as PEFT does: {some_of(list(self.left_out), 3)}"
        )

    @contextmanager
    def open(self):
        """Open the file and yield ``read(module) -> Factors``; tensors have the file's dtype, on the CPU.

        ``read`` raises :class:`AdapterError` where a factor holds NaN or infinity.
        """
        with open_safetensors(self.weights, self.name) as file:

            def read(module: str) -> Factors:
                shape = self.shapes[module]
                A, B = file.get_tensor(shape.key_A), file.get_tensor(shape.key_B)
                for key, tensor in ((shape.key_A, A), (shape.key_B, B)):
                    self._check(key, tensor)
                return Factors(A, B, shape.scale)

            yield read

    @contextmanager
    def open_saved(self):
        """Open the file and yield ``read(key) -> Tensor`` for keys of :attr:`saved`, in the file's dtype, on the CPU.

        ``read`` raises :class:`AdapterError` where a tensor holds NaN or infinity.
        """
        with open_safetensors(self.weights, self.name) as file:

            def read(key: str) -> Tensor:
                tensor = file.get_tensor(key)
                self._check(key, tensor)
                return tensor

            yield read

    def stacked(self, groups: Iterable[Sequence[str]]) -> Iterator[Stacked]:
        """Read the file at once, and yield each group of modules, whose factors have the same shapes.

        Raises:
            AdapterError: As :meth:`open` and ``read`` do.
        """
        with unreadable_as_error(self.weights, self.name):
            tensors = load(self.weights.read_bytes())

        def stack(keys: Sequence[str]) -> Tensor:
            stack_NXY = torch.stack([tensors[key] for key in keys])
            if not all_finite(stack_NXY):
                for key in keys:
                    self._check(key, tensors[key])
            return stack_NXY

        for modules in groups:
            shapes = [self.shapes[module] for module in modules]
            A_NRI, B_NOR = stack([shape.key_A for shape in shapes]), stack([shape.key_B for shape in shapes])
            yield Stacked(A_NRI, B_NOR, torch.tensor([shape.scale for shape in shapes], dtype=torch.float32))

    def _check(self, key: str, tensor: Tensor) -> None:
        if not all_finite(tensor):
            raise AdapterError(
                f"expert '{self.name}': {key} holds NaN or infinite numbers",
                expected="finite weights",
                do="train or download the adapter again",
            )


def all_finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor infinity: by the extremes, several times as fast as asking every number."""
    if not tensor.numel():
        return True
    low, high = map(float, tensor.aminmax())
    return -math.inf < low and high < math.inf


def open_safetensors(path: Path, name: str | None = None, kind: type[SpectrError] = AdapterError):
    """A memory-mapped safetensors file, of the expert ``name``.

    Raises:
        SpectrError: Of this ``kind``: the file is missing, cut short or corrupt.
    """
    with unreadable_as_error(path, name, kind):
        return safe_open(path, framework="pt")


@contextmanager
def unreadable_as_error(path: Path, name: str | None, kind: type[SpectrError] = AdapterError) -> Iterator[None]:
    """Raise what goes wrong with a safetensors file as an error of this kind."""
    try:
        yield
    except Exception as error:  # safetensors raises its own kinds, OSError among them
        owner = "" if name is None else f"expert '{name}': "
        raise kind(
            f"{owner}{path} cannot be read as safetensors ({error})",
            expected="a complete safetensors file",
            do="download or copy it again",
        ) from error
