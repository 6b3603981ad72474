"""What certain lists cost: a shortlist's decisions by 8 and 16 bits, and by the same prototypes in float32.

By 16 bits every score is known to within what its code has left out, and with it each expert's evidence. An expert
whose interval reaches the last place of the list is near; a list is certain where no other than its own are. For the
rest it is tried to score the near ones in full, while the others' votes, which all are divided by, stay as their codes
have them; and last all are. By 8 bits nothing is certain. Times are over that of the 8 bits just before, on the same
prompt.

    python benchmarks/codes.py --library LIBRARY --data-root DATA [--prompts 4] [--size 16]

LIBRARY is an indexed one, such as ``benchmarks/scale.py`` leaves behind. Each prompt is a line as it is read; after an
interrupt the tables are of those before.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pooling import place, rows, share
from spectr import ExpertLibrary, Shortlist, compose
from spectr.composition import Paged
from spectr.models import encode_prompt, load_model
from spectr.prompts.bounds import CertainProbe, Certainty, Interval
from spectr.prompts.probe import Probe
from spectr.spectral import Codes, Prototypes
from spectr.tasks import Example

IN_FULL = 8  # every which prompt it is timed on to read the prototypes from the index

Row = tuple[Example, str, bool]

# Shape suffixes: T tokens, E experts, I inputs.


class Prompt(NamedTuple):
    """One prompt, by each width of codes.

    Attributes:
        task: Whose expert is the right one.
        right: That expert's place among all.
        own_words: Whether the prompt is in the words that it was trained on.
        evidence: Each expert's, (E,).
        seconds: How long it took to read.
        known: What is certain of the evidence; of 8 bits nothing is.
        rescored: By length of a list that 16 bits leave open, what is certain when the near ones are scored in full.
        in_full: How long it took to read by the prototypes from the index, where that was tried.
    """

    task: str
    right: int
    own_words: bool
    evidence: dict[int, Float[Tensor, " E"]]
    seconds: dict[int, float]
    known: dict[int, Interval]
    rescored: dict[int, Interval]
    in_full: float | None

    def over(self, seconds: float) -> float:
        """The time that 8 bits take being one."""
        return seconds / self.seconds[8]

    def place(self, bits: int) -> int:
        """Of the right expert, from 1."""
        return place(self.evidence[bits], self.right)

    def how(self, bits: int, size: int) -> str:
        """How a list of this length comes to be certain."""
        if self.known[bits].decides(size).all():
            return "at once"
        if bits < 32 and self.rescored[size].decides(size).all():
            return "by near ones"
        return "in full" if bits < 32 and self.known[32].decides(size).all() else "tied"


class Readers(NamedTuple):
    """What reads prompts by each width of codes, all by the same layers of one base model."""

    plain: Probe
    known: CertainProbe
    kinds: dict[int, dict[str, Prototypes]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, required=True, help="a calibrated and indexed library")
    parser.add_argument("--data-root", type=Path, required=True, help="folder of the tasks' data")
    parser.add_argument("--prompts", type=int, default=4, help="training rows of each task, in each kind of words")
    parser.add_argument("--size", type=int, default=16, help="of the shortlist")
    arguments = parser.parse_args()
    console = Console(width=120)
    model, tokenizer = load_model(dtype="float32")
    begin = time.perf_counter()
    readers = prepared(model, ExpertLibrary.open(arguments.library))
    experts = readers.plain.experts
    console.print(f"{len(experts)} experts, made ready in {time.perf_counter() - begin:.0f} s")
    prompts: list[Prompt] = []
    with suppress(KeyboardInterrupt):
        for example, task, own in in_turn(list(rows(arguments)), arguments.prompts):
            ids = torch.tensor([encode_prompt(tokenizer, example.prompt)])
            told = read(readers, ids, (1, arguments.size), in_full=len(prompts) % IN_FULL == 0)
            prompts.append(Prompt(task, experts.index(task), own, *told))
            console.print(f"{len(prompts)}: {line(prompts[-1], (1, arguments.size))}", highlight=False)
    if not prompts:
        return
    memory = {bits: sum(p.bytes for p in kind.values()) for bits, kind in readers.kinds.items()}
    console.print(found(prompts, arguments.size, memory))
    console.print(certain(prompts, (1, arguments.size)))
    seconds = statistics.median(prompt.seconds[8] for prompt in prompts)
    again = statistics.median(prompt.over(prompt.in_full) for prompt in prompts if prompt.in_full is not None)
    console.print(
        f"by 8 bits {seconds:.2f} s; once more, by prototypes from the index, {again:.2f} times that; "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )


@torch.inference_mode()
def prepared(model, library: ExpertLibrary) -> Readers:
    routed = compose(model, library, Shortlist(size=1, bits=32))
    assert isinstance(routed, Paged)
    known = routed._probed
    assert isinstance(known, CertainProbe)
    means = {module: prototypes.mean_I for module, prototypes in routed.prototypes.items()}
    kinds = {bits: library.index.prototypes(routed.experts, means, bits) for bits in (8, 16)} | {32: routed.prototypes}
    plain = probe_by(known, kinds[8])
    plain.baseline = known.probe.baseline
    plain.read_baseline()
    return Readers(plain, known, kinds)


def probe_by(known: CertainProbe, scorers) -> Probe:
    probe = known.probe
    return Probe(probe.entry, probe.layers, scorers, known.evidence, probe.experts, probe.opening)


@torch.inference_mode()
def read(readers: Readers, ids: Tensor, sizes: Sequence[int], *, in_full: bool) -> tuple:
    """One prompt by all widths: what :class:`Prompt` says from ``evidence`` on."""
    begin = time.perf_counter()
    evidence = {8: readers.plain(input_ids=ids).evidence_BE[0]}
    seconds, known = {8: time.perf_counter() - begin}, {}
    for bits in (16, 32):
        begin = time.perf_counter()
        known[bits] = interval(readers.known, readers.kinds[bits], ids)
        seconds[bits] = time.perf_counter() - begin
        evidence[bits] = known[bits].middle_BE[0]
    left = [size for size in sizes if not known[16].decides(size).all()]
    rescored = {size: by_near_ones(readers, known[16], ids, size) for size in left}
    begin = time.perf_counter()
    if in_full:
        interval(readers.known, readers.kinds[16], ids, exact=True)
    return evidence, seconds, known, rescored, time.perf_counter() - begin if in_full else None


def by_near_ones(readers: Readers, first: Interval, ids: Tensor, size: int) -> Interval:
    near = {readers.plain.experts[e] for e in near_ones(first, size)}
    exact = readers.kinds[32]
    scorers = {name: Rescored(one, some(exact[name], near)) for name, one in readers.kinds[16].items()}
    return interval(readers.known, scorers, ids)


def interval(known: CertainProbe, scorers, ids: Tensor, *, exact: bool = False) -> Interval:
    """What is known by these scorers, compared with the baseline by the prototypes in full."""
    reader = CertainProbe(probe_by(known, scorers), known.evidence, known.size, Certainty())
    reader._baseline = known._baseline
    return reader._above(reader._read((), {"input_ids": ids}, exact=exact))


def near_ones(known: Interval, size: int) -> list[int]:
    """Who may be on the list."""
    last = known.least_BE[0].topk(size).values[-1]
    return (known.most_BE[0] >= last).nonzero()[:, 0].tolist()


def some(prototypes: Prototypes, names: Collection[str]) -> Prototypes:
    """Of these experts alone."""
    parts, experts = [], []
    left = iter(prototypes.experts)
    for part in prototypes.parts:
        here = list(islice(left, len(part.rms_E)))
        rows_here = [row for row, name in enumerate(here) if name in names]
        parts.append(Codes(*(values[rows_here] for values in part)))
        experts += [here[row] for row in rows_here]
    return replace(prototypes, experts=tuple(experts), parts=tuple(parts))


class Rescored:
    """Prototypes by codes, some of them in full."""

    def __init__(self, codes: Prototypes, exact: Prototypes):
        self.experts, self.codes, self.exact = codes.experts, codes, exact
        self.columns = [codes.experts.index(name) for name in exact.experts]

    def scores(self, x: Float[Tensor, "T I"]) -> Float[Tensor, "T E"]:
        return self.codes.scores(x)

    def bounded(self, x: Float[Tensor, "T I"]) -> tuple[Float[Tensor, "T E"], Float[Tensor, "T E"]]:
        known, exact = self.codes.bounded(x), self.exact.bounded(x)
        for values_TE, exact_TE in zip(known, exact, strict=True):
            values_TE[:, self.columns] = exact_TE
        return known

    def in_full(self) -> Prototypes:
        return self.codes.in_full()


def in_turn(prompts: Sequence[Row], count: int) -> Iterator[Row]:
    """Of each task one row in its own words, then one in others, and so on."""
    for number in range(count):
        for first in (number, count + number):
            yield from prompts[first :: 2 * count]


def line(prompt: Prompt, sizes: Sequence[int]) -> str:
    """What one prompt's reading says."""
    words = "own" if prompt.own_words else "other"
    places = ", ".join(str(prompt.place(bits)) for bits in prompt.evidence)
    lists = ", ".join(f"of {size} {prompt.how(16, size)}" for size in sizes)
    seconds = ", ".join(f"{value:.2f}" for value in prompt.seconds.values())
    return f"{prompt.task}, {words} words; right expert's place {places}; by 16 bits, list {lists}; {seconds} s"


