"""Lower an expert's ranks: the exact truncated SVD of its updates, from the factors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from spectr.adapters import CONFIG_FILE, Expert
from spectr.errors import ExtractionError, raise_together, range_faults
from spectr.extraction.extract import split, truncate
from spectr.extraction.extraction_settings import DTYPES, Truncation
from spectr.extraction.outcome import PACKAGES, Kept, Report, write_expert
from spectr.folders import check_new_folder
from spectr.hashing import file_sha256, package_versions
from spectr.spectral import align


def rerank(
    expert: Expert,
    out: str | Path,
    truncation: Truncation,
    *,
    dtype: str = "bfloat16",
    name: str | None = None,
    progress: Callable[[str, int, int, str], None] = lambda phase, done, total, remark: None,
) -> Report:
    """Write an expert of lower ranks: the closest one in the Frobenius norm, module by module.

    The SVD is computed from the factors (:func:`spectr.spectral.align`); their product is never formed. The factors
    include the scale. No module gets more ranks than its update has. An expert that would not shrink anywhere is
    refused.

    Args:
        expert: From a library, or from :func:`spectr.adapters.read_adapter`.
        out: The new expert's folder, which must not exist yet.
        truncation: The ranks to keep.
        dtype: Dtype of the written factors: ``bfloat16`` or ``float32``.
        name: The new expert's name; by default the folder's.
        progress: Called with (phase, done, total, remark).

    Returns:
        What was kept, by module.

    Raises:
        ExtractionError: No module shrinks, the dtype is unknown, or the folder cannot be written.
        AdapterError: A factor holds NaN or infinity.
    """
    out = Path(out)
    check_new_folder(out, ExtractionError)
    expert.check_plain("a lower rank", ExtractionError)
    raise_together("", range_faults(ExtractionError, " or ".join(DTYPES), DTYPES.__contains__, dtype=dtype))
    factors, modules = _truncated(expert, truncation, dtype, progress)
    _check_smaller(expert, modules, truncation)
    # The expert's own configuration, which names the modules that it adapts.
    config = json.loads((expert.weights.parent / CONFIG_FILE).read_text(encoding="utf-8"))
    report = Report(
        name=name or out.absolute().name,
        base_model=expert.base_model,
        modules=tuple(modules),
        left=(),
        remarks=(),
        origin={
            "made": "truncated from another expert with `spectr rerank`",
            "source": {
                "expert": expert.name,
                "from": expert.origin,
                f"{expert.weights.name} sha256": file_sha256(expert.weights),
            },
            "settings": {**asdict(truncation), "dtype": dtype},
            "versions": package_versions(*PACKAGES),
        },
    )
    write_expert(out, factors, {**config, "init_lora_weights": True, "inference_mode": True}, report)
    return report


def _truncated(
    expert: Expert, truncation: Truncation, dtype: str, progress: Callable[[str, int, int, str], None]
) -> tuple[dict[str, tuple[Tensor, Tensor]], list[Kept]]:
    factors, modules = {}, []
    with expert.open() as read:
        for done, module in enumerate(expert.shapes, start=1):
            svd = align(*read(module))
            total = float(svd.S.double().square().sum())
            rank, share = truncate(svd, truncation, total) if total else (1, 1.0)
            factors[module] = split(svd, rank, DTYPES[dtype])
            kept = Kept(module=module, rank=rank, share=share, change=total**0.5, relative=None, method="factors")
            modules.append(kept)
            progress("truncating", done, len(expert.shapes), module)
    return factors, modules


def _check_smaller(expert: Expert, modules: list[Kept], truncation: Truncation) -> None:
    if any(one.rank < expert.shapes[one.module].rank for one in modules):
        return
    wanted = f"rank {truncation.rank}" if truncation.rank else f"a share of {truncation.energy:g}"
    raise ExtractionError(
        f"'{expert.name}' does not shrink at {wanted}: its ranks are {', '.join(map(str, expert.ranks))}",
        expected="a lower rank; a higher one would only add zeros",
        do="use a lower rank or a smaller share of energy, or keep the expert",
    )
