"""Applies conditions to the fields of a dataset: sets of numbers, or comparisons of text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.errors import BadParameter, FieldNotFound, UnsupportedField
from h5feed.suggestions import did_you_mean

from ..catalog.dataset import Dataset, Field
from .grammar import Condition, InvalidCondition, Range, Value, parse
from .intervals import Floats, Integers, Interval, Number, Numbers, Scale

Bools = npt.NDArray[np.bool_]

_SHOWN_CLASSES = 20


@dataclass(frozen=True)
class Predicate:
    """A condition on the values of one field.

    Attributes
    ----------
    field : Field
    text : str
        Canonical text: equal for conditions with the same meaning. A condition of the grammar, but possibly longer than
        allowed.
    holds : callable
        Takes (n,) values as read, or text cut to `width` bytes; returns (n,) bool.
    width : int
        Number of leading bytes of a text that are compared; 0 for numbers.
    """

    field: Field
    text: str
    holds: Callable[[npt.NDArray[Any]], Bools]
    width: int = 0


def bind(dataset: Dataset, where: Sequence[str]) -> tuple[Predicate, ...]:
    """The predicates that all must hold, without duplicates, sorted by their text.

    Raises
    ------
    BadParameter
        A condition does not follow the grammar, its field does not exist or does not have one value per row, or a value
        does not fit the field.
    """
    numbers: dict[str, tuple[Field, Scale, Numbers]] = {}
    found: dict[str, Predicate] = {}
    for condition, field in _bound(dataset, where):
        if field.is_text:
            texts = _of_text(field, condition)
            found[texts.text] = texts
            continue
        scale = scale_of(field)
        wanted = _numbers(field, condition, scale)
        if field.name in numbers:
            # So that the field is read once for all of its conditions.
            wanted = wanted.common(numbers[field.name][2], scale)
        numbers[field.name] = field, scale, wanted
    for field, scale, wanted in numbers.values():
        predicate = _of_numbers(field, scale, wanted)
        found[predicate.text] = predicate
    return tuple(found[text] for text in sorted(found))


def _bound(dataset: Dataset, where: Sequence[str]) -> Iterator[tuple[Condition, Field]]:
    for text in where:
        try:
            condition = parse(text)
        except InvalidCondition as error:
            raise BadParameter(f"where: {error}") from None
        try:
            field = dataset.field(condition.field)
        except (FieldNotFound, UnsupportedField) as error:
            raise _refusal(condition, error.detail) from None
        if (field.is_ragged and not field.is_text) or field.images is not None or math.prod(field.sample_shape) != 1:
            is_list = field.is_ragged and not field.is_sparse
            what = "is a list" if is_list else f"has shape {' × '.join(map(str, field.sample_shape))}"
            raise _refusal(condition, f"conditions need one number or text per row, but a row of {field.name!r} {what}")
        if not field.is_text and field.dtype.kind not in "biuf":
            raise _refusal(condition, f"{field.name!r} holds {field.type_name}, which cannot be compared")
        yield condition, field


def _refusal(condition: Condition, why: str) -> BadParameter:
    return BadParameter(f"where: {InvalidCondition(str(condition), why)}")


def scale_of(field: Field) -> Scale:
    """The values that a field of numbers can have."""
    if field.column.is_bfloat16:
        return Floats(np.dtype(np.float32), is_bfloat16=True)
    return Floats(field.dtype) if field.dtype.kind == "f" else Integers(field.dtype)


def _of_numbers(field: Field, scale: Scale, wanted: Numbers) -> Predicate:
    items: list[Value | Range] = [
        _written(low) if low == high else Range(_bound_of(low, scale.least), _bound_of(high, scale.most))
        for low, high in wanted.intervals
    ]
    nan = [Value("nan")]
    everything: list[Value | Range] = [Range(None, None)]
    if items or wanted.nan:
        text = Condition(field.name, "in", (*items, *(nan if wanted.nan else ())))
    else:
        text = Condition(field.name, "not in", (*everything, *(nan if scale.has_nan else ())))

    def holds(values: npt.NDArray[Any]) -> Bools:
        return wanted.holds(field.column.widened(values), scale)

    return Predicate(field, str(text), holds)


def _written(value: Number) -> Value:
    return Value(repr(value))


def _bound_of(value: Number, end: Number) -> Value | None:
    return None if value == end else _written(value)


def _numbers(field: Field, condition: Condition, scale: Scale) -> Numbers:
    """The numbers that meet a condition."""
    if condition.operator == "startswith":
        raise _refusal(condition, f"{field.name!r} holds {field.type_name}: 'startswith' is for text")

    def number(value: Value) -> Number:
        return _number(field, condition, value, scale)

    if condition.operator in ("in", "not in", "=", "!="):
        wanted = [_interval(condition, item, number, scale) for item in condition.items]
        found = Numbers.of(scale, (one for one in wanted if one is not None), any(one is None for one in wanted))
        return found.inverted(scale) if condition.operator in ("not in", "!=") else found
    (item,) = condition.items
    assert isinstance(item, Value)
    bound = number(item)
    if _is_nan(bound):
        raise _refusal(condition, "nothing is less or greater than NaN: use = nan or != nan")
    interval: Interval = {
        "<": (scale.least, scale.below(scale.up(bound))),
        "<=": (scale.least, scale.down(bound)),
        ">": (scale.above(scale.down(bound)), scale.most),
        ">=": (scale.up(bound), scale.most),
    }[condition.operator]
    return Numbers.of(scale, [interval])


def _interval(
    condition: Condition, item: Value | Range, number: Callable[[Value], Number], scale: Scale
) -> Interval | None:
    """The lowest and highest value of an item; None for NaN."""
    if isinstance(item, Value):
        value = number(item)
        return None if _is_nan(value) else (scale.up(value), scale.down(value))
    low, high = (None if bound is None else number(bound) for bound in (item.low, item.high))
    if any(bound is not None and _is_nan(bound) for bound in (low, high)):
        raise _refusal(condition, "NaN is no bound of a range")
    if low is not None and high is not None and low > high:
        raise _refusal(condition, f"{item} is empty: {item.low} is greater than {item.high}")
    return scale.least if low is None else scale.up(low), scale.most if high is None else scale.down(high)


def _number(field: Field, condition: Condition, value: Value, scale: Scale) -> Number:
    """The number given by a value, directly or as a class name."""
    number = value.number
    if number is None:
        names = field.class_names
        if names is None:
            what = "is in quotes, which make it text" if value.is_quoted_number else "is not a number"
            shown = repr(value.text[:_MAX_NAME])
            raise _refusal(condition, f"{field.name!r} holds numbers ({field.type_name}), but {shown} {what}")
        if value.text not in names:
            said = did_you_mean(value.text, names, classes_shown(names))
            raise _refusal(condition, f"{field.name!r} has no class {value.text[:_MAX_NAME]!r}: {said}")
        return names.index(value.text)
    if _is_nan(number) and not scale.has_nan:
        raise _refusal(condition, f"{field.name!r} holds {field.type_name}, which is never NaN")
    return number


def classes_shown(names: Sequence[str]) -> str:
    """The class names of a field, for a message."""
    return f"the classes are {', '.join(names[:_SHOWN_CLASSES])}{' …' if len(names) > _SHOWN_CLASSES else ''}"


def _is_nan(number: Number) -> bool:
    # math.isnan refuses integers that are too large for a float.
    return number != number


_MAX_NAME = 100
"""Maximum characters of a name in a message."""


def _of_text(field: Field, condition: Condition) -> Predicate:
    """A comparison of the UTF-8 bytes of text, whose order is that of the code points."""
    given: Mapping[Value, bytes] = {value: _encoded(condition, value) for value in _values(condition)}
    ranges = [item for item in condition.items if isinstance(item, Range)]
    for item in ranges:
        if item.low is not None and item.high is not None and given[item.low] > given[item.high]:
            raise _refusal(condition, f"{item} is empty: {item.low} comes after {item.high}")
    # For text, 1 and "1" are the same value.
    items = sorted(map(_as_text, condition.items), key=str)
    operator = {"=": "in", "!=": "not in"}.get(condition.operator, condition.operator)
    text = str(Condition(field.name, operator, tuple(items)))  # type: ignore[arg-type]
    singles = np.unique(np.array([given[item] for item in condition.items if isinstance(item, Value)], "S"))
    bounds = [tuple(None if one is None else given[one] for one in (item.low, item.high)) for item in ranges]
    # One more byte than the longest value: enough to tell longer texts from equal ones.
    width = 1 + max(map(len, given.values()), default=0)

    def holds(values: npt.NDArray[Any]) -> Bools:
        if condition.operator == "startswith":
            prefix = singles[0]
            # numpy has no dtype for empty text.
            return np.asarray(values.astype(f"S{len(prefix)}") == prefix) if prefix else np.ones(len(values), np.bool_)
        if condition.operator in _COMPARISONS:
            return np.asarray(_COMPARISONS[condition.operator](values, singles[0]))
        found = _is_one_of(values, singles)
        for low, high in bounds:
            inside = np.ones(len(values), np.bool_) if low is None else values >= np.bytes_(low)
            found |= inside if high is None else inside & (values <= np.bytes_(high))
        return ~found if operator == "not in" else found

    return Predicate(field, text, holds, width)


def _is_one_of(values: npt.NDArray[Any], singles: npt.NDArray[Any]) -> Bools:
    """Whether each text is one of `singles`, which are sorted."""
    if len(singles) <= _FEW:
        found = np.zeros(len(values), np.bool_)
        for text in singles:
            found |= values == text
        return found
    places = np.minimum(np.searchsorted(singles, values), len(singles) - 1)
    return np.asarray(singles[places] == values)


_FEW = 4
"""Maximum number of texts to compare one by one, which is then faster than a binary search."""

_COMPARISONS: Mapping[str, Callable[[Any, Any], Any]] = {
    "<": np.less,
    "<=": np.less_equal,
    ">": np.greater,
    ">=": np.greater_equal,
}


def _values(condition: Condition) -> Iterator[Value]:
    for item in condition.items:
        yield from [item] if isinstance(item, Value) else filter(None, (item.low, item.high))


def _encoded(condition: Condition, value: Value) -> bytes:
    if "\0" in value.text:
        raise _refusal(condition, "text has no character \\u0000")
    return value.text.encode()


def _as_text(item: Value | Range) -> Value | Range:
    """The same item with quoted values."""
    if isinstance(item, Value):
        return Value(item.text, quoted=True)
    low, high = (None if bound is None else Value(bound.text, quoted=True) for bound in (item.low, item.high))
    return Range(low, high)
