"""Which experts each API key may use, the models that each client sees, and what a request selects."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, field_validator, model_validator

from spectr.errors import DataError, SpectrError, did_you_mean, nearest, page, raise_together
from spectr.serving.api_errors import RefusalError, faults
from spectr.serving.api_fields import Request
from spectr.serving.engines.engine import Engine, Recording, Ticket

_SEE = f"see {page('howto/serving')}, Who may use which expert"


class Key(BaseModel):
    """One API key and what its owner may use.

    Attributes:
        name: For logs and start-up errors; unique.
        key: The key itself, or
        key_sha256: its SHA-256 in hexadecimal.
        experts: Names, or ``"*"`` for all.
        base: Whether the base model alone may be used too.
        admin: Whether the owner may remove experts and read metrics.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, description="a name for the key's owner, such as team-a")
    key: str | None = Field(
        default=None, min_length=8, repr=False, description="the key itself, a quoted text of at least 8 characters"
    )
    key_sha256: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{64}$",
        repr=False,
        description="the 64 hexadecimal digits that this command prints: printf %s KEY | sha256sum",
    )
    experts: tuple[str, ...] | Literal["*"] = Field(
        default=(), description='a list of names, such as [sst2, agnews], or "*" for all'
    )
    base: StrictBool = Field(default=False, description="true or false")
    admin: StrictBool = Field(default=False, description="true or false")

    @field_validator("key_sha256", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_key(self) -> Key:
        if (self.key is None) == (self.key_sha256 is None):
            found = "has no key" if self.key is None else "has both key and key_sha256"
            raise ValueError(found, "either key or key_sha256")
        return self

    @property
    def digest(self) -> bytes:
        """SHA-256 of the key."""
        return bytes.fromhex(self.key_sha256) if self.key_sha256 else hashlib.sha256((self.key or "").encode()).digest()


class AccessPolicy(BaseModel):
    """The content of a policy file.

    Attributes:
        keys: The keys, each with its experts.
        exclude: Experts that no key may use; ``except`` in the file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    keys: tuple[Key, ...] = Field(
        min_length=1,
        repr=False,
        description="a list with at least one entry, each with a name, its key (or key_sha256) and its experts",
    )
    exclude: tuple[str, ...] = Field(default=(), alias="except", description="a list of names, such as [sst2, agnews]")

    @model_validator(mode="after")
    def _unique(self) -> AccessPolicy:
        for what, of in (("name", [key.name for key in self.keys]), ("key", [key.digest for key in self.keys])):
            first = {value: number for number, value in reversed(list(enumerate(of)))}
            if twice := [(first[value], number) for number, value in enumerate(of) if first[value] != number]:
                places = " and ".join(f"keys[{number}]" for number in twice[0])
                raise ValueError(f"has the same {what} in {places}", f"a different {what} for each")
        return self

    def holder(self, secret: str | None) -> Key | None:
        """The owner of a key. All keys are compared, in a time that does not depend on them."""
        digest = hashlib.sha256((secret or "").encode("utf-8", "surrogateescape")).digest()
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def granted(self, key: Key, experts: Iterable[str]) -> tuple[str, ...]:
        """The experts among these that a key may use, in alphabetical order."""
        return tuple(
            sorted(name for name in experts if name not in self.exclude and (key.experts == "*" or name in key.experts))
        )

    def check(self, experts: Iterable[str]) -> None:
        """Raise :class:`DataError` for names that are not experts of the library, all at once."""
        known = tuple(experts)
        named = {key.name: key.experts for key in self.keys if key.experts != "*"} | {"except": self.exclude}
        raise_together(
            "the policy names unknown experts",
            [
                DataError(f"'{name}' of {who} is not an expert of this library", expected=did_you_mean(name, known))
                for who, names in named.items()
                for name in names
                if name not in known
            ],
            DataError,
        )


def read_policy(path: Path) -> AccessPolicy:
    """Read a policy from a YAML or JSON file.

    Raises:
        DataError: It cannot be read, or is not a policy; lists all faults. No key is shown.
    """
    given = _read(path)
    try:
        return AccessPolicy.model_validate(given)
    except ValidationError as error:
        found = faults(AccessPolicy, given, error)
    problems = [DataError(f"{fault.place or 'the file'} {fault.found}", expected=fault.expected) for fault in found]
    raise DataError(f"{path} is not a policy\n" + "\n".join(f"- {problem}" for problem in problems), do=_SEE)


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", expected="a policy file", do=_SEE) from error
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text", expected="a policy, as YAML or JSON", do=_SEE) from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: {error.msg}", expected="JSON", do=_SEE) from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise DataError(f"{path}{place}: {problem or 'not YAML'}", expected="YAML", do=_SEE) from None


@dataclass(frozen=True, kw_only=True)
class Grant:
    """What one client may use now.

    Attributes:
        experts: In alphabetical order.
        base: Whether the client may also use the base model alone.
    """

    experts: tuple[str, ...]
    base: bool


class Catalog:
    """Names of models and experts, and who may use them.

    Args:
        engine: Provides the experts.
        policy: API keys; without a policy everyone may use everything.
        served_name: Name of the composed model; ``served_name/EXPERT`` is a single expert.
    """

    def __init__(self, engine: Engine, policy: AccessPolicy | None, served_name: str):
        if served_name == engine.base_model:
            raise SpectrError(f"'{served_name}' is the base model's own name", do="choose another name: --served-name")
        self.engine, self.policy, self.served_name = engine, policy, served_name
        self._since = int(time.time())

    def grant(self, secret: str | None) -> Grant:
        """What the owner of a key may use.

        Raises:
            RefusalError: 401: there is a policy, and it does not contain the key.
        """
        key = self._key(secret)
        if self.policy is None or key is None:
            return Grant(experts=self.engine.experts, base=True)
        return Grant(experts=self.policy.granted(key, self.engine.experts), base=key.base)

    def administrator(self, secret: str | None) -> str | None:
        """The name of an administrator's key; ``None`` without a policy, which needs no key.

        Raises:
            RefusalError: 401: unknown key; 403: not an administrator's key.
        """
        key = self._key(secret)
        if key is None:
            return None
        if not key.admin:
            raise RefusalError(
                "this key is not allowed to do that",
                expected="an administrator's key",
                do="use a key with 'admin: true' in the policy",
                code="admin_required",
                status=403,
            )
        return key.name

    def _key(self, secret: str | None) -> Key | None:
        """The policy's key; ``None`` without a policy."""
        key = self.policy and self.policy.holder(secret)
        if self.policy is not None and key is None:
            given = "no API key" if secret is None else "an unknown API key"
            do = "send a key of the policy: Authorization: Bearer KEY"
            raise RefusalError(given, do=do, code="invalid_api_key", status=401)
        return key

    def listing(self, grant: Grant) -> dict[str, Any]:
        """The answer of ``/v1/models``."""
        return {"object": "list", "data": [self._listed(grant, name) for name in self._names(grant)]}

    def entry(self, grant: Grant, name: str) -> dict[str, Any]:
        """One model in the list."""
        if name not in self._names(grant):
            raise self._no_model(grant, name)
        return self._listed(grant, name)

    def loaded(self, name: str | None = None) -> dict[str, Any]:
        """The answer of ``/v1/experts`` for administrators: all loaded experts, or one.

        Raises:
            RefusalError: 404: there is no expert of that name.
        """
        experts = self.engine.experts
        if name is not None and name not in experts:
            raise self._no_expert([name], experts, param=None, where="/v1/experts lists the loaded experts")
        found = [{"id": expert, "object": "expert", **self._outlier_score(expert)} for expert in experts]
        return {"object": "list", "data": found} if name is None else found[experts.index(name)]

    def ticket(self, grant: Grant, request: Request, *, count: bool) -> Ticket:
        """What a client's request selects. Routing is recorded if the request wants it, or to ``count`` tokens.

        Raises:
            RefusalError: The request names a model, expert or router that does not exist or that the client may not
                use. The answer is the same for both.
        """
        experts = self._experts(grant, request)
        router = self.engine.routers[0] if request.router is None else request.router
        if router not in self.engine.routers:
            raise RefusalError(
                f"router '{router}' is not served",
                expected=" or ".join(self.engine.routers),
                do=_meant(router, self.engine.routers),
                code="router_not_served",
                param="router",
            )
        record: Recording = "shares" if count or request.return_routing else "none"
        return Ticket(
            id=uuid.uuid4().hex,
            experts=experts,
            router=router,
            salt=hashlib.sha256("\n".join((router, *experts)).encode()).hexdigest()[:32],
            record="layers" if request.return_routing == "layers" else record,
        )

    def _no_expert(
        self, names: Sequence[str], known: Sequence[str], param: str | None = "experts", **where: str
    ) -> RefusalError:
        """The answer for experts that do not exist, and for those outside ``known``, which the client may use."""
        quoted = ", ".join(f"'{name}'" for name in names)
        do = _nearest(names[0], known, **where)
        return RefusalError(f"there is no expert {quoted}", do=do, code="expert_not_found", param=param, status=404)

    def _no_model(self, grant: Grant, name: str) -> RefusalError:
        """The answer for models that do not exist and for those that the client may not use."""
        known = self._names(grant)
        do = _nearest(name, known)
        if not known:
            do = "use another key: in the policy, this one has no served 'experts' and no 'base: true'"
        elif name == self.served_name:
            do = f"use '{known[0]}'; only keys with 'experts' in the policy may use the composed model"
        return RefusalError(f"there is no model '{name}'", do=do, code="model_not_found", param="model", status=404)

    def _experts(self, grant: Grant, request: Request) -> tuple[str, ...]:
        model, named = request.model, request.experts
        if model not in self._names(grant):
            raise self._no_model(grant, model)
        missing = sorted(set(named or ()) - set(grant.experts))
        if missing:
            raise self._no_expert(missing, grant.experts)
        if model == self.served_name:
            return grant.experts if named is None else tuple(sorted(set(named)))
        alone = () if model == self.engine.base_model else (model.removeprefix(self.served_name + "/"),)
        if named is not None and set(named) != set(alone):
            raise RefusalError(
                f"model '{model}' cannot use other experts",
                do=f"remove 'experts', or use model '{self.served_name}'",
                code="experts_conflict",
                param="experts",
            )
        return alone

    def _names(self, grant: Grant) -> list[str]:
        composed = (
            [self.served_name, *(f"{self.served_name}/{name}" for name in grant.experts)] if grant.experts else []
        )
        return composed + ([self.engine.base_model] if grant.base else [])

    def _listed(self, grant: Grant, name: str) -> dict[str, Any]:
        facts: dict[str, Any] = {"id": name, "object": "model", "created": self._since, "owned_by": "spectr"}
        expert = name.removeprefix(self.served_name + "/") if name.startswith(self.served_name + "/") else None
        if name == self.served_name:
            facts |= {"experts": list(grant.experts), "routers": list(self.engine.routers)}
        elif name == self.engine.base_model:
            facts |= {"experts": []}
        else:
            facts |= {"experts": [expert], "parent": self.engine.base_model}
        return facts if expert is None else facts | self._outlier_score(expert)

    def _outlier_score(self, expert: str) -> dict[str, Any]:
        score = self.engine.outlier_scores.get(expert)
        if score is None:
            return {}
        shown = round(score, 1) if math.isfinite(score) else "not finite"
        return {"outlier_score": shown, "suspicion": shown}  # the second is its old name


def _meant(name: str, known: Sequence[str]) -> str | None:
    alone = [other for other in known if other.endswith(f"/{name}")]  # an expert's name in place of a model's
    narrow = [
        other for other in known if not name.startswith(f"{other}/")
    ]  # a single expert is not a misspelling of all experts
    near = alone[0] if alone else nearest(name, narrow)
    return f"use '{near}' if you mean that" if near else None


def _nearest(name: str, known: Sequence[str], where: str = "/v1/models lists what this key may use") -> str:
    meant = _meant(name, known)
    return f"{meant}; {where}" if meant else where
