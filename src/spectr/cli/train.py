"""``spectr train``."""

from __future__ import annotations

from dataclasses import fields
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
    from spectr.training import TrainingSettings
    from spectr.training.plan import Source, read_plan, run_plan

    source = Source(
        task=task,
        prompt=prompt,
        answer=answer,
        choices=choices,
        train=data,
        test=test,
        root=data_root,
        letters=letters,
    )
    settings = {f.name: context.params[f.name] for f in fields(TrainingSettings) if f.name in context.params}
    plan = read_plan(out_folder, source, name=name, validation=validation, test_limit=test_limit, settings=settings)
    for remark in plan.remarks:
        say(remark)
    base, tokenizer = open_model(model, dtype)
    say(f"training '{plan.name}' on {len(plan.train)} examples")

    from spectr.models import HUB_ID

    with bar() as advance, told_where_it_stopped(plan.out):
        report = run_plan(plan, base, tokenizer, base_model=model or HUB_ID, progress=advance)
    if report.accuracy_after is not None:
        out.print(
            f"{report.metric} {report.accuracy_after:.1%} on {report.test_examples} test rows; the base model had "
            f"{report.accuracy_before:.1%}",
            highlight=False,
        )
    out.print(f"expert: {plan.out.resolve()}", highlight=False)
