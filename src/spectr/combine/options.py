"""The text of a combination, such as ``dare:density=0.1``, as a name and options."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from spectr.errors import SpectrWarning


def parse(text: str) -> tuple[str, dict[str, float]]:
    """``"dare-ties:density=0.1,trim=0.5"`` as ``("dare-ties", {"density": 0.1, "trim": 0.5})``.

    Numbers without a name, as in ``dare:0.9``, are the form of version 0 and keep their meaning for one version; see
    :func:`warn_of_numbers`.

    Raises:
        ValueError: What follows the name is no list of options.
    """
    name, colon, rest = text.partition(":")
    if not colon:
        return name, {}
    if "=" in rest:
        pairs = [option.split("=") for option in rest.split(",")]
        options = {key: float(number) for key, number in pairs}
        if len(options) < len(pairs):
            raise ValueError(text)
        return name, options
    return name, _of_numbers(name, [float(number) for number in rest.split(":")])


def warn_of_numbers(text: str, name: str, options: Mapping[str, float]) -> None:
    """Warn where options were given as numbers without names."""
    if options and "=" not in text:
        now = ",".join(f"{key}={number:g}" for key, number in options.items())
        # Its place is this line for all callers: Python shows one text once. Users of the command line see it too.
        warnings.warn(f"combine={text!r} is deprecated: write {f'{name}:{now}'!r}", SpectrWarning, stacklevel=1)


def _of_numbers(name: str, numbers: list[float]) -> dict[str, float]:
    """The options that numbers without names stood for: TIES's share that is kept, DARE's that is dropped."""
    match name, numbers:
        case "ties", [kept]:
            return {"density": kept}
        case "dare", [dropped]:
            return {"density": round(1 - dropped, 12)}
        case "dare-ties", [kept]:
            return {"density": 0.5, "trim": kept}
        case "dare-ties", [kept, dropped]:
            return {"density": round(1 - dropped, 12), "trim": kept}
    raise ValueError(f"{name} has no numbers")
