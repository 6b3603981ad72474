"""All commands in one application, and how it reports errors."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import typer
from rich.markup import escape

from spectr import __version__
from spectr.cli import (
    benchmark,
    compose,
    evaluate,
    extract,
    generate,
    library,
    merge,
    route,
    serve,
    train,
)
from spectr.cli.console import errors, out, say
from spectr.errors import SpectrError, SpectrWarning

app = typer.Typer(
    name="spectr",
    help="Turn a language model and a folder of LoRA experts into one model that chooses the right experts for each "
    "prompt, or for every token at every layer.\n\nWithout options, every command uses the default model "
    "(SmolLM2-135M-Instruct), the shipped experts, and the router calibrated (one expert for each prompt). "
    "Start with: spectr demo",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    *(route.demo, generate.generate, generate.chat, route.route, serve.serve, compose.compose, merge.merge),
    *(extract.extract, extract.rerank, evaluate.evaluate, evaluate.report, benchmark.benchmark),
):
    app.command()(command)
app.add_typer(train.app, name="train")
app.add_typer(library.app, name="library")


@app.callback(invoke_without_command=True)
def _version(
    version: bool = typer.Option(False, "--version", help="Show the version and exit."),
) -> None:
    if version:
        out.print(f"spectr {__version__}", highlight=False)
        raise typer.Exit


def run() -> None:
    """Run the application; the entry point of the ``spectr`` command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        with warnings.catch_warnings():
            _show_warnings()
            app()
    except SpectrError as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except SystemExit as end:  # typer turns Ctrl-C into this
        if end.code == 130:
            errors.print("stopped", highlight=False)
        raise
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:  # a bad path, missing permissions or a full disk, where no caller caught it
        place = f"{error.filename}: " if error.filename else ""
        errors.print(f"error: {place}{error.strerror or error}", markup=False, highlight=False, soft_wrap=True)
        errors.print("  to do: check the path, its permissions and the free space", highlight=False)
        sys.exit(2)


def _show_warnings() -> None:
    """Print our warnings as lines, each text once, and all others as Python does."""
    others, shown = warnings.showwarning, set()

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if not issubclass(category, SpectrWarning):
            others(message, category, *place, **more)
        elif str(message) not in shown:
            shown.add(str(message))
            say(f"warning: {message}")

    warnings.showwarning = show
