"""How much memory an extraction takes, worked out before it begins, and the method that fits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from spectr.errors import ExtractionError
from spectr.extraction.architecture import Linear
from spectr.extraction.checkpoint import BLOCK
from spectr.extraction.settings import DTYPES, Extraction, shown_bytes
from spectr.extraction.svd import exact_bytes, randomised_bytes, sketch_width

EXACT_SIDE = 2048  # the smaller side of a matrix beyond which a whole SVD takes minutes on a CPU
_FLOAT = 4
_READING = 8  # float32 blocks at most: both in their own dtype and in float32, the difference, its squares in float64


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The method for each module, by its name, and the bytes that tensors take at most."""

    methods: Mapping[str, str]
    need: int


def plan(layers: Sequence[Linear], settings: Extraction, held: Mapping[str, int] = MappingProxyType({})) -> Plan:
    """Choose a method for each module.

    A module takes its difference in float32, the larger of what reading and the SVD take in addition, and on top come
    all factors that are kept until they are written (twice: saving copies them).

    Args:
        layers: The modules.
        settings: Of the extraction.
        held: By module the bytes that reading it takes in addition, where its tensors have to be converted.

    Raises:
        ExtractionError: A module does not fit ``max_memory``; the one that needs most is named.
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
        f"{layer.module} ({layer.outputs} x {layer.inputs}) needs {shown_bytes(need)} of memory by the {method} SVD, "
        f"{shown_bytes(factors)} of it for the factors of all modules"
        + (f"; {others} more modules do not fit either" if others else ""),
        expected=f"at most {shown_bytes(settings.max_memory)}, as was allowed",
        do=f"allow more (--max-memory {1.01 * need / (1 << 30):.3g}, in GiB)"
        + (", or let --method auto choose" if method == "exact" else ", or ask for a lower rank"),
    )
