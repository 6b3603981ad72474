"""``spectr train`` and ``spectr train gates``."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from spectr.cli.console import bar, interruptible, out, say
from spectr.cli.model_loading import open_model
from spectr.cli.options import BaseOption, DtypeOption, LettersOption, Rows, last_step, setting, with_options
from spectr.errors import some_of

app = typer.Typer()
BatchSize = Annotated[int, setting("Set the examples per step.")]
WarmUp = Annotated[float, setting("Set the share of warm-up steps, from 0 to 1.")]
WeightDecay = Annotated[float, setting("Set AdamW's weight decay.")]
Examples = Annotated[int | None, setting("Train on the first N examples only.")]
MaxLength = Annotated[int, setting("Limit the tokens of an example; a longer prompt loses its middle.")]


@app.callback(invoke_without_command=True)
@with_options
def train(
    context: typer.Context,
    rows: Rows,
    out_folder: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the expert to this folder; an interrupted run resumes from it."),
    ] = None,
    test: Annotated[str | None, typer.Option(help="Measure accuracy on these rows before and after training.")] = None,
    letters: LettersOption = False,
    name: Annotated[str | None, typer.Option(help="Name the expert; by default like the task or the folder.")] = None,
    model: BaseOption = None,
    dtype: DtypeOption = "float32",
    validation: Annotated[
        int, typer.Option(help="Hold out the first N rows, and keep the epoch that is best on them.", min=0)
    ] = 0,
    test_limit: Annotated[
        int, typer.Option(help="Measure on at most this many test rows, drawn at random.", min=1)
    ] = 200,
    all_test_rows: Annotated[bool, typer.Option("--all-test-rows", help="Measure on all test rows.")] = False,
    rank: Annotated[int, setting("Set the LoRA rank r.")] = 8,
    alpha: Annotated[int, setting("Set LoRA's alpha; the scale is alpha / r.")] = 16,
    dropout: Annotated[
        float | None, setting("Set LoRA's dropout; by default 0.05, or 0 if fused parameters are trained.")
    ] = None,
    rslora: Annotated[bool, setting("Scale by alpha / sqrt(r) instead of alpha / r.")] = False,
    target_modules: Annotated[
        str, setting("Choose the modules: all-linear, names separated by commas, or a regular expression.")
    ] = "all-linear",
    batch_size: BatchSize = 8,
    learning_rate: Annotated[float, setting("Set AdamW's learning rate; 5e-4 to 1e-3 suits small models.")] = 1e-4,
    schedule: Annotated[
        str, setting("Choose the schedule after the warm-up: constant, linear or cosine.")
    ] = "constant",
    warmup: WarmUp = 0.0,
    weight_decay: WeightDecay = 0.0,
    epochs: Annotated[int, setting("Set the number of passes over the examples.")] = 1,
    examples: Examples = None,
    max_length: MaxLength = 512,
    seed: Annotated[int, setting("Set the seed of the initial weights, the order and the dropout.")] = 0,
) -> None:
    """Train a LoRA expert from a task, or from JSONL rows or a Hub dataset with a prompt template.

    The loss counts the answer only. The result is a PEFT adapter with a card. A checkpoint is written every minute and
    at Ctrl-C. The same command resumes an interrupted run, which ends with the same weights.

    [dim]spectr train --data rows.jsonl --prompt "Is this positive? {text}" --choices "no,yes" --out runs/mine[/]
    [dim]spectr train --data rows.jsonl --prompt "{question}" --answer "{reply}" --out runs/replies[/]

    To train gates for the router "phatgoose": [bold]spectr train gates[/].
    """
    if context.invoked_subcommand:
        return
    from spectr.training import TrainingSettings
    from spectr.training.training_plan import read_plan, run_plan

    source = rows.source(test=test, letters=letters)
    settings = _given(context, TrainingSettings)
    limit = None if all_test_rows else test_limit
    plan = read_plan(out_folder, source, name=name, validation=validation, test_limit=limit, settings=settings)
    for remark in plan.remarks:
        say(remark)
    base, tokenizer = open_model(model, dtype, plan.check_base)

    from spectr.models import HUB_ID

    say(f"training '{plan.name}' on {len(plan.train)} examples")
    with bar() as advance, interruptible(lambda: last_step(plan.out)):
        report = run_plan(plan, base, tokenizer, base_model=model or HUB_ID, progress=advance)
    if report.shortened:
        say(report.shortened)
    if report.without_gradient:
        say(f"no gradient reached {some_of(report.without_gradient, 5)}; the expert leaves them out")
    if report.accuracy_after is not None:
        out.print(
            f"{report.metric} {report.accuracy_after:.1%} on {report.test_examples} test rows; base model: "
            f"{report.accuracy_before:.1%}",
            highlight=False,
        )
    out.print(f"expert: {plan.out.resolve()}", highlight=False)


@app.command()
@with_options
def gates(
    context: typer.Context,
    rows: Rows,
    names: Annotated[
        list[str] | None, typer.Argument(help="Train gates for these experts; by default for all without gates.")
    ] = None,
    library: Annotated[
        Path | None, typer.Option("--library", "-l", help="Write the gates to this folder of experts.")
    ] = None,
    letters: LettersOption = False,
    model: BaseOption = None,
    dtype: DtypeOption = "float32",
    fresh: Annotated[bool, typer.Option("--fresh", help="Train gates again for experts that have some.")] = False,
    steps: Annotated[int, setting("Set the number of optimiser steps.")] = 100,
    batch_size: BatchSize = 8,
    accumulation: Annotated[
        int, setting("Set the batches per step. The authors use --batch-size 32 --accumulation 32.")
    ] = 1,
    learning_rate: Annotated[float, setting("Set AdamW's learning rate.")] = 5e-3,
    warmup: WarmUp = 0.06,
    weight_decay: WeightDecay = 0.0,
    examples: Examples = None,
    max_length: MaxLength = 512,
    seed: Annotated[int, setting("Set the seed of the order.")] = 0,
) -> None:
    """Train PHATGOOSE gates for finished experts, each on the rows that trained it.

    Trains one vector per layer; the base model and the expert stay frozen. This takes a few minutes per expert on two
    cores. An interrupted run resumes.

    [dim]spectr train gates --library my-experts --data-root data[/]
    [dim]spectr train gates mood -l experts --data rows.jsonl --prompt "Is this positive? {text}" --choices no,yes[/]
    """
    from spectr.training import GateSettings
    from spectr.training.training_plan import read_gate_plan, run_gate_plan

    source, settings = rows.source(letters=letters), _given(context, GateSettings)
    plan = read_gate_plan(library, names or (), source, fresh=fresh, limit=examples, settings=settings)
    if not plan.experts:
        out.print("all of these experts have gates; to train them again, use --fresh")
        return
    for remark in plan.remarks:
        say(remark)
    base, tokenizer = open_model(model, dtype)
    with bar() as advance, interruptible(lambda: last_step(*plan.work)):
        run_gate_plan(plan, base, tokenizer, progress=advance)
    out.print(f"gates of {', '.join(plan.experts)}: {plan.library.resolve()}", highlight=False)


def _given(context: typer.Context, kind: Any) -> dict[str, Any]:
    """The options that are settings of this kind."""
    return {field.name: context.params[field.name] for field in fields(kind) if field.name in context.params}
