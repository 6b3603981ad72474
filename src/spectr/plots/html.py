"""One self-contained HTML page: every token coloured by its experts, with a tooltip, and a switch by layer."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from spectr.folders import with_parents
from spectr.plots.palette import TINT, colours
from spectr.plots.tokens import TokenRouting


def write_page(routings: Sequence[TokenRouting], path: str | Path, *, title: str, subtitle: str = "") -> Path:
    """Write the page; it loads nothing from anywhere.

    Args:
        routings: One or more texts, all with the same experts and layers. With several, a table of texts by experts
            comes first.
        path: The file to write.
        title: Heading.
        subtitle: A line below it, such as the model and router.
    """
    template = (resources.files("spectr.plots") / "page.html").read_text(encoding="utf-8")
    data = {
        "experts": [{"name": name, "colour": colour} for name, colour in colours(routings[0].experts).items()],
        "tint": TINT,
        "layers": list(routings[0].layers),
        "texts": [
            {"title": one.title, "tokens": list(one.tokens), "weights": (one.weights * 1000).round().int().tolist()}
            for one in routings
        ],
    }
    page = template.replace("{{title}}", html.escape(title)).replace("{{subtitle}}", html.escape(subtitle))
    page = page.replace("{{data}}", json.dumps(data, separators=(",", ":")).replace("</", "<\\/"))
    path = with_parents(path)
    path.write_text(page, encoding="utf-8")
    return path
