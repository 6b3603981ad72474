"""``spectr train gates``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectr.cli.console import bar, out, say
from spectr.cli.model_loading import open_model
from spectr.cli.options import BaseOption, DataRootOption, DtypeOption, LettersOption
from spectr.cli.rows import (
    AnswerOption,
    ChoicesOption,
    PromptOption,
    rows_option,
    setting,
    told_where_it_stopped,
)
from spectr.errors import DataError
from spectr.shipped import open_library


def gates(
    names: Annotated[list[str] | None, typer.Argument(help="The experts; all that have no gates if left out.")] = None,
    library: Annotated[
        Path | None, typer.Option("--library", "-l", help="Folder of experts; the gates go there, beside the weights.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Task whose data trained the expert; by default the shipped one of its name.")
    ] = None,
    data: Annotated[str | None, rows_option("Training rows")] = None,
    data_root: DataRootOption = None,
    letters: LettersOption = False,
    prompt: PromptOption = None,
    answer: AnswerOption = None,
    choices: ChoicesOption = None,
    model: BaseOption = None,
    dtype: DtypeOption = "float32",
    fresh: Annotated[bool, typer.Option("--fresh", help="Train gates anew where there are some.")] = False,
    steps: Annotated[int, setting("Optimiser steps.")] = 100,
    batch_size: Annotated[int, setting("Examples a step.")] = 8,
    learning_rate: Annotated[float, setting("AdamW's.")] = 5e-3,
    warmup: Annotated[float, setting("Share of the steps that warm up, from 0 to 1.")] = 0.06,
    weight_decay: Annotated[float, setting("AdamW's.")] = 0.0,
    examples: Annotated[int | None, setting("Training examples used at most, the first of the data.")] = None,
    max_length: Annotated[int, setting("Tokens; a longer prompt loses its middle.")] = 512,
    seed: Annotated[int, setting("Of the order.")] = 0,
) -> None:
    """Train PHATGOOSE gates for finished experts, on the data that each was trained on.

    One vector a layer, with the base model and the expert frozen: a few minutes for an expert on two cores. A run that
    was stopped goes on when it is started again.

    [dim]spectr train gates --library experts --data-root data[/]
    [dim]spectr train gates mood -l experts --data rows.jsonl --prompt "Is this positive? {text}" --choices no,yes[/]
    """
    if library is None:
        raise DataError("nothing says which library the gates go into", do="give its folder: --library experts")
    from spectr.adapters import has_gates

    experts = open_library(library)
    experts.check(*(names or ()))
    chosen = [name for name in (names or experts) if fresh or not has_gates(experts[name])]
    if not chosen:
        out.print("all of these experts have gates; --fresh trains them anew")
        return
    from spectr.training.plan import Source, read_gate_data

    source = Source(
        task=task, prompt=prompt, answer=answer, choices=choices, train=data, root=data_root, letters=letters
    )
    found = read_gate_data(chosen, source, limit=examples)
    from spectr.training.settings import GateSettings

    settings = GateSettings(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup=warmup,
        weight_decay=weight_decay,
        max_length=max_length,
        seed=seed,
    )
    base, tokenizer = open_model(model, dtype)

    from spectr.training.gates import forget, keep_gates, train_gates

    for number, (name, (rows, origin)) in enumerate(found.items(), start=1):
        say(f"gates of '{name}' ({number} of {len(found)}): {steps} steps on {len(rows)} examples")
        work = library / f".gates-{name}"
        with bar() as advance, told_where_it_stopped(work):
            expert = experts[name]
            vectors, facts = train_gates(
                base, tokenizer, expert, train=rows, settings=settings, work=work, data=origin, progress=advance
            )
        keep_gates(library, expert, vectors, facts)
        forget(work)
    out.print(f"gates of {', '.join(found)}: {library.resolve()}", highlight=False)
