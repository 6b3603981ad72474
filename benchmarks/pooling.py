"""How to pool calibrated scores into one decision for a prompt, tried on training rows only.

Reads each prompt once with the base model, keeps the calibrated score of every token, module and expert, and then
tries ways to pool them. Prompts are rows of the tasks' *training* files, half in the experts' own words and half in the
words of ``pooling_words.yaml``, which are neither the experts' nor those of ``spectr evaluate wording``.

    python benchmarks/pooling.py --data-root DATA [--prompts 24] [--library DIR]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from spectr import Calibrated, ExpertLibrary, calibrate, compose
from spectr.layers.batch_routing import BatchRouting, routed_by
from spectr.models import encode_prompt, load_model
from spectr.shipped import shipped_experts
from spectr.tasks import Example, read_examples, shipped_tasks

# Shape suffixes: N tokens of one prompt, M modules, E experts, K texts of the calibration.


class Prompt(NamedTuple):
    """One prompt: log calibrated scores, (N, M, E) float16; the right expert; whether in its own words."""

    log_NME: Tensor
    right: int
    own_words: bool


class Usual(NamedTuple):
    """Log scores on the calibration's texts, (N, M, E) each: what says nothing. ``written`` says who wrote them."""

    texts: list[Tensor]
    written: str


Pooling = Callable[[Tensor], Tensor]  # (N, M, E) log scores -> (E,) evidence
Making = Callable[[Usual], Pooling]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True, help="folder of the tasks' data")
    parser.add_argument("--library", type=Path, default=None, help="folder of experts; the shipped ones by default")
    parser.add_argument("--prompts", type=int, default=24, help="training rows of each task, in each kind of words")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration")
    parser.add_argument("--keep", type=Path, default=None, help="file for the scores, to try more poolings later")
    arguments = parser.parse_args()
    if arguments.keep and arguments.keep.is_file():
        prompts, usual = torch.load(arguments.keep, weights_only=False)  # our own file of a moment ago
        prompts, usual = [Prompt(*p) for p in prompts], Usual(*usual)
    else:
        prompts, usual = collect(arguments)
        if arguments.keep:
            torch.save(([tuple(p) for p in prompts], tuple(usual)), arguments.keep)
    table = Table("pooling", "own words", "other words", "among two")
    for name, make in POOLINGS.items():
        pool = make(usual)
        places = [(place(pool(p.log_NME.float()), p.right), p.own_words) for p in prompts]
        own, other = [p for p, mine in places if mine], [p for p, mine in places if not mine]
        table.add_row(name, share(own, 1), share(other, 1), share(other, 2))
    Console().print(table)
    Console().print(f"{len(prompts)} prompts of training rows; calibrated on texts that {usual.written}")


def place(evidence_E: Tensor, right: int) -> int:
    """Of the right expert, from 1."""
    return int((evidence_E > evidence_E[right]).sum()) + 1


def share(places: list[int], most: int) -> str:
    """Of prompts whose right expert came early enough, with its standard error."""
    p = sum(number <= most for number in places) / len(places)
    return f"{p:.1%} ± {(p * (1 - p) / (len(places) - 1)) ** 0.5:.1%}"


def collect(arguments: argparse.Namespace) -> tuple[list[Prompt], Usual]:
    model, tokenizer = load_model(dtype="float32")
    library = ExpertLibrary.open(arguments.library or shipped_experts())
    library = library.with_calibration(calibrate(model, library, tokenizer, seed=arguments.seed, fresh=True))
    known = library.calibration
    assert known is not None
    routed = compose(model, library, Calibrated())
    skip, closing = len(known.opening), len(known.closing)
    found = []
    for example, task, own in track(list(rows(arguments)), "reading prompts"):
        ids = torch.tensor([encode_prompt(tokenizer, example.prompt)[:256]])
        found.append(Prompt(scores(routed, ids)[skip:-closing], library.names.index(task), own))
    texts = [
        scores(routed, ids[None, :size])[skip:-closing].float()
        for ids, size in zip(known.input_ids, known.real.sum(1).tolist(), strict=True)
    ]
    return found, Usual(texts, f"the model wrote with seed {arguments.seed}")


