"""One pass or two: what an answer is worth when the prompt was read by the base model and not by its expert.

A decision for a whole prompt costs one reading by the base model. Reading the prompt again with the chosen expert costs
a second one; keeping the base model's cache would save it. For each task's own expert, on rows of the *training* files:
accuracy with the prompt read by the expert (two passes), and with the base model's cache from which only the last few
tokens are read again (one pass).

    python benchmarks/passes.py --data-root DATA [--prompts 20] [--library DIR]
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from spectr import ExpertLibrary, Oracle, compose
from spectr.evaluation.score import Measurement
from spectr.models import encode_answer, encode_prompt, load_model
from spectr.shipped import shipped_experts
from spectr.tasks import Example, read_examples, shipped_tasks

_AGAIN = {"one pass, the last token read again": 1, "one pass, the last 8 tokens read again": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True, help="folder of the tasks' data")
    parser.add_argument("--library", type=Path, default=None, help="folder of experts; the shipped ones by default")
    parser.add_argument("--prompts", type=int, default=20, help="training rows of each task")
    arguments = parser.parse_args()
    model, tokenizer = load_model(dtype="float32")
    library = ExpertLibrary.open(arguments.library or shipped_experts())
    right: dict[str, list[float]] = {}
    for name, task in track(list(shipped_tasks().items()), "tasks"):
        assert task.train is not None
        examples = read_examples(task, task.train, root=arguments.data_root)[-arguments.prompts :]
        ids = [encode_prompt(tokenizer, example.prompt) for example in examples]
        caches = [{label: read(model, row[:-again]) for label, again in _AGAIN.items()} for row in ids]
        routed = compose(model, library, Oracle(expert=task.expert or name))
        for example, row, cached in zip(examples, ids, caches, strict=True):
            cached |= {"two passes": read(model, row[:-1]), **cached}
            for label, cache in cached.items():
                found = best(model, tokenizer, example, row[-_AGAIN.get(label, 1) :], cache, task.length_normalised)
                right.setdefault(label, []).append(float(found == example.label))
        routed.remove()
    table = Table("prompt read by", "accuracy")
    for label, values in sorted(right.items(), reverse=True):
        measured = Measurement.of(values)
        table.add_row(label, f"{measured.value:.1%} ± {measured.error:.1%}")
    Console().print(table)
    Console().print(f"{len(right['two passes'])} prompts of training rows, each with its task's own expert")


@torch.inference_mode()
def read(model: Any, ids: list[int]) -> Any:
    return model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1).past_key_values


@torch.inference_mode()
def best(model: Any, tokenizer: Any, example: Example, tail: list[int], cache: Any, normalised: bool) -> int:
    scores = []
    for choice in example.choices:
        answer = encode_answer(tokenizer, choice)
        ids = torch.tensor([[*tail, *answer[:-1]]])
        logits: Tensor = model(input_ids=ids, past_key_values=copy.deepcopy(cache), use_cache=True).logits[0]
        logprobs = logits[len(tail) - 1 :].log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
        scores.append(float(logprobs.mean() if normalised else logprobs.sum()))
    return scores.index(max(scores))


if __name__ == "__main__":
    main()
