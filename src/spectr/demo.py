"""The demonstration: the base model and the routed model on one prompt of each task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectr.composition import compose
from spectr.layers import trace
from spectr.library import ExpertLibrary
from spectr.models import encode_batch, generate_answers, opening_length
from spectr.plots.token_weights import TokenRouting, token_routing
from spectr.routers import Router
from spectr.tasks import Task

_ANSWER = 20  # tokens of an answer at most


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """One task's prompt, both answers, the routing, and the task's expert if the library has it."""

    task: str
    prompt: str
    expected: str
    base_answer: str
    routed_answer: str
    routing: TokenRouting
    expert: str | None = None

    @property
    def base_is_right(self) -> bool:
        """Whether the base model's answer begins with the right one."""
        return _begins(self.base_answer, self.expected)

    @property
    def routed_is_right(self) -> bool:
        """Whether the routed model's answer begins with the right one."""
        return _begins(self.routed_answer, self.expected)


def demonstrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    library: ExpertLibrary,
    router: Router,
    tasks: Sequence[Task],
    *,
    allow: Sequence[str] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Demonstration]:
    """Answer each task's sample with the base model, then with the routed model. The model is restored afterwards."""
    examples = [task.example(task.sample) for task in tasks if task.sample]
    prompts = [example.prompt for example in examples]
    say(f"the base model answers {len(prompts)} prompts")
    before = generate_answers(model, tokenizer, prompts, max_new_tokens=_ANSWER)
    say(f"composing the model with {len(library)} experts")
    routed = compose(model, library, router)
    try:
        if allow:
            routed.allow(allow)
        say(f"the routed model answers ({len(routed.layers)} routed layers)")
        after = generate_answers(model, tokenizer, prompts, max_new_tokens=_ANSWER)
        say("recording the routing of each layer")
        with trace(model) as record:
            model(**encode_batch(tokenizer, prompts), use_cache=False, logits_to_keep=1)
    finally:
        routed.remove()
    skip = opening_length(tokenizer)
    return [
        Demonstration(
            task=task.name,
            prompt=example.prompt,
            expected=example.answer,
            base_answer=base_answer,
            routed_answer=routed_answer,
            routing=token_routing(record, tokenizer, title=task.name, batch=number, skip=skip),
            expert=expert if (expert := task.expert or task.name) in library else None,
        )
        for number, (task, example, base_answer, routed_answer) in enumerate(
            zip([task for task in tasks if task.sample], examples, before, after, strict=True)
        )
    ]


def _begins(answer: str, expected: str) -> bool:
    return " ".join(answer.split()).lower().startswith(" ".join(expected.split()).lower())
