"""Read the arguments of a call or a generation: the prompt, its tokens, its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spectr.errors import CompositionError
from spectr.layers.linear_layers import input_device
from spectr.prompts import cache_records as records
from spectr.prompts.cache_records import CacheRecord

TOKENS = ("input_ids", "inputs_embeds")
_ASSISTED = (
    "assistant_model",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
)  # with these, proposed tokens are verified


# What records keep of a call, what a generation does not read itself, and what changes no token's keys.
_BY_TOKENS = {"input_ids", "inputs", "attention_mask", "position_ids", "labels", *records.STATES}
_BY_TOKENS |= {"negative_prompt_ids", "negative_prompt_attention_mask"}


class CallTokens(NamedTuple):
    """The tokens of a call that a cache will hold.

    Attributes:
        whole: Whether nothing else is read with them, such as images or other positions.
        masked: Whether the mask is known by tokens, and has no other form.
    """

    ids: Tensor | None
    mask: Tensor | None
    positions: Tensor | None
    rows: int
    count: int
    whole: bool = True
    masked: bool = True


class GenerationSettings(NamedTuple):
    """The settings of a generation that matter for decisions."""

    pad: Any
    eos: Any
    bos: Any
    expand: int | None
    assists: bool
    assisted: bool

    @staticmethod
    def of(model: Any, given: Mapping[str, Any]) -> GenerationSettings:
        """From the arguments of ``generate`` and the model's configuration."""
        config, own = given.get("generation_config"), getattr(model, "generation_config", None)

        def find(name: str) -> Any:
            found = (given.get(name), getattr(config, name, None), getattr(own, name, None))
            return next((value for value in found if value is not None), None)

        expand = max(find("num_beams") or 1, find("num_return_sequences") or 1)
        known = given.get("custom_generate") is None
        assists = bool(getattr(config, "is_assistant", False))
        eos = find("eos_token_id")
        eos = eos.tolist() if isinstance(eos, Tensor) else eos
        assisted = any(find(name) is not None for name in _ASSISTED)
        return GenerationSettings(
            find("pad_token_id"), eos, find("bos_token_id"), expand if known else None, assists, assisted
        )


def names_of(forward: Callable[..., Any], config: Any) -> tuple[str, ...]:
    """Names of a forward's parameters, with ``use_cache`` where it passes that on without naming it."""
    parameters = signature(forward).parameters
    names = tuple(parameters)
    passed_on = any(each.kind is Parameter.VAR_KEYWORD for each in parameters.values()) and hasattr(config, "use_cache")
    return (*names, "use_cache") if passed_on and "use_cache" not in names else names


def prompt_of(model: Any, given: Mapping[str, Any], settings: GenerationSettings) -> dict[str, Any]:
    """The prompt of a generation, as arguments of the module that reads prompts."""
    main = getattr(model, "main_input_name", "input_ids")
    if has_encoder(model):
        main = getattr(model.get_encoder(), "main_input_name", main)
    prompt = {name: given[name] for name in (*TOKENS, main, "attention_mask") if given.get(name) is not None}
    if given.get("inputs") is not None:
        prompt[main] = given["inputs"]
    if not any(name in prompt for name in (*TOKENS, main)) and given.get("encoder_outputs") is None:
        bos = settings.bos if settings.bos is not None else 0
        prompt["input_ids"] = torch.full((1, 1), bos, dtype=torch.long)
    if "inputs_embeds" in prompt and main == "input_ids":
        prompt.pop("input_ids", None)
    ids = prompt.get("input_ids")
    if isinstance(ids, Tensor) and "attention_mask" not in prompt and settings.pad is not None:
        eos = settings.eos if isinstance(settings.eos, (list, tuple)) else [settings.eos]
        pad = int(settings.pad)
        if pad not in eos and bool((ids == pad).any()):  # as in transformers
            prompt["attention_mask"] = (ids != pad).long()
    device = input_device(model)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in prompt.items()}


def by_tokens_alone(given: Mapping[str, Any]) -> bool:
    """Whether a call or a generation reads token ids and nothing else of their form: no images, no token types."""
    return not any(_is_read(value) for name, value in given.items() if name not in _BY_TOKENS)


def _is_read(value: Any) -> bool:
    if isinstance(value, (list, tuple, Mapping)):
        return any(map(_is_read, value.values() if isinstance(value, Mapping) else value))
    return isinstance(value, Tensor) and value.ndim > 1


def begins_with(whole: Mapping[str, Any], record: CacheRecord, only_new: bool) -> bool:
    """Whether a generation's input starts with the tokens of a cache and continues after them."""
    ids, before = whole.get("input_ids"), record.ids_BT
    if only_new:
        return True
    if not record.whole:  # other images may have the same tokens
        return False
    if not isinstance(ids, Tensor) or before is None or ids.ndim != 2 or before.shape[1] >= ids.shape[1]:
        return False
    mine = records.masked_ids(ids, whole.get("attention_mask"))[:, : before.shape[1]]
    return mine.shape == before.shape and bool((mine == before.to(mine.device)).all())


def as_prompt(ids_BT: Tensor, positions_BT: Tensor | None = None) -> dict[str, Tensor]:
    """Arguments for token ids, where -1 marks masked tokens."""
    real_BT = ids_BT >= 0
    given = {"input_ids": ids_BT.clamp(min=0)} | ({} if positions_BT is None else {"position_ids": positions_BT})
    return given if bool(real_BT.all()) else {**given, "attention_mask": real_BT.long()}


