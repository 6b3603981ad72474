"""``spectr generate``."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from spectr.cli.console import errors, out
from spectr.cli.guides import tell_guide
from spectr.cli.options import JsonOption, Routing, with_options
from spectr.errors import DataError

PromptArgument = Annotated[
    str | None, typer.Argument(help="Answer this prompt; by default, and for -, read it from standard input.")
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Limit the tokens of the answer.", min=1)]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature", "-t", help="Sample at this temperature; 0 always takes the most likely token.", min=0
    ),
]
Chat = Annotated[bool, typer.Option("--chat/--no-chat", help="Use the model's chat template.")]


def read_prompt(prompt: str | None) -> str:
    """The prompt as given, or all of standard input."""
    if prompt in (None, "-"):
        if prompt is None and sys.stdin.isatty():
            raise DataError("no prompt was given", do='spectr generate "your question", or pipe a prompt into it')
        prompt = sys.stdin.read()
    assert prompt is not None
    if not prompt.strip():
        raise DataError("the prompt is empty", do="pass some text")
    return prompt.strip("\n")


@with_options
def generate(
    routing: Routing,
    prompt: PromptArgument = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    seed: Annotated[int, typer.Option(help="Set the seed of the sampling.")] = 0,
    chat: Chat = True,
    as_json: JsonOption = False,
) -> None:
    """Answer one prompt with the routed model.

    [dim]spectr generate "Is the sentiment of this movie review positive or negative?  a dull , lifeless film"[/]
    """
    text = read_prompt(prompt)
    library, router = routing.experts()
    base, tokenizer = routing.base()

    from spectr.layers import trace
    from spectr.models import generate_answers

    routed = routing.compose(base, tokenizer, library, router)
    with trace(base) as record:
        [answer] = generate_answers(
            base, tokenizer, [text], max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, chat=chat
        )
    tell_guide(routed)
    remark, p = (routed.prompt.remark, routed.prompt.p_B) if routed.prompt else (None, None)
    shares = sorted(record.shares().items(), key=lambda item: -item[1])
    if as_json:
        experts = dict.fromkeys(routed.experts, 0.0) if remark else dict(shares)
        found = {"prompt": text, "answer": answer, "router": str(router), "experts": experts}
        sys.stdout.write(json.dumps(found if p is None else {**found, "p": round(float(p[0]), 4)}) + "\n")
        return
    out.print(answer, markup=False, highlight=False)
    leaders = ", ".join(f"{name} {share:.0%}" for name, share in shares[:4] if share)
    errors.print(f"[dim]{remark or f'experts used: {leaders}'}[/]", highlight=False)
