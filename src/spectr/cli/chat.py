"""``spectr chat``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectr.cli.console import errors, out
from spectr.cli.generate import MaxNewTokens, Temperature
from spectr.cli.options import Routing, with_options
from spectr.errors import SpectrError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from spectr.composition import Routed

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
        import torch

        torch.manual_seed(seed)
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
    import torch
    from transformers import TextStreamer

    from spectr.layers import trace
    from spectr.models import growing_cache

    model: Any = routed.model
    batch = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    batch = batch.to(model.device)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.inference_mode(), trace(model) as record:
        ids = model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            past_key_values=growing_cache(model),
            pad_token_id=tokenizer.pad_token_id,
            **sampling,
        )
    leaders = sorted(record.shares().items(), key=lambda item: -item[1])[:3]
    remark = routed.prompt.remark if routed.prompt else None
    shown = remark or ", ".join(f"{name} {share:.0%}" for name, share in leaders)
    errors.print(f"[dim]{shown}[/]", highlight=False)
    return tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
