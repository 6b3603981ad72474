"""What the shortlist's 8 bits cost: its decisions by them, and by the same prototypes in float32, of the same prompts.

For each prompt and expert the votes are also bounded: every score is known to within what its code has left out, so
that an expert's evidence lies between its votes with its own scores lowered and all others raised, and the other way
round. One whose interval reaches the last place of the shortlist would have to be scored again in full, were the list
to be certain.

    python benchmarks/codes.py --library LIBRARY --data-root DATA [--prompts 2] [--size 16]

LIBRARY is an indexed one, such as ``benchmarks/scale.py`` leaves behind.
"""

from __future__ import annotations

import argparse
import statistics
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
from spectr.models import encode_prompt, load_model
from spectr.spectral import Codes, Prototypes

# Shape suffixes: T tokens, E experts, I inputs.


class Read(NamedTuple):
    """One prompt: what speaks for each expert by codes and in float32, and the least and most that it can be."""

    coded_E: Float[Tensor, " E"]
    exact_E: Float[Tensor, " E"]
    least_E: Float[Tensor, " E"]
    most_E: Float[Tensor, " E"]
    right: int
    own_words: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, required=True, help="a calibrated and indexed library")
    parser.add_argument("--data-root", type=Path, required=True, help="folder of the tasks' data")
    parser.add_argument("--prompts", type=int, default=2, help="training rows of each task, in each kind of words")
    parser.add_argument("--size", type=int, default=16, help="of the shortlist")
    arguments = parser.parse_args()
    reads = list(read(arguments))
    Console(width=120).print(summary(reads, arguments.size))


@torch.inference_mode()
def read(arguments: argparse.Namespace) -> Iterator[Read]:
    model, tokenizer = load_model(dtype="float32")
    library = ExpertLibrary.open(arguments.library)
    routed = compose(model, library, Shortlist(size=1))
    assert isinstance(routed, Paged)
    assert routed.prompt is not None
    names = routed.experts
    by_codes, left_out = routed.prototypes, errors(library, routed)
    noting = {module: Noting(by_codes[module], left_out[module]) for module in by_codes}
    by_float = in_float32(library, routed)
    temperature, voters, usual = routed.router.pool_temperature, routed._probe.voters, {}
    for example, task, own in track(list(rows(arguments)), "reading prompts"):
        ids = torch.tensor([encode_prompt(tokenizer, example.prompt)])
        found = []
        for kind, prototypes in enumerate((by_codes, by_float)):
            voters.update(prototypes)
            routed._probe._usual_E = usual.get(kind)  # read by the same, once
            found.append(routed.prompt.evidence(ids)[0])
            usual[kind] = routed._probe._usual_E
        least_E, most_E = bounds(routed, ids, noting, temperature)
        yield Read(*found, least_E, most_E, names.index(task), own)


def errors(library: ExpertLibrary, routed: Paged) -> dict[str, Float[Tensor, " E"]]:
    """By module ``||v - steps codes||_2 / rms`` of each expert, in the order of its prototypes."""
    found = {}
    for module, prototypes in routed.prototypes.items():
        values = []
        for name in prototypes.experts:
            entry = library.index[name]
            place = [m.name for m in entry.modules].index(module)
            values.append(float(entry.error_M[place] / entry.rms_M[place].clamp(min=1e-30)))
        found[module] = torch.tensor(values)
    return found


def in_float32(library: ExpertLibrary, routed: Paged) -> dict[str, Prototypes]:
    """The prototypes as the experts' own factors have them."""
    rows_of: dict[str, dict[str, Float[Tensor, " I"]]] = {module: {} for module in routed.prototypes}
    for name in track(library.names, "prototypes in float32"):
        rotations = library.index[name].rotations()
        with library[name].open() as factors:
            for module in library[name].shapes:
                A = factors(module).A.float()
                rows_of[module][name] = (rotations[module].right[:1] @ A)[0]
    exact = {}
    for module, known in routed.prototypes.items():
        v_EI = torch.stack([rows_of[module].pop(name) for name in known.experts])
        rms_E = torch.cat([part.rms_E for part in known.parts])
        part = Codes(v_EI, torch.ones(len(v_EI)), rms_E)  # pyright: ignore[reportArgumentType]
        exact[module] = Prototypes(experts=known.experts, parts=(part,), mean_I=known.mean_I)
    return exact


class Noting:
    """Prototypes that note how far each score may be off."""

    def __init__(self, inner: Prototypes, left_out_E: Float[Tensor, " E"]):
        self.experts, self.inner, self.left_out_E = inner.experts, inner, left_out_E
        self.off_TE = torch.zeros(0)

    def scores(self, x: Float[Tensor, "T I"]) -> Float[Tensor, "T E"]:
        self.off_TE = (x - self.inner.mean_I).norm(dim=-1, keepdim=True) * self.left_out_E
        return self.inner.scores(x)


def bounds(
    routed: Paged, ids: Tensor, voters: dict[str, Noting], temperature: float
) -> tuple[Float[Tensor, " E"], Float[Tensor, " E"]]:
    """The least and the most votes that each expert can have, what is usual left in; one says nothing."""
    least, most = [], []
    routed._probe.voters.update(voters)
    for module, heard in routed._probe.hear(input_ids=ids).items():
        off_TE = voters[module].off_TE
        low_TE = (heard.scores_NE - off_TE).clamp(min=0).double() ** (1 / temperature)
        high_TE = (heard.scores_NE + off_TE).double() ** (1 / temperature)
        low_T1, high_T1 = low_TE.sum(-1, keepdim=True), high_TE.sum(-1, keepdim=True)
        least.append((low_TE / (high_T1 - high_TE + low_TE)).mean(0) * low_TE.shape[1])
        most.append((high_TE / (low_T1 - low_TE + high_TE)).mean(0) * low_TE.shape[1])
    return torch.stack(least).mean(0), torch.stack(most).mean(0)


def summary(reads: list[Read], size: int) -> Table:
    table = Table(
        "prompts", f"right among {size}: 8 bits", "float32", "on both lists", "evidence differs", "to score again"
    )
    for own in (True, False):
        here = [read for read in reads if read.own_words == own]
        coded, exact = (
            [place(values, r.right) for values, r in zip(kind, here, strict=True)]
            for kind in ([r.coded_E for r in here], [r.exact_E for r in here])
        )
        shared = [len(listed(r.coded_E, size) & listed(r.exact_E, size)) / size for r in here]
        differs = [float(((r.coded_E - r.exact_E).abs() / r.exact_E.abs().clamp(min=1)).max()) for r in here]
        again = [int((r.most_E >= r.least_E.topk(size).values[-1]).sum()) for r in here]
        table.add_row(
            f"{len(here)} in {'their own' if own else 'other'} words",
            share(coded, size),
            share(exact, size),
            f"{statistics.mean(shared):.1%}",
            f"at most {max(differs):.1%}",
            f"{statistics.median(again)} of {len(here[0].exact_E)}",
        )
    return table


def place(evidence_E: Tensor, right: int) -> int:
    return int((evidence_E > evidence_E[right]).sum()) + 1


def listed(evidence_E: Tensor, size: int) -> set[int]:
    return set(evidence_E.topk(size).indices.tolist())


if __name__ == "__main__":
    main()
