"""Self-contained HTML pages: every token coloured by its experts, and the results of all experiments."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from spectr.errors import DataError
from spectr.folders import with_parents
from spectr.plots.axes import as_svg
from spectr.plots.figures import figure
from spectr.plots.palette import TINT, colours
from spectr.plots.token_weights import TokenRouting

if TYPE_CHECKING:
    from spectr.evaluation.experiments.setup import Result, SideTable

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#1d2330;background:#fff}
h1{margin-bottom:.2rem} h2{margin-top:3rem;border-top:1px solid #dde1e8;padding-top:1.2rem}
table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}
th,td{padding:.25rem .6rem;border-bottom:1px solid #e6e9ef;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left} .source,.notes,summary{color:#5b6472;font-size:13px}
svg{max-width:100%;height:auto} pre{background:#f4f6f9;padding:.8rem;overflow-x:auto;font-size:12px}
"""


def write_page(routings: Sequence[TokenRouting], path: str | Path, *, title: str, subtitle: str = "") -> Path:
    """Write an HTML page of texts whose tokens have their experts' colours. The page needs no network.

    Args:
        routings: One or more texts, all with the same experts and layers. Several texts get a table of texts by experts
            first.
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


def write_report(results: Sequence[Result], path: str | Path, *, title: str) -> Path:
    """Write an HTML page with the results of experiments. The page needs no network.

    Args:
        results: The experiments' results, in the order to show.
        path: The file to write.
        title: Heading.
    """
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(title)}</h1>",
        *(_section(result) for result in results),
    ]
    path = with_parents(path)
    path.write_text("\n".join(parts) + "\n</html>\n", encoding="utf-8")
    return path


def _section(result: Result) -> str:
    more = "".join(f"<h3>{html.escape(table.title)}</h3>{_table(table)}" for table in result.more)
    try:
        picture = as_svg(figure(result)) if result.data else ""
    except (KeyError, TypeError) as error:
        raise DataError(
            f"the results of '{result.name}' lack what its figure shows ({error})",
            expected="results of this version",
            do=f"run spectr evaluate {result.name} again, with the same --out",
        ) from error
    command = result.origin.get("command") or "; ".join(result.origin.get("commands", []))
    notes = "".join(f"<p class=notes>{html.escape(note)}</p>" for note in result.notes)
    return (
        f"<h2>{html.escape(result.title)}</h2><p class=source>{html.escape(result.source)}; "
        f"<code>{html.escape(command)}</code></p>"
        f"{picture}{_table(result)}{more}{notes}"
        f"<details><summary>Origin</summary><pre>{html.escape(json.dumps(result.origin, indent=1))}</pre></details>"
    )


def _table(cells: Result | SideTable) -> str:
    head = "".join(f"<th>{html.escape(str(column))}</th>" for column in cells.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in cells.rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
