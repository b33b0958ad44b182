"""Windows of rows: which rows, relative to the row of a sample, each field of the sample has.

The form in URLs is ``offsets=image:-1,0;action:0..15``: names are percent-encoded, ``a..b`` includes both ends, and
``a..b/s`` is every s-th. One number without ``..`` or comma adds no axis. ``next=image:1`` gives rows of a field under
another name, in addition to those of the field.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from .errors import BadParameter

MASK = ".mask"
"""Suffix of the bool tensor that says which rows of a sample are real, if ends of episodes are padded."""

MAX_OFFSETS = 1 << 16
"""Maximum number of rows of a field in one sample."""

MAX_OFFSET = 1 << 40
"""Bound on offsets, so that sums with row ids fit into an int64."""

Offsets = int | tuple[int, ...]
"""Offsets of a field: one number, which adds no axis, or several."""


class Taken(NamedTuple):
    """Rows of which field, relative to the row of a sample."""

    field: str
    offsets: Offsets


_ITEM = re.compile(r"(-?\d{1,13})(?:\.\.(-?\d{1,13})(?:/(\d{1,13}))?)?")

_EXAMPLE = "such as image:-1,0;action:0..15"


def parse_offsets(text: str) -> dict[str, Taken]:
    """The offsets of fields, by the name of the field or by another one, from the form in URLs.

    Raises
    ------
    BadParameter
    """
    found: dict[str, Taken] = {}
    for part in text.split(";"):
        names, colon, items = part.rpartition(":")
        name, equals, field = names.partition("=")
        if not colon or not name or (equals and not field):
            raise BadParameter(f"offsets={text!r:.300}: {part!r:.100} must be NAME:OFFSETS, {_EXAMPLE}")
        name = unquote(name)
        if name in found:
            raise BadParameter(f"offsets={text!r:.300}: {name!r} is named twice")
        found[name] = Taken(unquote(field) if equals else name, _checked(name, _parsed(name, items)))
    return found


def offsets_of(given: str | Mapping[str, Any]) -> dict[str, Taken]:
    """The offsets of fields, from the form in URLs, or from a dict: see `h5feed.options.WindowOptions`.

    Raises
    ------
    BadParameter
    """
    if isinstance(given, str):
        return parse_offsets(given)
    if not isinstance(given, Mapping):
        raise BadParameter(f"offsets={given!r:.300} must be a dict: {{'image': [-1, 0], 'action': range(16)}}")
    found: dict[str, Taken] = {}
    for name, value in given.items():
        field = name
        # In JSON, tuples become lists.
        if isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[0], str):
            field, value = value
        is_one = not isinstance(value, str) and hasattr(value, "__index__") and not hasattr(value, "__len__")
        try:
            if not is_one and len(value) > MAX_OFFSETS:
                raise _too_many(name)
            offsets = operator.index(value) if is_one else tuple(map(operator.index, value))
        except TypeError:
            raise BadParameter(
                f"offsets of {name!r}: {value!r:.100} must be an integer, or a list or range of integers"
            ) from None
        found[name] = Taken(field, _checked(name, offsets))
    if not found:
        raise BadParameter(f"offsets={given!r} names no field: leave it out, or give a dict by field name")
    return found


def renamed(options: Mapping[str, Any]) -> dict[str, str]:
    """The fields whose rows an order has under other names, too: field by name.

    Raises
    ------
    BadParameter
    """
    named = {} if options.get("offsets") is None else offsets_of(options["offsets"])
    return {name: own.field for name, own in named.items() if name != own.field}


def offsets_by_name(options: Mapping[str, Any], names: Iterable[str]) -> dict[str, Offsets]:
    """The offsets of fields, by their own names or by others, without those whose rows are the samples' own.

    Raises
    ------
    BadParameter
    """
    named = {} if options.get("offsets") is None else offsets_of(options["offsets"])
    length, rate = options.get("sequence_length"), int(options.get("sampling_rate") or 1)
    others = 0 if length is None else tuple(rate * step for step in range(min(int(length), MAX_OFFSETS)))
    every = {name: named[name].offsets if name in named else others for name in names}
    return {name: own for name, own in every.items() if own != 0}


def has_masks(options: Mapping[str, Any]) -> bool:
    """Whether batches of an order have masks: an end of episodes is padded."""
    return options.get("ends") not in (None, "drop")


def masks_of(options: Mapping[str, Any], fields: Iterable[str]) -> dict[str, str]:
    """The masks that batches of an order can have, by name, with the names that they belong to."""
    if not has_masks(options):
        return {}
    return {name + MASK: name for name in offsets_by_name(options, [*fields, *renamed(options)])}


def offsets_text(offsets: Mapping[str, Taken]) -> str:
    """The form in URLs, which is the same for equal offsets."""
    return ";".join(f"{_names(name, own.field)}:{_text(own.offsets)}" for name, own in sorted(offsets.items()))


def _names(name: str, field: str) -> str:
    return quote(name, safe="") if name == field else f"{quote(name, safe='')}={quote(field, safe='')}"


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
