"""``spectr train``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectr.cli.console import bar, out, say
from spectr.cli.options import DtypeOption, ModelOption, open_model
from spectr.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    from spectr.tasks import Task

Setting = typer.Option(rich_help_panel="Settings (the paper's are the defaults)")


def train(
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for the expert; a killed run goes on there.")],
    task: Annotated[str | None, typer.Option(help="A shipped task's name, or the path of a task file.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Training rows: a JSONL file, or hub:<dataset>[:<config>]:<split>.")
    ] = None,
    test: Annotated[str | None, typer.Option(help="Test rows, for the accuracy before and after.")] = None,
    data_root: Annotated[
        Path | None, typer.Option(envvar="SPECTR_DATA", help="Folder that relative paths of data start from.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help='Template over the fields of a row: "Topic of: {title}"')] = None,
    answer: Annotated[str | None, typer.Option(help="Template of the answer, for free text.")] = None,
    choices: Annotated[str | None, typer.Option(help='Answers by label number: "World,Sports,Business"')] = None,
    name: Annotated[str | None, typer.Option(help="The expert's name; by default the task's or the folder's.")] = None,
    model: ModelOption = None,
    dtype: DtypeOption = "float32",
    validation: Annotated[
        int, typer.Option(help="Hold out the first rows of the data, and keep the epoch that is best on them.", min=0)
    ] = 0,
    test_limit: Annotated[int | None, typer.Option(help="Test rows used at most.", min=1)] = None,
    rank: Annotated[int, Setting] = 8,
    alpha: Annotated[int, Setting] = 16,
    dropout: Annotated[float, Setting] = 0.05,
    rslora: Annotated[bool, Setting] = False,
    target_modules: Annotated[str, Setting] = "all-linear",
    batch_size: Annotated[int, Setting] = 8,
    learning_rate: Annotated[float, Setting] = 1e-4,
    schedule: Annotated[str, Setting] = "constant",
    warmup: Annotated[float, Setting] = 0.0,
    weight_decay: Annotated[float, Setting] = 0.0,
    epochs: Annotated[int, Setting] = 1,
    examples: Annotated[int | None, Setting] = None,
    max_length: Annotated[int, Setting] = 512,
    seed: Annotated[int, Setting] = 0,
) -> None:
    """Train a LoRA expert: from a task, or from JSONL rows or a Hub dataset with a prompt template.

    Loss on the answer only. Writes a PEFT adapter with a card. A run that was killed goes on where it stopped, and ends
    with the same weights, when it is started again with the same settings.

    [dim]spectr train --task agnews --data-root data --out runs/agnews[/]
    [dim]spectr train --data rows.jsonl --prompt "{question}" --answer "{reply}" --out runs/mine[/]
    """
    from spectr.tasks import read_rows

    chosen = _task(task, prompt, answer, choices, name or out_folder.name)
    train_source, test_source = data or chosen.train, test or chosen.test
    if train_source is None:
        raise DataError("no training data was named", do="give --data, or a task that names its own")
    rows = read_rows(train_source, root=data_root, limit=None if examples is None else validation + examples)
    test_rows = read_rows(test_source, root=data_root, limit=test_limit) if test_source else []
    held_out, train_examples, test_examples = (
        [chosen.example(row) for row in part] for part in (rows[:validation], rows[validation:], test_rows)
    )
    if find_spec("peft") is None:  # asked before the model is loaded
        raise MissingExtraError("training", "train")
    base, tokenizer = open_model(model, dtype)

    from spectr.models import HUB_ID
    from spectr.training import TrainingSettings, train_expert

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
    say(f"training '{name or chosen.name}' on {len(train_examples)} examples")
    with bar() as advance:
        report = train_expert(
            base,
            tokenizer,
            name=name or chosen.name,
            base_model=model or HUB_ID,
            train=train_examples,
            test=test_examples,
            validation=held_out,
            settings=settings,
            out=out_folder,
            data=_origin(chosen, train_source, test_source, data_root),
            length_normalised=chosen.length_normalised,
            note=chosen.note,
            progress=advance,
        )
    if report.accuracy_after is not None:
        out.print(
            f"accuracy {report.accuracy_after:.1%} on {report.test_examples} test rows; the base model had "
            f"{report.accuracy_before:.1%}",
            highlight=False,
        )
    out.print(f"expert: {out_folder.resolve()}", highlight=False)


def _task(task: str | None, prompt: str | None, answer: str | None, choices: str | None, name: str) -> Task:
    from spectr.tasks import Task

    if task is None and prompt is None:
        raise DataError(
            "nothing says how a row becomes a prompt",
            do='give --task agnews (or a task file), or --prompt "..." with --answer "..." or --choices "a,b"',
        )
    if task is not None:
        if prompt or answer or choices:
            raise DataError("--task comes with its own templates", do="leave out --prompt, --answer and --choices")
        return Task.load(task) if task.endswith((".yaml", ".yml")) else Task.shipped(task)
    if (answer is None) == (choices is None):
        raise DataError("one kind of answer is needed", do='give --answer "{field}" or --choices "no,yes", not both')
    listed = tuple(choice.strip() for choice in choices.split(",")) if choices else None
    assert prompt is not None
    return Task.of(name=name, version=1, prompt=prompt, answer=answer, choices=listed)


def _origin(task: Task, train: str, test: str | None, root: Path | None) -> dict[str, Any]:
    from spectr.hashing import file_sha256

    origin: dict[str, Any] = {"task": f"{task.name} v{task.version}"}
    for what, source in (("train", train), ("test", test)):
        if source:
            origin[what] = source
            path = Path(root or ".") / source
            if path.is_file():
                origin[f"{what} sha256"] = file_sha256(path)
    return origin
