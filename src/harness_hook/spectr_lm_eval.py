"""Makes "spectr" known to ``lm_eval`` releases that read no entry points (0.4.13 and older).

``spectr_lm_eval.pth`` calls it when Python starts as ``lm_eval``, and at no other time. Newer releases find the model
by the entry point of the group ``lm_eval.models``; once one is out, both files go.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, entry_points, version

_LAST_WITHOUT_PLUGINS = (0, 4, 13)


def register() -> None:
    """Add what the entry points of ``lm_eval.models`` name to the harness' registry, unloaded."""
    try:
        numbers = tuple(int(part) for part in version("lm_eval").split(".")[:3])
    except (PackageNotFoundError, ValueError):
        return
    if numbers > _LAST_WITHOUT_PLUGINS:
        return
    from lm_eval.api.registry import model_registry

    for point in entry_points(group="lm_eval.models"):
        if point.name not in model_registry:
            model_registry.register(point.name, target=point.value)
