"""Names of tensors in an adapter file, and the modules they belong to."""

from __future__ import annotations

import re
from collections.abc import Iterable

# "base_model.model.<module>.lora_A.weight"; files written by hand may name the adapter: "...lora_A.default.weight".
_FACTOR = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight$")
_STRANGERS = (
    ("lora_magnitude_vector", "a DoRA magnitude"),
    ("lora_embedding_", "factors of an embedding"),
    ("modules_to_save", "a whole trained module"),
    (".lora_B.bias", "a bias of the B matrix"),
    ("token_adapter", "trained rows of an embedding"),
)


def pair_keys(keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Sort tensor names into ``{module: {"A": key, "B": key}}`` and a list of faults."""
    pairs: dict[str, dict[str, str]] = {}
    faults: list[str] = []
    ordered = sorted(keys)
    together = "\n".join(ordered)
    strangers = [(mark, what) for mark, what in _STRANGERS if mark in together]
    for key in ordered:
        stranger = next((what for mark, what in strangers if mark in key), None)
        match = _FACTOR.match(key)
        if stranger or not match:
            faults.append(f"{key} is {stranger or 'not a LoRA factor'}")
        else:
            sides = pairs.setdefault(match["module"], {})
            if match["side"] in sides:
                faults.append(
                    f"{match['module']} has more than one factor {match['side']} (several adapters in one file)"
                )
            sides[match["side"]] = key
    faults += [f"{module} has only one factor" for module, sides in pairs.items() if len(sides) < 2]
    return pairs, faults
