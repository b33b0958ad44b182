"""Conditions that links of the pages carry, in the words of the API's ``where=``."""

from __future__ import annotations

from typing import Any

from ...catalog.dataset import Field
from ...filters.grammar import Condition, Operator, Value
from ...filters.intervals import Number, Scale
from ...filters.predicates import scale_of


def is_value(field: Field, value: Any) -> str:
    """The field has this value; its class's name says it where it has one."""
    names = field.class_names
    if names and isinstance(value, int) and 0 <= value < len(names):
        # Of two classes of the same name, the condition would mean the first.
        name = names[value]
        return _condition(field, "=", Value(name, quoted=True) if names.index(name) == value else _number(value))
    return _condition(field, "=", Value(value, quoted=True) if isinstance(value, str) else _number(value))


def is_within(field: Field, low: float, high: float, *, closed: bool) -> tuple[str, str]:
    """The field's number is from `low` to `high`, which belongs to it where that is `closed`.

    The bounds are written as numbers that the field can hold: of others, a condition would round them, perhaps past a
    value of the field, or to infinity.
    """
    scale = scale_of(field)
    first = _first_from(scale, low)
    if closed:
        last = scale.down(high)
        last = scale.below(last) if last > high else last
        return _condition(field, ">=", _number(first)), _condition(field, "<=", _number(last))
    return _condition(field, ">=", _number(first)), _condition(field, "<", _number(_first_from(scale, high)))


def _first_from(scale: Scale, bound: float) -> Number:
    """The least number of the field from `bound` on."""
    first = scale.up(bound)
    return scale.above(first) if first < bound else first


def _condition(field: Field, operator: Operator, value: Value) -> str:
    return str(Condition(field.name, operator, (value,)))


def _number(value: Any) -> Value:
    return Value(str(value).lower() if isinstance(value, bool) else repr(value))
