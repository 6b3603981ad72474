"""What an extraction found and kept, by module, and the expert's folder with its card."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from spectr.adapters import CARD_DATA
from spectr.adapters.write import Pair, write_adapter, write_card
from spectr.errors import ExtractionError
from spectr.folders import new_folder
from spectr.grouping import grouped

_BLOCK = re.compile(r"\.(\d+)\.")
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One module of the expert.

    Attributes:
        module: Its name in the model.
        rank: Number of kept directions.
        share: Their share of the update's squared Frobenius norm, from 0 to 1.
        change: The Frobenius norm of the whole update.
        relative: The same divided by the norm of the base's weight, if known and not zero.
        method: ``exact``, ``randomised``, or ``factors`` for an expert that was re-ranked.
    """

    module: str
    rank: int
    share: float
    change: float
    relative: float | None
    method: str


@dataclass(frozen=True, kw_only=True)
class Left:
    """A parameter that changed but that no LoRA expert can hold.

    ``relative`` is ``||d|| / ||W||``, or ``None`` if the base has nothing to compare with.
    """

    name: str
    kind: str
    relative: float | None
    change: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Report:
    """An expert that was made from other weights.

    Attributes:
        name: The expert's.
        base_model: The given base.
        modules: Its modules, in the model's order.
        left: What it cannot hold.
        remarks: Remarks for the reader.
        origin: Sources, hashes, settings, versions.
    """

    name: str
    base_model: str | None
    modules: tuple[Kept, ...]
    left: tuple[Left, ...]
    remarks: tuple[str, ...]
    origin: Mapping[str, Any]

    @property
    def share(self) -> float:
        """Share of the squared norm kept, over all modules of the expert together."""
        total = sum(kept.change**2 for kept in self.modules)
        return sum(kept.share * kept.change**2 for kept in self.modules) / total

    @property
    def left_share(self) -> float:
        """The share of :attr:`left` in the squared norm of all changes."""
        left = sum(one.change**2 for one in self.left)
        return left / (left + sum(kept.change**2 for kept in self.modules))


class Place(NamedTuple):
    """A module's position in the model; ``layer`` is ``None`` outside of the numbered layers."""

    kind: str
    layer: int | None


def places(modules: Iterable[str]) -> dict[str, Place]:
    """Kind and layer of each module: ``model.layers.3.self_attn.q_proj`` is ``q_proj`` of layer 3.

    Kinds get their parent's name too where the last part alone is ambiguous (``attn.c_proj``, ``mlp.c_proj``); further
    numbers, as those of a mixture's experts, become ``*``.
    """
    found = {}
    for module in modules:
        block = _BLOCK.search(f".{module}.")
        path = f".{module}."[block.end() - 1 : -1] if block else f".{module}"
        found[module] = Place(_NUMBER.sub(".*", path)[1:] or module, int(block[1]) if block else None)
    short: dict[str, set[str]] = {}
    for kind, _ in found.values():
        short.setdefault(kind.rpartition(".")[2], set()).add(kind)
    return {
        module: Place(last if len(short[last := kind.rpartition(".")[2]]) == 1 else kind, layer)
        for module, (kind, layer) in found.items()
    }


class Spread(NamedTuple):
    """Minimum, median and maximum of some numbers."""

    least: float
    median: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of numbers that are there."""
        numbers = sorted(values)
        return cls(numbers[0], statistics.median(numbers), numbers[-1])


class KindSummary(NamedTuple):
    """All modules of one kind."""

    kind: str
    modules: int
    share: Spread
    rank: Spread
    relative: Spread | None


def summary(report: Report) -> tuple[KindSummary, ...]:
    """The modules by kind, in the model's order; then all of them, if there are several kinds."""
    where = places(kept.module for kept in report.modules)
    groups = grouped((where[kept.module].kind, kept) for kept in report.modules)
    if len(groups) > 1:
        groups["all"] = list(report.modules)
    return tuple(_of_kind(kind, modules) for kind, modules in groups.items())


def _of_kind(kind: str, modules: list[Kept]) -> KindSummary:
    relative = [kept.relative for kept in modules if kept.relative is not None]
    return KindSummary(
        kind=kind,
        modules=len(modules),
        share=Spread.of(kept.share for kept in modules),
        rank=Spread.of(kept.rank for kept in modules),
        relative=Spread.of(relative) if relative else None,
    )


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
        write_card(folder, card(report), asdict(report))
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
