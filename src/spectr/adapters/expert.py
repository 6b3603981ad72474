"""One expert: its factors by module name, read on use from a memory-mapped file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor

from spectr.adapters.adapter_config import AdapterConfig
from spectr.adapters.saved_parts import SavedParts
from spectr.adapters.updates import BaseLayers, Factors, Layout, Parts, Read, Update, update_on, without_initial
from spectr.errors import AdapterError, SpectrError, some_of


class Stacked(NamedTuple):
    """Factors of N modules of the same shapes, in one floating dtype, on the CPU."""

    A_NRI: Float[Tensor, "N R I"]
    B_NOR: Float[Tensor, "N O R"]
    scale_N: Float[Tensor, " N"]


class FactorShape(NamedTuple):
    """What is known about a module's update before it is read.

    Attributes:
        rank: Rank of the low-rank part; for a fused parameter, of each of its matrices.
        inputs: Inputs of the layer.
        outputs: Outputs of the layer.
        scale: Scale of the file's factors.
        key_A: The name of the tensor ``A``; empty if a layout names several.
        key_B: The name of the tensor ``B``.
        parts: Parts of the update besides these factors.
        layout: For a fused parameter, where the factors of its matrices are.
        matrices: For a fused parameter, its number of matrices; else 0.
        of_parameter: Whether the name is a parameter's, fused or not, instead of a module's.
    """

    rank: int
    inputs: int
    outputs: int
    scale: float
    key_A: str
    key_B: str
    parts: Parts = Parts()
    layout: Layout | None = None
    matrices: int = 0
    of_parameter: bool = False

    @property
    def file_rank(self) -> int:
        """Rank of the file's factors, without initial ones."""
        return self.rank - self.parts.initial_rank


