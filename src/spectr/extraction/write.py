"""Writing an expert folder as PEFT reads it, with a card and its origin; whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

from spectr.adapters.config import CONFIG_FILE
from spectr.adapters.read import WEIGHTS_FILE
from spectr.atomic_write import save_readable
from spectr.errors import ExtractionError
from spectr.extraction.report import Report, Spread, summary

CARD, CARD_DATA = "README.md", "expert.json"


def check_target(out: Path) -> None:
    """Raise :class:`ExtractionError` where an expert could not be written, before any work is done."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ExtractionError(
            f"{out} is {'a file' if out.is_file() else 'there already and not empty'}",
            expected="a folder that is not there yet",
            do="choose another --out, or remove it",
        )
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise ExtractionError(
            f"{out} cannot be written: {above} is no folder that can be written to",
            do="check the path and its permissions",
        )


def write_expert(
    out: Path, factors: Mapping[str, tuple[Tensor, Tensor]], config: Mapping[str, Any], report: Report
) -> Path:
    """Write the folder beside its place and then rename it, so that a kill leaves nothing half-made there.

    Args:
        out: Where it belongs.
        factors: A (rank, inputs) and B (outputs, rank) by module, in the dtype that is to be written.
        config: For ``adapter_config.json``.
        report: For the card and the record of its origin.
    """
    out = out.absolute()
    scratch = out.parent / f".{out.name}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        tensors = {}
        for module, (A, B) in factors.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = A.contiguous()
            tensors[f"base_model.model.{module}.lora_B.weight"] = B.contiguous()
        save_readable(tensors, scratch / WEIGHTS_FILE, {"format": "pt"})
        (scratch / CONFIG_FILE).write_text(_json(config), encoding="utf-8")
        (scratch / CARD_DATA).write_text(_json(asdict(report)), encoding="utf-8")
        (scratch / CARD).write_text(card(report), encoding="utf-8")
        os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out


def rank_settings(ranks: Mapping[str, int]) -> dict[str, Any]:
    """The part of a PEFT configuration that gives every module its rank, and the scale 1.

    The commonest rank is ``r``. The others stand in ``rank_pattern``, and in ``alpha_pattern`` since PEFT divides a
    module's alpha by its own rank. PEFT reads their keys as regular expressions for the end of a module's name; these
    are escaped and anchored, so that each is one module.
    """
    counts = Counter(ranks.values())
    usual = max(counts, key=lambda rank: (counts[rank], rank))
    pattern = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != usual}
    return {"r": usual, "lora_alpha": usual, "use_rslora": False, "rank_pattern": pattern, "alpha_pattern": pattern}


def targets(chosen: Sequence[str], modules: Iterable[str]) -> list[str] | str:
    """PEFT's ``target_modules`` for exactly these of a model's modules.

    PEFT adapts every module whose name is one of the list or ends with a dot and one of the list. So: last parts of
    names where these say it all, else whole names, else (one name is the end of another's) a regular expression.
    """
    every, wanted = list(modules), set(chosen)
    for names in (sorted({name.rpartition(".")[2] for name in chosen}), sorted(wanted)):
        ends = tuple(f".{name}" for name in names)
        if {module for module in every if f".{module}".endswith(ends)} == wanted:
            return names
    return "|".join(re.escape(name) for name in sorted(wanted))


def versions() -> dict[str, str]:
    """Of what computed it."""
    found = {"python": platform.python_version()}
    for package in ("spectr-lora", "torch", "transformers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def card(report: Report) -> str:
    """The expert's card in Markdown, with the front matter that the Hub reads."""
    base = f"base_model: {report.base_model}\n" if report.base_model else ""
    rows = "\n".join(f"| {name} | {value} |" for name, value in report.origin.get("settings", {}).items())
    source = "\n".join(f"- {name}: {value}" for name, value in report.origin["source"].items())
    tools = ", ".join(f"{name} {number}" for name, number in report.origin["versions"].items())
    remarks = "".join(f"\n{remark}\n" for remark in report.remarks)
    return f"""---
{base}library_name: peft
tags: [lora, spectr]
---
# {report.name}

A LoRA expert{f" for `{report.base_model}`" if report.base_model else ""}, {report.origin["made"]}. Its licence is that
of the weights that it comes from.
{remarks}
## What it keeps
{report.share:.2%} of the squared Frobenius norm of the update, over all {len(report.modules)} modules.

{_table(report)}
{_left(report)}
## Source
{source}

## Settings
| setting | value |
| --- | --- |
{rows}

{tools}
"""


def _table(report: Report) -> str:
    head = "| modules | number | kept, % (least / median / most) | rank (least / median / most) |"
    rows = [
        f"| {kind} | {count} | {percent(share)} | {whole(rank)} |" for kind, count, share, rank, _ in summary(report)
    ]
    return "\n".join([head, "| --- | --- | --- | --- |", *rows])


def _left(report: Report) -> str:
    if not report.left:
        return ""
    rows = [
        f"| {one.name} | {one.kind} | {'nothing there before' if one.relative is None else f'{one.relative:.2e}'} |"
        for one in sorted(report.left, key=lambda one: -one.change)[:20]
    ]
    rest = f"\nand {len(report.left) - 20} more; see {CARD_DATA}.\n" if len(report.left) > 20 else ""
    return f"""
## What it leaves out
{len(report.left)} parameters have changed that LoRA cannot carry: {report.left_share:.2%} of the squared norm of all
that has changed.

| parameter | what it is | change / size |
| --- | --- | --- |
{chr(10).join(rows)}
{rest}"""


def percent(spread: Spread) -> str:
    """Shares as percentages."""
    return " / ".join(f"{value * 100:.1f}" for value in spread)


def whole(spread: Spread) -> str:
    """Ranks."""
    return " / ".join(f"{value:g}" for value in spread)


def _json(data: Any) -> str:
    return json.dumps(data, indent=2, sort_keys=True, default=str) + "\n"
