"""``spectr route`` and ``spectr demo``: the experts at work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from spectr.cli.console import errors, out, say
from spectr.cli.generate import Chat, PromptArgument, read_prompt
from spectr.cli.options import JsonOption, Routing, check_target, with_options

if TYPE_CHECKING:
    from spectr.plots import TokenRouting


@with_options
def route(
    routing: Routing,
    prompt: PromptArgument = None,
    answer_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="Route an answer of up to this many tokens too.", min=0)
    ] = 0,
    layer: Annotated[str | None, typer.Option(help='Show only this layer in the terminal: --layer "layer 12".')] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page (HTML) with a tooltip for each token and a choice of layers.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw layers by tokens as PNG.")] = None,
    chat: Chat = True,
    as_json: JsonOption = False,
) -> None:
    """Show which experts are used for each token of a text, in the colour of its first expert (the paper's Figure 4).

    [dim]spectr route "Is this sentence acceptable? The boy eat apples." --html routing.html --png routing.png[/]
    """
    text = read_prompt(prompt)
    check_target(html, ".html")
    check_target(png, ".png")
    library, router = routing.experts()
    if layer:
        from spectr.plots.token_weights import layer_named

        layer = layer_named(layer, library)
    base, tokenizer = routing.base()

    from spectr.layers import trace
    from spectr.layers.linear_layers import input_device
    from spectr.models import encode_batch, generate_answers
    from spectr.plots.token_weights import token_routing

    routed = routing.compose(base, tokenizer, library, router)
    with trace(base) as record:
        if answer_tokens:
            generate_answers(base, tokenizer, [text], max_new_tokens=answer_tokens, chat=chat)
        else:
            base(**encode_batch(tokenizer, [text], chat=chat, device=input_device(base)))
    remark, p = (routed.prompt.remark, routed.prompt.p_B) if routed.prompt else (None, None)
    title = " ".join(text.split())[:80] + (f" ({remark})" if remark else "")
    found = token_routing(record, tokenizer, title=title)
    shown = found.layers.index(layer) if layer else 0
    if as_json:
        more = {} if p is None else {"p": round(float(p[0]), 4)}
        sys.stdout.write(json.dumps(_as_data(found, str(router)) | more) + "\n")
    else:
        _print(found, shown)
        if remark:
            out.print(remark, highlight=False)
        elif router.policy is not None and router.policy.use.fixes:
            say(
                "this router decides once for the whole prompt; to see a choice for every token: spectr route -r spectr"
            )
    _draw(found, html, png, str(router), errors if as_json else out)


def _draw(routing: TokenRouting, html: Path | None, png: Path | None, router: str, console: Console) -> None:
    from spectr.plots import write_page, write_token_map

    if html:
        page = write_page([routing], html, title="Experts at work, token by token", subtitle=router)
        console.print(f"page: {page.resolve()}", highlight=False)
    if png:
        console.print(f"picture: {write_token_map(routing, png).resolve()}", highlight=False)


def _print(routing: TokenRouting, group: int) -> None:
    from spectr.plots.palette import tints

    palette = tints(routing.experts)
    line = Text()
    for token, weights_E in zip(routing.tokens, routing.weights[group], strict=True):
        best = int(weights_E.argmax()) if weights_E.any() else None
        line.append(token, style="" if best is None else f"black on {palette[routing.experts[best]]}")
    out.print(line)
    out.print()
    for name, share in routing.leaders:
        out.print(
            Text(f" {name:<14}", style=f"black on {palette[name]}"), f"{share:6.1%} of the weight", highlight=False
        )
    if group:
        out.print(f"(colours: {routing.layers[group]}; shares: all layers)", style="dim", highlight=False)


def _as_data(routing: TokenRouting, router: str) -> dict:
    weights = [[[round(w, 4) for w in token] for token in layer] for layer in routing.weights.tolist()]
    return {
        "router": router,
        "experts": routing.experts,
        "tokens": routing.tokens,
        "layers": routing.layers,
        "shares": routing.shares,
        "weights": weights,
    }


_SHOWN = 60  # characters of an answer


@with_options
def demo(
    routing: Routing,
    folder: Annotated[Path, typer.Option("--out", "-o", help="Write the picture and the page to this folder.")] = Path(
        "out"
    ),
) -> None:
    """Ask the base model and the routed model one question of each task, and draw which experts were used.

    Writes a heat map (PNG) and a page (HTML) that shows the experts of every token and layer.
    """
    check_target(folder / "routing.png", ".png")
    found = routing.resolve()
    library, router, name = found.library, found.router, next(iter(found.routers))
    base, tokenizer = routing.base()

    from spectr.demo import demonstrate
    from spectr.plots import tints, write_heat_map, write_page
    from spectr.tasks import shipped_tasks

    shown = demonstrate(base, tokenizer, library, router, list(shipped_tasks().values()), allow=routing.allow, say=say)
    palette = tints(library.names)
    table = Table(title=f"{name}, top {router.selection.k or len(library)}, {len(library)} experts", expand=True)
    for column, ratio in (("task", 2), ("right answer", 3), ("base model", 5), ("routed model", 5), ("at work", 4)):
        table.add_column(column, ratio=ratio, overflow="fold")
    for row in shown:
        workers = "\n".join(
            f"[black on {palette[n]}]{n}[/] {share:.1%}" for n, share in row.routing.leaders[:3] if share
        )
        workers = workers or "[dim]base model[/]"
        task = row.task if row.expert else f"{row.task}\n[dim](no expert)[/]"
        before, after = _marked(row.base_answer, row.base_is_right), _marked(row.routed_answer, row.routed_is_right)
        table.add_row(task, _first(row.expected), before, after, workers)
    out.print(table)
    before, after = sum(row.base_is_right for row in shown), sum(row.routed_is_right for row in shown)
    out.print(
        f"Answers that begin with the right one: base model {before} of {len(shown)}, routed model {after}. One "
        "prompt for each task shows how it works; spectr evaluate measures how well.",
        highlight=False,
    )
    routings = [row.routing for row in shown]
    title = f"Experts at work on one prompt of each task ({name})"
    png = write_heat_map(routings, folder / "routing.png", title=title)
    page = write_page(routings, folder / "routing.html", title=title, subtitle=str(router))
    out.print(f"heat map: {png.resolve()}\npage:     {page.resolve()}", highlight=False)


def _marked(text: str, right: bool) -> str:
    mark = "[green]\u2713[/]" if right else "[red]\u2717[/]"
    return f"{mark} {_first(text)}"


def _first(text: str) -> str:
    line = " ".join(text.split())
    return escape(line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "\u2026")
