"""Keeps cached prefixes of one set of experts from serving another set: each request's cache salt names its set."""

from __future__ import annotations

from functools import wraps
from typing import Any

from spectr.vllm.requests import RequestOptions

REMOVE = "spectr_remove"
_removed: set[str] = set()  # experts removed from the engine of this process


def salt_requests() -> None:
    """Add each request's set of experts to its cache salt, where the engine core makes the salt."""
    from vllm.v1.request import Request

    if getattr(Request.__init__, "salts", False):
        return
    original = Request.__init__

    @wraps(original)
    def salted(self: Any, *args: Any, **options: Any) -> None:
        params = options["sampling_params"] if "sampling_params" in options else (args[2] if len(args) > 2 else None)
        salt = RequestOptions.of(getattr(params, "extra_args", None)).salt(_removed)
        if salt:
            own = options.get("cache_salt")
            options["cache_salt"] = f"{salt}|{own}" if own else salt
        original(self, *args, **options)

    salted.salts = True  # pyright: ignore[reportAttributeAccessIssue]
    Request.__init__ = salted


def follow_removals() -> None:
    """Change the salt of requests that come after the removal of an expert."""
    from vllm.v1.engine.core import EngineCore

    if getattr(EngineCore.collective_rpc, "follows", False):
        return
    original = EngineCore.collective_rpc

    @wraps(original)
    def followed(self: Any, method: Any, timeout: float | None = None, args: tuple = (), kwargs: Any = None) -> Any:
        if method == REMOVE and args:
            _removed.add(str(args[0]))
        return original(self, method, timeout, args, kwargs)

    followed.follows = True  # pyright: ignore[reportAttributeAccessIssue]
    EngineCore.collective_rpc = followed
