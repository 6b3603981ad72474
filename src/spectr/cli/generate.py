"""``spectr generate`` and ``spectr chat``."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectr.cli.console import errors, out
from spectr.cli.model_loading import tell_guide
from spectr.cli.options import JsonOption, Routing, with_options
from spectr.errors import DataError, SpectrError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from spectr.composition import Routed

PromptArgument = Annotated[
    str | None, typer.Argument(help="Answer this prompt; by default, and for -, read it from standard input.")
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Limit the tokens of the answer.", min=1)]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature", "-t", help="Sample at this temperature; 0 always chooses the most likely token.", min=0
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


HELP = "/experts lists the experts, /allow NAME ... allows only these, /allow allows all, /new starts over, /quit exits"


@with_options
def chat(
    routing: Routing,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Annotated[int | None, typer.Option(help="Set the seed of the sampling; by default it is random.")] = None,
) -> None:
    """Chat with the routed model. After each answer, the experts with the most weight are shown.

    Commands in the chat: /experts, /allow NAME ..., /new and /quit.
    """
    library, router = routing.experts()
    base, tokenizer = routing.base(_check_template)
    routed = routing.compose(base, tokenizer, library, router)
    if seed is not None:
        from transformers import set_seed

        set_seed(seed)
    errors.print(f"[dim]{HELP}[/]", highlight=False)
    turns: list[dict[str, str]] = []
    while (line := _read()) is not None:
        if line.startswith("/"):
            if line.split()[0] in ("/quit", "/exit"):
                break
            turns = _command(line, routed, turns)
        elif line:
            turns.append({"role": "user", "content": line})
            answer = _answer(routed, tokenizer, turns, max_new_tokens, temperature)
            turns.append({"role": "assistant", "content": answer})


def _check_template(_config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.chat_template is None:
        raise SpectrError("this model has no chat template", do="use spectr generate --no-chat")


def _read() -> str | None:
    try:
        return out.input("[bold cyan]you[/] " if out.is_terminal else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def _command(line: str, routed: Routed, turns: list[dict[str, str]]) -> list[dict[str, str]]:
    name, *words = line.split()
    try:
        if name == "/experts":
            errors.print(", ".join(routed.experts), highlight=False)
        elif name == "/allow":
            errors.print(f"allowed: {', '.join(routed.allow(words or None).experts)}", highlight=False)
        elif name == "/new":
            return []
        else:
            known = "" if name == "/help" else f"unknown command {name}; "
            errors.print(known + HELP, markup=False, highlight=False)
    except SpectrError as error:
        errors.print(str(error), markup=False, highlight=False)
    return turns


def _answer(
    routed: Routed,
    tokenizer: Any,
    turns: list[dict[str, str]],
    max_new_tokens: int,
    temperature: float,
) -> str:
    from spectr.layers import trace
    from spectr.models.generate import stream_answer

    model: Any = routed.model
    with trace(model) as record:
        answer = stream_answer(model, tokenizer, turns, max_new_tokens=max_new_tokens, temperature=temperature)
    leaders = sorted(record.shares().items(), key=lambda item: -item[1])[:3]
    remark = routed.prompt.remark if routed.prompt else None
    shown = remark or ", ".join(f"{name} {share:.0%}" for name, share in leaders)
    errors.print(f"[dim]{shown}[/]", highlight=False)
    return answer
