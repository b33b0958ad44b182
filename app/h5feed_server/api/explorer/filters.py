"""Conditions that links of the pages carry, in the words of the API's ``where=``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from ...catalog.dataset import Dataset
from .kinds import Kind, kind_of

_EXAMPLE_CHARS = 40

_EXAMPLES: dict[Kind, str] = {"class": "= 1", "number": ">= 0", "text": 'startswith "A"'}

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")


def examples(dataset: Dataset) -> list[str]:
    """At most two conditions on fields of the dataset, which show how one is written: on a class, a number, a text."""
    found: dict[str, str] = {}
    # Names that need no quotes come first.
    for field in sorted(dataset.fields, key=lambda field: quoted(field.name) != field.name):
        kind = kind_of(dataset, field)
        condition = f"{quoted(field.name)} {_EXAMPLES.get(kind, '')}"
        if kind == "class" and field.class_names:
            first = field.class_names[:2]
            condition = f"{quoted(field.name)} {'in' if first[1:] else '='} {', '.join(map(quoted, first))}"
        if kind in _EXAMPLES and len(condition) <= _EXAMPLE_CHARS:
            found.setdefault(kind, condition)
    return [found[kind] for kind in _EXAMPLES if kind in found][:2]


def is_value(field: str, value: Any, names: Sequence[str] | None) -> str:
    """The field has this value; its class's name says it where it has one."""
    named = names is not None and isinstance(value, int) and 0 <= value < len(names)
    return f"{quoted(field)} = {quoted(names[value]) if named and names else quoted(value)}"


def is_within(field: str, low: float, high: float, *, closed: bool) -> tuple[str, str]:
    """The field's number is from `low` to `high`, which belongs to it where that is `closed`."""
    return f"{quoted(field)} >= {low!r}", f"{quoted(field)} {'<=' if closed else '<'} {high!r}"


def quoted(value: Any) -> str:
    """A name or a value: as it is where nothing in it can be mistaken, else as JSON."""
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) and value.lower() not in _WORDS else json.dumps(value)
    return json.dumps(value)


_WORDS = frozenset({"in", "not", "and", "or", "nan", "true", "false", "null", "starts", "is", "between"})
