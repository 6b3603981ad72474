"""Who may use which expert: API keys and their sets of experts, in a file; what is not named is denied."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from spectr.errors import DataError, did_you_mean, raise_together

_HEX = r"^[0-9a-f]{64}$"


class Key(BaseModel):
    """One API key and what its holder may use.

    Attributes:
        name: For logs and error messages at start-up; unique.
        key: The key itself, or
        key_sha256: its SHA-256 in hexadecimal.
        experts: Names, or ``"*"`` for all.
        base: Whether the base model alone may be used too.
        admin: Whether experts may be removed and metrics read.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    key: str | None = Field(default=None, min_length=8, repr=False)
    key_sha256: str | None = Field(default=None, pattern=_HEX, repr=False)
    experts: tuple[str, ...] | Literal["*"] = ()
    base: bool = False
    admin: bool = False

    @field_validator("key_sha256", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_key(self) -> Key:
        if (self.key is None) == (self.key_sha256 is None):
            raise ValueError("give either key or key_sha256")
        return self

    @property
    def digest(self) -> bytes:
        """SHA-256 of the key."""
        return bytes.fromhex(self.key_sha256) if self.key_sha256 else hashlib.sha256((self.key or "").encode()).digest()


class Policy(BaseModel):
    """What a policy file says.

    Attributes:
        keys: Each with its set.
        exclude: Experts that nobody may use, whatever their set; ``except`` in the file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    keys: tuple[Key, ...] = Field(min_length=1)
    exclude: tuple[str, ...] = Field(default=(), alias="except")

    @model_validator(mode="after")
    def _unique(self) -> Policy:
        if len({key.name for key in self.keys}) < len(self.keys):
            raise ValueError("two keys have the same name")
        if len({key.digest for key in self.keys}) < len(self.keys):
            raise ValueError("two entries have the same key")
        return self

    def holder(self, secret: str | None) -> Key | None:
        """Whose key this is; all are compared, in a time that says nothing of any of them."""
        digest = hashlib.sha256((secret or "").encode("utf-8", "surrogateescape")).digest()
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def granted(self, key: Key, experts: Iterable[str]) -> tuple[str, ...]:
        """Of these experts those that a key may use, in alphabetical order."""
        return tuple(
            sorted(name for name in experts if name not in self.exclude and (key.experts == "*" or name in key.experts))
        )

    def check(self, experts: Iterable[str]) -> None:
        """Raise :class:`DataError` for names that are no experts of the library, all at once."""
        known = tuple(experts)
        named = {key.name: key.experts for key in self.keys if key.experts != "*"} | {"except": self.exclude}
        raise_together(
            "the policy names experts that are not there",
            [
                DataError(f"'{name}' of {who} is no expert of this library", expected=did_you_mean(name, known))
                for who, names in named.items()
                for name in names
                if name not in known
            ],
            DataError,
        )


def read_policy(path: Path) -> Policy:
    """A policy from a YAML or JSON file.

    Raises:
        DataError: It cannot be read, or is no policy; all faults at once. No key is shown.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return Policy.model_validate(json.loads(text) if path.suffix == ".json" else yaml.safe_load(text))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", expected="a policy file", do="see docs/serving.md") from error
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", getattr(error, "lineno", 1) - 1) + 1
        raise DataError(f"{path}, line {line}: no YAML or JSON", expected="a policy; see docs/serving.md") from None
    except ValidationError as error:
        raise _told(path, error) from None


def _told(path: Path, error: ValidationError) -> DataError:
    faults = [f"{'.'.join(map(str, fault['loc'])) or 'the file'}: {fault['msg']}" for fault in error.errors()]
    return DataError(
        f"{path} is no policy: " + "; ".join(faults),
        expected="keys: a list, each with name, key or key_sha256, experts (names or '*'), and perhaps base and admin",
        do="see docs/serving.md",
    )
