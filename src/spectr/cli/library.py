"""``spectr library``: experts on disk."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from spectr.adapters import GATES_FILE
from spectr.cli.console import bar, out, say
from spectr.cli.describe import describe
from spectr.cli.model_loading import open_model
from spectr.cli.options import BaseOption, DataRootOption, DtypeOption, JsonOption, LibraryOption
from spectr.errors import LibraryError, SpectrError, raise_together, some_of
from spectr.grouping import grouped
from spectr.library import Entry, ExpertLibrary, LibraryStore
from spectr.library.calibration_file import CALIBRATION_FILE
from spectr.library.description_file import DESCRIPTIONS_FILE
from spectr.library.index import INDEX_FOLDER
from spectr.library.manifest import MANIFEST_FILE
from spectr.library.remarks import added_remarks
from spectr.shipped import open_library, shipped_experts
from spectr.tasks.own_rows import read_own_rows
from spectr.tasks.rows import Source, read_lines

if TYPE_CHECKING:
    from spectr.checkup import Checkup

_SIDE_FILES = f"{CALIBRATION_FILE}, {DESCRIPTIONS_FILE}, {INDEX_FOLDER}"
_UNFILLED = "# Model Card for Model ID"  # the title of PEFT's template
app = typer.Typer(
    help="Manage experts on disk: check, add, remove, list, show, verify, calibrate, index, describe.",
    no_args_is_help=True,
)
app.command()(describe)
WriteTo = Annotated[
    Path, typer.Option("--library", "-l", help="Use the library in this folder; it is created if it does not exist.")
]


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="Set the expert's name in the library.")],
    adapter: Annotated[
        str,
        typer.Argument(
            help="Copy this PEFT folder, or this Hub id: org/repo or org/repo/folder, optionally with @revision."
        ),
    ],
    library: WriteTo,
    replace: Annotated[bool, typer.Option(help="Replace the expert of that name.")] = False,
) -> None:
    """Check a LoRA adapter and copy it into a library.

    [dim]spectr library add sql ./adapters/sql --library my-experts[/]
    """
    store = LibraryStore(library)
    entry = store.add(name, adapter, replace=replace)
    out.print(f"added {entry.name}: {_ranks(entry)}, {entry.modules} modules, {entry.parameters:,} parameters")
    for remark in added_remarks(store, entry):
        say(remark)


@app.command()
def check(
    adapter: Annotated[str, typer.Argument(help="Check this PEFT folder or Hub id.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Check it against this base model; by default the one in its configuration."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check an adapter before you use it: its base model, the modules that are routed, the modules without effect.

    The base model is not loaded. Exit code 0: all of it is routed; 1: parts have no effect; 2: it is refused; 3: its
    base model is not on this machine.

    [dim]spectr library check ./adapters/sql[/]
    """
    from spectr.checkup import check_adapter

    found = check_adapter(adapter, model)
    if as_json:
        sys.stdout.write(json.dumps({**asdict(found), "exit_code": found.exit_code}) + "\n")
    else:
        _show_checkup(found)
    raise typer.Exit(found.exit_code)


def _show_checkup(found: Checkup) -> None:
    """Print a table of facts, then the modules without effect and the reasons."""
    likely = f" (most likely {found.likely})" if found.likely else ""
    results = ("all of it is routed", "parts of it have no effect", "refused", "its base model is not on this machine")
    facts = {
        "adapter": found.source,
        "what it is": found.kind,
        "base model in its configuration": f"{found.named or 'none'}{likely}",
        "checked with": found.base or "no base model: name one with --model",
        "routed": f"{len(found.routed)} modules",
        "no effect": f"{len(found.idle)} modules" if found.idle else "",
        "missing in its file": some_of(list(found.missing), 3, " modules"),
        "result": results[found.exit_code],
    }
    table = Table(show_header=False)
    for key, value in facts.items():
        if value:
            table.add_row(key, escape(value))
    out.print(table)
    for why, modules in grouped((why, module) for module, why in found.idle.items()).items():
        out.print(f"{why}: {some_of(modules, 3, ' modules')}", markup=False, highlight=False)
    for text in (*found.remarks, *([found.refused] if found.refused else [])):
        out.print(text, markup=False, highlight=False)


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="Delete this expert.")],
    library: Annotated[Path, typer.Option("--library", "-l", help="Use the library in this folder.")],
) -> None:
    """Remove an expert from a library and delete its files."""
    store, _ = _open(library)
    store.remove(name)
    out.print(f"removed {name}")