@dataclass(frozen=True, kw_only=True)
class Expert:
    """A LoRA adapter with a name.

    Attributes:
        name: Unique in a library.
        weights: The safetensors file.
        shapes: Shapes by module name (as in ``model.named_modules()``), in alphabetical order.
        base_model: The base model in its configuration.
        origin: Where it came from: a folder or a Hub id.
        saved: By module name, what it holds besides factors of linear layers, such as trained heads and embeddings.
        config: The ranks, scales and targets in its configuration.
        left_out: Modules in the file that the configuration does not target; PEFT ignores them too.
        file_names: For modules that the file names differently, the name in the file.
        initial: The adapter before training, if it is saved with it and is part of the update.
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
    initial: Expert | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        """All modules that the expert changes, in alphabetical order."""
        return tuple(sorted({*self.shapes, *self.saved}))

    @property
    def ranks(self) -> tuple[int, ...]:
        """The different ranks, ascending."""
        return tuple(sorted({shape.rank for shape in self.shapes.values()}))

    @property
    def parameters(self) -> int:
        """Number of parameters in all updates and all saved tensors."""
        pairs = sum(max(1, s.matrices) * s.rank * (s.inputs + s.outputs) for s in self.shapes.values())
        more = sum(s.outputs * len(s.parts.tensors) for s in self.shapes.values())
        return pairs + more + sum(parts.numbers for parts in self.saved.values())

    @property
    def kinds(self) -> tuple[str, ...]:
        """Parts of the updates besides pairs of factors, as texts; empty for plain LoRA."""
        return tuple(dict.fromkeys(kind for shape in self.shapes.values() for kind in shape.parts.kinds))

    @property
    def exceeds_products(self) -> bool:
        """Whether an update is more than a product of the file's two factors."""
        return any(shape.parts.tensors for shape in self.shapes.values())

    def check_plain(self, what: str, kind: type[SpectrError] = AdapterError, *, parameters: bool = False) -> None:
        """Raise if the expert is more than ``scale * B @ A`` of the file's own factors.

        Args:
            what: The operation that needs plain LoRA, such as ``"merging"``.
            kind: Type of the error.
            parameters: Whether factors of fused parameters are allowed.
        """
        self.check_factors_alone(what, kind, parameters=parameters)
        self._check_kinds(what, kind)

    def _check_kinds(self, what: str, kind: type[SpectrError]) -> None:
        if self.kinds:
            raise kind(
                f"expert '{self.name}' is no plain LoRA adapter ({', '.join(self.kinds)}): its update depends on the "
                f"base model's layers, and {what} reads factors only",
                expected="plain LoRA, whose update is scale * B @ A",
                do="route it in a composed model; or merge it into its base with PEFT and extract plain LoRA from the "
                "result: spectr extract",
            )

    @property
    def fused(self) -> tuple[str, ...]:
        """Names that are, or may be, parameters' instead of linear layers'; only a model can tell."""
        config = self.config
        return tuple(n for n, shape in self.shapes.items() if shape.of_parameter or (config and config.may_wrap(n)))

    def check_factors_alone(
        self, what: str, kind: type[SpectrError] = AdapterError, *, parameters: bool = False
    ) -> None:
        """Raise if the expert has more than factors of linear layers.

        Args:
            what: The operation that needs such factors, such as ``"merging"``.
            kind: Type of the error.
            parameters: Whether factors of fused parameters are allowed.
        """
        if self.fused and not parameters:
            raise kind(
                f"expert '{self.name}' adapts parameters by name ({some_of(self.fused, 3)}), and "
                f"{what} reads factors of linear layers only",
                expected="an adapter of linear layers",
                do="omit this expert; spectr.compose and spectr merge --into-base support it",
            )
        if self.saved:
            raise kind(
                f"expert '{self.name}' has trained {some_of(list(self.saved), 3, ' modules')} besides LoRA's factors, "
                f"and {what} reads factors only",
                expected="an adapter of LoRA factors of linear layers",
                do="omit this expert; spectr.compose supports it with routers that choose one expert per prompt",
            )

    @property
    def remark_left_out(self) -> str:
        """The ignored modules of the file, as text."""
        return (
            f"expert '{self.name}': its configuration does not target {len(self.left_out)} modules in its file; they "
            f"are ignored, as in PEFT: {some_of(list(self.left_out), 3)}"
        )

    @contextmanager
    def open(self):
        """Open the file of a plain LoRA adapter and yield ``read(module) -> Factors``.

        Tensors have the file's dtype, on the CPU. ``read`` raises :class:`AdapterError` if a factor is not finite.

        Raises:
            AdapterError: The file cannot be read, or its updates are more than its factors (see :attr:`kinds`).
        """
        self._check_kinds("this operation", AdapterError)
        with open_safetensors(self.weights, self.name) as file:
            yield lambda module: self._factors(module, file.get_tensor)

    @contextmanager
    def open_on(self, base: BaseLayers):
        """Open the file and yield ``read(module) -> Update`` for the layers of a base model, on the CPU.

        Plain factors have the file's dtype. ``read`` raises :class:`AdapterError` if a tensor holds NaN or infinity, or
        does not fit the layer.
        """
        with ExitStack() as files:
            read = files.enter_context(open_safetensors(self.weights, self.name)).get_tensor
            first = files.enter_context(self.initial.open()) if self.initial else None
            yield lambda module: self._update(base, module, read, first)

    @contextmanager
    def open_saved(self):
        """Open the file and yield ``read(key) -> Tensor`` for keys of :attr:`saved`, in the file's dtype, on the CPU.

        ``read`` raises :class:`AdapterError` if a tensor holds NaN or infinity.
        """
        with open_safetensors(self.weights, self.name) as file:
            yield self._checked(file.get_tensor)

    def check_values(self) -> None:
        """Read all tensors, and refuse an expert whose updates are all zero.

        Raises:
            AdapterError: All updates are zero, or a tensor holds NaN or infinity.
        """
        with open_safetensors(self.weights, self.name) as file:
            alive = [self.is_alive(module, file.get_tensor) for module in self.modules]
        if not any(alive):
            raise AdapterError(
                f"expert '{self.name}' changes nothing: the updates of all {len(alive)} modules are zero",
                expected="a trained adapter",
                do="omit it, or save it again after training",
            )

    def is_alive(self, module: str, read: Read) -> bool:
        """Whether a module's update differs from zero; ``read`` returns the file's tensors by name.

        Raises:
            AdapterError: A tensor holds NaN or infinity.
        """
        checked, alive = self._checked(read), False
        if module in self.shapes:
            alive = not self._factors(module, read).is_zero
            more = [checked(key) for key in self.shapes[module].parts.tensors]
            alive = alive or any(bool(tensor.any()) for tensor in more)
        return (module in self.saved and self.saved[module].is_alive(checked)) or alive

    def _factors(self, module: str, read: Read) -> Factors:
        shape, checked = self.shapes[module], self._checked(read)
        if shape.layout is not None:
            return Factors(*shape.layout.read(checked), shape.scale)
        return Factors(checked(shape.key_A), checked(shape.key_B), shape.scale)

    def _update(self, base: BaseLayers, module: str, read: Read, first: Callable[[str], Factors] | None) -> Update:
        factors, parts = self._factors(module, read), self.shapes[module].parts
        if not parts.kinds:
            return Update(factors)
        for key in parts.tensors:
            self._checked(read)(key)
        with naming(self.name):
            if first is not None:
                factors = without_initial(factors, first(self.file_names.get(module, module)))
            elif parts.initial:
                kind = parts.initial.lower()
                factors = without_initial(factors, base.initial(module, kind, parts.initial_rank, factors.scale))
            return update_on(base, module, factors, parts, read)

    def stacked(self, groups: Iterable[Sequence[str]], base: BaseLayers) -> Iterator[Stacked]:
        """The factors, grouped by equal shapes; a plain adapter's file is read at once.

        Raises:
            AdapterError: See :meth:`open_on` and ``read``.
        """
        yield from self._stacked_plain(groups) if not self.kinds else self._stacked_on(base, groups)

    def _stacked_on(self, base: BaseLayers, groups: Iterable[Sequence[str]]) -> Iterator[Stacked]:
        with self.open_on(base) as read:
            for modules in groups:
                A, B, scale = zip(*(read(module).factors for module in modules), strict=True)
                yield Stacked(torch.stack(A), torch.stack(B), torch.tensor(scale, dtype=torch.float32))

    def _stacked_plain(self, groups: Iterable[Sequence[str]]) -> Iterator[Stacked]:
        with unreadable_as_error(self.weights, self.name):
            tensors = load(self.weights.read_bytes())

        def stack(keys: Sequence[str]) -> Tensor:
            stack_NXY = torch.stack([tensors[key] for key in keys])
            if not all_finite(stack_NXY):
                for key in keys:
                    self._checked(tensors.__getitem__)(key)
            return stack_NXY

        for modules in groups:
            shapes = [self.shapes[module] for module in modules]
            A_NRI, B_NOR = stack([shape.key_A for shape in shapes]), stack([shape.key_B for shape in shapes])
            yield Stacked(A_NRI, B_NOR, torch.tensor([shape.scale for shape in shapes], dtype=torch.float32))

    def _checked(self, read: Read) -> Read:
        """A function that reads a tensor by name, and refuses NaN and infinity."""

        def checked(key: str) -> Tensor:
            tensor = read(key)
            if all_finite(tensor):
                return tensor
            raise AdapterError(
                f"expert '{self.name}': {key} holds NaN or infinite values",
                expected="finite weights",
                do="train or download the adapter again",
            )

        return checked


@contextmanager
def naming(expert: str) -> Iterator[None]:
    """Prefix an error of the block with the name of an expert."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"expert '{expert}': {error.given}", expected=error.expected, do=error.do) from error


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; checks the extremes, which is several times faster."""
    if not tensor.numel():
        return True
    low, high = map(float, tensor.aminmax())
    return -math.inf < low and high < math.inf


def open_safetensors(path: Path, name: str | None = None, kind: type[SpectrError] = AdapterError):
    """Open a memory-mapped safetensors file of the expert ``name``.

    Raises:
        SpectrError: The file is missing, cut short or corrupt; of type ``kind``.
    """
    with unreadable_as_error(path, name, kind):
        return safe_open(path, framework="pt")


@contextmanager
def unreadable_as_error(path: Path, name: str | None, kind: type[SpectrError] = AdapterError) -> Iterator[None]:
    """Raise errors of a safetensors file as errors of this kind."""
    try:
        yield
    except Exception as error:  # safetensors raises its own types, and OSError
        owner = "" if name is None else f"expert '{name}': "
        raise kind(
            f"{owner}{path} cannot be read as safetensors ({error})",
            expected="a complete safetensors file",
            do="download or copy it again",
        ) from error