def found(prompts: list[Prompt], size: int, memory: dict[int, int]) -> Table:
    """Whether the right expert is on the list."""
    table = Table("prompts", "bits", "memory", f"right among {size}", "alone", "as float32's list", "evidence off")
    for own in (True, False):
        here = [prompt for prompt in prompts if prompt.own_words == own]
        for bits in memory if len(here) > 1 else ():
            pairs = [(prompt.evidence[bits], prompt.evidence[32]) for prompt in here]
            places = [prompt.place(bits) for prompt in here]
            both = [len(listed(a, size) & listed(b, size)) / size for a, b in pairs]
            off = [float(((a - b).abs() / b.abs().clamp(min=1)).max()) for a, b in pairs]
            table.add_row(
                f"{len(here)} in {'their own' if own else 'other'} words",
                str(bits),
                f"{memory[bits] / (1 << 20):.0f} MiB",
                share(places, size),
                share(places, 1),
                f"{statistics.mean(both):.1%}",
                f"at most {max(off):.1e}",
            )
    return table


def certain(prompts: list[Prompt], sizes: Sequence[int]) -> Table:
    """How lists come to be certain."""
    ways = ("at once", "by near ones", "in full", "tied")
    table = Table("bits", "list of", "known to", "near", *ways, "first read over 8 bits'")
    for bits in (16, 32):
        over = statistics.median(prompt.over(prompt.seconds[bits]) for prompt in prompts)
        for size in sizes:
            near = [len(near_ones(prompt.known[bits], size)) for prompt in prompts]
            counts = Counter(prompt.how(bits, size) for prompt in prompts)
            table.add_row(
                str(bits),
                str(size),
                f"{statistics.median(width(prompt.known[bits], size) for prompt in prompts):.1e}",
                f"{statistics.median(near):g}, at most {max(near)}",
                *(str(counts[way]) for way in ways),
                f"{over:.2f}",
            )
    return table


def width(known: Interval, size: int) -> float:
    """To within what the evidence of those on the list is known, in the mean."""
    half_E = (known.most_BE - known.least_BE)[0] / 2
    return float(half_E[list(listed(known.middle_BE[0], size))].mean())


def listed(evidence_E: Tensor, size: int) -> set[int]:
    return set(evidence_E.topk(size).indices.tolist())


if __name__ == "__main__":
    main()
