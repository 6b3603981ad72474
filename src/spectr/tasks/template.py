"""Templates over a row's fields, as in ``{title}``."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

from spectr.errors import DataError


def names(template: str) -> list[str]:
    """The fields that a template names, in order.

    Raises:
        ValueError: The braces do not match.
    """
    found = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    if not all(name.isidentifier() for name in found):
        raise ValueError("a field's name is no identifier")
    return found


def fault(template: str) -> str | None:
    """What is wrong with a template, or ``None``."""
    try:
        names(template)
    except ValueError:
        return f"the template {template!r} has wrong braces: fields are {{name}}, a brace itself {{{{"
    return None


def fill(template: str, row: Mapping[str, Any], task: str) -> str:
    """Fill a template with a row's fields.

    Raises:
        DataError: A field is missing, or its value does not fit its format.
    """
    values = {name: field(name, row, task) for name in names(template)}
    try:
        return template.format(**values)
    except (ValueError, TypeError, LookupError) as error:
        raise DataError(
            f"task '{task}': the template {template!r} cannot be filled with the fields{of(row)}: {error}",
            expected="fields by name, such as {text}",
        ) from error


def field(name: str, row: Mapping[str, Any], task: str) -> Any:
    """Get one field of a row.

    Raises:
        DataError: The field is missing.
    """
    if name not in row:
        raise DataError(
            f"task '{task}' needs the field '{name}', which {of(row).removeprefix(' of ') or 'the row'} does not have",
            do=f"use one of the row's fields: {', '.join(sorted(row))}"
            + ("; 'label' is the number of the right choice, from 0" if name == "label" else ""),
        )
    return row[name]


def of(row: Mapping[str, Any]) -> str:
    """The words " of row ID" where the row has an ``id``."""
    return f" of row {row['id']}" if "id" in row else ""
