"""Write an expert folder in PEFT's format, with a card and its origin; all or nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spectr.adapters import CARD, CARD_DATA
from spectr.adapters.write import Pair, write_adapter
from spectr.errors import ExtractionError
from spectr.extraction.outcome import Report, Spread, summary
from spectr.folders import new_folder

PACKAGES = ("spectr-lora", "torch", "transformers", "safetensors")


def write_expert(out: Path, factors: Mapping[str, Pair], config: Mapping[str, Any], report: Report) -> Path:
    """Write a scratch folder and then rename it, so that a killed process leaves no partial folder.

    Args:
        out: Where it belongs.
        factors: B (outputs, rank) and A (rank, inputs) by module, in the dtype that is to be written.
        config: For ``adapter_config.json``; its ranks are those of the factors.
        report: For the card and the record of its origin.
    """
    with new_folder(out, ExtractionError) as folder:
        write_adapter(folder, factors, config)
        (folder / CARD_DATA).write_text(
            json.dumps(asdict(report), indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8"
        )
        (folder / CARD).write_text(card(report), encoding="utf-8")
    return out


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
of the original weights.
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
{len(report.left)} parameters changed that LoRA cannot hold: {report.left_share:.2%} of the squared norm of
all\nchanges.

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
