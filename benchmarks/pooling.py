"""How to pool calibrated scores into one decision for a prompt, tried on training rows only.

Reads each prompt once with the base model, keeps the calibrated score of every token, module and expert, and then
tries ways to pool them. Prompts are rows of the tasks' *training* files, half in the experts' own words and half in the
words of ``pooling_words.yaml``, which are neither the experts' nor those of ``spectr evaluate wording``.

    python benchmarks/pooling.py --data-root DATA [--prompts 24] [--library DIR]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from spectr import Calibrated, ExpertLibrary, calibrate, compose
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
    """Log scores on the calibration's own tokens: mean and deviation, (M, E), and how much texts differ, (M,)."""

    mean_ME: Tensor
    deviation_ME: Tensor
    spread_M: Tensor


Pooling = Callable[[Tensor, Usual], Tensor]


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
    for name, pool in POOLINGS.items():
        places = [(place(pool(p.log_NME.float(), usual), p.right), p.own_words) for p in prompts]
        own, other = [p for p, mine in places if mine], [p for p, mine in places if not mine]
        table.add_row(name, share(own, 1), share(other, 1), share(other, 2))
    Console().print(table)
    Console().print(f"{len(prompts)} prompts of training rows, calibration seed {arguments.seed}")


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
    found = []
    for example, task, own in track(list(rows(arguments)), "reading prompts"):
        ids = torch.tensor([encode_prompt(tokenizer, example.prompt)[:256]])
        log_NME = scores(routed, ids)[len(known.opening) :]
        found.append(Prompt(log_NME, library.names.index(task), own))
    texts = []
    for ids, counted, real in zip(known.input_ids, known.counted, known.real, strict=True):
        size = int(real.sum())
        texts.append(scores(routed, ids[None, :size])[counted[:size]])
    log_TME = torch.cat(texts).float()
    spread_M = torch.stack([text.float().mean(0) for text in texts]).std(0).mean(-1)
    return found, Usual(log_TME.mean(0), log_TME.std(0), spread_M)


def rows(arguments: argparse.Namespace) -> Iterator[tuple[Example, str, bool]]:
    words = yaml.safe_load((Path(__file__).parent / "pooling_words.yaml").read_text(encoding="utf-8"))
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
    for layer in routed.layers.values():
        layer.listen = lambda scores_TE: gathered.append(scores_TE[0].clamp(min=1e-12).log().half())
    routed.prompt.entry.forward(input_ids=ids, use_cache=False, logits_to_keep=1)
    for layer in routed.layers.values():
        layer.listen = None
    return torch.stack(gathered, dim=1)


def hard(log_NME: Tensor, _: Usual) -> Tensor:
    return torch.nn.functional.one_hot(log_NME.argmax(-1), log_NME.shape[-1]).float().mean((0, 1))


def soft(temperature: float, part: Callable[[Tensor], Tensor] = lambda x: x) -> Pooling:
    """The mean over tokens and modules of the softmax over experts; ``part`` leaves some of these out."""
    return lambda log_NME, _: (part(log_NME) / temperature).softmax(-1).mean((0, 1))


def weighed(power: float) -> Pooling:
    """Modules whose scores differ more (power 1) or less (-1) from one calibration text to the next count more."""

    def pool(log_NME: Tensor, usual: Usual) -> Tensor:
        weight_M = usual.spread_M**power
        return torch.einsum("me,m->e", (log_NME / 0.2).softmax(-1).mean(0), weight_M / weight_M.sum())

    return pool


def certain(strength: float) -> Pooling:
    """Votes that are nearly one-sided count more."""

    def pool(log_NME: Tensor, _: Usual) -> Tensor:
        vote_NME = (log_NME / 0.2).softmax(-1)
        entropy_NM = -(vote_NME.clamp(min=1e-9).log() * vote_NME).sum(-1)
        return torch.einsum("nme,nm->e", vote_NME, (-strength * entropy_NM).exp())

    return pool


POOLINGS: dict[str, Pooling] = {
    "hard votes": hard,
    **{f"soft votes, T {t}": soft(t) for t in (0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 1.0)},
    "T 0.2, first half of the modules": soft(0.2, lambda x: x[:, : x.shape[1] // 2]),
    "T 0.2, second half of the modules": soft(0.2, lambda x: x[:, x.shape[1] // 2 :]),
    "T 0.2, without the template's last five tokens": soft(0.2, lambda x: x[:-5]),
    "T 0.2, the template's last five tokens alone": soft(0.2, lambda x: x[-5:]),
    "T 0.2, first 16 tokens": soft(0.2, lambda x: x[:16]),
    "T 0.2, modules that differ between texts count more": weighed(1.0),
    "T 0.2, modules that differ between texts count less": weighed(-1.0),
    "T 0.2, certain votes count more (exp of -1 x entropy)": certain(1.0),
    "T 0.2, certain votes count more (exp of -4 x entropy)": certain(4.0),
    "mean of the logs": lambda x, _: x.mean((0, 1)),
    "mean score": lambda x, _: x.exp().mean((0, 1)),
    "mean fourth power of the score": lambda x, _: (4 * x).exp().mean((0, 1)),
    "tokens averaged first (logs), then soft votes of modules": lambda x, _: (x.mean(0) / 0.1).softmax(-1).mean(0),
    "modules averaged first (logs), then soft votes of tokens": lambda x, _: (x.mean(1) / 0.1).softmax(-1).mean(0),
    "geometric mean of soft votes, T 0.2": lambda x, _: (x / 0.2).log_softmax(-1).mean((0, 1)),
    "logs less their usual mean, T 0.2": lambda x, u: ((x - u.mean_ME) / 0.2).softmax(-1).mean((0, 1)),
    "z-scores of the logs, T 1": lambda x, u: ((x - u.mean_ME) / u.deviation_ME).softmax(-1).mean((0, 1)),
}

if __name__ == "__main__":
    main()
