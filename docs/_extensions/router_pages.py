"""The settings of every router, of every kind of evidence and of every use, from their own fields."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import partial
from typing import Any


def router_page() -> str:
    """The page."""
    from spectr.routers import Evidence, Router, Use
    from spectr.routers.registries import PARTS

    titles = {Router: "Routers", Evidence: "Evidence", Use: "Uses"}
    lines = [
        "# Router settings",
        "",
        "Use `--set NAME=VALUE` on the command line, or `spectr.get_router` in Python.",
        "[Routers](../routers.md) explains what each router computes.",
    ]
    for kind, title in titles.items():
        lines += ["", f"## {title}"]
        for name in sorted(PARTS[kind].entries):
            lines += ["", *_section(name, kind)]
    return "\n".join([*lines, ""])


def _section(name: str, kind: type) -> Iterator[str]:
    from spectr.routers.registries import PARTS
    from spectr.routers.setting_texts import options_of

    make = PARTS[kind].load(name)
    source = make.func if isinstance(make, partial) else make
    plain = next(other for other in PARTS[kind].entries if PARTS[kind].load(other) is source)
    if plain != name:
        presets = getattr(make, "keywords", {})
        given = ", ".join(f"`{option}={_as_text(value)}`" for option, value in presets.items())
        yield from (f"### `{name}`", "", f"`{plain}` with {given}." if given else f"Another name of `{plain}`.")
        return
    about = documented(inspect.getdoc(source) or "")
    yield from (f"### `{name}`", "", f"Python: `spectr.routers.{source.__name__}`", "")
    options = options_of(name, kind)
    if not options:
        yield "It has no settings."
        return
    yield from ("| setting | type | default | |", "| --- | --- | --- | --- |")
    for option, (hint, default) in options.items():
        shown = "required" if default is inspect.Parameter.empty else f"`{_as_text(default)}`"
        yield f"| `{option}` | {_type(hint)} | {shown} | {about.get(option, '')} |"


def documented(docstring: str) -> dict[str, str]:
    """The attributes that a docstring describes, each with its text as Markdown."""
    _, _, rest = docstring.partition("Attributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in rest.splitlines():
        if line and not line.startswith(" "):
            break
        if start := re.match(r"    (\w+): (.*)", line):
            name = start[1]
            found[name] = start[2]
        elif name and line.strip():
            found[name] += " " + line.strip()
    return {key: _markdown(text) for key, text in found.items()}


def _markdown(text: str) -> str:
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return re.sub(r"``([^`]*)``", r"`\1`", text).replace("|", "\\|")


def _type(hint: Any) -> str:
    from typing import Literal, get_args, get_origin

    from spectr.routers.hints import kinds

    words = {type(None): "none", int: "whole number", float: "number", bool: "true or false", str: "text"}
    found = []
    for kind in kinds(hint):
        if get_origin(kind) is Literal:
            found += [f"`{value}`" for value in get_args(kind)]
        elif get_origin(kind) is tuple:
            found.append("names, separated by commas")
        else:
            found.append(words.get(kind) or inspect.formatannotation(kind).split(".")[-1].replace("|", "\\|"))
    return " or ".join(found)


def _as_text(value: Any) -> str:
    from spectr.routers.registries import PARTS
    from spectr.routers.router_config import part_config

    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple(PARTS)):
        return part_config(value)["name"]
    return ",".join(map(str, value)) or "empty" if isinstance(value, tuple) else str(value)
