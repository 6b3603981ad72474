"""``spectr train``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from spectr.cli.console import bar, out, say
from spectr.cli.opened import open_model
from spectr.cli.options import BaseOption, DataRootOption, DtypeOption, LettersOption
from spectr.cli.rows import (
    AnswerOption,
    ChoicesOption,
    PromptOption,
    chosen_task,
    origin_of,
    rows_option,
    setting,
    source_of,
    told_where_it_stopped,
)
from spectr.errors import DataError, MissingExtraError

app = typer.Typer()


@app.callback(invoke_without_command=True)
def train(
    context: typer.Context,
    out_folder: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the expert; a killed run goes on there.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="A shipped task's name, or a task file; --data-root says where its data are."),
    ] = None,
    data: Annotated[str | None, rows_option("Training rows")] = None,
    test: Annotated[str | None, typer.Option(help="Test rows, for the accuracy before and after.")] = None,
    data_root: DataRootOption = None,
    letters: LettersOption = False,
    prompt: PromptOption = None,
    answer: AnswerOption = None,
    choices: ChoicesOption = None,
    name: Annotated[str | None, typer.Option(help="The expert's name; by default the task's or the folder's.")] = None,
    model: BaseOption = None,
    dtype: DtypeOption = "float32",
    validation: Annotated[
        int, typer.Option(help="Hold out the first rows of the data, and keep the epoch that is best on them.", min=0)
    ] = 0,
    test_limit: Annotated[int | None, typer.Option(help="Test rows used at most.", min=1)] = None,
    rank: Annotated[int, setting("LoRA rank r.")] = 8,
    alpha: Annotated[int, setting("LoRA alpha; the scale is alpha / r.")] = 16,
    dropout: Annotated[float, setting("LoRA dropout.")] = 0.05,
    rslora: Annotated[bool, setting("Scale alpha / sqrt(r) instead.")] = False,
    target_modules: Annotated[
        str, setting("all-linear, names separated by commas, or a regular expression.")
    ] = "all-linear",
    batch_size: Annotated[int, setting("Examples a step.")] = 8,
    learning_rate: Annotated[float, setting("AdamW's; 5e-4 to 1e-3 suits small models.")] = 1e-4,
    schedule: Annotated[str, setting("constant, linear or cosine, after the warm-up.")] = "constant",
    warmup: Annotated[float, setting("Share of the steps that warm up, from 0 to 1.")] = 0.0,
    weight_decay: Annotated[float, setting("AdamW's.")] = 0.0,
    epochs: Annotated[int, setting("Passes over the examples.")] = 1,
    examples: Annotated[int | None, setting("Training examples used at most, the first of the data.")] = None,
    max_length: Annotated[int, setting("Tokens; a longer prompt loses its middle.")] = 512,
    seed: Annotated[int, setting("Of the initial weights, the order and the dropout.")] = 0,
) -> None:
    """Train a LoRA expert: from a task, or from JSONL rows or a Hub dataset with a prompt template.

    Loss on the answer only. Writes a PEFT adapter with a card. A checkpoint is kept every minute and at Ctrl-C: a run
    that was stopped goes on from there when it is started again, and ends with the same weights.

    [dim]spectr train --data rows.jsonl --prompt "Is this positive? {text}" --choices "no,yes" --out runs/mine[/]
    [dim]spectr train --data rows.jsonl --prompt "{question}" --answer "{reply}" --out runs/replies[/]

    For the router "phatgoose", of experts that are there: [bold]spectr train gates[/].
    """
    if context.invoked_subcommand:
        return
    if out_folder is None:
        raise DataError("nothing says where the expert goes", do="give a folder: --out runs/mine")
    from spectr.tasks import read_examples

    chosen = chosen_task(task, prompt, answer, choices, name or out_folder.name)
    chosen = chosen.lettered() if letters else chosen
    train_source = data or source_of(chosen, "train", data_root)
    test_source = test or source_of(chosen, "test", data_root)
    if train_source is None:
        raise DataError("no training data was named", do="give --data, or a task that names its own")
    limit = None if examples is None else validation + examples
    rows = read_examples(chosen, train_source, root=data_root, limit=limit)
    if validation >= len(rows):
        raise DataError(
            f"--validation {validation} holds out all of the {len(rows)} rows that there are",
            do="hold out fewer, or give more data",
        )
    test_examples = read_examples(chosen, test_source, root=data_root, limit=test_limit) if test_source else []
    if find_spec("peft") is None:
        raise MissingExtraError("training", "train")

    from spectr.models import HUB_ID
    from spectr.training import TrainingSettings, check_folder, train_expert

    settings = TrainingSettings(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        rslora=rslora,
        target_modules=target_modules,
        batch_size=batch_size,
        learning_rate=learning_rate,
        schedule=schedule,  # pyright: ignore[reportArgumentType]
        warmup=warmup,
        weight_decay=weight_decay,
        epochs=epochs,
        examples=examples,
        max_length=max_length,
        seed=seed,
    )
    check_folder(out_folder)  # all of this before a model is loaded
    if test_source == train_source:
        say("the test rows are training rows: the accuracy says nothing about new ones")
    base, tokenizer = open_model(model, dtype)
    say(f"training '{name or chosen.name}' on {len(rows) - validation} examples")
    with bar() as advance, told_where_it_stopped(out_folder):
        report = train_expert(
            base,
            tokenizer,
            name=name or chosen.name,
            base_model=model or HUB_ID,
            train=rows[validation:],
            test=test_examples,
            validation=rows[:validation],
            settings=settings,
            out=out_folder,
            data=origin_of(chosen, train_source, test_source, data_root),
            length_normalised=chosen.length_normalised,
            metric=chosen.metric,
            max_new_tokens=chosen.max_new_tokens,
            note=chosen.note,
            progress=advance,
        )
    if report.accuracy_after is not None:
        out.print(
            f"{report.metric} {report.accuracy_after:.1%} on {report.test_examples} test rows; the base model had "
            f"{report.accuracy_before:.1%}",
            highlight=False,
        )
    out.print(f"expert: {out_folder.resolve()}", highlight=False)
