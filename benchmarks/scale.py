"""A library of very many experts: what each step costs, and what an answer costs.

The nine shipped experts stand among synthetic ones that resemble them in spectrum and size. The library is made,
calibrated and indexed in WORK, which is kept: a second run measures again what it can. ``recall.py`` tells whether the
right expert is found in it.

    python benchmarks/scale.py --work WORK [--experts 1000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from spectr import Calibrated, ExpertLibrary, Shortlist, Spectr, build_index, calibrate, compose
from spectr.benchmark.subjects import write_lookalikes
from spectr.composition import Paged
from spectr.composition.multi_router import weight_sharing_copy
from spectr.library import LibraryStore
from spectr.models import load_model
from spectr.routers.abstention import always_choosing
from spectr.shipped import shipped_experts

ANSWER = 32  # tokens of an answer
PROMPT = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the library; some 5 MB an expert")
    parser.add_argument("--experts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--answer", action="store_true", help="only open, compose and answer once, for the memory")
    arguments = parser.parse_args()
    if arguments.answer:
        answer_once(arguments.work / "library")
        return
    console = Console(width=120)
    table = Table("step", "figure")
    model, tokenizer = load_model(dtype="float32")
    for step, figure in build(arguments, model, tokenizer):
        table.add_row(step, figure)
    many = ExpertLibrary.open(arguments.work / "library")
    few = ExpertLibrary.open(shipped_experts())
    assert many.calibration is not None
    few = build_index(model, few.with_calibration(many.calibration))
    for step, figure in (*adding(arguments.work), *alone(arguments.work)):
        table.add_row(step, figure)
    console.print(table)
    console.print(timed(model, few, many, arguments.rounds))
    console.print(
        f"float32, {torch.get_num_threads()} threads, torch {torch.__version__}; medians of {arguments.rounds}"
    )


# Making the library


def build(arguments: argparse.Namespace, model: nn.Module, tokenizer) -> Iterator[tuple[str, str]]:
    root, plain = arguments.work / "library", arguments.work / "plain"
    store = LibraryStore(root)
    if len(store.entries) < arguments.experts:
        synthetic = write_lookalikes(ExpertLibrary.open(shipped_experts()), plain, arguments.experts)
        there = {entry.name for entry in store.entries}
        seconds = []
        for name in track([name for name in synthetic if name not in there], "adding"):
            begin = time.perf_counter()
            store.add(name, synthetic[name].weights.parent)
            seconds.append(time.perf_counter() - begin)
        yield (
            f"add an expert: the 2nd to the 11th, the last 10 of {len(store.entries)}",
            (f"{statistics.median(seconds[1:11]):.3f} s, {statistics.median(seconds[-10:]):.3f} s"),
        )
        shutil.rmtree(plain, ignore_errors=True)
    library = ExpertLibrary.open(root)
    if not all(map(library.calibrated, library)):
        begin = time.perf_counter()
        calibrate(model, library, tokenizer).save(root)
        yield f"calibrate {len(library)} experts", f"{time.perf_counter() - begin:.1f} s"
    library = ExpertLibrary.open(root)
    missing = sum(not library.indexed(name) for name in library)
    if missing:
        begin = time.perf_counter()
        build_index(model, library, root)
        yield f"index (align) {missing} experts", f"{time.perf_counter() - begin:.1f} s"
    begin = time.perf_counter()
    one = library.names[-1]
    (root / "index" / f"{one}.safetensors").unlink()
    build_index(model, ExpertLibrary.open(root), root)
    yield "index one more, the base model reading the texts", f"{time.perf_counter() - begin:.2f} s"


def adding(work: Path) -> Iterator[tuple[str, str]]:
    """Experts added to libraries that have entries of many more, whose own files adding has no need of."""
    shipped = LibraryStore(shipped_experts())
    for count in (2, 10_000):
        with tempfile.TemporaryDirectory(dir=work) as folder:
            store = LibraryStore(folder)
            first, *others = shipped.entries
            text = store.add(first.name, shipped.root / first.folder).model_dump_json()
            for number in range(1, count):
                name, digits = f"{first.name}-{number}", f"{number:012x}"
                (store.root / f"{name}-{digits}").mkdir()
                entry = json.loads(text) | {"name": name, "folder": f"{name}-{digits}"}
                (store.root / "entries" / f"{name}.json").write_text(json.dumps(entry))
            seconds = []
            for entry in others:
                begin = time.perf_counter()
                store.add(entry.name, shipped.root / entry.folder)
                seconds.append(time.perf_counter() - begin)
        yield f"add an expert to {count:,}", f"{statistics.median(seconds):.3f} s"


def alone(work: Path) -> Iterator[tuple[str, str]]:
    """Opening, composing and one answer in a process of its own."""
    said = subprocess.run(
        [sys.executable, __file__, "--work", str(work), "--answer"], capture_output=True, text=True, check=True
    )
    yield from json.loads(said.stdout.splitlines()[-1]).items()


@torch.inference_mode()
def answer_once(root: Path) -> None:
    model, _ = load_model(dtype="float32")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    begin = time.perf_counter()
    library = ExpertLibrary.open(root)
    _ = all(map(library.indexed, library)), library.calibration
    opened = time.perf_counter()
    routed = compose(model, library, Shortlist(size=16, token_router=Spectr(top_k=4), abstain=None))
    assert isinstance(routed, Paged)
    composed = time.perf_counter()
    write(model, torch.randint(100, 40000, (1, PROMPT)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    loaded = routed.expert_cache.figures
    told = {
        f"open {len(library)} experts, index and calibration": f"{opened - begin:.2f} s",
        "compose, with the baseline on the calibration's texts": f"{composed - opened:.2f} s",
        "load an expert from disk": f"{1000 * loaded.seconds / loaded.misses:.0f} ms",
        "prototypes in memory": f"{sum(p.bytes for p in routed.prototypes.values()) / (1 << 20):.0f} MiB",
        "peak memory of the process, the base model alone": f"{peak:.2f} GiB, {before:.2f} GiB",
    }
    print(json.dumps(told))


# What an answer costs


def timed(model: nn.Module, few: ExpertLibrary, many: ExpertLibrary, rounds: int) -> Table:
    by_token = Spectr(top_k=4)
    subjects = {
        "base model": weight_sharing_copy(model),
        "9, calibrated": composed(model, few, Calibrated()),
        f"{len(many)}, shortlist of 1": composed(model, many, Shortlist(size=1)),
        f"{len(many)}, shortlist of 1, every 3": composed(model, many, Shortlist(size=1, module_stride=3)),
        "9, spectr, top 4": composed(model, few, by_token),
        f"{len(many)}, shortlist of 16, spectr, top 4": composed(
            model, many, Shortlist(size=16, token_router=by_token)
        ),
    }
    first: dict[str, list[float]] = {name: [] for name in subjects}
    token: dict[str, list[float]] = {name: [] for name in subjects}
    for turn in track(range(-1, rounds), "timing"):
        for place in range(len(subjects)):
            name = list(subjects)[(place + max(turn, 0)) % len(subjects)]
            ids = torch.randint(100, 40000, (1, PROMPT), generator=torch.Generator().manual_seed(1000 + turn))
            begin = time.perf_counter()
            stamps = write(subjects[name], ids)
            if turn >= 0:
                first[name].append(stamps[-1] - begin)
                token[name].append((stamps[-1] - stamps[0]) / (ANSWER - 1))
    table = Table(
        "model", f"first answer ({PROMPT} + {ANSWER} tokens)", "over its 9", "a generated token", "over its 9"
    )
    for name in subjects:
        peer = "9, spectr, top 4" if "top 4" in name else "9, calibrated"
        pairs = zip(first[name], first[peer], strict=True), zip(token[name], token[peer], strict=True)
        over = [statistics.median(a / b for a, b in pair) for pair in pairs]
        table.add_row(
            name,
            f"{statistics.median(first[name]):.2f} s",
            f"{over[0]:.2f}",
            f"{1000 * statistics.median(token[name]):.1f} ms",
            f"{over[1]:.2f}",
        )
    return table


def composed(model: nn.Module, library: ExpertLibrary, router) -> nn.Module:
    copy = weight_sharing_copy(model)
    compose(copy, library, always_choosing(router))  # an expert's answer is timed
    return copy


class Stamps:
    """What transformers tells a streamer of, as times."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@torch.inference_mode()
def write(model, ids: torch.Tensor) -> list[float]:
    """When each token of an answer was there."""
    stamps = Stamps()
    model.generate(ids, max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False, streamer=stamps)
    return stamps.times[1:]  # the first is the prompt itself


if __name__ == "__main__":
    main()
