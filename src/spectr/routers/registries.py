"""Routers, evidence and uses by name, including other packages' (:mod:`spectr.registry`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, get_origin

from spectr.errors import CompositionError
from spectr.registry import Registry, entry
from spectr.renamed import current_options
from spectr.routers.evidence.evidence import Evidence
from spectr.routers.hints import hints_of, kinds
from spectr.routers.router import PROTOCOL, Router
from spectr.routers.use import Use
from spectr.routers.version1 import adapted_maker

T = TypeVar("T")
_SPECTR, _CALIBRATED = "spectr.routers.spectr:Spectr", "spectr.routers.calibrated:Calibrated"
_GLIDER, _UNIFORM = "spectr.routers.glider:Glider", "spectr.routers.uniform:Uniform"
_EVIDENCE, _USE = "spectr.routers.evidence", "spectr.routers.use"


def _as_text(_: str, options: list[str]) -> str:
    return " ".join(f"--set {option}" for option in options)


ROUTERS: Registry[Router] = Registry(
    kind="router",
    group="spectr.routers",
    error=CompositionError,
    protocol=PROTOCOL,
    adapters={1: adapted_maker},
    as_text=_as_text,
    entries={
        "spectr": _SPECTR,
        "spectr-paper": entry(_SPECTR, combine="factors"),
        "spectr-softmax": entry(_SPECTR, weights="softmax"),
        "spectr-projection": entry(_SPECTR, score="projection"),
        "spectr-code": entry(_SPECTR, score="projection", combine="factors"),
        "calibrated": _CALIBRATED,
        "calibrated-prior": entry(_CALIBRATED, level="prior"),
        "calibrated-token": entry(_CALIBRATED, level="token", top_k=4),
        "arrow": "spectr.routers.arrow:Arrow",
        "phatgoose": "spectr.routers.phatgoose:Phatgoose",
        "glider": _GLIDER,
        "glider-paper": entry(_GLIDER, threshold=0.8),
        "glider-global": entry(_GLIDER, token_router=None),
        "glider-spectr": entry(_GLIDER, token_router=entry(_SPECTR, top_k=1)),
        "lag": "spectr.routers.lag:Lag",
        "seqr": "spectr.routers.seqr:Seqr",
        "seqr-normalised": "spectr.routers.seqr_normalised:SeqrNormalised",
        "shortlist": "spectr.routers.shortlist:Shortlist",
        "policy": "spectr.routers.policy:PromptPolicy",
        "mu": _UNIFORM,
        "uniform": _UNIFORM,
        "oracle": "spectr.routers.oracle:Oracle",
    },
)
EVIDENCE: Registry[Evidence] = Registry(
    kind="evidence",
    group="spectr.evidence",
    error=CompositionError,
    as_text=_as_text,
    entries={
        "descriptions": f"{_EVIDENCE}.descriptions:DescriptionSimilarity",
        "prototype-means": f"{_EVIDENCE}.prototype_means:PrototypeMeans",
        "score-means": f"{_EVIDENCE}.score_means:ScoreMeans",
    },
)
USES: Registry[Use] = Registry(
    kind="use",
    group="spectr.uses",
    error=CompositionError,
    as_text=_as_text,
    entries={
        "bias": f"{_USE}:AddToScores",
        "hold": f"{_USE}:HoldWeights",
        "prior": f"{_USE}:MultiplyScores",
        "shortlist": f"{_USE}:KeepShortlist",
    },
)
PARTS: Mapping[type, Registry[Any]] = {Router: ROUTERS, Evidence: EVIDENCE, Use: USES}


def router_names() -> tuple[str, ...]:
    """All names for :func:`get_router`, in alphabetical order."""
    return ROUTERS.names()


def get_router(name: str, **options: Any) -> Router:
    """Make a router by name.

    Example:
        >>> spectr.get_router("arrow", top_k=2)
        Arrow(top_k=2, weights='softmax', temperature=1.0, combine='outputs')

    Args:
        name: One of :func:`router_names`.
        options: Its settings, such as ``top_k=2``. A router, evidence or use inside it may be plain data, such as
            ``{"name": "spectr", "top_k": 2}``.

    Raises:
        CompositionError: The name or an option is unknown, a value is out of range, or a package's object is not a
            router.
    """
    return make_part(Router, name, options)


def make_part(kind: type[T], name: str, options: Mapping[str, Any]) -> T:
    """Make a router, evidence or a use by name; see :func:`get_router`."""
    registry = PARTS[kind]
    make = registry.load(name)
    options = current_options(make, options)
    hints = hints_of(make) if any(isinstance(value, (list, Mapping)) for value in options.values()) else {}
    made: object = registry.make(name, **{k: _from_data(value, hints.get(k, Any)) for k, value in options.items()})
    if not isinstance(made, kind):
        raise CompositionError(
            f"{registry.described(name)} makes an object of type {type(made).__name__}",
            expected=f"a spectr.routers.{kind.__name__}",
            do="repair or uninstall the package",
        )
    return made


def part_of(hint: Any) -> type | None:
    """The kind of object for a setting of this type: :class:`Router`, :class:`Evidence`, :class:`Use`, or nothing."""
    classes = [kind for kind in kinds(hint) if isinstance(kind, type)]
    return next((part for part in PARTS for kind in classes if issubclass(kind, part)), None)


def _from_data(value: Any, hint: Any) -> Any:
    if isinstance(value, Mapping) and "name" in value:
        options = {key: option for key, option in value.items() if key != "name"}
        return make_part(part_of(hint) or Router, value["name"], options)
    wants_list = any(kind is list or get_origin(kind) is list for kind in kinds(hint))
    return tuple(value) if isinstance(value, list) and not wants_list else value
