"""A composed model for EleutherAI's lm-evaluation-harness, with the name "spectr".

``python -m spectr.evaluation.harness --model spectr --model_args library=experts,router=calibrated --tasks ...`` is
the harness' command line with this model registered. ``lm_eval --model spectr`` needs a harness that reads the
entry-point group ``lm_eval.models``; releases up to 0.4.13 do not.
"""

# The harness' decorator hides the class that HFLM is from the type checker.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from spectr.composition import compose
from spectr.errors import CompositionError, MissingExtraError, SpectrError, did_you_mean
from spectr.evaluation.choices import decided_alike
from spectr.grouping import chunks
from spectr.guidance import QueryGuide
from spectr.layers.linear_layers import input_device
from spectr.library.needs import DESCRIBED
from spectr.models import load_model, pad_rows
from spectr.routers import check_needs, get_router, residents
from spectr.routers.abstention import always_choosing
from spectr.routers.setting_texts import options_of, parse
from spectr.shipped import open_library


def main() -> None:
    """Run the harness' command line. A user's mistake ends with a message and exit code 2."""
    try:
        import_module("spectr.evaluation.harness")  # registers its class; that of __main__ would be another one
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except SpectrError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":  # before the harness is imported and the class is registered
    main()
    sys.exit()

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise MissingExtraError("lm-evaluation-harness", "harness") from error

_AT_ONCE = 16  # prompts that are decided on together

Request = tuple[tuple[str, str], list[int], list[int]]


@register_model("spectr")
class SpectrLM(HFLM):
    """The harness' transformers model, composed.

    A router for whole prompts decides on the context alone, not on the scored text. It always chooses an expert unless
    ``abstain`` is given.

    Args:
        base: Folder or Hub id of the base model; the default is SmolLM2-135M-Instruct.
        library: Folder of experts; the default is the shipped ones.
        router: A router's name, or "base" for the base model alone.
        dtype: auto, float32, bfloat16 or float16.
        device: Device to run on; by default an accelerator if there is one.
        more: Settings of the router, such as ``top_k``; all others go to the harness' ``HFLM``, such as ``batch_size``.

    Raises:
        SpectrError: The router or a setting is unknown, or the library lacks what the router needs.
    """

    def __init__(
        self,
        base: str | None = None,
        library: str | None = None,
        router: str = "spectr",
        dtype: str = "auto",
        device: str | None = None,
        **more: Any,
    ):
        settings = _settings(router, more)
        experts = open_library(Path(library) if library else None)
        chosen = None
        if router != "base":
            chosen = get_router(router, **settings)
            chosen = chosen if "abstain" in settings else always_choosing(chosen)
            check_needs(chosen, experts, residents(chosen, experts.names))  # before a model is loaded
        if device and device.startswith("cuda") and not torch.cuda.is_available():
            device = None  # the harness' default wherever it runs
        model, tokenizer = load_model(base, dtype=dtype, device=device)  # pyright: ignore[reportArgumentType]
        super().__init__(pretrained=model, tokenizer=tokenizer, **more)
        guide = QueryGuide.of(model, tokenizer) if chosen and DESCRIBED in chosen.needs else None
        self.routed = None if chosen is None else compose(model, experts, chosen, guide=guide)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        decision = self.routed.prompt if self.routed else None
        if decision is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        contexts = sorted({tuple(context) for _, context, _ in requests}, key=lambda ids: (-len(ids), ids))
        chosen: dict[tuple[int, ...], tuple[float, ...]] = {}
        for some in chunks(contexts, _AT_ONCE):
            ids = pad_rows(list(map(list, some)), 0, left=False, device=input_device(self.model))
            mask = pad_rows([[1] * len(row) for row in some], 0, left=False, device=input_device(self.model))
            weights_BE = decision.decide(input_ids=ids, attention_mask=mask)
            chosen.update(zip(some, map(tuple, weights_BE.tolist()), strict=True))
        likelihoods = super()._loglikelihood_tokens
        return decided_alike(
            decision,
            [chosen[tuple(context)] for _, context, _ in requests],
            lambda members: likelihoods([requests[i] for i in members], disable_tqdm, override_bs),
        )


def _settings(router: str, given: dict[str, Any]) -> dict[str, Any]:
    """Those of the router, taken out of what was given; the rest is for ``HFLM``.

    Raises:
        CompositionError: Neither the router nor ``HFLM`` has a name, or a value has another type.
    """
    options = {} if router == "base" else options_of(router)
    known = [*options, *inspect.signature(HFLM.__init__).parameters]
    if strange := [name for name in given if name not in known]:
        raise CompositionError(
            f"neither the router '{router}' nor the harness' HFLM has {' and '.join(strange)}",
            do=did_you_mean(strange[0], set(known) - {"self", "pretrained", "tokenizer", "kwargs"}),
        )
    taken = {name: given.pop(name) for name in options if name in given}
    return {k: parse(str(v), options[k].hint, k) if isinstance(v, (str, int, float)) else v for k, v in taken.items()}
