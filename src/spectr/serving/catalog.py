"""The models that are offered, to whom, and what a request stands for."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spectr.errors import SpectrError
from spectr.serving.engines.base import Engine
from spectr.serving.errors import RefusalError
from spectr.serving.extras import Request
from spectr.serving.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Grant:
    """What one client may use now.

    Attributes:
        experts: In alphabetical order.
        base: Whether the base model alone, too.
    """

    experts: tuple[str, ...]
    base: bool


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a request stands for: see :class:`Ticket`."""

    experts: tuple[str, ...]
    router: str
    salt: str


class Catalog:
    """Names of models and experts, and who may use them.

    Args:
        engine: Has the experts.
        policy: API keys; without one everybody may use everything.
        served: The composed model's name; ``served/EXPERT`` is one expert alone.
    """

    def __init__(self, engine: Engine, policy: Policy | None, served: str):
        if served == engine.base_model:
            raise SpectrError(f"'{served}' is the base model's own name", do="serve under another name: --served-name")
        self.engine, self.policy, self.served = engine, policy, served
        self._since = int(time.time())

    def grant(self, secret: str | None) -> Grant:
        """What the holder of a key may use.

        Raises:
            RefusalError: 401: there is a policy, and no such key in it.
        """
        if self.policy is None:
            return Grant(experts=self.engine.experts, base=True)
        key = self.policy.holder(secret)
        if key is None:
            raise _unknown_key(secret)
        return Grant(experts=self.policy.granted(key, self.engine.experts), base=key.base)

    def administrator(self, secret: str | None) -> None:
        """Raise :class:`RefusalError` for who is none; without a policy everybody is."""
        if self.policy is None:
            return
        key = self.policy.holder(secret)
        if key is None:
            raise _unknown_key(secret)
        if not key.admin:
            raise RefusalError("this key may not do that", code="admin_required", status=403)

    def listing(self, grant: Grant) -> dict[str, Any]:
        """The answer of ``/v1/models``."""
        return {"object": "list", "data": [self._told(grant, name) for name in self._names(grant)]}

    def entry(self, grant: Grant, name: str) -> dict[str, Any]:
        """One model, as it is listed."""
        if name not in self._names(grant):
            raise _no_model(name)
        return self._told(grant, name)

    def choose(self, grant: Grant, request: Request) -> Choice:
        """What a request of this client stands for.

        Raises:
            RefusalError: It names a model, an expert or a router that the client may not use or nobody has. Which of
                the two it is, the answer does not say.
        """
        experts = self._experts(grant, request)
        router = self.engine.routers[0] if request.router is None else request.router
        if router not in self.engine.routers:
            raise RefusalError(
                f"router '{router}' is not served",
                expected=" or ".join(self.engine.routers),
                code="router_not_served",
                param="router",
            )
        told = "\n".join((router, *experts))
        return Choice(experts=experts, router=router, salt=hashlib.sha256(told.encode()).hexdigest()[:32])

    def no_expert(self, names: Sequence[str], param: str | None = "experts") -> RefusalError:
        """The one answer for experts that are not there and those that are not for this client."""
        told = ", ".join(f"'{name}'" for name in names)
        return RefusalError(f"there is no expert {told}", code="expert_not_found", param=param, status=404)

    def _experts(self, grant: Grant, request: Request) -> tuple[str, ...]:
        model, asked = request.model, request.experts
        if model not in self._names(grant):
            raise _no_model(model)
        missing = sorted(set(asked or ()) - set(grant.experts))
        if missing:
            raise self.no_expert(missing)
        if model == self.served:
            return grant.experts if asked is None else tuple(sorted(set(asked)))
        alone = () if model == self.engine.base_model else (model.removeprefix(self.served + "/"),)
        if asked is not None and set(asked) != set(alone):
            raise RefusalError(
                f"model '{model}' and other experts do not go together",
                do=f"leave 'experts' out, or ask for model '{self.served}'",
                code="experts_conflict",
                param="experts",
            )
        return alone

    def _names(self, grant: Grant) -> list[str]:
        composed = [self.served, *(f"{self.served}/{name}" for name in grant.experts)] if grant.experts else []
        return composed + ([self.engine.base_model] if grant.base else [])

    def _told(self, grant: Grant, name: str) -> dict[str, Any]:
        told: dict[str, Any] = {"id": name, "object": "model", "created": self._since, "owned_by": "spectr"}
        expert = name.removeprefix(self.served + "/") if name.startswith(self.served + "/") else None
        if name == self.served:
            told |= {"experts": list(grant.experts), "routers": list(self.engine.routers)}
        elif name == self.engine.base_model:
            told |= {"experts": []}
        else:
            told |= {"experts": [expert], "parent": self.engine.base_model}
        if expert is not None and expert in self.engine.suspicion:
            told["suspicion"] = round(self.engine.suspicion[expert], 1)
        return told


def _unknown_key(secret: str | None) -> RefusalError:
    given = "no API key" if secret is None else "an API key that is not known"
    return RefusalError(
        given, do="send one of the policy's: Authorization: Bearer KEY", code="invalid_api_key", status=401
    )


def _no_model(name: str) -> RefusalError:
    return RefusalError(f"there is no model '{name}'", code="model_not_found", param="model", status=404)
