"""What the shortlist's codes cost: its decisions by 8 and 16 bits, and by the same prototypes in float32.

Every score is known to within what its code has left out, and with it each expert's evidence. An expert whose interval
reaches the last place of the list is near; a list is certain where no other than its own are. For the rest it is tried
to score the near ones in full, while the others' votes, which all are divided by, stay as their codes have them.

    python benchmarks/codes.py --library LIBRARY --data-root DATA [--prompts 2] [--size 16]

LIBRARY is an indexed one, such as ``benchmarks/scale.py`` leaves behind.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from pooling import rows, share
from spectr import ExpertLibrary, Shortlist, compose
from spectr.composition import Paged
from spectr.layers.certain import CertainProbe, Certainty, Interval
from spectr.layers.probe import Probe
from spectr.models import encode_prompt, load_model
from spectr.spectral import Prototypes

# Shape suffixes: T tokens, E experts, I inputs.


class Read(NamedTuple):
    """One prompt by codes of one width: what is known of each expert's evidence, and how long it took to read.

    ``rescored`` is by length of a list what is known when those that are near are scored in full.
    """

    evidence_E: Float[Tensor, " E"]
    interval: Interval
    rescored: dict[int, Interval]
    seconds: float


class Prompt(NamedTuple):
    """One prompt by all widths, and how long a plain shortlist and one that is read in full take to read it."""

    reads: dict[int, Read]
    right: int
    own_words: bool
    plain: float
    in_full: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, required=True, help="a calibrated and indexed library")
    parser.add_argument("--data-root", type=Path, required=True, help="folder of the tasks' data")
    parser.add_argument("--prompts", type=int, default=2, help="training rows of each task, in each kind of words")
    parser.add_argument("--size", type=int, default=16, help="of the shortlist")
    arguments = parser.parse_args()
    prompts = list(read(arguments))
    console = Console(width=120)
    console.print(found(prompts, arguments.size))
    for size in (1, arguments.size):
        console.print(certain(prompts, size))
    again = statistics.median(prompt.in_full / prompt.plain for prompt in prompts)
    console.print(
        f"once more, by prototypes from the index: {again:.2f} times 8 bits'; {torch.get_num_threads()} threads"
    )


@torch.inference_mode()
def read(arguments: argparse.Namespace) -> Iterator[Prompt]:
    model, tokenizer = load_model(dtype="float32")
    library = ExpertLibrary.open(arguments.library)
    routed = compose(model, library, Shortlist(size=1, bits=32))
    assert isinstance(routed, Paged)
    assert routed.prompt is not None
    in_full = routed._probed
    assert isinstance(in_full, CertainProbe)
    means = {module: prototypes.mean_I for module, prototypes in routed.prototypes.items()}
    kinds = {bits: library.index.prototypes(routed.experts, means, bits) for bits in (8, 16)} | {32: routed.prototypes}
    plain = Probe(in_full.probe.entry, in_full.probe.layers, kinds[8], in_full.router, routed.experts)
    plain.opening, plain.usual = in_full.probe.opening, in_full.probe.usual
    asleep(routed)
    plain.learn_usual()
    for example, task, own in track(list(rows(arguments)), "reading prompts"):
        ids = torch.tensor([encode_prompt(tokenizer, example.prompt)])
        begin = time.perf_counter()
        evidence_E = plain(input_ids=ids)[0]
        seconds = time.perf_counter() - begin
        reads = {bits: bounds(in_full, kinds[bits], ids, (1, arguments.size)) for bits in kinds}
        reads[8] = reads[8]._replace(evidence_E=evidence_E)
        begin = time.perf_counter()
        interval(in_full, kinds[16], ids, exact=True)
        yield Prompt(reads, routed.experts.index(task), own, seconds, time.perf_counter() - begin)


def asleep(routed: Paged) -> None:
    """The model is the base model from now on."""
    for layer in routed.layers.values():
        layer.asleep = True


def bounds(known: CertainProbe, voters: dict[str, Prototypes], ids: Tensor, sizes: tuple[int, ...]) -> Read:
    """By these voters, less what is usual by the prototypes in full."""
    begin = time.perf_counter()
    first = interval(known, voters, ids)
    seconds = time.perf_counter() - begin
    rescored = {}
    for size in sizes:
        near = near_ones(first, size)
        if not first.decides(size).all() and len(near) < 100:  # else nothing is left that codes would tell
            rescored[size] = interval(known, {name: Rescored(one, near) for name, one in voters.items()}, ids)
    return Read(first.middle_BE[0], first, rescored, seconds)


def interval(known: CertainProbe, voters, ids: Tensor, *, exact: bool = False) -> Interval:
    probe = Probe(known.probe.entry, known.probe.layers, voters, known.router, known.probe.experts, known.probe.opening)
    reader = CertainProbe(probe, Certainty())
    reader._usual = known._usual
    return reader._less_usual(reader._read((), {"input_ids": ids}, exact=exact))


def near_ones(known: Interval, size: int) -> list[int]:
    """Who may be on the list."""
    last = known.least_BE[0].topk(size).values[-1]
    return (known.most_BE[0] >= last).nonzero()[:, 0].tolist()


class Rescored:
    """Prototypes, some of them in full."""

    def __init__(self, inner: Prototypes, near: list[int]):
        self.experts, self.inner, self.near = inner.experts, inner, near

    def scores(self, x: Float[Tensor, "T I"]) -> Float[Tensor, "T E"]:
        return self.inner.scores(x)

    def bounded(self, x: Float[Tensor, "T I"]) -> tuple[Float[Tensor, "T E"], Float[Tensor, "T E"]]:
        known, exact = self.inner.bounded(x), self.inner.in_full().bounded(x)
        for values_TE, exact_TE in zip(known, exact, strict=True):
            values_TE[:, self.near] = exact_TE[:, self.near]
        return known

    def in_full(self) -> Prototypes:
        return self.inner.in_full()


def found(prompts: list[Prompt], size: int) -> Table:
    """Whether the right expert is on the list."""
    table = Table(
        "prompts", "bits", f"right among {size}", "right alone", f"of {size} on float32's list", "evidence off"
    )
    for own in (True, False):
        here = [prompt for prompt in prompts if prompt.own_words == own]
        for bits in here[0].reads:
            mine = [prompt.reads[bits].evidence_E for prompt in here]
            exact = [prompt.reads[32].evidence_E for prompt in here]
            places = [place(values, prompt.right) for values, prompt in zip(mine, here, strict=True)]
            both = [len(listed(a, size) & listed(b, size)) / size for a, b in zip(mine, exact, strict=True)]
            off = [float(((a - b).abs() / b.abs().clamp(min=1)).max()) for a, b in zip(mine, exact, strict=True)]
            table.add_row(
                f"{len(here)} in {'their own' if own else 'other'} words",
                str(bits),
                share(places, size),
                share(places, 1),
                f"{statistics.mean(both):.1%}",
                f"at most {max(off):.1e}",
            )
    return table


def certain(prompts: list[Prompt], size: int) -> Table:
    """Whether the list is certain."""
    table = Table(
        f"lists of {size}: bits", "evidence known to", "near", "certain", "near ones in full", "time over 8 bits'"
    )
    for bits in prompts[0].reads:
        reads = [prompt.reads[bits] for prompt in prompts]
        widths = [
            float(((r.interval.most_BE - r.interval.least_BE)[0] / 2)[list(listed(r.evidence_E, size))].mean())
            for r in reads
        ]
        at_once = [bool(r.interval.decides(size).all()) for r in reads]
        later = [
            once or (size in r.rescored and bool(r.rescored[size].decides(size).all()))
            for once, r in zip(at_once, reads, strict=True)
        ]
        near = [len(near_ones(r.interval, size)) for r in reads]
        table.add_row(
            str(bits),
            f"{statistics.median(widths):.1e}",
            f"{statistics.median(near):g}, at most {max(near)}",
            f"{sum(at_once)} of {len(reads)}",
            f"{sum(later)} of {len(reads)}",
            f"{statistics.median(r.seconds / p.plain for r, p in zip(reads, prompts, strict=True)):.2f}",
        )
    return table


def place(evidence_E: Tensor, right: int) -> int:
    return int((evidence_E > evidence_E[right]).sum()) + 1


def listed(evidence_E: Tensor, size: int) -> set[int]:
    return set(evidence_E.topk(size).indices.tolist())


if __name__ == "__main__":
    main()
