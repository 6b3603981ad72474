"""Calibrate a library: measure each expert's updates on texts that the base model writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectr.adapters import Expert
from spectr.composition import compose, prepare_module
from spectr.composition.base_checks import report_calibration
from spectr.composition.model_naming import naming_of
from spectr.composition.multi_router import weight_sharing_copy
from spectr.composition.subset_probes import Readers
from spectr.errors import CompositionError, DataError
from spectr.grouping import chunks
from spectr.hashing import known_sha256
from spectr.layers.base_layers import ModelLayers
from spectr.layers.eval_mode import eval_mode
from spectr.layers.linear_layers import input_device
from spectr.layers.pairs import LayerInput, Pairs
from spectr.layers.parameters import layers_at
from spectr.layers.plan import Plan, make_plan
from spectr.layers.routed_linear import RoutedLinear
from spectr.layers.token_layout import Layouts
from spectr.library import Calibration, ExpertLibrary
from spectr.library.calibration_file import Norm
from spectr.models.samples import encode_texts, null_samples, self_samples
from spectr.prompts.probe import Probe
from spectr.prompts.token_places import read_tokens
from spectr.routers import Calibrated, Spectr
from spectr.spectral.precision import without_autocast

Progress = Callable[[int, int], None]
_AT_ONCE = 128  # experts measured in one pass
_NULL_TOKENS = 96  # at most, of a text; a third of what a probe reads, and most texts are shorter


@without_autocast()
@torch.no_grad()
def calibrate(
    model: Any,
    library: ExpertLibrary,
    tokenizer: Any,
    *,
    texts: Sequence[str] | None = None,
    own: Mapping[str, Sequence[str]] | None = None,
    samples: int = 24,
    tokens: int = 64,
    null: int = 160,
    seed: int = 0,
    fresh: bool = False,
    progress: Progress = lambda *_: None,
) -> Calibration:
    """Measure each module's mean input ``m`` and each expert's ``c_t = sqrt(mean ||A*_t (x - m)||^2)``.

    Also mean and deviation of ``||A*_t x||``, for :class:`SeqrNormalised`. Needs no labels and no training. Modules
    that no text reaches, such as a vision tower's, are recorded as unmeasured. If the library is calibrated already,
    only experts without a calibration are measured, on the same texts; the others keep their values. Fields that an
    older version did not write are added. The model is unchanged.

    Args:
        model: The base model, not composed.
        library: The experts. Use ``library.with_calibration(result)`` to route, ``result.save(folder)`` to store it.
        tokenizer: The model's tokenizer.
        texts: Unlabelled texts of your own, each as a user would send it. By default the base model writes them: it
            continues the chat template from the start of a user's turn.
        own: By expert, texts like its training data. Mean and deviation of its ``||A*_t x||`` are measured on them.
        samples: Number of texts that the model writes for means and scales.
        tokens: Maximum number of tokens of each text.
        null: Number of further texts that it writes. They are the ordinary prompts that evidence is compared with (the
            null). A false alarm rate ``abstain`` needs ``2 / abstain`` of them. A calibration with fewer is extended to
            this number. A classifier writes none.
        seed: Seed of the writing.
        fresh: Measure everything again, on new texts.
        progress: Called with (passes done, total passes).

    Raises:
        CompositionError: The model is composed, has no decoder alone, or an expert does not fit it.
        LibraryError: An expert's weights differ from those in the library.
        DataError: ``texts`` is empty, or an expert's texts in ``own``.
    """
    _check(model, {"texts": texts, **{f"own[{name!r}]": some for name, some in (own or {}).items()}})
    library.check(*(own or ()))
    library = library.named_for(naming_of(model))
    report_calibration(model, None if fresh or texts is not None else library.calibration)
    with eval_mode(model):
        return _calibrated(model, library, tokenizer, texts, own or {}, samples, tokens, null, seed, fresh, progress)


def _calibrated(
    model: Any,
    library: ExpertLibrary,
    tokenizer: Any,
    texts: Sequence[str] | None,
    own: Mapping[str, Sequence[str]],
    samples: int,
    tokens: int,
    null: int,
    seed: int,
    fresh: bool,
    progress: Progress,
) -> Calibration:
    """See :func:`calibrate`; in eval mode."""
    before = known = None if fresh or texts is not None else library.calibration
    new = [name for name in library if known is None or not library.calibrated(name)]
    measured = [name for name in library if name in new or known is None or name not in known.norms]
    experts = {name: library[name] for name in (*measured, *own)}
    for expert in experts.values():
        library.check_weights(expert)
    plan = make_plan(model, list(experts.values()), Spectr(top_k=1))
    total = 4 + -(-len(measured) // _AT_ONCE) + len(own)
    known = known or _texts_alone(model, tokenizer, texts, samples, tokens, seed)
    progress(1, total)
    if len(known.null) < null and _writes(model):
        written = null_samples(model, tokenizer, samples=null, tokens=_NULL_TOKENS, seed=seed + 1)
        rows = zip(written.input_ids, written.real, strict=True)
        known = replace(known, null=[ids_T[real_T].tolist() for ids_T, real_T in rows])
    progress(2, total)
    missing = [name for name in plan.modules if name not in known.means and name not in known.unmeasured]
    means = {**known.means, **_mean_inputs(model, missing, known)}
    known = replace(known, unmeasured=known.unmeasured | {name for name in missing if name not in means})
    progress(3, total)
    rms: dict[str, dict[str, float]] = {}
    norms: dict[str, dict[str, Norm]] = {}
    base = ModelLayers(model, library.folder)
    groups = [(known, chunk) for chunk in chunks(measured, _AT_ONCE)]
    groups += [(_texts_alone(model, tokenizer, some, samples, tokens, seed), [name]) for name, some in own.items()]
    for done, (read, chunk) in enumerate(groups, start=4):
        sizes, lengths = _sizes(model, base, plan, {name: experts[name] for name in chunk}, means, read)
        rms, norms = {**sizes, **rms}, {**norms, **lengths}  # an expert's own texts come last
        progress(done, total)
    given = {name: count for name, count in known.own.items() if name not in measured}
    sha256 = {name: known_sha256(experts[name].weights) for name in new}
    rms = {name: rms[name] for name in new}
    known = known.joined(replace(known, means=means, rms=rms, norms=norms, sha256=sha256))
    known = replace(known, own={**given, **{name: len(some) for name, some in own.items()}})
    if new or before is None or before.null != known.null or known.null_experts != library.names:
        known = _with_null_numbers(model, library, known)
    progress(total, total)
    return known


def _with_null_numbers(model: Any, library: ExpertLibrary, known: Calibration) -> Calibration:
    """The same with what ``calibrated`` makes of the null, unless it refuses the experts or they are very many."""
    without = replace(known, null_experts=(), null_numbers=None)
    if not known.null or len(library) > _AT_ONCE:
        return without
    try:
        given = library.with_calibration(without)
        routed = compose(weight_sharing_copy(model), given, Calibrated())
    except CompositionError:
        return without
    reader = Readers(routed).of(routed.experts)
    assert isinstance(reader, Probe)
    return replace(known, null_experts=routed.experts, null_numbers=reader.null_numbers())


def _check(model: Any, given: Mapping[str, Sequence[str] | None]) -> None:
    if any(isinstance(module, RoutedLinear) for module in model.modules()):
        raise CompositionError("the model is composed", do="calibrate the base model: call remove() first")
    if getattr(model.config, "is_encoder_decoder", False):
        raise CompositionError(
            "the model has an encoder and a decoder", expected="a decoder-only language model, which can write texts"
        )
    for what, texts in given.items():
        if texts is not None and not any(text.strip() for text in texts):
            raise DataError(f"{what} is empty", do="pass at least one text, or omit it")


def _writes(model: Any) -> bool:
    """Whether a model generates text; a classifier does not."""
    return hasattr(model, "generate")


def _texts_alone(
    model: Any, tokenizer: Any, texts: Sequence[str] | None, samples: int, tokens: int, seed: int
) -> Calibration:
    """A calibration of no expert: the encoded texts."""
    if texts is None and not _writes(model):
        raise CompositionError(
            f"a {type(model).__name__} cannot write texts",
            expected="texts to calibrate on, or a library that its language model calibrated",
            do="spectr.calibrate(model, library, tokenizer, texts=[...])",
        )
    ids, counted, real, opening, turn, closing = (
        encode_texts(model, tokenizer, texts)
        if texts is not None
        else self_samples(model, tokenizer, samples=samples, tokens=tokens, seed=seed)
    )
    settings = {
        "base_model": str(getattr(model.config, "name_or_path", "")).rpartition("/")[2],
        "source": "self-samples" if texts is None else "texts",
        "samples": len(ids),
        "tokens": int(counted.sum()),
        "seed": seed if texts is None else None,
        "opening": opening,
        "turn": turn,
        "closing": closing,
    }
    return Calibration(means={}, rms={}, sha256={}, input_ids=ids, counted=counted, real=real, settings=settings)


def _mean_inputs(model: nn.Module, modules: Sequence[str], known: Calibration) -> dict[str, Float[Tensor, " I"]]:
    sums: dict[str, Tensor] = {}

    def see(module: str, x: LayerInput) -> None:
        x_TI = x.x_SI if isinstance(x, Pairs) else x
        sums[module] = x_TI.double().mean(0).float()

    read_inputs(model, modules, known, see)
    return sums


def _sizes(
    model: nn.Module,
    base: ModelLayers,
    plan: Plan,
    experts: Mapping[str, Expert],
    means: Mapping[str, Tensor],
    known: Calibration,
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, Norm]]]:
    """By expert and module the root mean square of ``||A* (x - m)||``, and mean and deviation of ``||A* x||``."""
    rms: dict[str, dict[str, float]] = {name: {} for name in experts}
    norms: dict[str, dict[str, Norm]] = {name: {} for name in experts}

    def see(module: str, x: LayerInput) -> None:
        x_TI = x.x_SI if isinstance(x, Pairs) else x
        centred_TI = x_TI.float() - means[module].to(x_TI.device)
        here = {name: readers[name] for name in plan.modules[module] if name in readers}
        parts = prepare_module(here, module, Spectr(top_k=1))
        A_SI = torch.cat([part.A for part in parts.values()], dim=-2).to(x_TI.device)  # S: the ranks of all
        h_TS = x._replace(x_SI=centred_TI).products(A_SI) if isinstance(x, Pairs) else centred_TI @ A_SI.mT
        whole_TS = x._replace(x_SI=x_TI.float()).products(A_SI) if isinstance(x, Pairs) else x.float() @ A_SI.mT
        mean_S = h_TS.square().mean(0, dtype=torch.float64)
        ranks = [part.A.shape[-2] for part in parts.values()]
        for name, mean_R, whole_TR in zip(parts, mean_S.cpu().split(ranks), whole_TS.split(ranks, -1), strict=True):
            rms[name][module] = mean_R.sum().sqrt().item()
            norm_T = whole_TR.double().norm(dim=-1)
            norms[name][module] = Norm(norm_T.mean().item(), norm_T.std(correction=0).item())

    with ExitStack() as files:
        readers = {name: files.enter_context(expert.open_on(base)) for name, expert in experts.items()}
        used = [module for module in means if not readers.keys().isdisjoint(plan.modules.get(module, ()))]
        read_inputs(model, used, known, see)
    return rms, norms


def read_inputs(model: Any, modules: Sequence[str], known: Calibration, see: Callable[[str, LayerInput], None]) -> None:
    """Run a calibration's texts through the model; ``see`` receives each module and its counted inputs."""
    if not modules:
        return
    device = input_device(model)
    given = {"input_ids": known.input_ids.to(device), "attention_mask": known.real.long().to(device)}
    given |= {"use_cache": False, **_without_logits(model, modules)}
    with layers_at(model, modules) as layers:
        names = {layer: name for name, layer in layers.items()}
        read_tokens(model, Layouts(names), names, lambda name, x, *_: see(name, x), given, known.counted)


def _without_logits(model: Any, modules: Sequence[str]) -> dict[str, int]:
    """Skip the logits of all tokens but the last, unless the layer that computes them is measured."""
    head = model.get_output_embeddings()
    if "logits_to_keep" not in signature(model.forward).parameters:
        return {}
    layers = dict(model.named_modules())
    return {} if any(layers.get(name) is head for name in modules) else {"logits_to_keep": 1}
