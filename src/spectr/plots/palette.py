"""One colour for each expert, the same in the terminal, in HTML and in PNG."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

# Okabe and Ito's palette for all kinds of colour vision, lightened where text stands on it.
_FIRST = ("#56b4e9", "#e69f00", "#2fb391", "#f0e442", "#cc79a7", "#d55e00", "#4a7fd6", "#9a9a9a", "#a5d66f", "#b39ddb")


def colours(experts: Sequence[str]) -> dict[str, str]:
    """A hex colour by expert: ten that everybody can tell apart, then hues spread by the golden ratio."""
    found = {}
    for number, name in enumerate(experts):
        if number < len(_FIRST):
            found[name] = _FIRST[number]
        else:
            red, green, blue = colorsys.hls_to_rgb((number * 0.618034) % 1, 0.66, 0.6)
            found[name] = f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"
    return found
