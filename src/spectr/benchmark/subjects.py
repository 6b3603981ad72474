"""The models to compare. All of them share the base model's weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from spectr.composition import Routed, compose
from spectr.composition.multi_router import weight_sharing_copy
from spectr.errors import CompositionError, MissingExtraError, did_you_mean
from spectr.library import ExpertLibrary
from spectr.ops import without_kernels
from spectr.routers import Router
from spectr.routers.abstention import always_choosing

BASE, OURS, BY_TORCH = "base model", "spectr", "spectr without kernels"


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """One model to measure.

    Attributes:
        name: Its name in the table.
        model: A causal model from transformers.
        routed: The handle, if the model is composed.
    """

    name: str
    model: nn.Module
    routed: Routed | None = None


def ours(model: nn.Module, library: ExpertLibrary, router: Router) -> Subject:
    """The base model composed with the library."""
    routed = compose(weight_sharing_copy(model), library, always_choosing(router))
    return Subject(name=OURS, model=routed.model, routed=routed)


def by_torch(model: nn.Module, library: ExpertLibrary, router: Router) -> Subject:
    """The same, computed by torch alone."""
    with without_kernels():
        return replace(ours(model, library, router), name=BY_TORCH)


def peft_single(model: nn.Module, library: ExpertLibrary, top_k: int) -> Subject:
    """PEFT with the library's first adapter."""
    peft = _peft()
    folder = library[library.names[0]].weights.parent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a user can do nothing about PEFT's warnings here
        return Subject(
            name="peft, one adapter",
            model=peft.PeftModel.from_pretrained(weight_sharing_copy(model), str(folder)).eval(),
        )


def peft_arrow(model: nn.Module, library: ExpertLibrary, top_k: int) -> Subject:
    """PEFT's Arrow with all experts.

    Raises:
        CompositionError: The experts differ in rank or modules, which PEFT's Arrow does not support.
    """
    check_peers(["peft-arrow"], library)
    peft = _peft()
    folders = [str(library[name].weights.parent) for name in library]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arrow = peft.create_arrow_model(weight_sharing_copy(model), folders, arrow_config=peft.ArrowConfig(top_k=top_k))  # pyright: ignore
    return Subject(name="peft, Arrow", model=arrow.eval())


PEERS: Mapping[str, Callable[[nn.Module, ExpertLibrary, int], Subject]] = {
    "peft-single": peft_single,
    "peft-arrow": peft_arrow,
}


def get_peer(name: str) -> Callable[[nn.Module, ExpertLibrary, int], Subject]:
    """Get a peer by name.

    Raises:
        CompositionError: The name is unknown.
    """
    if name not in PEERS:
        raise CompositionError(f"unknown peer '{name}'", do=did_you_mean(name, PEERS))
    return PEERS[name]


def check_peers(names: Sequence[str], library: ExpertLibrary) -> None:
    """Check that peers are known, and can hold these experts.

    Raises:
        CompositionError: A name is unknown, or PEFT's Arrow is named and the experts differ in rank or modules.
    """
    for name in names:
        get_peer(name)
    if "peft-arrow" in names and not alike(library):
        raise CompositionError(
            "PEFT's Arrow cannot hold these experts: they differ in rank or modules",
            expected="experts that adapt the same modules with the same ranks",
            do="compare with a single adapter: --against peft-single",
        )


def alike(library: ExpertLibrary) -> bool:
    """Whether all experts have the same modules with the same ranks."""
    first, *others = ({module: shape.rank for module, shape in library[name].shapes.items()} for name in library)
    return all(other == first for other in others)


def _peft():
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError("a comparison with PEFT", "train") from error
    return peft