def rows(
    arguments: argparse.Namespace, words: Mapping[str, Sequence[str]] | None = None
) -> Iterator[tuple[Example, str, bool]]:
    """Training rows of each task in its expert's own words, then in others, by default those of
    ``pooling_words.yaml``."""
    if words is None:
        words = yaml.safe_load((Path(__file__).parent / "pooling_words.yaml").read_text(encoding="utf-8"))
    assert words is not None
    for name, task in shipped_tasks().items():
        assert task.train is not None
        variants = [task.model_copy(update={"prompt": prompt}) for prompt in words[name]]
        own = read_examples(task, task.train, root=arguments.data_root)[-arguments.prompts :]
        yield from ((example, name, True) for example in own)
        for number in range(arguments.prompts):
            about = variants[number % len(variants)]
            examples = read_examples(about, task.train, root=arguments.data_root)[-2 * arguments.prompts :]
            yield examples[number], name, False


@torch.inference_mode()
def scores(routed, ids: Tensor) -> Tensor:
    """Log calibrated scores of every token, (N, M, E) float16."""
    gathered: list[Tensor] = []

    def see(layer, x: Tensor) -> None:
        gathered.append(layer.scores(x)[0].clamp(min=1e-12).log().half())

    with routed_by(BatchRouting(base_only=True, observe=see)):
        routed.model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return torch.stack(gathered, dim=1)


def vote(log_NME: Tensor, temperature: float = 0.2) -> Tensor:
    return (log_NME / temperature).softmax(-1)


def certain(strength: float, temperature: float = 0.2, part: slice = slice(None)) -> Pooling:
    """Mean over modules of the mean vote, each vote counting exp(-strength x entropy)."""

    def pool(log_NME: Tensor) -> Tensor:
        vote_NME = vote(log_NME[:, part], temperature)
        weight_NM = (strength * torch.special.xlogy(vote_NME, vote_NME).sum(-1)).exp()
        return (torch.einsum("nme,nm->me", vote_NME, weight_NM) / weight_NM.sum(0)[:, None]).mean(0)

    return pool


def as_is(pool: Pooling) -> Making:
    return lambda _: pool


def less_usual(pool: Pooling, much: float = 1.0) -> Making:
    """Less what the calibration's texts get."""

    def make(usual: Usual) -> Pooling:
        usual_E = torch.stack([pool(text) for text in usual.texts]).mean(0)
        return lambda log_NME: pool(log_NME) - much * usual_E

    return make


def over_deviation(pool: Pooling) -> Making:
    """The z-score of a prompt's evidence among that of the calibration's texts."""

    def make(usual: Usual) -> Pooling:
        evidence_KE = torch.stack([pool(text) for text in usual.texts])
        return lambda log_NME: (pool(log_NME) - evidence_KE.mean(0)) / evidence_KE.std(0)

    return make


def centred(usual: Usual) -> Pooling:
    mean_ME = torch.cat(usual.texts).mean(0)
    return lambda log_NME: vote(log_NME - mean_ME).mean((0, 1))


def hard(log_NME: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(log_NME.argmax(-1), log_NME.shape[-1]).float().mean((0, 1))


POOLINGS: dict[str, Making] = {
    "hard votes": as_is(hard),
    **{f"soft votes, T {t}": as_is(certain(0.0, t)) for t in (0.1, 0.2, 0.3, 0.5)},
    "certain votes count more (1)": as_is(certain(1.0)),
    "certain votes count more (4)": as_is(certain(4.0)),
    "hard votes, less usual": less_usual(hard),
    **{f"soft votes, T {t}, less usual": less_usual(certain(0.0, t)) for t in (0.1, 0.2, 0.3, 0.5)},
    **{f"certain votes ({g:g}), less usual": less_usual(certain(g)) for g in (1.0, 2.0, 4.0, 6.0, 8.0)},
    **{f"certain votes (4), T {t}, less usual": less_usual(certain(4.0, t)) for t in (0.1, 0.3)},
    "certain votes (4), less half of usual": less_usual(certain(4.0), 0.5),
    "certain votes (4), z-score": over_deviation(certain(4.0)),
    "first half of the modules, (4), less usual": less_usual(certain(4.0, part=slice(0, 105))),
    "second half of the modules, (4), less usual": less_usual(certain(4.0, part=slice(105, None))),
    "logs less their usual mean": centred,
    "mean of the logs, less usual": less_usual(lambda x: x.mean((0, 1))),
    "mean fourth power of the score": as_is(lambda x: (4 * x).exp().mean((0, 1))),
    "tokens averaged first, less usual": less_usual(lambda x: vote(x.mean(0)).mean(0)),
    "modules averaged first, less usual": less_usual(lambda x: vote(x.mean(1)).mean(0)),
}

if __name__ == "__main__":
    main()
