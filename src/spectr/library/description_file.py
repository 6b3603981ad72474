"""Descriptions of experts, in one text file next to them that people can read and edit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from spectr.atomic_write import replacing
from spectr.errors import LibraryError
from spectr.library.lock import locked_if_library

DESCRIPTIONS_FILE = "descriptions.yaml"
_HEAD = (
    "# What each expert is for. GLIDER compares prompts with these texts. You may edit them. Other comments are lost\n"
    "# when spectr library describe writes.\n"
)


def read_descriptions(folder: str | Path) -> dict[str, str]:
    """The descriptions in a library's folder, by expert; empty if there are none.

    Raises:
        LibraryError: The file does not map experts to texts.
    """
    path = Path(folder) / DESCRIPTIONS_FILE
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LibraryError(
            f"{path} is not YAML ({error})",
            do="correct it (quote a text that contains a colon), or delete it and describe the experts again",
        ) from error
    found = {} if found is None else found
    wrong = (
        [str(key) for key, value in found.items() if not (isinstance(value, str) and value.strip())]
        if isinstance(found, dict)
        else ["all of it"]
    )
    if wrong:
        raise LibraryError(
            f"{path} has no text for: {', '.join(wrong)}", expected="a line 'expert: text' for each", do="correct it"
        )
    return {str(name): " ".join(text.split()) for name, text in found.items()}


def write_descriptions(folder: str | Path, descriptions: Mapping[str, str]) -> Path:
    """Write a library's descriptions, atomically."""
    target = Path(folder) / DESCRIPTIONS_FILE
    text = _HEAD + yaml.safe_dump(dict(sorted(descriptions.items())), allow_unicode=True, width=10_000)
    with locked_if_library(target.parent), replacing(target) as scratch:
        scratch.write_text(text, encoding="utf-8")
    return target
