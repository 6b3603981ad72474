"""``spectr generate``."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from spectr.cli.console import errors, out
from spectr.cli.options import (
    AllowOption,
    CombineOption,
    DtypeOption,
    ExpertOption,
    JsonOption,
    LibraryOption,
    ModelOption,
    RouterOption,
    RouterTemperatureOption,
    TopKOption,
    make_router,
    open_library,
    open_model,
    open_routed,
)
from spectr.errors import DataError

PromptArgument = Annotated[str | None, typer.Argument(help="The prompt; read from standard input if left out or -.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Length of the answer at most.", min=1)]
Temperature = Annotated[float, typer.Option("--temperature", "-t", help="0 for the likeliest tokens.", min=0)]
Chat = Annotated[bool, typer.Option("--chat/--no-chat", help="Use the model's chat template.")]


def read_prompt(prompt: str | None) -> str:
    """The prompt as given, or all of standard input."""
    if prompt in (None, "-"):
        if prompt is None and sys.stdin.isatty():
            raise DataError("no prompt was given", do='spectr generate "your question", or pipe one in')
        prompt = sys.stdin.read()
    assert prompt is not None
    if not prompt.strip():
        raise DataError("the prompt is empty", do='spectr generate "your question"')
    return prompt.strip("\n")


def generate(
    prompt: PromptArgument = None,
    model: ModelOption = None,
    library: LibraryOption = None,
    router: RouterOption = "spectr",
    top_k: TopKOption = None,
    expert: ExpertOption = None,
    combine: CombineOption = None,
    router_temperature: RouterTemperatureOption = None,
    allow: AllowOption = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    chat: Chat = True,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Answer one prompt with the routed model.

    [dim]spectr generate "Is the sentiment of this movie review positive or negative?  a dull , lifeless film"[/]
    """
    text = read_prompt(prompt)
    experts = open_library(library)
    chosen = make_router(router, experts, top_k=top_k, expert=expert, combine=combine, temperature=router_temperature)
    experts.check(*(allow or []))
    base, tokenizer = open_model(model, dtype)

    from spectr.layers import trace
    from spectr.models import generate_answers

    open_routed(base, experts, chosen, allow)
    with trace(base) as record:
        [answer] = generate_answers(
            base, tokenizer, [text], max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, chat=chat
        )
    shares = sorted(record.shares().items(), key=lambda item: -item[1])
    if as_json:
        sys.stdout.write(
            json.dumps({"prompt": text, "answer": answer, "router": str(chosen), "experts": dict(shares)}) + "\n"
        )
        return
    out.print(answer, markup=False, highlight=False)
    leaders = ", ".join(f"{name} {share:.0%}" for name, share in shares[:4] if share)
    errors.print(f"[dim]experts at work: {leaders}[/]", highlight=False)
