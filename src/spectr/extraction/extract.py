"""Extract a LoRA expert from a fully fine-tuned model: the first singular directions of each linear layer's change."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectr.adapters.write import targets
from spectr.errors import ExtractionError, first_line, some_of
from spectr.extraction.architecture import Architecture, read_architecture
from spectr.extraction.checkpoint import Checkpoint, Rows, locate_model, read_checkpoint
from spectr.extraction.compare import Difference, Pair, difference, measure, pair_up, unmatched
from spectr.extraction.extraction_settings import DTYPES, Extraction, Plan, Truncation, plan, shown_bytes
from spectr.extraction.outcome import PACKAGES, Kept, Left, Report, write_expert
from spectr.extraction.svd import exact_svd, randomised_svd
from spectr.folders import check_new_folder
from spectr.hashing import file_sha256, package_versions
from spectr.spectral import Aligned

Progress = Callable[[str, int, int, str], None]
_COARSE = {"BF16": 8, "F16": 11, "F32": 24, "F64": 53}  # bits of precision
_SHOWN = 5


def extract(
    tuned: str | Path,
    base: str | Path,
    out: str | Path,
    settings: Extraction,
    *,
    name: str | None = None,
    base_model: str | None = None,
    progress: Progress = lambda phase, done, total, remark: None,
) -> Report:
    """Write a LoRA expert with the best low-rank approximation of each linear layer's change.

    ``d = W_tuned - W_base = U S V^T``; the expert is ``B = U_r sqrt(S_r)``, ``A = sqrt(S_r) V_r^T`` with scale 1. Both
    models are read block by block and never loaded. Everything is checked before anything is written.

    Args:
        tuned: The fine-tuned model: a folder with safetensors weights, or a Hub id.
        base: The model that it was fine-tuned from, likewise.
        out: The expert's folder, which must not exist yet.
        settings: Ranks, method and memory.
        name: The expert's name; by default the folder's.
        base_model: Name of the base in the expert's configuration; by default ``base``.
        progress: Called with (phase, done, total, remark).

    Returns:
        What was kept and what was left out, by module.

    Raises:
        ModelError: A model is missing or damaged, or transformers cannot build it.
        ExtractionError: The two models do not fit together, are equal, differ only in parts that LoRA cannot hold (or,
            with ``settings.strict``, in any such part), or need too much memory.

    Source: Ilharco et al. (2023), task vectors; Fleshman and Van Durme (2024), RE-Adapt and its low-rank LoRE-Adapt.
    """
    out = Path(out)
    check_new_folder(out, ExtractionError)
    old, new = read_checkpoint(locate_model(base)), read_checkpoint(locate_model(tuned))
    architecture = read_architecture(old.folder, called_only=settings.called_only)
    pairs = pair_up(old, new, architecture)
    reading = _reading(pairs, old, new, settings)
    with old.open() as old_rows, new.open() as new_rows:
        found = measure(pairs, old_rows, new_rows, lambda done, total: progress("comparing", done, total, ""))
        left = _left(found, unmatched(old, new, architecture))
        changed = _changed(found, left, settings)
        methods = plan([linear for one in changed if (linear := one.pair.linear)], settings, reading)
        factors, modules = _factorise(changed, methods, old_rows, new_rows, settings, progress)
    config = _config(modules, architecture, base_model or str(base))
    remarks = _remarks(old, new, architecture, modules, settings)
    report = Report(
        name=name or out.absolute().name,
        base_model=base_model or str(base),
        modules=tuple(modules),
        left=left,
        remarks=(*remarks, *peft_remarks(architecture.model, config["target_modules"], factors)),
        origin=_origin(tuned, base, old, new, methods, settings, progress),
    )
    write_expert(out, factors, config, report)
    return report


def _reading(pairs: Sequence[Pair], old: Checkpoint, new: Checkpoint, settings: Extraction) -> dict[str, int]:
    """By module the bytes that reading it takes in addition to blocks, as its names differ in file and model."""
    needs = {pair: pair.memory(old, new) for pair in pairs}
    most = max(needs, key=needs.__getitem__)
    if needs[most] > settings.max_memory:
        raise ExtractionError(
            f"{most.name} is split differently in the two checkpoints: comparing it takes "
            f"{shown_bytes(needs[most])} of memory",
            expected=f"at most {shown_bytes(settings.max_memory)}, the limit",
            do="load and save both with the same version of transformers, or raise --max-memory",
        )
    return {pair.linear.module: need for pair, need in needs.items() if pair.linear}


def _left(found: Sequence[Difference], added: Sequence[str]) -> tuple[Left, ...]:
    left = [
        Left(name=one.pair.name, kind=one.pair.kind, relative=one.relative, change=one.change)
        for one in found
        if one.change and one.pair.linear is None
    ]
    return (*left, *(Left(name=name, kind="tensor that the base lacks", relative=None) for name in added))


def _changed(found: Sequence[Difference], left: Sequence[Left], settings: Extraction) -> list[Difference]:
    """The linear layers that differ."""
    changed = [one for one in found if one.change and one.pair.linear]
    if not changed and not left:
        raise ExtractionError(
            f"the two models are the same: none of {len(found)} tensors differs",
            expected="a model that was fine-tuned from the base",
            do="check the two paths",
        )
    if left and (settings.strict or not changed):
        shown = [f"{one.name} ({one.kind}{'' if one.relative is None else f', {one.relative:.1e}'})" for one in left]
        raise ExtractionError(
            f"{len(left)} parameters changed that LoRA cannot hold: {some_of(shown, _SHOWN)}",
            expected="changes in weights of linear layers only" if changed else "a change in a linear layer",
            do="to leave them out, remove --strict" if changed else "LoRA cannot hold this difference",
        )
    return changed


def _factorise(
    changed: Sequence[Difference], methods: Plan, old: Rows, new: Rows, settings: Extraction, progress: Progress
) -> tuple[dict[str, tuple[Tensor, Tensor]], list[Kept]]:
    factors, modules = {}, []
    for done, one in enumerate(changed, start=1):
        kept, pair = _kept(one, methods, old, new, settings)
        factors[kept.module] = pair
        modules.append(kept)
        progress("factorising", done, len(changed), kept.module)
    return factors, modules


def _kept(
    one: Difference, methods: Plan, old: Rows, new: Rows, settings: Extraction
) -> tuple[Kept, tuple[Tensor, Tensor]]:
    """One module; its SVD must be gone before the next one's begins, hence a function."""
    assert one.pair.linear is not None
    module = one.pair.linear.module
    method = methods.methods[module]
    if method == "exact":
        svd = exact_svd(difference(one.pair, old, new))
    else:
        svd = randomised_svd(
            difference(one.pair, old, new),
            settings.most,
            oversampling=settings.oversampling,
            power_iterations=settings.power_iterations,
            seed=module_seed(settings.seed, module),
        )
    rank, share = truncate(svd, settings, one.change**2)
    kept = Kept(module=module, rank=rank, share=share, change=one.change, relative=one.relative, method=method)
    return kept, split(svd, rank, DTYPES[settings.dtype])


