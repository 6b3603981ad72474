"""Cached prefixes of one set of experts are never another set's: the set is part of every request's cache salt."""

from __future__ import annotations

from functools import wraps
from typing import Any

from spectr.vllm.requests import Asked

REMOVE = "spectr_remove"
_removed: set[str] = set()  # experts that have left the engine of this process


def salt_requests() -> None:
    """Put each request's set of experts into its cache salt, where the engine core makes it."""
    from vllm.v1.request import Request

    if getattr(Request.__init__, "salts", False):
        return
    plain = Request.__init__

    @wraps(plain)
    def salted(self: Any, *args: Any, **given: Any) -> None:
        params = given["sampling_params"] if "sampling_params" in given else (args[2] if len(args) > 2 else None)
        salt = Asked.of(getattr(params, "extra_args", None)).salt(_removed)
        if salt:
            own = given.get("cache_salt")
            given["cache_salt"] = f"{salt}|{own}" if own else salt
        plain(self, *args, **given)

    salted.salts = True  # pyright: ignore[reportAttributeAccessIssue]
    Request.__init__ = salted


def follow_removals() -> None:
    """Salt what comes after an expert was removed, where the engine core tells its workers to."""
    from vllm.v1.engine.core import EngineCore

    if getattr(EngineCore.collective_rpc, "follows", False):
        return
    plain = EngineCore.collective_rpc

    @wraps(plain)
    def followed(self: Any, method: Any, timeout: float | None = None, args: tuple = (), kwargs: Any = None) -> Any:
        if method == REMOVE and args:
            _removed.add(str(args[0]))
        return plain(self, method, timeout, args, kwargs)

    followed.follows = True  # pyright: ignore[reportAttributeAccessIssue]
    EngineCore.collective_rpc = followed
