"""One colour for each expert, the same in the terminal, HTML, PNG and the playground."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

# The page's own, in serving/playground/style.css, for a light and a dark ground; a test holds them equal. At least 3:1
# against the ground, and searched to stay apart for all kinds of colour vision.
LIGHT = ("#101ee0", "#d97b08", "#047d6c", "#8a0260", "#64a077", "#a45df1", "#916710", "#5f0e24", "#4b209b", "#634400")
DARK = ("#34a3c9", "#f17b0c", "#7bfeef", "#b3568b", "#8fe90c", "#c0b2fe", "#efe5a2", "#d34624", "#7171d0", "#f4ac91")
TINT = 0.45  # largest share of a colour behind dark text


def colours(experts: Sequence[str]) -> dict[str, str]:
    """A hex colour for each expert on a light background: ten clearly distinct ones, then hues by the golden ratio."""
    found = {}
    for number, name in enumerate(experts):
        if number < len(LIGHT):
            found[name] = LIGHT[number]
        else:
            rgb = colorsys.hls_to_rgb((number * 0.618034) % 1, 0.45, 0.6)
            found[name] = _hex([round(255 * part) for part in rgb])
    return found


def tints(experts: Sequence[str]) -> dict[str, str]:
    """:func:`colours`, lightened so that black text on them is readable."""
    return {name: _lightened(colour) for name, colour in colours(experts).items()}


def _lightened(colour: str) -> str:
    parts = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return _hex([round(255 - TINT * (255 - part)) for part in parts])


def _hex(rgb: Sequence[int]) -> str:
    return "#" + "".join(f"{part:02x}" for part in rgb)
