"""How much memory an extraction needs, computed in advance, and the method that fits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from spectr.errors import ExtractionError
from spectr.extraction.architecture import Linear
from spectr.extraction.checkpoint import BLOCK
from spectr.extraction.settings import DTYPES, Extraction, shown_bytes
from spectr.extraction.svd import exact_bytes, randomised_bytes, sketch_width

EXACT_SIDE = 2048  # if both sides are larger, a full SVD takes minutes on a CPU
_FLOAT = 4
_READING = 8  # float32 blocks at most: both in their own dtype and in float32, the difference, its squares in float64


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The method for each module, by its name, and the maximum size of tensors in bytes."""

    methods: Mapping[str, str]
    need: int


def plan(layers: Sequence[Linear], settings: Extraction, held: Mapping[str, int] = MappingProxyType({})) -> Plan:
    """Choose a method for each module.

    A module needs its difference in float32, and the larger of what reading and the SVD need. All factors are kept
    until they are written (twice, since saving copies them).

    Args:
        layers: The modules.
        settings: Of the extraction.
        held: By module, further bytes for reading it, if its tensors must be converted.

    Raises:
        ExtractionError: A module does not fit into ``max_memory``; names the one that needs most.
    """
    factors = _factors(layers, settings)
    needs = {layer.module: _by_method(layer, settings, held.get(layer.module, 0)) for layer in layers}
    methods = {layer.module: _method(layer, needs[layer.module], factors, settings) for layer in layers}
    whole = {module: factors + needs[module][method] for module, method in methods.items()}
    most = max(whole, key=whole.__getitem__)
    if whole[most] > settings.max_memory:
        layer = next(layer for layer in layers if layer.module == most)
        raise _too_large(layer, methods[most], whole, factors, settings)
    return Plan(methods=methods, need=whole[most])


def _factors(layers: Iterable[Linear], settings: Extraction) -> int:
    """Bytes of all factors at the largest ranks that they can get."""
    most, size = settings.most, DTYPES[settings.dtype].itemsize
    return 2 * size * sum(min(most, o, i) * (o + i) for _, o, i, _ in layers)


def _by_method(layer: Linear, settings: Extraction, held: int) -> dict[str, int]:
    _, outputs, inputs, _ = layer
    delta = _FLOAT * outputs * inputs
    reading = held + _READING * min(delta, _FLOAT * max(BLOCK, outputs, inputs))
    width = sketch_width(outputs, inputs, settings.most, settings.oversampling)
    return {
        "exact": delta + max(reading, exact_bytes(outputs, inputs)),
        "randomised": delta + max(reading, randomised_bytes(outputs, inputs, width)),
    }


def _method(layer: Linear, needs: Mapping[str, int], factors: int, settings: Extraction) -> str:
    if settings.method != "auto":
        return settings.method
    fits = factors + needs["exact"] <= settings.max_memory
    small = min(layer.outputs, layer.inputs) <= EXACT_SIDE
    return "exact" if (fits and small) or needs["exact"] <= needs["randomised"] else "randomised"


def _too_large(
    layer: Linear, method: str, whole: Mapping[str, int], factors: int, settings: Extraction
) -> ExtractionError:
    others = sum(need > settings.max_memory for need in whole.values()) - 1
    need = whole[layer.module]
    return ExtractionError(
        f"{layer.module} ({layer.outputs} x {layer.inputs}) needs {shown_bytes(need)} of memory for the {method} SVD, "
        f"including {shown_bytes(factors)} for the factors of all modules"
        + (f"; {others} more modules do not fit" if others else ""),
        expected=f"at most {shown_bytes(settings.max_memory)}, the limit",
        do=f"use --max-memory {1.01 * need / (1 << 30):.3g} (GiB)"
        + (", or let --method auto choose" if method == "exact" else ", or use a lower rank"),
    )
