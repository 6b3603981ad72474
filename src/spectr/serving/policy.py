"""Which experts each API key may use, from a file. Everything that it does not name is denied."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, field_validator, model_validator

from spectr.errors import DataError, did_you_mean, page, raise_together
from spectr.serving.validation import faults

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


class Policy(BaseModel):
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
    def _unique(self) -> Policy:
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


def read_policy(path: Path) -> Policy:
    """Read a policy from a YAML or JSON file.

    Raises:
        DataError: It cannot be read, or is not a policy; lists all faults. No key is shown.
    """
    given = _read(path)
    try:
        return Policy.model_validate(given)
    except ValidationError as error:
        found = faults(Policy, given, error)
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