def as_read(given: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments for a decision: the mask is that of its tokens; one of another form says nothing of them."""
    read = {name: value for name, value in given.items() if value is not None}
    tokens, mask = next((read[name] for name in TOKENS if name in read), None), read.get("attention_mask")
    if isinstance(tokens, Tensor) and mask is not None:
        del read["attention_mask"]
        if isinstance(mask, Tensor) and mask.ndim == 2:
            read["attention_mask"] = mask[:, : tokens.shape[1]]
    return read


def same_verdict(one_BE: Tensor | None, other_BE: Tensor) -> bool:
    """Whether two verdicts are equal for every row."""
    return one_BE is not None and one_BE.shape == other_BE.shape and bool((one_BE == other_BE).all())


def expanded(verdict_BE: Tensor, rows: int, expand: int | None) -> Tensor:
    """A verdict for the rows that a generation makes from the rows of a decision.

    Each row becomes ``expand`` adjacent rows. Then all rows together may be repeated, as guidance needs them.
    """
    given = len(verdict_BE)
    if given == rows:
        return verdict_BE
    times, rest = divmod(rows, given)
    if given == 1 or ((rest or not times) and bool((verdict_BE == verdict_BE[:1]).all())):
        return verdict_BE[:1].expand(rows, -1)
    if rest or not times:
        raise CompositionError(
            f"the call has {rows} rows, but the decision has {given}",
            expected=f"{given} rows, or several for each of them",
            do="decide on all rows: with routed.prompt.using(routed.prompt.decide(...)): ...",
        )
    if expand is None or times % expand:
        return verdict_BE.repeat_interleave(times, 0)
    return verdict_BE.repeat_interleave(expand, 0).repeat(times // expand, 1)


def tokens_of(given: Mapping[str, Any], *, decoder: bool) -> CallTokens:
    """The tokens of a call that a cache will hold.

    Args:
        given: The call's arguments by name.
        decoder: Whether the model also has an encoder; then they are the decoder's tokens.
    """
    ids_name, embeds_name = ("decoder_input_ids", "decoder_inputs_embeds") if decoder else TOKENS
    ids, embeds = given.get(ids_name), given.get(embeds_name)
    mask = given.get("decoder_attention_mask" if decoder else "attention_mask")
    positions = _positions(given)
    whole = by_tokens_alone(given) and (positions is None) == (given.get("position_ids") is None)
    masked = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
    if not masked:
        mask = None
    for tokens in (ids, embeds):
        if isinstance(tokens, Tensor) and tokens.ndim > 1:
            rows, count = tokens.shape[:2]
            return CallTokens(ids if tokens is ids else None, mask, positions, rows, count, whole, masked)
    first = next((value for value in given.values() if isinstance(value, Tensor) and value.ndim > 1), None)
    outputs = given.get("encoder_outputs")
    if first is None and outputs is not None:
        first = outputs if isinstance(outputs, Tensor) else outputs[0]
    return CallTokens(None, None, None, 1 if first is None else len(first), 1 if first is None else first.shape[1])


def _positions(given: Mapping[str, Any]) -> Tensor | None:
    """A call's positions, (rows, tokens); ``None`` if none are given, or those of one token differ by axis."""
    positions = given.get("position_ids")
    if not isinstance(positions, Tensor):
        return None
    if positions.ndim == 3 and bool((positions == positions[:1]).all()):  # as those of text among images
        return positions[0]
    return positions if positions.ndim == 2 else None


def packed_lengths(given: Mapping[str, Any]) -> list[list[int]] | None:
    """For each row of a call, the lengths of the prompts that are packed in it, judged by their positions."""
    ids, positions = given.get("input_ids"), given.get("position_ids")
    tokens = ids if ids is not None else given.get("inputs_embeds")
    filled = any(records.is_filled(state) for _, state in records.states_in(given))
    if not isinstance(tokens, Tensor) or tokens.ndim < 2 or filled:
        return None
    ends, (rows, count) = given.get("cu_seq_lens_q"), tokens.shape[:2]
    if rows == 1 and isinstance(ends, Tensor) and ends.ndim == 1 and int(ends[-1]) == count:
        lengths = [ends.diff().tolist()]
    elif (
        given.get("attention_mask") is None
        and isinstance(positions, Tensor)
        and positions.shape in ((rows, count), (1, count))
    ):
        lengths = [_between_restarts(position_T) for position_T in positions.expand(rows, -1)]
    else:
        return None
    return lengths if any(len(some) > 1 for some in lengths) else None


def _between_restarts(position_T: Tensor) -> list[int]:
    starts = [0, *((position_T.diff() != 1).nonzero()[:, 0] + 1).tolist(), len(position_T)]
    return [end - start for start, end in pairwise(starts)]


def unpacked(given: Mapping[str, Any], lengths: list[list[int]]) -> dict[str, Tensor]:
    """The prompts of packed rows as a padded batch.

    Raises:
        CompositionError: The call has embeddings instead of token ids.
    """
    ids = given.get("input_ids")
    if ids is None:
        raise CompositionError("prompts cannot be packed as embeddings", do="pass input_ids")
    pieces = [piece for row_T, some in zip(ids, lengths, strict=True) for piece in row_T.split(some)]
    mask = [torch.ones_like(piece) for piece in pieces]
    padded, real = (nn.utils.rnn.pad_sequence(list(some), batch_first=True) for some in (pieces, mask))
    return {"input_ids": padded, "attention_mask": real}


def kept_tokens(given: Mapping[str, Any]) -> slice | Tensor | None:
    """The tokens that the output head receives."""
    kept = given.get("logits_to_keep")
    return kept if isinstance(kept, Tensor) else slice(-kept, None) if kept else None


def part_of(out: Any, name: str) -> Any:
    """An output of a model or an encoder by name, for any type of output."""
    if isinstance(out, Mapping):
        return out.get(name)
    return getattr(out, name, None) if not isinstance(out, tuple) else (out[0] if name == "last_hidden_state" else None)


def has_encoder(model: Any) -> bool:
    """Whether a model has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