def module_seed(seed: int, module: str) -> int:
    """A module's own seed: its random numbers don't depend on which other modules there are."""
    return int.from_bytes(hashlib.sha256(f"{seed} {module}".encode()).digest()[:6], "big")


def truncate(svd: Aligned, truncation: Truncation, total: float) -> tuple[int, float]:
    """The rank to keep, and its share of ``total`` (a squared norm)."""
    rank = truncation.choose(svd.S, total)
    return rank, min(1.0, float(svd.S[:rank].double().square().sum()) / total)


def split(svd: Aligned, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``B = U sqrt(S)`` and ``A = sqrt(S) V^T`` of the first directions: factors of one size, with scale 1."""
    root_R = svd.S[:rank].sqrt()
    return (svd.U[:, :rank] * root_R).to(dtype), (root_R[:, None] * svd.Vh[:rank]).to(dtype)


def _remarks(
    old: Checkpoint, new: Checkpoint, architecture: Architecture, modules: Sequence[Kept], settings: Extraction
) -> tuple[str, ...]:
    remarks = []
    if new.model_class not in (None, architecture.model_class):
        remarks.append(
            f"The fine-tuned model is a {new.model_class}, the expert one for a {architecture.model_class}; its head "
            "is not used."
        )
    used = [one.module for one in modules if one.module in architecture.uncalled]
    if used:
        remarks.append(
            f"The model uses the weights of {some_of(used, _SHOWN, ' layers')} without calling the layer: the expert "
            "needs a router that takes one expert for a whole prompt, and PEFT has to merge it. Without these layers: "
            "--called-only."
        )
    coarse = [min((_COARSE.get(t.dtype, 53), t.dtype) for t in one.tensors.values()) for one in (old, new)]
    if coarse[1][0] < coarse[0][0]:
        remarks.append(
            f"The fine-tuned model is stored as {coarse[1][1]}, the base as {coarse[0][1]}: the difference, and what "
            "is not kept of it, includes the rounding."
        )
    short = [] if settings.energy is None else [one for one in modules if one.share < settings.energy - 1e-6]
    if short:
        remarks.append(
            f"{len(short)} of {len(modules)} modules stay below the share of {settings.energy:g}: they would need more "
            f"than {settings.max_rank} ranks."
        )
    return tuple(remarks)


def _origin(
    tuned: str | Path,
    base: str | Path,
    old: Checkpoint,
    new: Checkpoint,
    methods: Plan,
    settings: Extraction,
    progress: Progress,
) -> dict[str, Any]:
    files = [(what, one.folder, file) for what, one in (("base", old), ("fine-tuned", new)) for file in one.files]
    hashes = {}
    for done, (what, folder, file) in enumerate(files, start=1):
        hashes[f"{what} {file} sha256"] = file_sha256(folder / file)
        progress("hashing", done, len(files), "")
    return {
        "made": "extracted from a fully fine-tuned model with `spectr extract`",
        "source": {"fine-tuned": str(tuned), "base": str(base), **hashes},
        "settings": asdict(settings),
        "memory_needed": methods.need,
        "versions": package_versions(*PACKAGES),
    }


def _config(modules: Sequence[Kept], architecture: Architecture, base_model: str) -> dict[str, Any]:
    names = [one.module for one in modules]
    transposed = {layer.module for layer in architecture.linear.values() if layer.transposed}
    return {
        "task_type": "SEQ_2_SEQ_LM" if architecture.model.config.is_encoder_decoder else "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "fan_in_fan_out": any(name in transposed for name in names),
        "target_modules": targets(names, architecture.modules),
    }


_DIFFERING_SHOWN = 3


def peft_remarks(model: Any, targets: Any, modules: Iterable[str]) -> list[str]:
    """Remarks for users who load an expert with PEFT; empty if it adapts the same layers, or is not installed.

    PEFT does not adapt ``out_proj`` in Mamba models, and treats some layers of mixtures of experts as fused parameters.

    Args:
        model: On the meta device; it is left with an adapter.
        targets: The expert's ``target_modules``.
        modules: The layers that it has factors for.
    """
    if find_spec("peft") is None:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what does not match, which this function reports
        try:
            from peft import LoraConfig, get_peft_model
            from peft.tuners.lora.layer import LoraLayer

            get_peft_model(model, LoraConfig(r=1, target_modules=targets))
        except Exception as error:  # any error: the expert is written anyway
            return [f"PEFT does not load this expert ({first_line(error)}); spectr does."]
    adapted = {name for name, part in model.named_modules() if isinstance(part, LoraLayer)}
    other = sorted(adapted ^ set(modules))
    if not other:
        return []
    return [f"PEFT reads {some_of(other, _DIFFERING_SHOWN)} differently: use this expert with spectr only."]
