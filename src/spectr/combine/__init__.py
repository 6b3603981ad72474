"""From weights to a module's update: how the updates of the chosen experts are combined.

Names: ``outputs``, ``factors``, ``raw-factors``, ``ties``, ``dare``, ``dare-ties``, ``knots``. Options follow a colon,
as in ``ties:density=0.5``; each option is the share of entries that is kept. Other packages add combinations with the
entry-point group ``spectr.combinations``; their options are numbers.
"""

from __future__ import annotations

from spectr.combine.combination import Combination
from spectr.combine.factors import merge_factors, merge_raw_factors, merged_products
from spectr.combine.knots import merge_knots
from spectr.combine.outputs import merge_outputs
from spectr.combine.parsing import parse, warn_of_numbers
from spectr.combine.ties import merge_ties
from spectr.errors import CompositionError
from spectr.registry import Registry, signature

COMBINATIONS: Registry[Combination] = Registry(
    kind="combination",
    group="spectr.combinations",
    error=CompositionError,
    as_text=lambda name, options: f"{name}:{','.join(options)}",
    entries={
        "outputs": "spectr.combine.outputs:outputs",
        "factors": "spectr.combine.factors:factors",
        "raw-factors": "spectr.combine.factors:raw_factors",
        "ties": "spectr.combine.ties:ties",
        "dare": "spectr.combine.outputs:dare",
        "dare-ties": "spectr.combine.ties:dare_ties",
        "knots": "spectr.combine.knots:knots",
    },
)


def get_combination(text: str) -> Combination:
    """Make a combination from its name and options, such as ``"dare:density=0.1"``.

    Example:
        >>> get_combination("outputs").is_sum, get_combination("ties:density=0.5").is_sum
        (True, False)

    Raises:
        CompositionError: The name or an option is unknown, or an option is out of range.
    """
    kind = text.partition(":")[0]
    parameters = signature(COMBINATIONS.load(kind)).parameters.values()
    known = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    try:
        options = parse(text)[1]
    except ValueError:
        options = {"": 0.0}
    ours = kind in COMBINATIONS.entries
    if not options.keys() <= set(known) or (ours and not all(0 < share <= 1 for share in options.values())):
        number = "SHARE" if ours else "NUMBER"
        spelled = f"{kind}:{','.join(f'{option}={number}' for option in known)}"
        spelled += ", where SHARE is the share that is kept, above 0 and at most 1" if ours else ""
        raise CompositionError(f"combine={text!r}", expected=spelled if known else f"no options after {kind}")
    warn_of_numbers(text, kind, options)
    return COMBINATIONS.make(kind, **options)


__all__ = [
    "COMBINATIONS",
    "Combination",
    "get_combination",
    "merge_factors",
    "merge_knots",
    "merge_outputs",
    "merge_raw_factors",
    "merge_ties",
    "merged_products",
]
