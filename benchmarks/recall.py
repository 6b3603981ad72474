"""Whether the right expert is found among very many, and what the decision costs.

The library is an indexed one with the nine shipped experts in it, such as ``benchmarks/scale.py`` leaves behind.
Prompts are rows of the tasks' *training* files, half in the experts' own words and half in those of
``pooling_words.yaml``. Each decision is timed next to one pass of the base model over the same prompt, so that the
machine's other work affects both. A row is printed as it is done; after an interrupt the table is of those before.

    python benchmarks/recall.py --library LIBRARY --data-root DATA [--prompts 12] [--paraphrases]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from evidence import share
from spectr import Calibrated, ExpertLibrary, Shortlist, build_index, compose
from spectr.composition import Paged
from spectr.composition.multi_router import weight_sharing_copy
from spectr.models import encode_prompt, load_model
from spectr.routers import Router
from spectr.shipped import shipped_experts
from spectr.tasks import read_examples, shipped_tasks


class Prompt(NamedTuple):
    """A prompt's tokens, (1, T), the right expert, and whether it is in that expert's own words."""

    ids: torch.Tensor
    right: str
    own_words: bool


class Found(NamedTuple):
    """The right expert's place, from 1, and what finding it took over a pass of the base model."""

    place: int
    cost: float


class Case(NamedTuple):
    """A way to decide."""

    name: str
    library: ExpertLibrary
    router: Router


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, required=True, help="a calibrated and indexed library")
    parser.add_argument("--data-root", type=Path, required=True, help="folder of the tasks' data")
    parser.add_argument("--prompts", type=int, default=12, help="training rows of each task, in each kind of words")
    parser.add_argument("--paraphrases", action="store_true", help="other words are those of spectr evaluate wording")
    parser.add_argument(
        "--modules", nargs="*", default=["q_proj", "k_proj", "down_proj"], help="modules that decide alone"
    )
    parser.add_argument("--every", type=int, nargs="*", default=[2, 3, 5], help="modules left out, as in every third")
    parser.add_argument("--tokens", type=int, nargs="*", default=[16, 64], help="of a prompt that are read")
    arguments = parser.parse_args()
    console = Console(width=120)
    model, tokenizer = load_model(dtype="float32")
    prompts = [Prompt(torch.tensor([encode_prompt(tokenizer, text)]), task, own) for text, task, own in rows(arguments)]
    done = []
    try:
        for case in cases(model, arguments):
            done.append(row(case.name, *read(model, case, prompts), prompts))
            console.print(" | ".join(done[-1]))
    finally:
        table = Table(
            "decision", "experts", "own words", "among 16", "other words", "among 16", "over the base", "memory"
        )
        for cells in done:
            table.add_row(*cells)
        console.print(table)
        console.print(f"{len(prompts)} prompts, half of them in other words; float32, torch {torch.__version__}")


def rows(arguments: argparse.Namespace) -> Iterator[tuple[str, str, bool]]:
    """Prompts of each task's training rows with its name, in its expert's own words, then in others."""
    tuned = yaml.safe_load((Path(__file__).parent / "pooling_words.yaml").read_text(encoding="utf-8"))
    for name, task in shipped_tasks().items():
        assert task.train is not None
        own = read_examples(task, task.train, root=arguments.data_root)[-arguments.prompts :]
        yield from ((example.prompt, name, True) for example in own)
        words = task.paraphrases if arguments.paraphrases else tuned[name][:2]  # those of earlier figures
        for number in range(arguments.prompts):
            reworded = task.model_copy(update={"prompt": words[number % len(words)]})
            examples = read_examples(reworded, task.train, root=arguments.data_root)[-2 * arguments.prompts :]
            yield examples[number].prompt, name, False


def cases(model: nn.Module, arguments: argparse.Namespace) -> Iterator[Case]:
    many = ExpertLibrary.open(arguments.library)
    assert many.calibration is not None
    few = build_index(model, ExpertLibrary.open(shipped_experts()).with_calibration(many.calibration))
    yield Case("calibrated, all directions", few, Calibrated())
    yield Case("shortlist", few, Shortlist(size=1))
    yield Case("shortlist", many, Shortlist(size=1))
    for library in (few, many) if arguments.modules else ():
        yield Case(", ".join(arguments.modules), library, Shortlist(size=1, modules=tuple(arguments.modules)))
    for n in arguments.every:
        yield Case(f"every {n}", many, Shortlist(size=1, module_stride=n))
    for n in arguments.tokens:
        yield Case(f"{n} tokens", many, Shortlist(size=1, probe_tokens=n))


@torch.inference_mode()
def read(model: nn.Module, case: Case, prompts: Sequence[Prompt]) -> tuple[int, int, list[Found]]:
    """How many experts there are, what they keep in memory to be found by, and where the right one is found."""
    composed = weight_sharing_copy(model)
    routed = compose(composed, case.library, case.router)
    assert routed.prompt is not None
    routed.prompt.evidence(prompts[0].ids)  # the first prompt computes the baseline
    found = []
    for prompt in track(prompts, f"{case.name}, {len(case.library)}"):
        begin = time.perf_counter()
        evidence_E = routed.prompt.evidence(prompt.ids)[0]
        decided = time.perf_counter()
        model(input_ids=prompt.ids, use_cache=False, logits_to_keep=1)
        cost = (decided - begin) / (time.perf_counter() - decided)
        place = int((evidence_E > evidence_E[routed.experts.index(prompt.right)]).sum()) + 1
        found.append(Found(place, cost))
    kept = sum(p.bytes for p in routed.prototypes.values()) if isinstance(routed, Paged) else 0
    return len(case.library), kept, found


def row(name: str, experts: int, kept: int, found: Sequence[Found], prompts: Sequence[Prompt]) -> list[str]:
    own, other = (
        [one.place for one, prompt in zip(found, prompts, strict=True) if prompt.own_words == mine]
        for mine in (True, False)
    )
    return [
        name,
        str(experts),
        *(share([place <= most for place in places]) for places in (own, other) for most in (1, 16)),
        f"{statistics.median(one.cost for one in found):.2f}",
        f"{kept / (1 << 20):.0f} MiB" if kept else "-",
    ]


if __name__ == "__main__":
    main()
