"""Conditions that links of the pages carry, in the words of the API's ``where=``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")


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
