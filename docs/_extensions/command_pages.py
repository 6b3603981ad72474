"""The command line's reference, from the commands themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_MARKUP = re.compile(r"\[/?(?:dim|bold|italic|red|green|yellow|cyan)?(?: [a-z ]+)?\]")


def commands() -> Iterator[tuple[str, Any]]:
    """Each command by its whole name, such as ``spectr library add``."""
    from typer.main import get_command

    from spectr.cli.app import app

    yield from _below("spectr", get_command(app))


def _below(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    inner = getattr(command, "commands", {})
    if not inner or (command.invoke_without_command and name != "spectr"):
        yield name, command
    for word, found in inner.items():
        yield from _below(f"{name} {word}", found)


def command_page() -> str:
    """The page: for each command its help, its arguments and its options."""
    found = dict(commands())
    lines = ["# Command line", "", "The text of each command is that of `spectr COMMAND --help`.", ""]
    lines += ["| command | |", "| --- | --- |"]
    lines += [f"| [`{name}`](#{_anchor(name)}) | {_summary(command)} |" for name, command in found.items()]
    for name, command in found.items():
        lines += ["", *_section(name, command)]
    return "\n".join([*lines, ""])


def _section(name: str, command: Any) -> Iterator[str]:
    context = command.context_class(command, info_name=name)
    usage = command.get_usage(context).removeprefix("Usage: ")
    yield from (f"({_anchor(name)})=", f"## {name}", "", *_help(command.help or ""), "```text", usage, "```")
    records = [parameter.get_help_record(context) for parameter in command.params if not parameter.hidden]
    if records:
        yield from ("", "| argument or option | |", "| --- | --- |")
        yield from (f"| `{names}` | {_escaped(text)} |" for names, text in records)


def _help(text: str) -> Iterator[str]:
    """Paragraphs as they are, and examples, which the terminal dims, as code."""
    for paragraph in re.split(r"\n\s*\n", text):
        if "[dim]" in paragraph:
            lines = [_MARKUP.sub("", line).strip() for line in paragraph.splitlines()]
            yield from ("```console", *(f"$ {line}" for line in lines if line), "```", "")
        else:
            yield from (_escaped(" ".join(paragraph.split())), "")


def _summary(command: Any) -> str:
    return _escaped(" ".join((command.help or "").split("\n\n")[0].split()))


def _escaped(text: str) -> str:
    plain = _MARKUP.sub("", text)
    return re.sub(r"([\\`*_{}\[\]<>|#$])", r"\\\1", plain)


def _anchor(name: str) -> str:
    return f"command-{name.replace(' ', '-')}"
