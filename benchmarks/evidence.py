"""Whether the right expert is found, and whether the base model answers what no expert is for.

Reads prompts by the router ``calibrated`` (or another) in any calibrated library: rows of the tasks whose experts the
library has, in the experts' words and in others; rows of all other tasks of a collection; and ordinary prompts. Tells
how often the right expert comes first, or is among two; which prompts go to the base model at the router's level of
``abstain``; and draws the distributions and the ROC curves.

    python benchmarks/evidence.py --data-root DATA [--collection DATA] [--library DIR] [--picture evidence.png]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from spectr import ExpertLibrary, compose, get_router
from spectr.models import encode_prompt, load_model
from spectr.shipped import shipped_experts
from spectr.tasks import Example, Task, read_examples, shipped_tasks

HERE = Path(__file__).parent
PARTS = {"tune": 0.0, "confirm": 0.5, "second": 0.75}  # where in the data their rows begin
KINDS = ("own words", "other words", "other tasks", "ordinary prompts")


class Prompt(NamedTuple):
    """A prompt: its kind, the expert that is right for it, if one is, and its text."""

    kind: str
    right: str
    text: str


class Read(NamedTuple):
    """What was found of a prompt: the place of the right expert, from 1 (0: none is right), and the p-value."""

    prompt: Prompt
    place: int
    p: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True, help="folder of the nine tasks' data")
    parser.add_argument("--collection", type=Path, default=None, help="folder with tasks/*.yaml and their data")
    parser.add_argument("--library", type=Path, default=None, help="calibrated experts; the shipped ones by default")
    parser.add_argument("--router", default="calibrated")
    parser.add_argument("--part", choices=PARTS, default="confirm", help="of rows, words and prompts")
    parser.add_argument("--rows", type=int, default=8, help="of a task, in each of its wordings")
    parser.add_argument("--picture", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=None, help="file for all that was found, as JSON lines")
    arguments = parser.parse_args()
    library = ExpertLibrary.open(arguments.library or shipped_experts())
    model, tokenizer = load_model(dtype="float32")
    routed = compose(model, library, get_router(arguments.router))
    assert routed.prompt is not None
    assert routed.policy is not None
    found = []
    with torch.inference_mode():
        for prompt in track(list(prompts(arguments, library)), "reading prompts"):
            ids = torch.tensor([encode_prompt(tokenizer, prompt.text)])
            of_prompt = routed.prompt.find(input_ids=ids)
            assert of_prompt.p_B is not None, "the calibration has no null: spectr library calibrate"
            found.append(Read(prompt, place(of_prompt.evidence_BE[0], routed.experts, prompt), float(of_prompt.p_B[0])))
    if arguments.out:
        arguments.out.write_text("".join(json.dumps([*one.prompt, one.place, one.p]) + "\n" for one in found))
    show(found, library, routed.policy.abstain or 0.05)
    if arguments.picture:
        draw(found, routed.policy.abstain or 0.05, arguments.picture)


def place(evidence_E: Tensor, experts: Sequence[str], prompt: Prompt) -> int:
    """Of the right expert, from 1; 0 where none is right."""
    if not prompt.right:
        return 0
    return int((evidence_E > evidence_E[experts.index(prompt.right)]).sum()) + 1


def prompts(arguments: argparse.Namespace, library: ExpertLibrary) -> Iterator[Prompt]:
    """All prompts of a part. Each row of data is used once."""
    part = arguments.part
    fresh = yaml.safe_load((HERE / "evidence_words.yaml").read_text(encoding="utf-8"))
    tuned = yaml.safe_load((HERE / "pooling_words.yaml").read_text(encoding="utf-8"))
    for name, task in shipped_tasks().items():
        if name in library:
            by_part = {
                "tune": [*tuned[name], *task.paraphrases],
                "confirm": fresh[name],
                "second": fresh["second"][name],
            }
            yield from of_task(task, by_part[part], arguments.data_root, name, arguments.rows, part)
    for path in sorted((arguments.collection / "tasks").glob("*.yaml")) if arguments.collection else ():
        task = Task.load(path)
        if task.name in library:
            other = task.paraphrases[:1] if part == "tune" else task.paraphrases[1:]
            yield from of_task(task, other, arguments.collection, task.name, arguments.rows, part)
        else:
            for prompt in of_task(task, task.paraphrases, arguments.collection, "", 1, part):
                yield prompt._replace(kind="other tasks")
    ordinary = yaml.safe_load((HERE / "ordinary_prompts.yaml").read_text(encoding="utf-8"))
    yield from (Prompt("ordinary prompts", "", text) for text in ordinary["tune" if part == "tune" else "confirm"])


def of_task(task: Task, wordings: Sequence[str], root: Path, right: str, count: int, part: str) -> Iterator[Prompt]:
    """Test rows in the expert's words, then in others, from the part's first row on."""
    assert task.test is not None
    own = read_examples(task, task.test, root=root)
    left = iter(range(int(len(own) * PARTS[part]), len(own)))
    yield from (Prompt("own words", right, own[row].prompt) for row in islice(left, count))
    for wording in wordings:
        other: list[Example] = read_examples(task.model_copy(update={"prompt": wording}), task.test, root=root)
        yield from (Prompt("other words", right, other[row].prompt) for row in islice(left, count))


def share(hits: Sequence[bool]) -> str:
    """In percent, with its standard error."""
    if not hits:
        return "-"
    p = sum(hits) / len(hits)
    return f"{p:.1%} ± {(p * (1 - p) / max(1, len(hits) - 1)) ** 0.5:.1%}"


def show(found: Sequence[Read], library: ExpertLibrary, abstain: float) -> None:
    console = Console(width=140)
    nine = set(shipped_tasks())
    table = Table("prompts", "of", "number", "right expert first", "among two", "right first, and kept", "to the base")
    for kind in KINDS:
        for name, some in (("the nine", lambda one: one in nine), ("others", lambda one: one not in nine)):
            here = [one for one in found if one.prompt.kind == kind and some(one.prompt.right)]
            if not here:
                continue
            firsts = [one for one in here if one.place == 1]
            table.add_row(
                kind,
                name if here[0].prompt.right else "-",
                str(len(here)),
                share([one.place == 1 for one in here]) if here[0].prompt.right else "-",
                share([one.place <= 2 for one in here]) if here[0].prompt.right else "-",
                share([one.p <= abstain for one in firsts]),
                share([one.p > abstain for one in here]),
            )
    console.print(table)
    console.print(
        f"{len(library)} experts; abstaining where p > {abstain}; AUC of prompts in other words (of pairs of like "
        f"length) against ordinary prompts {both(found, KINDS[3])}, against other tasks {both(found, KINDS[2])}; "
        f"float32, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


def both(found: Sequence[Read], kind: str) -> str:
    """The AUC, in brackets that of pairs of like length."""
    return f"{auc(found, kind):.3f} ({auc(found, kind, alike=True):.3f})"


def auc(found: Sequence[Read], kind: str, *, alike: bool = False) -> float:
    """How often a prompt in other words has a smaller p-value than one of this kind; ties count half.

    Args:
        found: Prompts of all kinds.
        kind: That is compared.
        alike: Compare only prompts whose numbers of words differ by a factor of at most 1.5.
    """
    ours, theirs = ([one for one in found if one.prompt.kind == some] for some in ("other words", kind))
    p_A, p_B = (torch.tensor([one.p for one in some], dtype=torch.float64) for some in (ours, theirs))
    below_AB = (p_A[:, None] < p_B).double() + 0.5 * (p_A[:, None] == p_B).double()
    if alike:
        words_A, words_B = (torch.tensor([len(one.prompt.text.split()) for one in some]) for some in (ours, theirs))
        below_AB = below_AB[(words_A.log()[:, None] - words_B.log()).abs() <= math.log(1.5)]
    return float(below_AB.mean())  # NaN where there is nothing to compare


def draw(found: Sequence[Read], abstain: float, path: Path) -> None:
    """The p-values by kind of prompt, and how the level trades one kind for the other."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    levels = torch.logspace(-2.3, 0, 200)
    for kind, colour in zip(KINDS, ("#1b7837", "#7fbf7b", "#af8dc3", "#762a83"), strict=True):
        p = torch.tensor([one.p for one in found if one.prompt.kind == kind])
        if len(p):
            left.plot(levels, [float((p <= level).float().mean()) for level in levels], label=kind, color=colour)
    left.axvline(abstain, color="grey", linestyle="--", linewidth=1)
    left.text(abstain * 1.05, 0.5, f"abstain = {abstain}", color="grey")
    left.set(xscale="log", xlabel="p-value at most", ylabel="share of prompts", title="Evidence against the null")
    left.legend(frameon=False)
    kept = torch.tensor([one.p for one in found if one.prompt.kind == "other words"])
    for kind, colour in (("ordinary prompts", "#762a83"), ("other tasks", "#af8dc3")):
        p = torch.tensor([one.p for one in found if one.prompt.kind == kind])
        if len(p):
            curve = [(float((p <= level).float().mean()), float((kept <= level).float().mean())) for level in levels]
            right.plot(*zip(*curve, strict=True), color=colour, label=f"against {kind}, AUC {both(found, kind)}")
    right.set(xlabel="share that an expert answers", ylabel="in other words, kept", title="ROC")
    right.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