@app.command("list")
def list_experts(library: LibraryOption = None, as_json: JsonOption = False) -> None:
    """List the experts of a library."""
    store, opened = _open(library)
    words = opened.descriptions
    if as_json:
        rows = [{**entry.model_dump(), **_kept(entry, opened)} for entry in store.entries]
        sys.stdout.write(json.dumps(rows) + "\n")
        return
    if not store.entries:
        out.print(f"{store.root} is an empty library", highlight=False)
        return
    table = Table("expert", "rank", "modules", "parameters", "calibrated", "gates", "described")
    for entry in store.entries:
        kept = _kept(entry, opened)
        has = (kept["calibrated"], kept["gates"], kept["description"])
        sizes = ("/".join(map(str, entry.ranks)), str(entry.modules), f"{entry.parameters:,}")
        table.add_row(entry.name, *sizes, *("yes" if it else "no" for it in has))
    out.print(table)
    alike = grouped(((entry.base_model, entry.targets), entry.name) for entry in store.entries)
    for (base, targets), names in alike.items():
        who = "all" if len(alike) == 1 else ", ".join(names)
        say(f"{who} for {base or 'an unknown base model'}: {', '.join(targets)}")
    strangers = sorted(set(words) - set(opened.names))
    if strangers:
        say(f"{DESCRIPTIONS_FILE} also describes experts that are not in the library: {', '.join(strangers)}")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Show this expert.")],
    library: LibraryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one expert: its facts and its card."""
    store, opened = _open(library)
    entry = store.entry(name)
    card = store.root / entry.folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if as_json:
        sys.stdout.write(json.dumps({**entry.model_dump(), "card": text}) + "\n")
        return
    table = Table(show_header=False)
    for key, value in {**_facts(entry, store.root), **_kept(entry, opened)}.items():
        table.add_row(key, {True: "yes", False: "no", None: "none"}.get(value) or str(value))
    out.print(table)
    if _UNFILLED in text:
        say(f"its card is PEFT's template, not filled in: {card}")
    elif text:
        from rich.markdown import Markdown

        out.print(Markdown(text.split("---\n", 2)[-1]))


@app.command()
def calibrate(
    library: Annotated[
        Path,
        typer.Option("--library", "-l", help="Calibrate the experts in this folder, and write the calibration there."),
    ],
    model: BaseOption = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="Read unlabelled texts from this file, one per line; by default the model writes some."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Let the model write this many texts.", min=1)] = 24,
    tokens: Annotated[int, typer.Option(help="Limit the tokens of each text.", min=1)] = 64,
    null: Annotated[
        int,
        typer.Option(help="Let the base model write this many ordinary prompts, the baseline of the evidence.", min=0),
    ] = 160,
    seed: Annotated[int, typer.Option(help="Set the seed of the writing.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure all experts again.")] = False,
    own_rows: Annotated[
        int,
        typer.Option(
            help="Measure each expert's scores on this many training rows of the shipped task with its name, for the "
            'router "seqr-normalised".',
            min=0,
        ),
    ] = 0,
    data_root: DataRootOption = None,
    dtype: DtypeOption = "auto",
) -> None:
    """Measure each expert's response to texts that the base model writes, for the router "calibrated".

    Needs no data and no training: the model writes a few texts as a user would. An expert that was added later is
    measured alone, on the same texts.

    [dim]spectr library calibrate --library my-experts[/]
    """
    experts = open_library(library)
    lines = read_lines(texts) if texts else None
    rows = read_own_rows(experts, experts.names, Source(root=data_root), limit=own_rows) if own_rows else {}
    if not fresh and experts.fully_calibrated(null) and lines is None and not rows:
        out.print(f"all {len(experts)} experts are calibrated; to measure them again, use --fresh", highlight=False)
        return
    base, tokenizer = open_model(model, dtype)

    from spectr.calibration import calibrate

    with bar() as advance:
        result = calibrate(
            base,
            experts,
            tokenizer,
            texts=lines,
            own={name: [example.prompt for example in examples] for name, (examples, _) in rows.items()},
            samples=samples,
            tokens=tokens,
            null=null,
            seed=seed,
            fresh=fresh,
            progress=lambda done, total: advance("calibrating, model passes", done, total, ""),
        )
    path = result.save(library)
    out.print(f"calibrated {len(experts)} experts on {result.settings['tokens']} tokens: {path}", highlight=False)


@app.command()
def index(
    library: Annotated[
        Path, typer.Option("--library", "-l", help="Index the experts in this folder, and write the index there.")
    ],
    model: BaseOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Index all experts again.")] = False,
    dtype: DtypeOption = "auto",
) -> None:
    """Store each expert's alignment and prototypes, for the router "shortlist" and very large libraries.

    The index of SmolLM2-135M takes about 0.9 MB per expert. An interrupted run resumes.

    [dim]spectr library index --library my-experts[/]
    """
    from spectr.indexing import build_index, check_index

    experts = open_library(library)
    missing = check_index(experts, fresh=fresh)
    if not missing:
        out.print(f"all {len(experts)} experts are indexed", highlight=False)
        return
    base, _ = open_model(model, dtype)
    with bar() as advance:
        build_index(
            base,
            experts,
            library,
            fresh=fresh,
            progress=lambda done, total, name: advance("indexing", done, total, name),
        )
    out.print(f"indexed {len(missing)} of {len(experts)} experts: {library / INDEX_FOLDER}", highlight=False)


@app.command()
def verify(library: LibraryOption = None, as_json: JsonOption = False) -> None:
    """Check the hashes of all files, and read every expert. Exit code 2 if anything is wrong."""
    store, _ = _open(library)
    say(f"reading {len(store.entries)} experts in {store.root}")
    faults = {**store.verify(), _SIDE_FILES: _side_fault(store.root)}
    if as_json:
        sys.stdout.write(json.dumps({name: fault and str(fault) for name, fault in faults.items()}) + "\n")
    raise_together(f"{store.root} is damaged", [fault for fault in faults.values() if fault], LibraryError)
    if not as_json:
        out.print(f"all {len(store.entries)} experts are unchanged since they were added")


def _open(path: Path | None) -> tuple[LibraryStore, ExpertLibrary]:
    """A library on disk: its entries and its experts."""
    root = path or shipped_experts()
    opened = ExpertLibrary.open(root)
    if not (root / MANIFEST_FILE).is_file():
        raise LibraryError(
            f"{root} is a plain folder of adapters, without a {MANIFEST_FILE}",
            do="add each adapter to a library: spectr library add NAME ADAPTER --library DIR",
        )
    return LibraryStore(root), opened


def _side_fault(root: Path) -> SpectrError | None:
    try:
        library = ExpertLibrary.open(root)
        _ = library.calibration, library.descriptions, dict(library.index)
    except SpectrError as error:
        return error
    return None


def _ranks(entry: Entry) -> str:
    return "rank " + "/".join(map(str, entry.ranks)) if entry.ranks else "no factors"


def _kept(entry: Entry, opened: ExpertLibrary) -> dict[str, Any]:
    """The files that the library keeps next to an expert's weights."""
    return {
        "description": opened.descriptions.get(entry.name),
        "calibrated": opened.calibrated(entry.name),
        "indexed": opened.indexed(entry.name),
        "gates": GATES_FILE in entry.sha256,
    }


def _facts(entry: Entry, root: Path) -> dict[str, Any]:
    return {
        "expert": entry.name,
        "folder": root / entry.folder,
        "ranks": _ranks(entry),
        "modules": f"{entry.modules} ({', '.join(entry.targets)})",
        "parameters": f"{entry.parameters:,}",
        "base model": entry.base_model or "not stated",
        "origin": entry.origin,
        "added": entry.added,
        **{f"SHA-256 of {file}": digest for file, digest in entry.sha256.items()},
    }
