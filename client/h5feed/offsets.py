"""Windows of rows: which rows, relative to the row of a sample, each field of the sample has.

The form in URLs is ``offsets=image:-1,0;action:0..15``: names are percent-encoded, ``a..b`` includes both ends, and
``a..b/s`` is every s-th. One number without ``..`` or comma adds no axis.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote, unquote

from .errors import BadParameter

MASK = ".mask"
"""Suffix of the bool tensor that says which rows of a sample are real, with ``ends=pad``."""

MAX_OFFSETS = 1 << 16
"""Maximum number of rows of a field in one sample."""

MAX_OFFSET = 1 << 40
"""Bound on offsets, so that sums with row ids fit into an int64."""

Offsets = int | tuple[int, ...]
"""Offsets of a field: one number, which adds no axis, or several."""

_ITEM = re.compile(r"(-?\d{1,13})(?:\.\.(-?\d{1,13})(?:/(\d{1,13}))?)?")

_EXAMPLE = "such as image:-1,0;action:0..15"


def parse_offsets(text: str) -> dict[str, Offsets]:
    """The offsets of each field, from the form in URLs.

    Raises
    ------
    BadParameter
    """
    found: dict[str, Offsets] = {}
    for part in text.split(";"):
        name, colon, items = part.rpartition(":")
        if not name or not colon:
            raise BadParameter(f"offsets={text!r:.300}: {part!r:.100} must be NAME:OFFSETS, {_EXAMPLE}")
        name = unquote(name)
        if name in found:
            raise BadParameter(f"offsets={text!r:.300}: {name!r} is named twice")
        found[name] = _checked(name, _parsed(name, items))
    return found


def offsets_of(given: str | Mapping[str, Any]) -> dict[str, Offsets]:
    """The offsets of each field, from the form in URLs, or from integers or sequences of them by field name.

    Raises
    ------
    BadParameter
    """
    if isinstance(given, str):
        return parse_offsets(given)
    if not isinstance(given, Mapping):
        raise BadParameter(f"offsets={given!r:.300} must be a dict: {{'image': [-1, 0], 'action': range(16)}}")
    found: dict[str, Offsets] = {}
    for name, value in given.items():
        is_one = not isinstance(value, str) and hasattr(value, "__index__") and not hasattr(value, "__len__")
        try:
            if not is_one and len(value) > MAX_OFFSETS:
                raise _too_many(name)
            offsets = operator.index(value) if is_one else tuple(map(operator.index, value))
        except TypeError:
            raise BadParameter(
                f"offsets of {name!r}: {value!r:.100} must be an integer, or a list or range of integers"
            ) from None
        found[name] = _checked(name, offsets)
    if not found:
        raise BadParameter(f"offsets={given!r} names no field: leave it out, or give a dict by field name")
    return found


def offsets_by_field(options: Mapping[str, Any], names: Iterable[str]) -> dict[str, Offsets]:
    """The offsets of fields, without those whose rows are the samples' own, from the options of an order.

    Raises
    ------
    BadParameter
    """
    named = {} if options.get("offsets") is None else offsets_of(options["offsets"])
    length = options.get("sequence_length")
    others = 0 if length is None else tuple(range(min(int(length), MAX_OFFSETS)))
    return {name: own for name in names if (own := named.get(name, others)) != 0}


def masks_of(options: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """The masks that batches of an order can have, by name, with their fields."""
    return {name + MASK: name for name in offsets_by_field(options, names)} if options.get("ends") == "pad" else {}


def offsets_text(offsets: Mapping[str, Offsets]) -> str:
    """The form in URLs, which is the same for equal offsets."""
    return ";".join(f"{quote(name, safe='')}:{_text(own)}" for name, own in sorted(offsets.items()))


def axes_of(offsets: Offsets) -> tuple[int, ...]:
    """The axes that these offsets add to a sample."""
    return () if isinstance(offsets, int) else (len(offsets),)


def _parsed(name: str, items: str) -> Offsets:
    if re.fullmatch(r"-?\d{1,13}", items):
        return int(items)
    numbers: list[int] = []
    for item in items.split(","):
        match = _ITEM.fullmatch(item)
        if match is None:
            raise BadParameter(f"offsets of {name!r}: {item!r:.100} is neither a number nor a range, {_EXAMPLE}")
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        if step < 1 or last < first:
            raise BadParameter(f"offsets of {name!r}: the range {item!r} must ascend, {_EXAMPLE}")
        if len(numbers) + (last - first) // step >= MAX_OFFSETS:
            raise _too_many(name)
        numbers += range(first, last + 1, step)
    return tuple(numbers)


def _checked(name: str, offsets: Offsets) -> Offsets:
    every = (offsets,) if isinstance(offsets, int) else offsets
    if not every:
        raise BadParameter(f"offsets of {name!r} are empty: name at least one row, such as 0")
    far = next((one for one in every if abs(one) > MAX_OFFSET), None)
    if far is not None:
        raise BadParameter(f"offsets of {name!r}: {far} is out of range (-2**40 to 2**40)")
    return offsets


def _too_many(name: str) -> BadParameter:
    return BadParameter(f"offsets of {name!r}: more than the limit of {MAX_OFFSETS} rows per sample")


def _text(offsets: Offsets) -> str:
    if isinstance(offsets, int):
        return str(offsets)
    step = offsets[1] - offsets[0] if len(offsets) > 1 else 1
    if step > 0 and (len(offsets) == 1 or _is_range(offsets, step)):
        return f"{offsets[0]}..{offsets[-1]}" + (f"/{step}" if step > 1 else "")
    return ",".join(map(str, offsets))


def _is_range(offsets: Sequence[int], step: int) -> bool:
    return len(offsets) > 2 and tuple(range(offsets[0], offsets[-1] + 1, step)) == tuple(offsets)
