"""A library of unlike experts, as people make them: other tasks, ranks, modules, learning rates, lengths and seeds.

Trains small experts on tasks of a collection, links the shipped ones next to them, and calibrates all. An
interrupted run resumes.

    python benchmarks/unlike_library.py --collection DATA --out LIBRARY
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from rich.progress import Progress

from spectr import ExpertLibrary, calibrate
from spectr.models import HUB_ID, load_model
from spectr.shipped import shipped_experts
from spectr.tasks import Task, read_examples
from spectr.training import TrainingSettings, train_expert


class Recipe(NamedTuple):
    """How one expert is made; the scale is 2 throughout."""

    task: str
    rank: int
    modules: str
    learning_rate: float
    examples: int


_QV, _ALL = "q_proj,v_proj", "all-linear"
RECIPES = (
    Recipe("clickbait", 8, _QV, 2e-3, 320),
    Recipe("spelling", 4, _ALL, 1e-3, 640),
    Recipe("m30k_en_de", 32, _ALL, 1e-3, 480),
    Recipe("snips_intent", 16, _ALL, 5e-4, 480),
    Recipe("tweet_emotion", 4, _QV, 1e-3, 800),
    Recipe("nl2bash", 8, _ALL, 2e-3, 640),
    Recipe("inflect_es", 4, _QV, 2e-3, 640),
    Recipe("pos_tags", 8, _ALL, 1e-3, 640),
    Recipe("stackoverflow", 16, _ALL, 1e-3, 800),
    Recipe("sms_spam", 8, _ALL, 1e-3, 160),
    Recipe("e2e_nlg", 16, _QV, 1e-3, 480),
    Recipe("syn_ant", 32, _QV, 5e-4, 800),
    Recipe("openbookqa", 8, _ALL, 3e-4, 640),
    Recipe("webnlg", 16, _ALL, 3e-4, 320),
    Recipe("arithmetic", 4, _ALL, 3e-3, 960),
    Recipe("wikisplit", 32, _QV, 1e-3, 320),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collection", type=Path, required=True, help="folder with tasks/*.yaml and their data")
    parser.add_argument("--out", type=Path, required=True, help="folder of the library")
    parser.add_argument("--part", default="0/1", help="train every n-th from the k-th on: K/N")
    arguments = parser.parse_args()
    first, step = map(int, arguments.part.split("/"))
    model, tokenizer = load_model(dtype="float32")
    with Progress() as bar:
        for seed, recipe in list(enumerate(RECIPES))[first::step]:
            out = arguments.out / recipe.task
            if (out / "adapter_model.safetensors").is_file():
                continue
            task = Task.load(arguments.collection / "tasks" / f"{recipe.task}.yaml")
            assert task.train is not None
            settings = TrainingSettings(
                rank=recipe.rank,
                alpha=2 * recipe.rank,
                dropout=0.0,
                target_modules=recipe.modules,
                learning_rate=recipe.learning_rate,
                schedule="linear",
                warmup=0.05,
                examples=recipe.examples,
                max_length=192,
                seed=seed,
            )
            shown = bar.add_task(recipe.task)
            train_expert(
                model,
                tokenizer,
                name=recipe.task,
                base_model=HUB_ID,
                train=read_examples(task, task.train, root=arguments.collection),
                settings=settings,
                out=out,
                progress=lambda phase, done, total, _, shown=shown: bar.update(shown, completed=done, total=total),
            )
        if not all((arguments.out / recipe.task / "adapter_model.safetensors").is_file() for recipe in RECIPES):
            return  # another part is not done
        shipped = ExpertLibrary.open(shipped_experts())
        for name in shipped:
            if not (arguments.out / name).exists():
                (arguments.out / name).symlink_to(shipped[name].weights.parent.resolve())
        shown = bar.add_task("calibrating")
        calibrate(
            model,
            ExpertLibrary.open(arguments.out),
            tokenizer,
            progress=lambda done, total: bar.update(shown, completed=done, total=total),
        ).save(arguments.out)


if __name__ == "__main__":
    main()
