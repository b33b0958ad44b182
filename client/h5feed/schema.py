"""Validate JSON from a server before it is used.

The expected structure is given as types: `TypedDict`, lists, dicts, unions, literals, `Count` and `Number`. Additional
keys are ignored: they may come from a newer server.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from .errors import BadAnswer

T = TypeVar("T")

MAX_VALUES = 4_000_000
"""Maximum number of values in a JSON text: an empty list takes twenty times the memory of its two characters."""


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`."""

    least: float
    most: float
    name: str


Count = Annotated[int, Range(0, 2**63 - 1, "an integer, 0 or more")]
"""A count, position or size that fits into an int64."""

Number = Annotated[float, Range(-1.7e308, 1.7e308, "a finite number")]
"""An int or float that fits into a float64."""

_NAMES = {str: "a string", bool: "true or false", NoneType: "null"}


def read_json(text: bytes) -> Any:
    """Parse a JSON text.

    Raises
    ------
    ValueError
        The text is not JSON, is nested too deeply, or has more than `MAX_VALUES` values.
    """
    # Each value needs at least one of these characters.
    if len(text) > MAX_VALUES and text.count(b",") + text.count(b"[") + text.count(b"{") > MAX_VALUES:
        raise ValueError(f"it has more than {MAX_VALUES:,} values")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def checked(value: Any, kind: type[T], what: str) -> T:
    """Return `value` if it has the type `kind`.

    Parameters
    ----------
    what : str
        Name of the requested resource.

    Raises
    ------
    BadAnswer
        The message names the wrong item and what was expected.
    """
    try:
        check: _Check = _check_of(cast("Hashable", kind))
        check(value)
    except _Mismatch as wrong:
        raise BadAnswer(
            f"invalid {what} from the server: {wrong}. Is it an h5feed server of a compatible version?"
        ) from None
    return value  # type: ignore[no-any-return]


_Check = Callable[[Any], None]
"""Raises `_Mismatch`."""


class _Mismatch(Exception):
    def __init__(self, value: object, expected: str) -> None:
        super().__init__()
        self.path = ""
        self._value = value
        self._expected = expected

    def below(self, place: object) -> _Mismatch:
        """The same error, seen from the list or dict that contains the value."""
        own = f"[{place}]" if isinstance(place, int) else f".{place}"
        self.path = own + self.path
        return self

    def __str__(self) -> str:
        place = self.path.removeprefix(".") or "it"
        return f"{place} is {reprlib.repr(self._value)}, expected {self._expected}"


@cache
def _check_of(kind: Any) -> _Check:
    """The check for a type, created once because there may be many values."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda value: None
    if is_typeddict(kind):
        return _check_of_keys(kind)
    if origin is Annotated:
        return _check_of_range(*args)
    if origin in (Union, UnionType):
        return _check_of_union(args)
    if origin is Literal:
        return _check_of_literal(args)
    if origin is list:
        return _check_of_items(args[0])
    if origin is dict:
        return _check_of_values(_check_of(args[1]))
    return _check_of_type(NoneType if kind is None else kind)


def _check_of_type(kind: type) -> _Check:
    def check(value: Any) -> None:
        if not isinstance(value, kind):
            raise _Mismatch(value, _NAMES[kind])

    return check


def _types_of(base: type) -> set[type]:
    """The exact types of JSON numbers annotated as `base`; isinstance would also accept booleans."""
    return {int} if base is int else {int, float}


def _check_of_range(base: type, allowed: Range) -> _Check:
    types, least, most = _types_of(base), allowed.least, allowed.most

    def check(value: Any) -> None:
        # The range test is false for NaN.
        if type(value) not in types or not least <= value <= most:
            raise _Mismatch(value, allowed.name)

    return check


def _check_of_literal(allowed: tuple[Any, ...]) -> _Check:
    def check(value: Any) -> None:
        if not isinstance(value, str) or value not in allowed:
            raise _Mismatch(value, " or ".join(map(repr, allowed)))

    return check


def _check_of_union(kinds: tuple[Any, ...]) -> _Check:
    """The kinds have different JSON types, so the type of the value selects the check."""
    by_type: dict[type, _Check] = {}
    for kind in kinds:
        by_type.update(dict.fromkeys(_json_types(kind), _check_of(kind)))
    otherwise = _check_of([kind for kind in kinds if kind is not NoneType][-1])

    def check(value: Any) -> None:
        by_type.get(type(value), otherwise)(value)

    return check


def _json_types(kind: Any) -> set[type]:
    """The Python types of parsed JSON values of a kind."""
    origin = get_origin(kind) or kind
    if origin is Annotated:
        return _types_of(get_args(kind)[0])
    if origin is Literal:
        return {str}
    return {dict} if is_typeddict(kind) else {origin}


def _check_of_items(kind: Any) -> _Check:
    of_item = _check_of(kind)
    sound = _bulk_check_of_range(*get_args(kind)) if get_origin(kind) is Annotated else None

    def check(value: Any) -> None:
        if not isinstance(value, list):
            raise _Mismatch(value, "a list")
        if sound is None or not sound(value):
            _check_each(enumerate(value), of_item)

    return check


def _bulk_check_of_range(base: type, allowed: Range) -> Callable[[list[Any]], bool]:
    """A fast check that all numbers of a list are in a range: histograms have thousands of them."""
    types, least, most = _types_of(base), allowed.least, allowed.most

    def sound(values: list[Any]) -> bool:
        try:
            # No single absolute value exceeds their sum; a sum with NaN fails the comparison.
            return (
                types.issuperset(map(type, values))
                and sum(map(abs, values)) <= most
                and (least <= -most or not values or min(values) >= least)
            )
        except OverflowError:
            return False

    return sound


def _check_of_values(of_value: _Check) -> _Check:
    def check(value: Any) -> None:
        if not isinstance(value, dict):
            raise _Mismatch(value, "an object")
        _check_each(value.items(), of_value)

    return check


def _check_each(items: Iterable[tuple[object, Any]], check: _Check) -> None:
    for place, item in items:
        try:
            check(item)
        except _Mismatch as wrong:
            raise wrong.below(place) from None


def _check_of_keys(kind: Any) -> _Check:
    hints = get_type_hints(kind, include_extras=True)
    optional = {key for key, hint in hints.items() if get_origin(hint) is NotRequired}
    checks = {key: _check_of(get_args(hint)[0] if key in optional else hint) for key, hint in hints.items()}

    def check(value: Any) -> None:
        if not isinstance(value, dict):
            raise _Mismatch(value, "an object")
        try:
            for key, of_value in checks.items():
                if key in value:
                    of_value(value[key])
                elif key not in optional:
                    break
            else:
                return
        except _Mismatch as wrong:
            raise wrong.below(key) from None
        raise _Mismatch(value, f"an object with {key!r}")

    return check
