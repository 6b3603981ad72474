"""Packed layers whose tokens may each use other experts, as one operation in C; see packed.c, and tiles.c."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectr.ops.compiling import load
from spectr.ops.cpu import parts_of_float32, tiles_work
from spectr.ops.dispatch import report_once
from spectr.ops.fused_linear import place
from spectr.ops.ways import switched_off

_SIDE, _DEEP = 16, 32  # columns of a tile, and terms
_VECTORS = {torch.float32: "add_f32", torch.bfloat16: "add_bf16"}


class Module(NamedTuple):
    """One module of a packed layer.

    Attributes:
        B_OP: Its experts' output factors.
        centers_WP: For each router, what is taken away before scoring, if anything is.
        begin: Where its output begins in the layer's.
        scales_WP: What ``A x`` is multiplied by before that, float32, if by anything; then there are centers, too.
    """

    B_OP: Tensor
    centers_WP: Tensor | None
    begin: int
    scales_WP: Tensor | None = None


class TopKNumbers(NamedTuple):
    """How a router selects experts.

    Attributes:
        k: Experts at most.
        temperature: Of the softmax over their scores; 0 weighs them alike.
    """

    k: int
    temperature: float


class Choosing(NamedTuple):
    """How experts are chosen.

    Attributes:
        columns_E: Of these experts in a token's mask.
        granted_TF: Masks of a step's tokens, float32, which may be overwritten: of an expert that may not be used NaN,
            of one that may be chosen what its score is multiplied by, from zero on, else minus the weight that it has.
        selects: One for each router.
        router_T: Each token's router, int32, which may be overwritten as well; ``None`` for a single one.
        most: How many have a weight, chosen or not.
        kept: Which tokens' scores and weights to keep, (N,), and where, (N, S, E); or nothing.
    """

    columns_E: Tensor
    granted_TF: Tensor
    selects: Sequence[TopKNumbers]
    router_T: Tensor | None
    most: int
    kept: tuple[Tensor, Tensor, Tensor] | None


class _Module(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("B", "centers", "scales")),
        *((name, ctypes.c_long) for name in ("rows", "first", "begin", "length")),
    )


class _TopK(ctypes.Structure):
    _fields_ = (("k", ctypes.c_long), ("temperature", ctypes.c_float))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("add", "A", "modules", "columns", "granted", "selects", "routers")),
        *((name, ctypes.c_void_p) for name in ("sampled", "scores", "weights")),
        *((n, ctypes.c_long) for n in ("apart", "requests", "count", "experts", "inputs", "rows", "most", "parts")),
    )


class _Way(NamedTuple):
    """A compiled function, and the layout of its factors.

    Attributes:
        add: Where it is.
        inner: Lays input factors out,
        outer: and a module's output factors.
        centers: Their dtype.
        parts: Of each number where tiles multiply many tokens; 0 where none do.
    """

    add: int | None
    inner: Callable[[Tensor], Tensor]
    outer: Callable[[Tensor], Tensor]
    centers: torch.dtype
    parts: int


class Packed(nn.Module):
    """A packed layer's experts, whose factors lie as the compiled function reads them and nowhere else.

    Args:
        A_PI: Of all modules, one below the other, float32 or bfloat16.
        modules: They have the same experts of one rank.
        choosing: How these are chosen.
    """

    at: Tensor

    def __init__(self, A_PI: Tensor, modules: Sequence[Module], choosing: Choosing):
        super().__init__()
        self._way = way = _way_for(A_PI)
        self.A, self.B_S = way.inner(A_PI), [way.outer(module.B_OP) for module in modules]
        self.centers_S = [None if m.centers_WP is None else m.centers_WP.to(way.centers).contiguous() for m in modules]
        self.scales_S = [None if m.scales_WP is None else m.scales_WP.float().contiguous() for m in modules]
        self.choosing = choosing._replace(columns_E=choosing.columns_E.to(torch.int32).contiguous())
        structs, first = [], 0
        for module, *parts in zip(modules, self.B_S, self.centers_S, self.scales_S, strict=True):
            outputs, rows = module.B_OP.shape
            structs.append(_Module(*map(place, parts), rows, first, module.begin, outputs))
            first += rows
        self._module_structs = (_Module * len(structs))(*structs)
        columns_E, granted_TF, selects, router_T, most, kept = self.choosing
        sampled, scores, weights = kept or (None, None, None)
        experts = len(columns_E)
        self._selects = (_TopK * len(selects))(*((min(k, experts), temperature) for k, temperature in selects))
        self._layer = _Layer(
            way.add,
            place(self.A),
            ctypes.addressof(self._module_structs),
            *map(place, (columns_E, granted_TF)),
            ctypes.addressof(self._selects),
            *map(place, (router_T, sampled, scores, weights)),
            granted_TF.stride(0),
            0 if sampled is None else len(sampled),
            len(structs),
            experts,
            A_PI.shape[1],
            first,
            min(most, experts),
            way.parts,
        )
        at = torch.tensor([ctypes.addressof(self._layer)])  # a tensor, so that no graph takes it for a constant
        self.register_buffer("at", at, persistent=False)

    def forward(self, out_TO: Float[Tensor, "T O"], x_TI: Float[Tensor, "T I"]) -> Float[Tensor, "T O"]:
        """The base layer's output with the chosen experts' update, in the memory of ``out_TO``."""
        torch.ops.spectr.add_experts(out_TO, x_TI.contiguous(), self.at)
        return out_TO

    def fill(self, A_PI: Tensor, B_SOP: Sequence[Tensor], centers_SWP: Tensor | None) -> None:
        """Other factors of the same sizes, in the place of what was there."""
        self.A.copy_(self._way.inner(A_PI))
        for B, B_OP in zip(self.B_S, B_SOP, strict=True):
            B.copy_(self._way.outer(B_OP))
        for number, centers in enumerate(self.centers_S):
            if centers is not None and centers_SWP is not None:
                centers.copy_(centers_SWP[number])


def packed_works(dtype: torch.dtype) -> bool:
    """Whether this machine, this process and this torch can run them; if so the operation is there afterwards."""
    return dtype in _VECTORS and _library("packed.c") is not None


def _way_for(A_PI: Tensor) -> _Way:
    """The fastest way on this machine."""
    dtype, library = A_PI.dtype, _library("packed.c")
    assert library is not None
    unit = tiles_work(library)
    suits = unit and dtype == torch.bfloat16 and A_PI.shape[1] % _DEEP == 0
    if suits and (tiles := _library("tiles.c")) is not None:
        return _Way(_address(tiles.add), _tiled, _tiled, torch.float32, 1)
    parts = 1 if dtype == torch.bfloat16 else parts_of_float32()
    add = getattr(library, _VECTORS[dtype])
    return _Way(_address(add), Tensor.contiguous, lambda B_OP: B_OP.mT.contiguous(), dtype, parts if unit else 0)


def _tiled(M_NK: Float[Tensor, "N K"]) -> Tensor:
    """Tiles of 16 columns and 32 terms, in which pairs of terms lie together; zeros up to whole tiles."""
    outputs, terms = M_NK.shape
    whole = nn.functional.pad(M_NK.to(torch.bfloat16), (0, -terms % _DEEP, 0, -outputs % _SIDE))
    tiles = whole.view(-1, _SIDE, whole.shape[1] // _DEEP, _DEEP // 2, 2)
    return tiles.permute(0, 2, 3, 1, 4).contiguous()


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value


@lru_cache(maxsize=2)
def _library(source: str) -> ctypes.CDLL | None:
    if switched_off():
        return None
    try:
        library = load(source)
        if source == "packed.c":
            _register(library)
    except (OSError, AttributeError) as error:
        report_once(f"layers in vLLM run without kernels: {error}")
        return None
    return library


def _register(library: ctypes.CDLL) -> None:
    """Make the function an operation of torch, by what torch has for operations that are written in C."""
    torchs = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    pointer = ctypes.c_void_p
    names = ("get_data_ptr", "get_size", "get_stride", "delete_tensor_object")
    library.meet(*(ctypes.cast(getattr(torchs, f"aoti_torch_{name}"), pointer) for name in names))
    torch.library.define("spectr::add_experts", "(Tensor(a!) out, Tensor x, Tensor at) -> ()")
    torch.library.register_fake("spectr::add_experts", lambda out, x, at: None)
    ours = pointer()
    made = torchs.aoti_torch_library_init_impl(b"spectr", b"CPU", b"packed.c", 1, ctypes.byref(ours))
    if made or torchs.aoti_torch_library_impl(ours, b"add_experts", ctypes.cast(library.operation, pointer)):
        raise OSError("torch does not take operations that are written in C")
