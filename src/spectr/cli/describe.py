"""``spectr library describe``: experts in words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectr.cli.console import bar, out, say
from spectr.cli.guides import open_writer
from spectr.cli.options import BaseOption, DataRootOption, DtypeOption
from spectr.cli.rows import AnswerOption, ChoicesOption, PromptOption, rows_option
from spectr.errors import DataError, SpectrError, raise_together
from spectr.shipped import open_library


def describe(
    library: Annotated[Path, typer.Option("--library", "-l", help="Folder of experts; descriptions.yaml goes there.")],
    names: Annotated[
        list[str] | None, typer.Argument(help="The experts; all that are not described if left out.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="The description itself, of one expert, instead of writing one.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Task that the expert belongs to; by default the shipped one of its name.")
    ] = None,
    data: Annotated[str | None, rows_option("Rows to show")] = None,
    data_root: DataRootOption = None,
    prompt: PromptOption = None,
    answer: AnswerOption = None,
    choices: ChoicesOption = None,
    examples: Annotated[int, typer.Option(help="Rows that the writer is shown.", min=1)] = 3,
    writer: Annotated[
        str | None,
        typer.Option(help="Who writes: a model, or http(s)://host/v1#MODEL; by default the model of --model."),
    ] = None,
    model: BaseOption = None,
    dtype: DtypeOption = "auto",
) -> None:
    """Describe experts in words, for the router "glider": a language model looks at a few rows of each.

    The texts are in descriptions.yaml, to be read and corrected: a small model writes poor ones.

    [dim]spectr library describe --library experts --data-root data --writer http://localhost:8000/v1#my-model[/]
    [dim]spectr library describe sql --library experts --text "Turn a question into an SQL query."[/]
    """
    from spectr.library.descriptions import write_descriptions

    experts = open_library(library)
    experts.check(*(names or ()))
    known = dict(experts.descriptions)
    if text is not None and not text.strip():
        raise DataError("--text is empty", do="say what the expert is for")
    if text is not None and len(names or ()) != 1:
        raise DataError("--text describes one expert", do="name it: spectr library describe NAME --text ...")
    if writer == "none":
        raise DataError("--writer none writes nothing", do="name a model or an endpoint, or give --text")
    chosen = names or [name for name in experts if name not in known]
    if not chosen:
        out.print("all of these experts are described; name those that are to be described anew")
        return
    own = any((task, data, prompt, answer, choices, text))
    if own and len(chosen) > 1:
        raise DataError(f"one text or task for {len(chosen)} experts ({', '.join(chosen)})", do="name one expert")
    if text:
        path = write_descriptions(library, {**known, chosen[0]: " ".join(text.split())})
        out.print(f"{chosen[0]}: {path}", highlight=False)
        return
    from spectr.tasks import read_examples
    from spectr.tasks.chosen import chosen_task, source_of

    shown, problems = {}, []
    for name in chosen:
        try:
            about = chosen_task(task or (None if own and prompt else name), prompt, answer, choices, name)
            source = data or source_of(about, "train", data_root)
            if source is None:
                raise DataError(f"no data was named for '{name}'", do="give --data, or a task that names its own")
            shown[name] = read_examples(about, source, root=data_root, limit=examples)
        except SpectrError as error:
            problems.append(error)
    raise_together("rows to describe experts by", problems, DataError)

    from spectr.guidance import describe as written

    write = open_writer(writer or model, dtype)
    with bar() as advance:
        for done, (name, rows) in enumerate(shown.items(), start=1):
            known[name] = written(write, rows)
            advance("describing", done, len(shown), name)
    path = write_descriptions(library, known)
    for name in shown:
        out.print(f"{name}: {known[name]}", highlight=False, markup=False)
    say(f"written to {path}; correct it there")
