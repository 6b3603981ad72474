"""Parse the text of a combination, such as ``dare:density=0.1``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from spectr.errors import SpectrWarning


def parse(text: str) -> tuple[str, dict[str, float]]:
    """``"dare-ties:density=0.1,trim=0.5"`` as ``("dare-ties", {"density": 0.1, "trim": 0.5})``.

    Numbers without a name, as in ``dare:0.9``, are the form of version 0. They keep their meaning for one version; see
    :func:`warn_of_numbers`.

    Raises:
        ValueError: The text after the name is not a list of options.
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
    """Warn about options that are numbers without names."""
    if options and "=" not in text:
        now = ",".join(f"{key}={number:g}" for key, number in options.items())
        # stacklevel=1, so that Python shows each text once. The command line prints it too.
        warnings.warn(f"combine={text!r} is deprecated: write {f'{name}:{now}'!r}", SpectrWarning, stacklevel=1)


def _of_numbers(name: str, numbers: list[float]) -> dict[str, float]:
    """Names for numbers without names: the share that TIES keeps, and the share that DARE drops."""
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
